"""The cluster with a key service on three hosts in the place of the one.

Owns: the hosts key1 to key3, each a network namespace with a daemon and its replicator, a small disk of its own, a
wall clock and a CLOCK_BOOTTIME of its own; how they were made members. The replicators reach the same database as the
message servers. Clients and message servers reach the daemons through their Unix sockets.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import minikms
from minikms import api
from minikms.api.errors import KmsError
from tests.cluster.machines import (
    APPLICATION_UID,
    APPLICATIONS,
    BASE,
    DATABASES,
    KMS_UID,
    START_S_MAX,
    Cluster,
    descendants,
    run,
    send,
)
from tests.harness.waiting import wait_until

KEYS: Final = ("key1", "key2", "key3")
REPLICATOR_UID: Final = 45_703
DISK: Final = "128m"
BOOT_AHEAD_S: Final = {"key2": 3600}
"""How far the CLOCK_BOOTTIME of a host is ahead. That of FAST is as its wall clock."""
FAST: Final = "key3"
RATE: Final = 1.05
"""Of all clocks of FAST, whose two programs have one user. The wait for the end of a lease allows for 1/16."""
POLICY: Final = f"""
version = 1
[[grant]]
principals = ["uid:{REPLICATOR_UID}", "uid:{KMS_UID}"]
roles = ["replicate"]
[[grant]]
principals = ["uid:{APPLICATION_UID}"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor"]
threads = ["*"]
[[grant]]
principals = ["uid:{os.geteuid()}"]
roles = ["create", "encrypt", "decrypt", "monitor", "rotate", "destroy", "unseal"]
threads = ["*"]
"""


class KeyCluster(Cluster):
    """See the module."""

    hosts = (*DATABASES, *APPLICATIONS, *KEYS)

    @property
    def kms_sockets(self) -> list[Path]:
        return [self.home(host) / "socket" for host in KEYS]

    def home(self, host: str) -> Path:
        """The directory of the daemon's user."""
        return BASE / host / "kms"

    def start_kms(self) -> None:
        self.sql("CREATE ROLE minikms LOGIN", database="postgres")
        self.sql("CREATE DATABASE minikms", database="postgres")
        primary = self.primary()
        init = ("init", "--url", self._local_url(primary), "--role", "minikms")
        self._module(primary, "postgres", "minikms_replicator", *init)
        first, *others = KEYS
        for host in KEYS:
            self._make_host(host)
        self._minikms(first, "init")
        self._minikms(first, "replica", "init", "--name", first)
        self.start_key_host(first)
        wait_until(lambda: self.serving() == first or self._ended(first, "replicator"), seconds=START_S_MAX)
        for host in others:
            invitation, request = self.home(host) / "invite.json", self.home(host) / "request.json"
            self._ask(first, "invite", "--invitation", invitation)
            self._minikms(host, "replica", "join", "--invitation", invitation, "--request", request, "--name", host)
            self._ask(first, "add", request, "--yes")
            self.fetch(host)
            self.start_key_host(host)
        wait_until(self.keys_whole, seconds=START_S_MAX)

    def _make_host(self, host: str) -> None:
        home = BASE / host
        home.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "tmpfs", home)
        self.home(host).mkdir()
        os.chown(self.home(host), KMS_UID, KMS_UID)
        (home / "etc").mkdir()
        (home / "etc" / "policy.toml").write_text(POLICY)
        self._configure(host, "replicator", self._replicator_uid(host))
        self._configure(host, "fetch", KMS_UID)

    def _configure(self, host: str, name: str, uid: int) -> None:
        home = BASE / host
        (home / f"{name}.toml").write_text(
            f'version = 1\nsocket = "{self.home(host)}/socket"\nserver_uids = [{KMS_UID}]\n'
            f'[database]\nurl = "{self.url("minikms", self.certify(home / name, uid))}"\n'
            f"single_node = {str(self.variant.single_node).lower()}\n"
        )

    def _module(self, host: str, user: str | int, module: str, *words: object) -> str:
        """Runs a command of the project to its end."""
        environ = ["env", f"HOME={BASE / host}"]
        if self.variant.source is not None:
            environ.append(f"PYTHONPATH={self.variant.source}")
        return run(*environ, sys.executable, "-P", "-m", module, *words, host=host, user=user)

    def _minikms(self, host: str, *words: object) -> str:
        """As the daemon's user, while the daemon is stopped."""
        home = self.home(host)
        files = ("--data-dir", home / "data", "--master-key-file", home / "data.master-key")
        return self._module(host, KMS_UID, "minikms", *words, *files)

    def _ask(self, host: str, *words: object) -> str:
        asked = ("--socket", self.home(host) / "socket", "--server-uid", KMS_UID)
        return self._module(host, os.geteuid(), "minikms", "replica", *words, *asked)

    def fetch(self, host: str) -> None:
        """Give a stopped member all that the database has."""
        words = ("fetch", "--config", BASE / host / "fetch.toml", "--data-dir", self.home(host) / "data")
        self._module(host, KMS_UID, "minikms_replicator", *words)

    def clock(self, host: str) -> list[object]:
        """The clocks of a fast host began to run so with a program that shows them to the others of its user."""
        if host != FAST:
            return super().clock(host)
        if (host, "clock") not in self.processes:
            rate = f"{self.variant.ahead_s.get(host, 0):+}s x{RATE}"
            self.start(host, "clock", KMS_UID, ["faketime", "-m", "-f", rate, "sleep", "infinity"])
            wait_until(lambda: _faked(self.processes[host, "clock"].pid))
        return ["env", *_faked(self.processes[host, "clock"].pid)]

    def before(self, host: str) -> list[str]:
        ahead = BOOT_AHEAD_S.get(host)
        return ["unshare", "--time", "--boottime", str(ahead)] if ahead else []

    def serves(self) -> bool:
        return super().serves() and self.keys_whole()

    def empty_tables(self) -> None:
        """As an operator does after a restore, before a member fills them."""
        primary = self.primary()
        self._module(primary, "postgres", "minikms_replicator", "reset", "--url", self._local_url(primary), "--yes")

    def _local_url(self, primary: str) -> str:
        return f"postgresql://superuser@/minikms?host={BASE}/{primary}"

    def start_key_host(self, host: str) -> None:
        """Both programs, the daemon first."""
        self.start_daemon(host)
        self.start_replicator(host)

    def start_daemon(self, host: str) -> None:
        home = self.home(host)
        with contextlib.suppress(FileNotFoundError):
            (home / "socket").unlink()
        command = [
            *self.clock(host), sys.executable, "-P", "-m", "minikms", "serve", "--socket", home / "socket",
            "--data-dir", home / "data", "--master-key-file", home / "data.master-key",
            "--policy", BASE / host / "etc" / "policy.toml", "--socket-mode", "0666",
        ]  # fmt: skip
        self.start(host, "daemon", KMS_UID, [*command], self.environ(home))
        wait_until(lambda: (home / "socket").exists() or self._ended(host, "daemon"), seconds=START_S_MAX)

    def start_replicator(self, host: str) -> None:
        home = BASE / host
        command = [
            *self.clock(host), sys.executable, "-P", "-m", "minikms_replicator", "--config", home / "replicator.toml",
        ]  # fmt: skip
        self.start(host, "replicator", self._replicator_uid(host), [*command], self.environ(home))

    def _ended(self, host: str, program: str) -> bool:
        process = self.processes[host, program]
        assert process.poll() is None, (BASE / f"{host}-{program}.log").read_text()[-2000:]
        return False

    def _replicator_uid(self, host: str) -> int:
        return KMS_UID if host == FAST else REPLICATOR_UID

    # --- what they say ------------------------------------------------------------------------------------------------
    def state(self, host: str) -> api.ReplicaStatusAnswer | None:
        """None if it does not answer."""
        client = minikms.Client(self.home(host) / "socket", server_uids=[KMS_UID], timeout_s=2, wait_s=0)
        with contextlib.closing(client), contextlib.suppress(KmsError):
            return client.replica_status()
        return None

    def serving(self) -> str:
        """The member that says so; empty if none does."""
        for host in KEYS:
            state = self.state(host)
            if state is not None and state.mode == "serving":
                return host
        return ""

    def keys_whole(self) -> bool:
        """One serves, and the others follow it closely."""
        states = [self.state(host) for host in KEYS]
        modes = sorted(one.mode for one in states if one is not None)
        return modes == ["following", "following", "serving"] and all(one is None or not one.why for one in states)

    def active(self) -> str:
        """The member that serves. AssertionError if none does for a minute."""
        wait_until(self.serving)
        return self.serving()

    def pair(self, host: str) -> list[int]:
        return [self.processes[host, program].pid for program in ("daemon", "replicator")]


def _faked(pid: int) -> list[str]:
    """The variables by which libfaketime joins the clocks of a program."""
    last = Path(f"/proc/{descendants(pid)[-1]}/environ").read_text().split("\0")
    return [one for one in last if one.startswith(("FAKETIME", "LD_PRELOAD=")) and "FAKETIME_SHARED" in str(last)]


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """The processes stand still in a cgroup, as those of a suspended container."""
    name = f"minikms-tests-{os.getpid()}"
    old = Path("/sys/fs/cgroup/freezer")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / name
    group.mkdir()
    switch, off, on = ("freezer.state", "THAWED", "FROZEN") if old.is_dir() else ("cgroup.freeze", "0", "1")
    try:
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        (group / switch).write_text(on)
        yield
    finally:
        (group / switch).write_text(off)
        for pid in pids:
            (group.parent / "cgroup.procs").write_text(str(pid))
        time.sleep(0.1)
        group.rmdir()


def killed(cluster: KeyCluster, host: str) -> None:
    """A host of the key service loses its power."""
    send(cluster.pair(host), signal.SIGKILL)
    for program in ("daemon", "replicator"):
        cluster.processes[host, program].wait()
