"""docs/several-key-hosts.md, and the runbook's sections about its hosts, pasted on two machines with one PostgreSQL."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import minikms
from tests import needs
from tests.documents.machine import PROJECT, UID_MIN, Machine, blocks, machine
from tests.documents.test_runbook import ALL_SECTIONS, RUNBOOK, a_policy_holds
from tests.harness import postgres
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign

PAGE = PROJECT / "docs" / "several-key-hosts.md"
DATABASE, EACH, FIRST, JOIN, ADD, FETCH = blocks(PAGE)
OF_REPLICATOR = ("minikms-replicator",)
TAKE_OVER_S_MAX = 40.0
FINGERPRINT = re.compile(r"\b(?:[0-9a-f]{4}[ -]){7,}[0-9a-f]{4}\b")


class Hosts:
    """Two machines, and the socket directory of a PostgreSQL that both reach."""

    def __init__(self, a: Machine, b: Machine, place: str) -> None:
        self.a, self.b, self._place = a, b, place
        for made in (a, b):
            made.environ |= {"PGHOST": place, "PGUSER": "test", "PGDATABASE": "postgres"}
            made.environ["PATH"] += os.pathsep + needs.postgresql()

    def here(self, block: str) -> str:
        """Of the page: the database is one node without standbys, on a Unix socket."""
        block = re.sub(
            r'url = ".*"',
            f'url = "postgresql://minikms-replicator@/minikms?host={self._place}"\nsingle_node = true',
            block,
        )
        return block.replace("/run/postgresql", self._place)

    def do(self, made: Machine, block: str) -> str:
        return made.do(self.here(block))

    def follow(self, made: Machine, title: str) -> str:
        return "".join(self.do(made, block) for block in ALL_SECTIONS[title])

    def copy(self, name: str, source: Machine, target: Machine) -> None:
        """A file of /backup."""
        target.at(f"/backup/{name}").write_bytes(source.at(f"/backup/{name}").read_bytes())
        target.at(f"/backup/{name}").chmod(0o644)

    def call(self, made: Machine, action: Callable[[minikms.Client], Any]) -> Any:
        """What a client gets that runs as the message server of a host. The code of a refusal."""
        place, servers = str(made.at("/run/minikms/minikms.sock")), {0, made.uid("minikms")}

        def ask() -> Any:
            with minikms.Client(place, server_uids=servers, wait_s=0, timeout_s=5) as kms:
                try:
                    return action(kms)
                except minikms.KmsRefusedError as error:
                    return error.code

        return foreign.run_as(made.uid("progressdb"), ask, groups=(made.uid("minikms"),))

    def use(self, made: Machine) -> tuple[str, str]:
        """A new key, and what it has encrypted."""

        def use(kms: minikms.Client) -> list[str]:
            key_id = kms.create_dek_for_thread("thread-2").key_id
            return [key_id, kms.encrypt(key_id, b"text").hex()]

        key_id, sealed = self.call(made, use)
        return key_id, sealed

    def opens(self, made: Machine, key_id: str, sealed: str) -> bool:
        return bool(self.call(made, lambda kms: kms.decrypt(key_id, bytes.fromhex(sealed)).decode()) == "text")

    def answers(self, made: Machine) -> str:
        """The code of a refusal; empty if it serves."""
        return str(self.call(made, lambda kms: kms.encrypt("k_" + 26 * "0", b"").hex()))

    def number(self, made: Machine) -> str:
        return "".join(re.findall(r"(?m)^ *changes +(\S+)", made.run("minikms replica status")[1]))

    def mode(self, made: Machine) -> str:
        """What the status of this host says of itself; empty if it does not answer."""
        _, said = made.run("minikms replica status")
        return "".join(re.findall(r"(?m)^ *mode +(\w+)", said))

    def wait_for(self, made: Machine, mode: str) -> None:
        wait_until(lambda: self.mode(made) == mode, seconds=TAKE_OVER_S_MAX)

    def postgres(self, program: str, *words: str) -> bytes:
        """The output of a program of PostgreSQL, run by its superuser."""
        command = [f"{needs.postgresql()}/{program}", "-h", self._place, "-U", "test", *words]
        return subprocess.run(command, cwd="/", check=True, capture_output=True, timeout=60).stdout

    def older(self, copy: bytes) -> None:
        """The database is what it was at the time of the copy."""
        tables = "kms_schema, kms_head, kms_file, kms_tombstone, kms_member"
        script = b"BEGIN; TRUNCATE %s;\n%s\nCOMMIT;\n" % (tables.encode(), copy)
        command = [
            f"{needs.postgresql()}/psql",
            "-h",
            self._place,
            "-U",
            "test",
            "-qd",
            "minikms",
            "-v",
            "ON_ERROR_STOP=1",
        ]
        subprocess.run(command, cwd="/", input=script, check=True, capture_output=True, timeout=60)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """By the page: the host a has had keys, and serves; the host b has joined."""
    needs.root()
    with (
        postgres.running() as (_, data),
        machine(users=OF_REPLICATOR) as a,
        machine(users=OF_REPLICATOR, uid_min=UID_MIN + 100) as b,
    ):
        data.parent.chmod(0o711)
        hosts = Hosts(a, b, str(data.parent))
        a.install()
        b.configure()
        for made in (a, b):
            a_policy_holds(made, runs=made is a)
            made.export(blocks(RUNBOOK)[0])
        hosts.do(a, DATABASE)
        for made in (a, b):
            hosts.do(made, EACH)
        hosts.do(a, FIRST)
        hosts.copy("invite.json", a, b)
        [shown] = FINGERPRINT.findall(hosts.do(b, JOIN))
        hosts.copy("request.json", b, a)
        with a.on_terminal(ADD) as terminal:
            terminal.wait_for("[y/N]")
            terminal.type("y")
            assert terminal.wait() == 0, terminal.shown
        assert shown.encode() in terminal.shown
        hosts.do(b, FETCH)
        yield hosts


@pytest.mark.timeout(900)
def test_a_host_joins_takes_over_and_is_left_again() -> None:
    """By the page, and by the sections of the runbook for a lost host, for moves and for the way back."""
    with two_hosts() as hosts:
        a, b = hosts.a, hosts.b
        key_id, sealed = hosts.use(a)
        assert hosts.answers(b) == "standby"
        for name in ("minikms-replicator", "minikms"):
            os.kill(a.pid(name), signal.SIGKILL)
        hosts.wait_for(b, "serving")
        assert hosts.opens(b, key_id, sealed)
        assert re.search(r"mode +serving", hosts.follow(b, "A host of the key service is lost"))
        a.do("systemctl restart minikms minikms-replicator")
        hosts.wait_for(a, "following")
        hosts.follow(a, "Move to other hosts")
        assert hosts.opens(a, key_id, sealed) and hosts.answers(b) == "standby"
        a.do("minikms seal --yes")
        wait_until(lambda: hosts.answers(b) == "sealed")
        for made in (a, b):
            made.do("minikms unseal --from-source")
        wait_until(lambda: "serving" in (hosts.mode(a), hosts.mode(b)), seconds=TAKE_OVER_S_MAX)
        if hosts.mode(a) != "serving":
            hosts.wait_for(a, "following")
            hosts.follow(a, "Move to other hosts")
        hosts.follow(a, "Replace a host")
        b.do("systemctl disable --now minikms-replicator minikms.socket minikms")
        hosts.follow(a, "Go back to one host")
        assert hosts.opens(a, key_id, sealed) and hosts.use(a)


SERVICES = "minikms-replicator minikms.socket minikms"
DAMAGES = (
    "TRUNCATE kms_head, kms_file, kms_tombstone, kms_member",
    "DELETE FROM kms_head",
    "UPDATE kms_head SET member = 'nobody'",
    "UPDATE kms_file SET content = set_byte(content, 3, 0)",
)


def compared(hosts: Hosts) -> str:
    """What the runbook's comparison shows."""
    [each, compare, _, _] = ALL_SECTIONS["The database differs from its hosts"]
    for made in (hosts.a, hosts.b):
        hosts.do(made, each)
    [file] = hosts.b.at("/backup/evidence").glob("*.json")
    hosts.a.at("/backup/evidence/b.json").write_bytes(file.read_bytes())
    status, said = hosts.a.run(hosts.here(compare))
    assert status in (0, 1), said
    return said


