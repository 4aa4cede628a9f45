"""The hosts of the cluster: three of the database and three of the message server, each a network namespace.

Owns: the network, the programs of each host, and the files that they need. Each host db1 to db3 has etcd, Patroni and
PostgreSQL; each host app1 to app3 has a message server; one miniKMS is reached through its Unix socket. The caller is
in mount and PID namespaces of its own (`tests.cluster.__main__`): when it ends, the kernel ends every process and
removes the network and the files, which are in a tmpfs. So nothing here cleans up.
"""

import asyncio
import contextlib
import http.client
import json
import os
import pwd
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import yaml

from progressdb_server.store.postgres import tables
from tests import needs
from tests.harness.certificates import CLIENT, HOUR, SERVER, Authority
from tests.harness.waiting import WAIT_S_MAX, wait_until

RUN: Final = Path("/run")
"""A tmpfs of this mount namespace."""
BASE: Final = RUN / "cluster"
DATABASES: Final = ("db1", "db2", "db3")
APPLICATIONS: Final = ("app1", "app2", "app3")
PORT: Final = 8080
KMS_UID, APPLICATION_UID = 45_701, 45_702
START_S_MAX: Final = 120.0
LOG_BYTES: Final = 1500
"""Of each log, shown after a start that failed."""
WATCHDOG_S: Final = 12.0
"""After so long without an answer of Patroni its host's PostgreSQL is killed: less than the `ttl` of its leader key."""
TTL_S, LOOP_WAIT_S, RETRY_TIMEOUT_S = 20, 2, 5
"""Patroni demands ttl >= 20 and ttl >= loop_wait + 2 * retry_timeout."""
BACKEND, FRONTEND, ADMIN = "backend-key", "frontend-key", "admin-key"


class Variant(NamedTuple):
    """What differs from the recommended cluster."""

    synchronous_mode: str = "quorum"
    single_node: bool = False
    """The message servers do not ask for standbys."""
    source: Path | None = None
    """Of another version of the project."""
    ahead_s: Mapping[str, int] = MappingProxyType({})
    """By host, how far the clock of its message server is ahead."""


