"""Stops the real daemon at a chosen system call of a chosen thread, and checks what is left.

Owns: a prepared data directory from which each run starts; the injection (strace attached to one thread, so "the N-th
write of the disk thread" is one point); and the check: under the root key that still opens the keyring, the daemon
starts, a running rotation completes, every key decrypts what it encrypted, and the audit log is whole.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import minikms
from minikms.api.errors import KmsError
from tests import needs
from tests.harness.forked import Forked, start
from tests.harness.scripts import verify_audit

STATE_CALLS = (
    "openat",
    "mkdir,mkdirat",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "syncfs",
    "rename,renameat,renameat2",
    "link,linkat",
    "unlink,unlinkat",
    "ftruncate",
)
"""The system calls that change what is on disk (openat: with O_CREAT among others)."""
THREADS = ("main", "disk", "reader", "audit")
DEADLINE_SECONDS = 60.0
HELD = "delay_enter=120000000"
"""The action that lasts until `Injection.end`, in microseconds: longer than any test waits."""
HELD_AFTER = HELD.replace("enter", "exit")


class Point(NamedTuple):
    """The `number`-th call of `calls` by `thread` after the injection has started, which concerns `what`."""

    thread: str
    calls: str
    number: int
    what: str = ""
    """A part of the call's line in the log of strace: a file or its content. The injection fails at another call."""

    def __str__(self) -> str:
        call = self.calls.split(",")[0]
        return f"{call} of {self.what}" if self.what else f"{call} no. {self.number} of the {self.thread} thread"


class Daemon:
    """A `minikms` process over `base`/data, with the root key in `base`/key."""

    def __init__(self, base: Path, *flags: str) -> None:
        self.base = base
        self.key_file = base / "key"
        self.command = [sys.executable, "-m", "minikms", "--socket", str(base / "s"), "--data-dir", str(base / "data")]
        self.command += ["--master-key-file", str(self.key_file), *flags]
        self.process: Forked | subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """False when it refuses to start (as under a root key that is not the keyring's)."""
        with (self.base / "log").open("ab") as log:
            self.process = start(self.command, log)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            try:
                with self.client(wait_s=0.05) as client:
                    client.health()
                return True
            except KmsError:
                time.sleep(0.01)
        raise AssertionError(f"the daemon neither serves nor ends: {self.log()}")

    def client(self, wait_s: float = 0.0) -> minikms.Client:
        return minikms.Client(self.base / "s", timeout_s=DEADLINE_SECONDS, wait_s=wait_s)

    def log(self) -> str:
        return (self.base / "log").read_text()

    def thread_ids(self) -> dict[str, int]:
        assert self.process is not None
        pid = self.process.pid
        found = {"main": pid}
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
                if tid != pid:
                    found[Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip()] = tid
        return found

    def event_fds(self) -> list[str]:
        """The numbers of the eventfd(2) descriptors."""
        assert self.process is not None
        found: list[str] = []
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if "[eventfd]" in os.readlink(path):
                    found.append(path.name)
        return found

    def serves(self) -> bool:
        """Whether it answers, which a daemon that was killed does not, though it may not be dead yet."""
        with contextlib.suppress(KmsError), self.client() as client:
            return client.health()
        return False

    def has_died(self, within_s: float = 0.0) -> bool:
        assert self.process is not None
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Injection:
    """strace on one thread: at the point, `action` (`signal=KILL`, `error=EIO`, …) happens."""

    def __init__(self, daemon: Daemon, point: Point, action: str) -> None:
        needs.program("strace")
        needs.root()  # the daemon is not dumpable
        self._daemon = daemon
        self._point = point
        self._kills = action == "signal=KILL"
        self._log = daemon.base / "strace"
        tid = daemon.thread_ids()[point.thread]
        # A worker thread wakes the event loop by a write to an eventfd. The kernel never refuses it, and libuv aborts
        # the process if it fails, so a disk's errors are injected into other writes only.
        files = point.calls == "write" and action.startswith("error=")
        only = ["-e", f"trace-fds=!{','.join(daemon.event_fds())}"] if files else []
        self._process = subprocess.Popen(
            [
                *("strace", "-y", "-s", "4096", "-o", str(self._log), "-p", str(tid), *only),
                *("-e", f"trace={point.calls}", "-e", f"inject={point.calls}:{action}:when={point.number}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        assert b"attached" in line, line

    def end(self) -> None:
        dead = self._daemon.has_died(within_s=0.05) or (self._kills and not self._daemon.serves())
        if dead:  # then strace ends too, once it has said so in its log
            self._process.wait(DEADLINE_SECONDS)
        else:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def happened(self) -> bool:
        """Whether the thread reached the point."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        if lines and "killed by SIGKILL" in lines[-1]:
            reached = lines[-2]
        else:
            reached = next((line for line in lines if "INJECTED" in line), "")
        assert not reached or self._point.what in reached, f"not {self._point} was reached, but {reached}"
        return bool(reached)


class Prepared:
    """A stopped data directory with a record under each of its keys."""

    def __init__(self, base: Path, keys: int) -> None:
        self.base = base
        self.records: list[tuple[str, bytes, bytes]] = []
        (base / "key").touch(0o600)
        (base / "key").write_text(os.urandom(32).hex() + "\n")
        daemon = Daemon(base)
        assert daemon.start(), daemon.log()
        with daemon.client() as client:
            for number in range(keys):
                key_id = client.create_dek_for_thread(f"t{number}").key_id
                plaintext = b"record %d" % number
                self.records.append((key_id, client.encrypt(key_id, plaintext), plaintext))
        daemon.stop()

    def copy_to(self, base: Path) -> Daemon:
        base.mkdir()
        shutil.copytree(self.base / "data", base / "data")
        shutil.copy2(self.base / "key", base / "key")
        return Daemon(base)

    def check_state(self, daemon: Daemon, first_key: str, other_key: str | None) -> None:
        """Starts under `first_key` or, if that is refused, under `other_key`, and checks that nothing is lost."""
        daemon.key_file.write_text(first_key + "\n")
        if not daemon.start():
            assert other_key is not None, daemon.log()
            daemon.key_file.write_text(other_key + "\n")
            assert daemon.start(), daemon.log()
        with daemon.client(wait_s=5.0) as client:
            wait_until_settled(client)
            self.check_records(client)
            status = client.status()
            assert status.status == "ok", status
        daemon.stop()
        verify_audit(daemon.base / "data", daemon.key_file)

    def check_records(self, client: minikms.Client) -> None:
        for key_id, sealed, plaintext in self.records:
            assert client.decrypt(key_id, sealed) == plaintext


def wait_until_settled(client: minikms.Client) -> None:
    """Returns when no rotation runs, every key file is read, and the audit log takes lines. After a fault requests get
    503 for a moment."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    found: object = None
    while time.monotonic() < deadline:
        try:
            found = client.status()
            if found.rotation is None and found.status == "ok" and not found.keys.indexing:
                return
        except KmsError as error:
            found = error
        time.sleep(0.02)
    raise AssertionError(f"the daemon does not recover: {found}")


def wait_for_revocation(client: minikms.Client) -> None:
    """Returns when no removed root key can open a DEK. Raises KmsError."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(root.state == "revoking" for root in client.list_roots().roots):
        assert time.monotonic() < deadline, "the revocation does not end"
        time.sleep(0.02)
