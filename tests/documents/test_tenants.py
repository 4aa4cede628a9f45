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

from tests import needs
from tests.documents.machine import PROJECT, Machine, blocks, machine
from tests.harness.ports import free_ports
from tests.harness.waiting import wait_until
from tests.minikms.daemon import foreign

ADD, REMOVE = blocks(PROJECT / "docs" / "tenants.md")
TENANTS = ("acme", "bolt")
USERS = tuple(f"{program}-{tenant}" for tenant in TENANTS for program in ("minikms", "progressdb"))


def of(tenant: str, text: str) -> str:
    """What the page says of `acme`."""
    return text.replace("acme", tenant)


class Tenants:
    """A machine with two tenants."""

    def __init__(self, made: Machine) -> None:
        self.made = made
        self.ports = dict(zip(TENANTS, free_ports(len(TENANTS)), strict=True))
        made.do("mkdir -p /etc/progressdb deploy")
        made.do(f"sed s/uid:0/uid:{os.geteuid()}/ {PROJECT}/deploy/policy.toml > deploy/policy.toml")
        for tenant, port in self.ports.items():
            made.do(of(tenant, ADD).replace("PORT=8081", f"PORT={port}"))

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
    with machine(users=USERS) as made:
        yield Tenants(made)


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
    files += [f"/etc/progressdb-{tenant}/{file}" for file in ("minikms.key", "progressdb.env")]
    files += [keys, run, f"/var/lib/progressdb-{tenant}/db"]
    attempts: dict[str, Callable[[], object]] = {path: partial(os.open, made.at(path), os.O_RDONLY) for path in files}
    with socket.socket(socket.AF_UNIX) as client:
        attempts["socket"] = partial(client.connect, str(made.at(f"{run}/minikms.sock")))
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
        "/etc/progressdb-TENANT/minikms.key",
        "/var/lib/progressdb-TENANT/minikms",
        "/run/minikms-TENANT",
        "socket",
        "signal to minikms",
    ],
    "progressdb": [
        "/run/minikms-TENANT",
        "/var/lib/progressdb-TENANT/db",
        "socket",
        "memory of progressdb",
        "signal to progressdb",
    ],
}
"""What each user reaches of its own tenant."""


@pytest.mark.parametrize("program", OWN)
def test_no_user_of_a_tenant_reaches_anything_of_another(two: Tenants, program: str) -> None:
    """Nor the memory of its own key service."""
    needs.root()
    made = two.made
    uid, group = made.uid(f"{program}-acme"), made.uid("minikms-acme")
    own, others = foreign.run_as(uid, lambda: [reached(made, each) for each in TENANTS], groups=(group,))
    assert own == OWN[program]
    assert others == []


def test_a_removed_tenant_leaves_nothing_and_the_other_goes_on(two: Tenants) -> None:
    two.made.do(REMOVE)
    left = [path for path in two.made.base.rglob("*acme*") if "journal" not in path.parts]
    assert left == []
    assert two.store("bolt", "after") == 200
