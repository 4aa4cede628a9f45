"""Hosts of one key service: in directories of one machine, each with a daemon, a replicator and a root key of its own.

Owns: making the first host and adding others as an operator does, starting and killing their processes, and the
database between them. It asserts only that its own commands succeed.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import asyncpg

import minikms
from minikms_replicator import tables
from tests.harness import forked, postgres
from tests.harness.forked import Forked
from tests.harness.postgres import url_of
from tests.harness.unix_http import answers
from tests.harness.waiting import WAIT_S_MAX, wait_until

ROLE = "replicator"
STANDBY = "standby"
TABLES = ("kms_head", "kms_file", "kms_tombstone", "kms_member")
POLICY = """
version = 1
[[grant]]
name = "everything"
principals = ["uid:{uid}"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy", "unseal", "audit", "replicate"]
threads = ["*"]
"""


class KeyHost:
    """`directory` has its data directory, socket, root key, policy, configuration and logs."""

    def __init__(self, directory: Path, name: str, database: str, *, single_node: bool) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir(mode=0o755)
        self.data_dir = self.directory / "data"
        self.socket = self.directory / "run" / "s"
        self.socket.parent.mkdir()
        self.root_file = self.directory / "root.key"
        self.config = self.directory / "replicator.toml"
        self.config.write_text(
            f'version = 1\nsocket = "{self.socket}"\nserver_uids = [{os.geteuid()}]\n'
            f'[database]\nurl = "{database}"\nsingle_node = {json.dumps(single_node)}\n'
        )
        self.policy = self.directory / "policy" / "policy.toml"
        self.policy.parent.mkdir()
        self.policy.write_text(POLICY.format(uid=os.geteuid()))
        self.daemon: Forked | subprocess.Popen[bytes] | None = None
        self.replicator: Forked | subprocess.Popen[bytes] | None = None

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, *words: object, program: str = "minikms") -> Any:
        """What a command prints, as JSON. `--json` and the root key are words of the caller."""
        done = forked.run(program, *words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if "--json" in words else done.stdout

    @property
    def own(self) -> tuple[object, ...]:
        """The flags of its data directory and root key."""
        return "--data-dir", self.data_dir, "--master-key-file", self.root_file

    @property
    def at(self) -> tuple[object, ...]:
        """The flags of its daemon."""
        return "--socket", self.socket, "--server-uid", os.geteuid()

    def client(self, **options: Any) -> minikms.Client:
        options.setdefault("timeout_s", WAIT_S_MAX)
        return minikms.Client(self.socket, server_uids=[os.geteuid()], **options)

    def status(self) -> Any:
        with self.client() as kms:
            return kms.replica_status()

    # --- processes ----------------------------------------------------------------------------------------------------

    def start_daemon(self, *flags: str) -> None:
        given = (*self.own, "--socket", self.socket, "--policy", self.policy)
        self.daemon = self._start("minikms", *map(str, given), *flags)
        wait_until(lambda: answers(self.socket))

    def start_replicator(self) -> None:
        self.replicator = self._start("minikms_replicator", "--config", str(self.config))

    def start(self) -> None:
        self.start_daemon()
        self.start_replicator()

    def _start(self, module: str, *words: str) -> Forked | subprocess.Popen[bytes]:
        log: IO[bytes]
        with (self.directory / f"{module}.log").open("ab") as log:
            return forked.start([sys.executable, "-m", module, *words], log)

    def log_of(self, module: str) -> str:
        return (self.directory / f"{module}.log").read_text()

    def end(self, number: int = signal.SIGKILL) -> None:
        """A signal to both processes, and their ends."""
        for process in (self.replicator, self.daemon):
            if process is not None and process.poll() is None:
                process.send_signal(number)
        for process in (self.replicator, self.daemon):
            if process is not None:
                process.wait()
        self.replicator = self.daemon = None


class KeyHosts:
    """`database`: the URL of the replicators' role; `owner`: that of the tables' owner."""

    def __init__(self, directory: Path, settings: str, *, single_node: bool = True) -> None:
        self.directory = directory
        self.database, self.owner = url_of(settings, ROLE), url_of(settings)
        self._single_node = single_node
        self.hosts: list[KeyHost] = []

    def first(self, name: str = "a") -> KeyHost:
        """A host with a fresh keyring, which serves."""
        host = self._host(name)
        host.run("init", *host.own)
        host.run("replica", "init", "--name", name, *host.own)
        host.start()
        wait_until(lambda: host.status().mode == "serving")
        return host

    def joined(self, name: str, serving: KeyHost) -> KeyHost:
        """A host more, which follows."""
        host = self._host(name)
        invitation, request = host.directory / "invite.json", host.directory / "request.json"
        serving.run("replica", "invite", "--invitation", invitation, *serving.at)
        host.run("replica", "join", "--invitation", invitation, "--name", name, "--request", request, *host.own)
        serving.run("replica", "add", request, "--yes", *serving.at)
        host.run("fetch", "--config", host.config, "--data-dir", host.data_dir, program="minikms_replicator")
        host.start()
        wait_until(lambda: host.status().number == serving.status().number)
        return host

    def _host(self, name: str) -> KeyHost:
        host = KeyHost(self.directory, name, self.database, single_node=self._single_node)
        self.hosts.append(host)
        return host

    def end(self) -> None:
        for host in self.hosts:
            host.end()

    # --- the database -------------------------------------------------------------------------------------------------

    def execute(self, *statements: str) -> None:
        """As the owner of the tables."""

        async def run() -> None:
            connection = await asyncpg.connect(self.owner)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())

    def back_up(self) -> None:
        self.execute(*(f"CREATE TABLE older_{table} AS TABLE {table}" for table in TABLES))

    def restore(self, *changes: str) -> None:
        """All tables are those of `back_up` again, with these changes, in one step."""
        steps = [f"TRUNCATE {table}; INSERT INTO {table} TABLE older_{table}" for table in TABLES]
        self.execute("; ".join((*steps, *changes)))


async def _prepare(owner: str, *, standby: bool) -> None:
    connection = await asyncpg.connect(owner, server_settings={"synchronous_commit": "local"})
    try:
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN")
        if standby:
            await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
            await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()


@contextlib.contextmanager
def key_hosts(directory: Path, *, standby: bool = False) -> Iterator[KeyHosts]:
    """A PostgreSQL with the tables, and no host yet. `standby`: with a receiver that confirms each commit."""
    directory.chmod(0o755)
    with contextlib.ExitStack() as running:
        settings, files = running.enter_context(postgres.running())
        files.parent.chmod(0o755)  # of the socket: a replicator that root starts gives up root's rights
        owner = url_of(settings)
        if standby:
            running.enter_context(postgres.receiver(settings, STANDBY))
        asyncio.run(_prepare(owner, standby=standby))
        asyncio.run(tables.init(owner, ROLE))
        hosts = KeyHosts(directory, settings, single_node=not standby)
        running.callback(hosts.end)
        yield hosts