def fill(hosts: Hosts, chosen: Machine) -> None:
    [_, _, empty, fill] = ALL_SECTIONS["The database differs from its hosts"]
    hosts.do(hosts.a, empty)
    hosts.do(chosen, fill)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_a_database_that_differs_is_filled_by_who_lacks_nothing() -> None:
    """Rolled back; emptied or damaged; rolled back while one host was away, which has gone on alone."""
    with two_hosts() as hosts:
        a, b = hosts.a, hosts.b
        older = hosts.postgres("pg_dump", "--data-only", "--column-inserts", "minikms")
        key_id, sealed = hosts.use(a)
        wait_until(lambda: hosts.number(b) == hosts.number(a))
        hosts.older(older)
        hosts.wait_for(b, "refused")
        hosts.wait_for(a, "refused")
        assert "replica_rolled_back" in hosts.follow(b, "The database of the key service is away")
        assert re.search(r"lacks nothing: [ab], [ab]", compared(hosts))
        fill(hosts, b)
        assert hosts.opens(b, key_id, sealed)
        hosts.wait_for(a, "following")
        for damage in DAMAGES:
            hosts.postgres("psql", "-qd", "minikms", "-c", damage)
            assert re.search(r"lacks nothing: [ab], [ab]", compared(hosts)), damage
            fill(hosts, a)
            assert hosts.opens(a, key_id, sealed), damage
            hosts.wait_for(b, "following")
        b.do(f"systemctl stop {SERVICES}")
        older = hosts.postgres("pg_dump", "--data-only", "--column-inserts", "minikms")
        later = hosts.use(a)
        a.do(f"systemctl stop {SERVICES}")
        hosts.older(older)
        b.do(f"systemctl start {SERVICES}")
        hosts.wait_for(b, "serving")  # nobody who knows more is there
        for _ in range(3):
            hosts.use(b)
        a.do(f"systemctl start {SERVICES}")
        hosts.wait_for(a, "refused")
        said = compared(hosts)
        assert "each host lacks something" in said and later[0] in said
        fill(hosts, a)
        assert hosts.opens(a, *later)
        hosts.wait_for(b, "refused")
