"""A real `minikms` process for the proofs, and the keys that it must not show.

Owns: starting the daemon in each way in which it gets its root key, and computing from its files and that root key
every key it holds. Invariants: the daemon is the command that a user types, with nothing changed in it, and has a
process of its own; for a claim about that process, an interpreter starts it (`forked=False`). The keys are computed in
the test's own process and never sent to the daemon.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import minikms
from minikms.api.errors import KmsError
from minikms.crypto.aead import NonceSource
from minikms.keys import dek
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory import SecretArena
from tests import needs
from tests.harness import decryptor
from tests.harness.forked import Forked, start
from tests.harness.waiting import WAIT_S_MAX, wait_until

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 60.0
RootKind = Literal["file", "environment", "dev"]
ROOT_KINDS: tuple[RootKind, ...] = ("file", "environment", "dev")


class LiveDaemon:
    """A daemon in a directory of its own, from construction to the end of the `with` block."""

    def __init__(
        self,
        base: Path,
        root_kind: RootKind = "file",
        *flags: str,
        program: tuple[str, ...] = (),
        launcher: tuple[str, ...] = (),
        socket: Path | None = None,
        pass_fds: tuple[int, ...] = (),
        limits: Mapping[int, tuple[int, int]] | None = None,
        root: bytes | None = None,
        server_uids: Collection[int] | None = None,
        forked: bool = True,
    ) -> None:
        """Start it in `base`, which is opened to all users.

        `program`: what runs the interpreter, such as `unshare --user`. `launcher`: what the interpreter runs first,
        which is to replace itself by the interpreter with its arguments. `limits`: soft and hard, by the number of
        the resource (setrlimit(2)). `root`: its root key, else a random one. `server_uids`: of the clients made here,
        as in `minikms.Client`. `forked`: by `tests.harness.forked`, unless another argument needs an interpreter.
        """
        base.chmod(0o755)
        self.data_dir = base / "data"
        self.socket = socket or base / "s"
        self.log = base / "log"
        self.root_file = base / "data.master-key"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        self.command = [*program, sys.executable, *launcher, "-m", "minikms"]
        self.command += ["--socket", str(self.socket), "--data-dir", str(self.data_dir), *flags]
        self._pass_fds = pass_fds
        self._limits = dict(limits or {})
        self._server_uids = server_uids
        self._forked = forked and not (pass_fds or limits)
        if root_kind == "dev":
            self.command += ["--dev"]
        else:
            self.root_file.touch(0o600)
            self.root_file.write_text((os.urandom(32) if root is None else root).hex() + "\n")
        if root_kind == "file":
            self.command += ["--master-key-file", str(self.root_file)]
        elif root_kind == "environment":
            self.environ["PROGRESSDB_MINIKMS_MASTER_KEY"] = self.root_file.read_text().strip()
        self.start()

    def start(self, *under: str) -> None:
        """Start it again, after it has ended, `under` a program such as strace; returns when it answers."""
        self.process: Forked | subprocess.Popen[bytes]
        command = [*under, *self.command]
        with self.log.open("ab") as log:
            if self._forked:
                self.process = start(command, log, self.environ)
            else:
                limited = self._set_limits if self._limits else None
                self.process = subprocess.Popen(
                    command, env=self.environ, stdout=log, stderr=log, pass_fds=self._pass_fds, preexec_fn=limited
                )
        self.pid = self.process.pid
        self._wait()

    @property
    def words(self) -> list[str]:
        """Its command line from `minikms` on."""
        return self.command[self.command.index("minikms") :]

    def _set_limits(self) -> None:
        for number, limit in self._limits.items():
            resource.setrlimit(number, limit)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                with minikms.Client(self.socket, server_uids=self._server_uids, wait_s=0.1) as client:
                    client.health()
                return
            except KmsError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(f"the daemon did not start: {self.log.read_text()}") from None
                time.sleep(0.02)

    def client(self) -> minikms.Client:
        """More patient than a program's: an fsync of a busy disk takes seconds."""
        return minikms.Client(self.socket, server_uids=self._server_uids, timeout_s=WAIT_S_MAX)

    @contextlib.contextmanager
    def held_up(self, thread: str, calls: str) -> Iterator[None]:
        """The next of these system calls of the thread returns after the block."""
        needs.program("strace")
        [tid] = [task.name for task in Path(f"/proc/{self.pid}/task").iterdir() if _name_of(task) == thread]
        command = ["strace", "-o", "/dev/null", "-p", tid, "-e", f"trace={calls}"]
        inject = f"inject={calls}:delay_enter=120000000:when=1"
        with subprocess.Popen([*command, "-e", inject], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            assert b"attached" in line, line
            try:
                yield
            finally:
                tracer.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """SIGTERM, and the end that the daemon makes of itself."""
        self.process.terminate()
        assert self.process.wait(STOP_SECONDS_MAX) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def root(self) -> bytes:
        return bytes.fromhex(self.root_file.read_text())

    def events(self, *types: str) -> list[dict[str, Any]]:
        """The events of these types in the newest file of the audit log, in order; without a line that is still being
        written, of which a reader may see the first part.
        """
        *lines, _ = (self.data_dir / "minikms-audit.log").read_text().split("\n")
        return [event for line in lines if (event := json.loads(line)["event"])["type"] in types]

    def wait_for_event(self, kind: str) -> None:
        """Returns when the newest file of the audit log has an event of this type."""
        wait_until(lambda: self.events(kind))

    def keys(self, root: bytes | None = None) -> dict[str, bytes]:
        """Every key that the daemon has, by a name; see `keys_in`."""
        return keys_in(self.data_dir, self.root() if root is None else root)


def record_keys(keys: dict[str, bytes], prefix: bytes) -> dict[str, bytes]:
    """The key that is derived from each DEK of `keys` for records whose nonces begin with `prefix`."""
    deks = {name: key for name, key in keys.items() if "DEK " in name and "derived" not in name}
    return {f"record key of {name}": decryptor.derived(key, prefix) for name, key in deks.items()}


def _whole(file: Path) -> bytes:
    """The content of a file that a rotation may be overwriting in place."""
    while (content := file.read_bytes()) != file.read_bytes():
        pass
    return content


def keys_in(data_dir: Path, root: bytes) -> dict[str, bytes]:
    """Every key by a name: the root key, what leads from it to the keyring key, that one, each KEK version, the audit
    keys and seeds, each DEK.
    """
    found = {"root key": root}
    # Before the keyring: a rotation that runs puts a KEK there first, and leaves the one before.
    files = {file.stem: _whole(file) for file in sorted((data_dir / "kms-deks").glob("*.json"))}
    with SecretArena(4096) as arena:
        data = (data_dir / "keyring.json").read_bytes()
        unlocked, _ = UnlockedKeyring.open(arena, memoryview(root), data, nonces=NonceSource().next)
        found["keyring key"] = bytes(unlocked.keyring_key.view)
        for kek in unlocked.body.keks:
            if kek.wrapped:
                found[f"KEK {kek.version}"] = bytes(unlocked.kek(kek.version))
                found[f"derived for KEK {kek.version}"] = decryptor.derived(found["keyring key"], kek.wrapped[:12])
        for key in unlocked.body.audit_keys:
            mac_key, seed = unlocked.audit_key(key.version)
            found |= {f"audit key {key.version}": bytes(mac_key), f"checkpoint seed {key.version}": bytes(seed)}
        for key_id, content in files.items():
            record = dek.parse(content, key_id)
            with arena.allocate() as slot:
                dek.unwrap_into(record, unlocked.kek_cipher(record.kek_version), slot.view)
                found[f"DEK {record.id}"] = bytes(slot.view)
            kek_used = found[f"KEK {record.kek_version}"]
            found[f"derived for DEK {record.id}"] = decryptor.derived(kek_used, record.wrapped[:12])
        unlocked.release()
    body, _, _ = decryptor.body_of(data)
    for slot in body["slots"]:
        with contextlib.suppress(decryptor.NotOpenedError):  # a slot of another root key
            opened = decryptor.open_slot(body, slot, root)
            found |= {f"{name} of slot {slot['slot_id']}": key for name, key in opened.secrets.items()}
    return found


def _name_of(task: Path) -> str:
    """Of a thread; empty if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (task / "comm").read_text().strip()
    return ""