def run(*command: object, host: str = "", user: str | int = "") -> str:
    """Runs a program to its end; what it printed."""
    words = [*_prefix(host, user), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_S_MAX, check=False, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def _prefix(host: str, user: str | int) -> list[str]:
    words = ["nsenter", f"--net={RUN}/netns/{host}"] if host else []
    if user:
        who = pwd.getpwnam(user) if isinstance(user, str) else None
        uid, gid = (who.pw_uid, who.pw_gid) if who else (user, user)
        words += ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    return words


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found: list[int] = []
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Cluster:
    """See the module. `network`: the third byte of its addresses."""

    hosts: tuple[str, ...] = (*DATABASES, *APPLICATIONS)

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.network = 0
        self.processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        """By host and program."""
        self.unwatched: set[str] = set()
        """Hosts whose watchdog is stopped with them."""
        self._ca = Authority("cluster")
        self._password = secrets.token_hex(16)
        self._postgres = needs.postgresql()

    # --- the network ----------------------------------------------------------------------------------------------
    def address(self, host: str) -> str:
        kind, number = host[:-1], int(host[-1])
        return f"10.213.{self.network}.{({'db': 10, 'app': 20, 'key': 30}[kind]) + number}"

    def make_network(self) -> None:
        """A bridge in a namespace of its own, and a link to it from each host and from the outside."""
        (RUN / "netns").mkdir()
        run("ip", "netns", "add", "switch")
        run("ip", "-n", "switch", "link", "add", "bridge0", "type", "bridge")
        run("ip", "-n", "switch", "link", "set", "bridge0", "up")
        for self.network in range(1, 256):
            with contextlib.suppress(RuntimeError):  # another cluster has this network
                run("ip", "link", "add", f"cluster{self.network}", "type", "veth", "peer", "outside", "netns", "switch")
                break
        run("ip", "addr", "add", f"10.213.{self.network}.1/24", "dev", f"cluster{self.network}")
        run("ip", "link", "set", f"cluster{self.network}", "up")
        run("ip", "-n", "switch", "link", "set", "outside", "master", "bridge0", "up")
        for host in self.hosts:
            run("ip", "netns", "add", host)
            run("ip", "-n", host, "link", "add", "eth0", "type", "veth", "peer", host, "netns", "switch")
            run("ip", "-n", "switch", "link", "set", host, "master", "bridge0", "up")
            run("ip", "-n", host, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            run("ip", "-n", host, "link", "set", "eth0", "up")
            run("ip", "-n", host, "link", "set", "lo", "up")
        hosts = BASE / "hosts"
        names = [f"{self.address(host)} {host}" for host in self.hosts]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        run("mount", "--bind", hosts, "/etc/hosts")

    def cut(self, host: str, others: Iterable[str], *, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop what the host gets from the others, or what it sends to them."""
        addresses = ", ".join(self.address(other) for other in others)
        run("nft", "add", "table", "inet", "faults", host=host)
        for chain, field, wanted in (("input", "saddr", incoming), ("output", "daddr", outgoing)):
            if wanted:
                hook = f"{{ type filter hook {chain} priority 0; }}"
                run("nft", "add", "chain", "inet", "faults", chain, hook, host=host)
                run("nft", "add", "rule", "inet", "faults", chain, "ip", field, f"{{ {addresses} }}", "drop", host=host)

    def mend(self, host: str) -> None:
        run("nft", "flush", "ruleset", host=host)

    # --- programs -------------------------------------------------------------------------------------------------
    def start(
        self, host: str, program: str, user: str | int, command: list[object], environ: Mapping[str, str] = os.environ
    ) -> None:
        words = [*self.before(host), *_prefix(host, user), *map(str, command)]
        with (BASE / f"{host}-{program}.log").open("ab") as log:
            process = subprocess.Popen(words, env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[host, program] = process

    def signal(self, host: str, program: str, number: signal.Signals) -> None:
        """To the program, or to PostgreSQL and its processes."""
        send(self.pids(host, program), number)
        if number == signal.SIGKILL and program != "postgres":
            self.processes[host, program].wait()

    def pids(self, host: str, program: str) -> list[int]:
        if program != "postgres":
            return [self.processes[host, program].pid]
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((BASE / host / "data" / "postmaster.pid").read_text().split()[0])
            return descendants(pid)
        return []

    def start_etcd(self, host: str) -> None:
        def url(host: str, port: int) -> str:
            return f"http://{self.address(host)}:{port}"

        members = ",".join(f"{one}={url(one, 2380)}" for one in DATABASES)
        command = [
            "etcd", "--name", host, "--data-dir", BASE / host / "etcd",
            "--listen-peer-urls", url(host, 2380), "--initial-advertise-peer-urls", url(host, 2380),
            "--listen-client-urls", url(host, 2379), "--advertise-client-urls", url(host, 2379),
            "--initial-cluster", members, "--log-level", "warn",
        ]  # fmt: skip
        self.start(host, "etcd", "etcd", [*command])

    def start_patroni(self, host: str) -> None:
        self.start(host, "patroni", "postgres", ["patroni", BASE / host / "patroni.yaml"])

    def configure(self, host: str) -> None:
        """The files of a host of the database."""
        home = BASE / host
        for directory, user in ((home, "postgres"), (home / "etcd", "etcd")):
            directory.mkdir(mode=0o755 if directory == home else 0o700)
            os.chown(directory, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        files = self._ca.issue(dns=[host], extended=(SERVER,), starts=-6 * HOUR).write(home, "server")
        for path in files:
            os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
        users = {
            name: {"username": name, "password": self._password} for name in ("superuser", "replication", "rewind")
        }
        address = self.address(host)
        config = {
            "scope": "progressdb",
            "name": host,
            "restapi": {"listen": f"{address}:8008", "connect_address": f"{address}:8008"},
            "etcd3": {"hosts": [f"{self.address(one)}:2379" for one in DATABASES]},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL_S,
                    "loop_wait": LOOP_WAIT_S,
                    "retry_timeout": RETRY_TIMEOUT_S,
                    "primary_start_timeout": 15,
                    "synchronous_mode": self.variant.synchronous_mode,
                    "synchronous_mode_strict": self.variant.synchronous_mode != "off",
                    "postgresql": {"use_pg_rewind": True},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                "listen": f"{address}:5432",
                "connect_address": f"{address}:5432",
                "data_dir": str(home / "data"),
                "bin_dir": self._postgres,
                "pgpass": str(home / "pgpass"),
                "authentication": users,
                "use_unix_socket": True,
                "parameters": {
                    "unix_socket_directories": str(home),
                    "shared_buffers": "32MB",
                    "max_wal_size": "128MB",
                    "ssl": "on",
                    "ssl_ca_file": str(BASE / "ca.pem"),
                    "ssl_cert_file": str(files[0]),
                    "ssl_key_file": str(files[1]),
                    "wal_receiver_timeout": "5s",
                    "wal_sender_timeout": "5s",
                    "log_line_prefix": "%m [%p] %a ",
                },
                "pg_hba": [
                    "local all all trust",
                    "hostssl progressdb progressdb samenet trust clientcert=verify-ca",
                    "hostssl minikms minikms samenet trust clientcert=verify-ca",
                    "host all superuser,rewind samenet scram-sha-256",
                    "host replication replication samenet scram-sha-256",
                ],
            },
        }
        path = home / "patroni.yaml"
        path.write_text(yaml.safe_dump(config))
        os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
        path.chmod(0o600)

    def start_kms(self) -> None:
        home = BASE / "kms"
        home.mkdir(mode=0o755)
        os.chown(home, KMS_UID, KMS_UID)
        root = home / "data.master-key"
        root.touch(0o600)
        root.write_text(secrets.token_hex(32) + "\n")
        os.chown(root, KMS_UID, KMS_UID)
        command = [
            sys.executable, "-P", "-m", "minikms", "serve", "--socket", home / "socket", "--data-dir", home / "data",
            "--master-key-file", root, "--allowed-uids", f"{KMS_UID},{APPLICATION_UID}", "--socket-mode", "0666",
        ]  # fmt: skip
        self.start("", "kms", KMS_UID, [*command])
        wait_until((home / "socket").exists, seconds=START_S_MAX)

    @property
    def kms_sockets(self) -> list[Path]:
        """Of the hosts of the key service."""
        return [BASE / "kms" / "socket"]

    def url(self, user: str, files: Path) -> str:
        """Of the user's database, which has its name. `files`: the directory of its certificate."""
        named = f"sslrootcert={BASE}/ca.pem&sslcert={files}/client.pem&sslkey={files}/client.key"
        return f"postgresql://{user}@{','.join(DATABASES)}/{user}?sslmode=verify-full&{named}"

    def certify(self, directory: Path, uid: int) -> Path:
        """A new directory with a certificate for connections to the database."""
        directory.mkdir()
        for path in (directory, *self._ca.issue(extended=(CLIENT,), starts=-6 * HOUR).write(directory)):
            os.chown(path, uid, uid)
        return directory

    def environ(self, home: Path) -> dict[str, str]:
        """Of a program of the project."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        environ["HOME"] = str(home)  # where libpq's files are looked for
        if self.variant.source is not None:
            environ["PYTHONPATH"] = str(self.variant.source)
        return environ

    def before(self, host: str) -> list[str]:
        """What starts each program of the host, as root."""
        return []

    def clock(self, host: str) -> list[object]:
        """What starts a program whose wall clock is ahead."""
        if not (ahead := self.variant.ahead_s.get(host)):
            return []
        [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        # Only the interpreter may load it: its semaphore belongs to the user that loads it first.
        return ["env", f"LD_PRELOAD={library}", f"FAKETIME={ahead:+}s", "FAKETIME_DONT_FAKE_MONOTONIC=1"]

    def start_application(self, host: str) -> None:
        home = BASE / host
        if not home.exists():
            home.mkdir()
            os.chown(home, APPLICATION_UID, APPLICATION_UID)
        environ = self.environ(home) | {
            "PROGRESSDB_STORE_URL": self.url("progressdb", BASE / "client"),
            "PROGRESSDB_STORE_SINGLE_NODE": "1" if self.variant.single_node else "0",
            "PROGRESSDB_KMS_SOCKET": ",".join(map(str, self.kms_sockets)),
            "PROGRESSDB_KMS_SPAWN": "0",
            "PROGRESSDB_KMS_SERVER_UIDS": str(KMS_UID),
            "PROGRESSDB_API_BACKEND_KEYS": BACKEND,
            "PROGRESSDB_API_FRONTEND_KEYS": FRONTEND,
            "PROGRESSDB_API_ADMIN_KEYS": ADMIN,
            "PROGRESSDB_RATE_RPS": "0",
        }
        address = f"{self.address(host)}:{PORT}"
        command = [
            *self.clock(host),
            sys.executable,
            "-P",
            "-m",
            "progressdb_server",
            "serve",
            "--addr",
            address,
            "--db",
            home / "db",
        ]
        self.start(host, "server", APPLICATION_UID, command, environ)

    # --- all ------------------------------------------------------------------------------------------------------
    def start_all(self) -> None:
        self.make_network()
        (BASE / "ca.pem").write_bytes(self._ca.pem)
        self.certify(BASE / "client", APPLICATION_UID)
        for host in DATABASES:
            self.configure(host)
            self.start_etcd(host)
        for host in DATABASES:
            self.start_patroni(host)
        wait_until(self.whole, seconds=START_S_MAX)
        primary = self.primary()
        self.sql("CREATE ROLE progressdb LOGIN", database="postgres")
        self.sql("CREATE DATABASE progressdb", database="postgres")
        local = f"postgresql://superuser@/progressdb?host={BASE}/{primary}"
        init = [sys.executable, "-P", "-m", "progressdb_server", "store", "init", "--url", local]
        run(*init, "--role", "progressdb", host=primary, user="postgres")
        counted = asyncio.run(tables.examine(local, single_node=True)).connected
        assert counted == (0 if self.variant.synchronous_mode == "off" else 2), "what doctor counts"
        self.start_kms()
        for host in APPLICATIONS:
            self.start_application(host)
        wait_until(self.serves, seconds=START_S_MAX)
        for host in DATABASES:
            threading.Thread(target=self._watch, args=(host,), daemon=True).start()

    def _watch(self, host: str) -> None:
        """As a watchdog of hardware, which resets a host whose Patroni does not write to it."""
        heard = time.monotonic()
        while True:
            time.sleep(0.5)
            if host in self.unwatched or self.patroni(host, "/liveness"):
                heard = time.monotonic()
            elif time.monotonic() > heard + WATCHDOG_S:
                self.signal(host, "postgres", signal.SIGKILL)

    def patroni(self, host: str, path: str) -> Any:
        """What Patroni answers, None if it does not, or refuses."""
        connection = http.client.HTTPConnection(self.address(host), 8008, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            connection.request("GET", path)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status == 200:
                return json.loads(content or b"true")
        return None

    def members(self, but: str = "") -> list[dict[str, Any]]:
        """As a host other than this one says."""
        for host in DATABASES:
            if host != but and (found := self.patroni(host, "/cluster")):
                return list(found["members"])
        return []

    def leader(self, but: str = "") -> str:
        """The host that has the leader key, as a host other than `but` says; empty if none has it."""
        return next((str(one["name"]) for one in self.members(but) if one["role"] == "leader"), "")

    def primary(self) -> str:
        """The host that has the leader key. AssertionError if none has it for a minute."""
        end = time.monotonic() + WAIT_S_MAX
        while not (found := self.leader()):
            assert time.monotonic() < end, "no host is the primary"
            time.sleep(0.1)
        return found

    def whole(self) -> bool:
        """A primary, and standbys that stream from it, of which each may be counted."""
        members = self.members()
        states = sorted(one["state"] for one in members)
        wanted = "replica" if self.variant.synchronous_mode == "off" else "quorum_standby"
        roles = sorted(one["role"] for one in members)
        return states == ["running", "streaming", "streaming"] and roles == ["leader", wanted, wanted]

    def etcd_leader(self) -> str:
        endpoints = ",".join(f"http://{self.address(host)}:2379" for host in DATABASES)
        told = json.loads(run("etcdctl", "--endpoints", endpoints, "endpoint", "status", "-w", "json", host="db1"))
        [number] = [n for n, one in enumerate(told) if one["Status"]["header"]["member_id"] == one["Status"]["leader"]]
        return DATABASES[number]

    def sql(self, statement: str, *, host: str = "", database: str = "progressdb") -> str:
        """As the superuser, at the primary. Fields without padding, a row each line."""
        at = host or self.primary()
        program = f"{self._postgres}/psql"
        words = (program, "-h", BASE / at, "-U", "superuser", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1")
        return run(*words, "-c", statement, host=at, user="postgres")

    def serves(self) -> bool:
        """Whether each message server is ready."""
        return all(self._ready(host) for host in APPLICATIONS)

    def _ready(self, host: str) -> bool:
        connection = http.client.HTTPConnection(self.address(host), PORT, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        assert self.processes[host, "server"].poll() is None, (BASE / f"{host}-server.log").read_text()
        return False


def start(made: Cluster) -> None:
    try:
        made.start_all()
    except BaseException:
        for log in sorted(BASE.glob("*.log")):
            print(f"--- {log.name}\n{log.read_bytes()[-LOG_BYTES:].decode(errors='replace')}", file=sys.stderr)
        raise
