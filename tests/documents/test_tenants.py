"""The commands of docs/tenants.md for two tenants: each is served, alone, and reaches nothing of the other."""

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from minikms.api.errors import ForbiddenError
from minikms.client import Client
from tests import needs
from tests.deploy import restricted
from tests.documents.machine import PROJECT, Machine, blocks, machine
from tests.harness.aws_kms import AwsKms, aws_kms
from tests.harness.ports import free_ports
from tests.harness.unix_http import unix_request
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign

ONCE, ADD, MOVE, METRICS, REMOVE = blocks(PROJECT / "docs" / "tenants.md")
TENANTS = ("acme", "bolt")
PROGRAMS = ("minikms", "minikms-unlock", "minikms-metrics", "progressdb")
LEASE_S = 30
"""The shortest one."""
WAIT_S_MAX = 120.0
USERS = tuple(f"{program}-{tenant}" for tenant in TENANTS for program in PROGRAMS)


def of(tenant: str, text: str) -> str:
    """What the page says of `acme`."""
    return text.replace("acme", tenant)


class Tenants:
    """A machine with two tenants, whose root keys are in AWS KMS."""

    def __init__(self, made: Machine, aws: AwsKms) -> None:
        self.made, self.aws = made, aws
        self.ports = dict(zip(TENANTS, free_ports(len(TENANTS)), strict=True))
        self.keys = {tenant: aws.new_key() for tenant in TENANTS}
        made.environ |= aws.environ
        made.do("mkdir -p /etc/progressdb deploy")
        made.do(ONCE)
        made.do(f"sed s/uid:0/uid:{os.geteuid()}/ {PROJECT}/deploy/policy.toml > deploy/policy.toml")
        for tenant, port in self.ports.items():
            made.do(of(tenant, ADD).replace("PORT=8081", f"PORT={port}"))
            settings = "".join(f"{name}={value}\n" for name, value in aws.environ.items())
            made.at(f"/etc/progressdb-{tenant}/unlock/unlock.env").write_text(settings)
            made.do(f"chmod 600 /etc/progressdb-{tenant}/unlock/unlock.env")
            move = of(tenant, MOVE).replace("SOURCE", f"aws-kms:{self.keys[tenant]}")
            made.do(move.replace("lease=300", f"lease={LEASE_S}"))

    def store(self, tenant: str, text: str) -> int:
        """The status of the answer of a tenant's message server, which stores a message."""
        settings = self.made.at(f"/etc/progressdb-{tenant}/progressdb.env").read_text()
        key = dict(line.split("=", 1) for line in settings.splitlines())["PROGRESSDB_API_BACKEND_KEYS"]
        url = f"http://127.0.0.1:{self.ports[tenant]}/v1/messages"
        body = json.dumps({"thread": "t", "author": "ada", "body": {"text": text}}).encode()
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(urllib.request.Request(url, body, {"X-API-Key": key}), timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def two() -> Iterator[Tenants]:
    needs.root()
    with machine(users=USERS) as made, aws_kms(made.base) as aws:
        yield Tenants(made, aws)


def test_a_tenant_that_is_sealed_leaves_the_other_serving(two: Tenants) -> None:
    assert {two.store(tenant, "before") for tenant in TENANTS} == {200}
    of_acme = "--socket /run/minikms-acme/minikms.sock"
    two.made.do(f"minikms seal --yes {of_acme}")
    assert (two.store("acme", "sealed"), two.store("bolt", "sealed")) == (503, 200)
    two.made.do(f"minikms unseal --from-source {of_acme}")
    wait_until(lambda: two.store("acme", "after") == 200)


def reached(made: Machine, tenant: str) -> list[str]:
    """What of a tenant this process can open, connect to or send a signal."""
    keys, run = f"/var/lib/progressdb-{tenant}/minikms", f"/run/minikms-{tenant}"
    files = [f"{keys}/{file}" for file in ("keyring.json", "minikms-audit.log", "kms-deks")]
    files += [f"/etc/progressdb-{tenant}/{file}" for file in ("progressdb.env", "unlock/unlock.env")]
    files += [keys, run, *(f"/var/lib/progressdb-{tenant}/{directory}" for directory in ("db", "unlock"))]
    attempts: dict[str, Callable[[], object]] = {path: partial(os.open, made.at(path), os.O_RDONLY) for path in files}
    with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_UNIX) as asking:
        attempts["socket"] = partial(client.connect, str(made.at(f"{run}/minikms.sock")))
        unlock = made.at(f"/run/minikms-unlock-{tenant}/unlock.sock")
        attempts["socket of the unlock service"] = partial(asking.connect, str(unlock))
        for name in ("minikms", "progressdb"):
            pid = made.pid(f"{name}@{tenant}")
            attempts[f"memory of {name}"] = partial(os.open, f"/proc/{pid}/mem", os.O_RDONLY)
            attempts[f"signal to {name}"] = partial(os.kill, pid, 0)
        found = []
        for what, attempt in attempts.items():
            with contextlib.suppress(PermissionError):
                attempt()
                found.append(what.replace(tenant, "TENANT"))
    return found


