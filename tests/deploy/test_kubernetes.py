"""The Kubernetes manifests: accepted by the schema, and run in namespaces with their users, modes and mounts."""

import contextlib
import errno
import http.client
import json
import os
import re
import ssl
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from tests import needs
from tests.deploy import pods
from tests.deploy.pods import Pod
from tests.harness.certificates import SERVER as SERVER_PURPOSE
from tests.harness.certificates import Authority
from tests.harness.ports import free_port
from tests.harness.tokens import TokenIssuer
from tests.harness.waiting import wait_until
from tests.minikms_auditor.receivers import TOKEN, Collector

SERVER, KEY_SERVICE = "progressdb", "minikms"
API_KEY = "backend-key"
SETTINGS = f"security: {{api_keys: {{backend: [{API_KEY}], admin: [admin-key]}}}}\n".encode()
CLUSTER = "https://kubernetes.default.svc.cluster.local"
SECRET_TEXT = "what only members of the thread read"


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        headers = {"X-API-Key": API_KEY, "X-User-ID": "ada"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def page_of(port: int) -> str:
    """The metrics there; empty while nothing listens."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            connection.request("GET", "/metrics")
        except ConnectionRefusedError:
            return ""
        return connection.getresponse().read().decode()


class Conversation:
    """One thread on the server of a pod, and what must be read back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.texts: list[str] = []

    def say(self) -> int:
        text = f"{SECRET_TEXT} {len(self.texts)}"
        message = {"thread": "t", "author": "ada", "role": "user", "body": {"text": text}}
        status, _ = ask(self._port, "POST", "/v1/messages", message)
        if status == 200:
            self.texts.append(text)
        return status

    def is_whole(self) -> bool:
        status, answer = ask(self._port, "GET", "/v1/threads/t/messages?author=ada")
        return status == 200 and [message["body"]["text"] for message in answer["messages"]] == self.texts


def status_of(pod: Pod) -> Any:
    done = pod.run(KEY_SERVICE, "minikms", "status", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def audited(pod: Pod) -> list[dict[str, Any]]:
    *lines, _ = (pod.volumes.path("keys") / "data" / "minikms-audit.log").read_text().split("\n")
    return [json.loads(line)["event"] for line in lines]


def holds(directory: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in directory.rglob("*") if path.is_file())


def run_a_conversation(base: Path, rootfs: Path | None = None, *, seccomp: bool = False) -> None:
    """One pod, from its first start over a seal, an unseal and a restart of each container."""
    documents = pods.build("sidecar", "prometheus", *(["seccomp"] if seccomp else []))
    pod = pods.pod_of(documents)
    port, metrics_port = free_port(), free_port()
    [policy] = [d["data"]["policy.toml"] for d in documents if d["kind"] == "ConfigMap"]
    objects = {
        "secret/minikms-root-key": {"minikms.key": os.urandom(32).hex().encode() + b"\n"},
        "secret/progressdb-config": {"progressdb.yaml": SETTINGS},
        "configMap/minikms-policy": {"policy.toml": policy.encode()},
    }
    environ = {"PROGRESSDB_ADDR": f"127.0.0.1:{port}", "PORT_8080": str(port), "PORT": str(metrics_port)}
    with Pod(base, pod, objects, rootfs=rootfs, environ=environ) as running:
        for name in running.order:
            running.start(name)
        assert running.order[0] == KEY_SERVICE
        for name in (KEY_SERVICE, SERVER):
            wait_until(partial(running.probe, name, "readinessProbe"))
        talk = Conversation(port)
        assert [talk.say() for _ in range(3)] == [200] * 3
        assert talk.is_whole()
        assert not holds(running.volumes.path("store"), SECRET_TEXT)
        check_hardening(running)
        check_separation(running)
        wait_until(lambda: "\nminikms_up 1\n" in page_of(metrics_port))

        # Sealed: both live and neither is ready, also after a crash of the key service.
        assert running.run(KEY_SERVICE, "minikms", "seal", "--yes").returncode == 0
        assert talk.say() == 503
        running.kill(KEY_SERVICE)
        running.start(KEY_SERVICE)
        for name in (KEY_SERVICE, SERVER):
            assert running.probe(name, "livenessProbe")
            wait_until(partial(running.fails, name, "readinessProbe"))
        unsealed = running.run(KEY_SERVICE, "minikms", "unseal", "--from-source")
        assert unsealed.returncode == 0, unsealed.stderr
        wait_until(lambda: talk.say() == 200)
        assert talk.is_whole()

        # The commands of docs/containers.md.
        stored = running.run(SERVER, "progressdb", "backup", "create", "monday", "--store-only")
        assert stored.returncode == 0, running.log(SERVER).read_text()
        archived = running.run(KEY_SERVICE, "minikms", "backup", "create", "/var/lib/minikms/monday.minikms")
        assert archived.returncode == 0, archived.stderr
        doctor = running.run(KEY_SERVICE, "minikms", "doctor")
        assert doctor.returncode == 0, doctor.stdout

        # Each container restarts alone.
        assert running.stop(KEY_SERVICE) == 0
        running.start(KEY_SERVICE)
        wait_until(talk.is_whole)
        assert running.stop(SERVER) == 0
        running.start(SERVER)
        wait_until(lambda: running.probe(SERVER, "readinessProbe"))
        assert talk.say() == 200
        assert talk.is_whole()
        lines = audited(running)
        assert {line["type"] for line in lines} >= {"create_dek", "encrypt_batch", "seal", "unseal"}
        assert not [line for line in lines if line["type"] == "peer"]
        by_server = [line for line in lines if line["actor"] == "peer_uid:10002"]
        assert by_server and not any("pid" in line for line in by_server)


def check_hardening(running: Pod) -> None:
    """Everything but the lock of all memory, as the manifests say."""
    status = status_of(running)
    assert status["memory"]["arena"] == "memfd_secret"
    assert [measure["measure"] for measure in status["hardening"] if not measure["in_force"]] == ["memory_locked"]


def check_separation(running: Pod) -> None:
    """The server's container reaches the socket, and nothing else of the key service. Neither writes its own root."""
    attempts = """
import os
def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__ + (str(error.errno) if type(error) is OSError else "")
    return "allowed"
print(
    attempt(lambda: os.stat("/etc/minikms/root-key/minikms.key")),
    attempt(lambda: os.listdir("/var/lib/minikms")),
    attempt(lambda: os.rename("/run/minikms/private", "/run/minikms/other")),
    attempt(lambda: open("/new", "w")),
)
"""
    done = running.run(SERVER, "python3", "-c", attempts)
    root_key, data, *writes = done.stdout.split()
    assert root_key == "FileNotFoundError", done.stderr
    assert data in ("FileNotFoundError", "PermissionError")  # the image has an empty directory there
    assert writes == [f"OSError{errno.EROFS}"] * 2
    private = running.volumes.path("kms-socket") / "private"
    assert (private.stat().st_mode & 0o777, private.stat().st_uid, private.stat().st_gid) == (0o750, 10001, 10000)


def run_elsewhere(base: Path, rootfs: Path | None = None) -> None:
    """Two pods: a message server with a token of its service account, and the key service with its gateway."""
    host, port, gateway_port, metrics_port = "minikms.minikms.svc", free_port(), free_port(), free_port()
    authority, issuer = Authority("cluster CA"), TokenIssuer(CLUSTER, algorithm="RS256")
    own = authority.issue(dns=[host], extended=[SERVER_PURPOSE])
    documents = pods.build("gateway")
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    objects = {
        "secret/minikms-root-key": {"minikms.key": os.urandom(32).hex().encode() + b"\n"},
        "configMap/minikms-policy": {name: text.encode() for name, text in maps["minikms-policy"].items()},
        "configMap/minikms-gateway": {
            name: text.replace("0.0.0.0:8443", f"127.0.0.1:{gateway_port}")
            .replace("0.0.0.0:9103", f"127.0.0.1:{metrics_port}")
            .encode()
            for name, text in maps["minikms-gateway"].items()
        },
        "configMap/minikms-issuer-keys": {"jwks.json": issuer.jwks},
        "secret/minikms-gateway-tls": {"tls.crt": own.chain, "tls.key": own.key},
    }
    mine = {
        "secret/progressdb-config": {"progressdb.yaml": SETTINGS},
        "configMap/minikms-gateway-ca": {"ca.crt": authority.pem},
        "token": {"minikms": service_account_token(issuer)},
    }
    environ = {
        "PROGRESSDB_ADDR": f"127.0.0.1:{port}",
        "PORT_8080": str(port),
        "PROGRESSDB_KMS_URL": f"https://{host}:{gateway_port}",
    }
    for name in ("keys", "server"):
        (base / name).mkdir()
    with (
        Pod(
            base / "keys",
            pods.pod_of(documents),
            objects,
            rootfs=rootfs,
            environ={"PORT_8443": str(gateway_port), "PORT_9103": str(metrics_port)},
        ) as kms,
        Pod(
            base / "server", pods.pod_of(pods.build("remote")), mine, rootfs=rootfs, environ=environ, hosts=[host]
        ) as own_pod,
    ):
        for name in kms.order:
            kms.start(name)
        wait_until(partial(kms.probe, "gateway", "livenessProbe"))
        own_pod.start(SERVER)
        wait_until(partial(own_pod.probe, SERVER, "readinessProbe"))
        talk = Conversation(port)
        assert talk.say() == 200
        assert talk.is_whole()
        assert not holds(own_pod.volumes.path("store"), SECRET_TEXT)
        check_hardening(kms)
        [made] = [line for line in audited(kms) if line["type"] == "create_dek"]
        assert made["actor"] == f"oidc:{CLUSTER}|system:serviceaccount:progressdb:progressdb"
        assert made["facts"]["via"] == "peer_uid:10003"

        # The kubelet replaces the links of volumes: another policy, another certificate, another token.
        policy = objects["configMap/minikms-policy"]
        policy["policy.toml"] += b"# changed\n"
        kms.refresh("policy")
        reloaded = kms.run(KEY_SERVICE, "minikms", "policy", "reload")
        assert reloaded.returncode == 0, reloaded.stderr
        assert status_of(kms)["policy"]["generation"] == 2
        renewed = authority.issue(dns=[host], extended=[SERVER_PURPOSE])
        objects["secret/minikms-gateway-tls"] |= {"tls.crt": renewed.chain, "tls.key": renewed.key}
        kms.refresh("gateway")
        wait_until(lambda: served(gateway_port) == renewed.chain.split(b"-----END", 1)[0])
        mine["token"]["minikms"] = service_account_token(issuer)
        own_pod.refresh("gateway")
        assert kms.stop("gateway") == 0
        kms.start("gateway")
        wait_until(lambda: talk.say() == 200)
        assert talk.is_whole()


def accept_the_log(running: Pod, state: Path, config: str) -> None:
    """As an operator does. The auditor publishes a tree then."""
    status = state / "status.json"
    wait_until(lambda: status.exists() and '"public_key"' in status.read_text())
    shown = running.run("auditor", "minikms-auditor", "accept-log", config)
    [key] = set(re.findall(r"[A-Za-z0-9+/]{43}=", shown.stdout))
    accepted = running.run("auditor", "minikms-auditor", "accept-log", key, config)
    assert accepted.returncode == 0, accepted.stderr
    wait_until((state / "tree" / "checkpoint").exists)


def test_an_auditor_in_the_pod_publishes_trees_of_the_log_and_sends_it(public: Path) -> None:
    """The overlay `siem`, which has the overlay `auditor` in it. It waits until an operator accepts the log."""
    needs.interpreter_for(10001)
    authority, collector_host = Authority("logging"), "collector.logging.svc"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        *authority.issue(dns=[collector_host], extended=[SERVER_PURPOSE]).write(public, "collector")
    )
    with Collector(context) as collector:
        _check_auditor(public, authority, collector_host, collector)


def _check_auditor(public: Path, authority: Authority, collector_host: str, collector: Collector) -> None:
    documents = pods.build("siem")
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    port = free_port()
    objects = {
        "secret/minikms-root-key": {"minikms.key": os.urandom(32).hex().encode() + b"\n"},
        "secret/progressdb-config": {"progressdb.yaml": SETTINGS},
    } | {
        f"configMap/{name}": {file: text.encode() for file, text in maps[name].items()}
        for name in ("minikms-policy", "minikms-auditor")
    }
    objects["secret/minikms-siem"] = {"token": TOKEN.encode(), "ca.crt": authority.pem}
    auditor_toml = objects["configMap/minikms-auditor"]["auditor.toml"]
    collector_port = collector.url.rpartition(":")[2].encode()
    objects["configMap/minikms-auditor"]["auditor.toml"] = auditor_toml.replace(b":8443", b":" + collector_port)
    config = "--config=/etc/minikms/auditor/..data/auditor.toml"
    environ = {"PROGRESSDB_ADDR": f"127.0.0.1:{port}", "PORT_8080": str(port)}
    with Pod(public, pods.pod_of(documents), objects, environ=environ, hosts=[collector_host]) as running:
        for name in running.order:
            running.start(name)
        state = running.volumes.path("auditor-state") / "state"
        talk = Conversation(port)
        assert talk.say() == 200
        accept_the_log(running, state, config)
        assert running.run("auditor", "minikms-auditor", "checkpoint", config).returncode == 0
        wait_until(lambda: any('"operation":"create_dek"' in line.decode() for line in collector.lines))
        assert collector.requests[0][1]["Authorization"] == f"Bearer {TOKEN}"
        assert running.stop("auditor") == 0
        running.start("auditor")
        position = status_of(running)["audit"]["position"]
        assert position["origin"] == "progressdb.progressdb.svc/audit"
        log = running.volumes.path("audit") / "log"
        assert (log.stat().st_mode & 0o7777, log.stat().st_uid, log.stat().st_gid) == (0o2750, 10001, 10000)


def service_account_token(issuer: TokenIssuer) -> bytes:
    """As the API server makes it for a projected volume."""
    now = int(time.time())
    claims = {
        "aud": ["minikms"],
        "exp": now + 3607,
        "iat": now,
        "iss": issuer.issuer,
        "jti": str(uuid.uuid4()),
        "kubernetes.io": {
            "namespace": "progressdb",
            "node": {"name": "node-1", "uid": str(uuid.uuid4())},
            "pod": {"name": "progressdb-0", "uid": str(uuid.uuid4())},
            "serviceaccount": {"name": "progressdb", "uid": str(uuid.uuid4())},
        },
        "nbf": now,
        "sub": "system:serviceaccount:progressdb:progressdb",
    }
    return issuer.signed({"alg": "RS256", "kid": issuer.kid}, json.dumps(claims).encode()).encode()


def served(port: int) -> bytes:
    """The certificate that the gateway shows, in PEM without its last line."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=60).encode().split(b"-----END", 1)[0]


def test_a_server_elsewhere_proves_itself_with_its_service_account(public: Path) -> None:
    needs.interpreter_for(10001)
    run_elsewhere(public)


def test_a_pod_serves_a_conversation_over_seals_and_restarts(public: Path) -> None:
    needs.interpreter_for(10001)
    run_a_conversation(public)
