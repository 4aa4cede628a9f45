"""What the files for containers say, without running them."""

import json

import pytest

from minikms.memory import seccomp
from minikms.policy.rules import parse_policy
from tests import needs
from tests.deploy import pods

OVERLAYS = sorted(path.name for path in (pods.KUBERNETES / "overlays").iterdir())
COMPONENTS = ["prometheus", "sealed", "seccomp"]
OLDEST_VERSION = "1.29"
"""The first one whose sidecars (init containers that are restarted) need no feature gate."""

CLAIMS_OF_0_2 = {"progressdb-store": "20Gi", "minikms-keys": "5Gi", "minikms-audit": "20Gi", "minikms-auditor": "5Gi"}


def ending(pod: pods.Document) -> list[pods.Document]:
    """The init containers that prepare volumes, and end."""
    return [container for container in pod.get("initContainers", ()) if container.get("restartPolicy") != "Always"]


@pytest.mark.parametrize(
    ("overlay", "components"),
    [*((overlay, []) for overlay in OVERLAYS), *((overlay, COMPONENTS) for overlay in ("gateway", "sidecar"))],
)
def test_the_schema_of_kubernetes_accepts_every_overlay(overlay: str, components: list[str]) -> None:
    validate = needs.library("kubernetes_validate")
    for document in pods.build(overlay, *components):
        if document["kind"] == "PodMonitor":  # of the Prometheus Operator
            continue
        for version in (OLDEST_VERSION, validate.latest_version()):
            validate.validate(document, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_upgrade_changes_nothing_that_kubernetes_keeps(overlay: str) -> None:
    """The fields that a StatefulSet and a claim refuse to change are those of 0.2.0. No claim shrinks."""
    documents = pods.build(overlay)
    [workload] = [document for document in documents if document["kind"] == "StatefulSet"]
    name = workload["metadata"]["name"]
    spec = {"serviceName": name, "selector": {"matchLabels": {"app.kubernetes.io/name": name}}}
    kept = ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates")
    assert name == ("minikms" if overlay == "gateway" else "progressdb")
    assert {field: workload["spec"][field] for field in kept if field in workload["spec"]} == spec
    for claim in [document for document in documents if document["kind"] == "PersistentVolumeClaim"]:
        size = {"resources": {"requests": {"storage": CLAIMS_OF_0_2[claim["metadata"]["name"]]}}}
        assert claim["spec"] == {"accessModes": ["ReadWriteOncePod"]} | size


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_of_the_pods_has_its_own_user_and_no_rights(overlay: str) -> None:
    """As the Pod Security Standard `restricted` asks, and no container as another one's user."""
    documents = pods.build(overlay)
    [namespace] = [document for document in documents if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = pods.pod_of(documents)
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    lasting = [container for container in containers if container not in ending(pod)]
    contexts = [container["securityContext"] for container in containers]
    for context in contexts:
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["runAsUser"] not in (0, pod["securityContext"]["fsGroup"])
    assert len({container["securityContext"]["runAsUser"] for container in lasting}) == len(lasting)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_key_service_mounts_keys_and_root_key(overlay: str) -> None:
    pod = pods.pod_of(pods.build(overlay))
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        if container["name"] == "minikms":
            assert mounted >= {"keys", "root-key", "kms-socket"}
        else:
            assert not mounted & {"keys", "root-key"}


def test_compose_accepts_its_file_and_shares_the_socket_only() -> None:
    services = pods.composed()["services"]
    sources: dict[str, set[str]] = {
        name: {volume["source"] for volume in service["volumes"]} for name, service in services.items()
    }
    assert sources["minikms"] & sources["progressdb"] == {"kms-socket"}
    assert sources["minikms"] & sources["gateway"] == {"kms-socket"}
    assert sources["minikms"] & sources["auditor"] == {"kms-socket", "audit"}
    writable = {volume["source"] for volume in services["auditor"]["volumes"] if not volume.get("read_only")}
    assert writable == {"auditor-state"}
    assert not {secret["source"] for secret in services["minikms"]["secrets"]} & {
        secret["source"] for secret in services["progressdb"]["secrets"]
    }


def test_compose_gives_each_container_its_own_user_and_no_rights() -> None:
    services = pods.composed()["services"]
    assert len({service["user"] for service in services.values()}) == len(services)
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
    key_service = services["minikms"]
    assert key_service["network_mode"] == "none"
    assert key_service["ulimits"]["memlock"] == {"single": -1} or key_service["ulimits"]["memlock"] == -1
    [profile] = [option.partition("=")[2] for option in key_service["security_opt"] if option.startswith("seccomp=")]
    assert (pods.COMPOSE.parent / profile).resolve() == pods.SECCOMP


def test_compose_and_kubernetes_name_the_same_users() -> None:
    users = {name: service["user"].partition(":")[0] for name, service in pods.composed()["services"].items()}
    for overlay in OVERLAYS:
        pod = pods.pod_of(pods.build(overlay))
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            if container not in ending(pod):
                assert users[container["name"]] == str(container["securityContext"]["runAsUser"])


def test_the_filter_of_the_key_service_permits_its_own_hardening() -> None:
    rules = json.loads(pods.SECCOMP.read_text())
    [allowed] = [set(rule["names"]) for rule in rules["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    assert rules["defaultAction"] == "SCMP_ACT_ERRNO"
    assert allowed >= {"memfd_secret", "landlock_restrict_self", "seccomp", "prctl", "execve"}
    assert not allowed & set(seccomp.DENIED)


def test_the_policies_of_the_manifests_are_valid() -> None:
    found = list((pods.PROJECT / "deploy").glob("*/**/policy.toml"))
    assert len(found) >= 2
    for path in found:
        parse_policy(path.read_bytes())