OWN = {
    "minikms": [
        "/var/lib/progressdb-TENANT/minikms/keyring.json",
        "/var/lib/progressdb-TENANT/minikms/minikms-audit.log",
        "/var/lib/progressdb-TENANT/minikms/kms-deks",
        "/var/lib/progressdb-TENANT/minikms",
        "/run/minikms-TENANT",
        "socket",
        "socket of the unlock service",
        "signal to minikms",
    ],
    "minikms-unlock": ["/var/lib/progressdb-TENANT/unlock"],
    "progressdb": [
        "/run/minikms-TENANT",
        "/var/lib/progressdb-TENANT/db",
        "socket",
        "socket of the unlock service",
        "memory of progressdb",
        "signal to progressdb",
    ],
}
"""What each user reaches of its own tenant."""


@pytest.mark.parametrize("program", OWN)
def test_no_user_of_a_tenant_reaches_anything_of_another(two: Tenants, program: str) -> None:
    """Nor the memory of its own key service. The unlock service answers only the user of its key service."""
    made = two.made
    groups = (made.uid("minikms-acme"),) if program == "progressdb" else ()
    uid = made.uid(f"{program}-acme")
    own, others = foreign.run_as(uid, lambda: [reached(made, each) for each in TENANTS], groups=groups)
    assert own == OWN[program]
    assert others == []


def test_the_port_of_a_tenant_reads_the_metrics_of_its_key_service_alone(two: Tenants) -> None:
    """As the user of the proxy, which has the unit's group."""
    made = two.made
    made.do(METRICS)
    listens = restricted.loaded("minikms-metrics@acme.socket", "[Socket]", etc=made.at("/etc/systemd/system"))
    assert [value for name, value in listens if name == "ListenStream"] == ["127.0.0.1:9112"]
    path = made.at("/run/minikms-acme/minikms.sock")

    def statuses() -> list[int]:
        with Client(path) as kms, pytest.raises(ForbiddenError) as refused:
            kms.create_dek_for_thread("t")
        return [unix_request(path, "/metrics").status, refused.value.status]

    groups = (made.uid("minikms-acme"),)
    assert foreign.run_as(made.uid("minikms-metrics-acme"), statuses, groups=groups) == [200, 403]


def test_a_customer_who_disables_the_root_key_stops_that_tenant_alone(two: Tenants) -> None:
    """It goes on by itself once the key is enabled. The other one has renewed its lease meanwhile."""
    two.aws.enable(two.keys["acme"], False)
    wait_until(lambda: two.store("acme", "disabled") == 503, seconds=WAIT_S_MAX)
    _, said = two.made.run("minikms status --socket /run/minikms-acme/minikms.sock")
    assert "DisabledException" in said
    assert two.store("bolt", "disabled") == 200
    two.aws.enable(two.keys["acme"], True)
    wait_until(lambda: two.store("acme", "enabled") == 200, seconds=WAIT_S_MAX)


def test_a_removed_tenant_leaves_nothing_and_the_other_goes_on(two: Tenants) -> None:
    two.made.do(REMOVE)
    left = [path for path in two.made.base.rglob("*acme*") if "journal" not in path.parts]
    assert left == []
    assert two.store("bolt", "after") == 200
