"""An auditor in the test's process, beside a real log, a daemon's half of the contract, and real witnesses.

Owns: the log (`tests.minikms.audit.logmaker`), the answers that a daemon gives about it, the witnesses of
`tests.harness.witness` on ports of their own, and starting the auditor anew. Invariant: the tree is computed here from
the lines that were written, never by the code under test. It asserts nothing by itself.
"""

import contextlib
import hashlib
import json
from base64 import b64decode
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from minikms.api import AuditPositionAnswer, DurableLine
from minikms.api.base64 import encode_text
from minikms.api.errors import ConflictError, InvalidRequestError, KmsUnavailableError
from minikms.audit import AuditLog
from minikms.audit.note import parse_checkpoint, parse_note
from minikms.audit.reader import each_segment
from minikms.audit.record import peek_seq
from minikms.memory import SecretArena
from minikms_auditor.auditor import Auditor, Reporter, Status
from minikms_auditor.config import AuditorFiles, Config, parse_config
from minikms_auditor.signers import open_signers
from minikms_auditor.sinks import Shipper
from minikms_auditor.store import AuditorStore
from minikms_auditor.witnesses import Witnesses
from tests.harness import witness as cosigning
from tests.minikms.audit.logmaker import KEY1, Clock, Key, open_log, write_events
from tests.vectors import make_tree

ORIGIN = "kms.example/audit"
SIGNING_KEY = "5a" * 32


class Daemon:
    """What a daemon answers about its log. `durable_seq`, `durable_mac`: None for those of the last line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log: AuditLog | None = None
        self.durable_seq: int | None = None
        self.durable_mac: bytes | None = None
        self.away = False
        self.reports: list[int] = []

    def report_audit_position(self, *, origin: str, log_id: str, seq: int, mac: bytes) -> AuditPositionAnswer:
        if self.away:
            raise KmsUnavailableError("no daemon")
        own = self._lines()
        lines = {peek_seq(line): line[-46:-2].decode() for line in own}
        last = max(lines) if self.durable_seq is None else self.durable_seq
        own_id = str(json.loads(own[0])["event"]["facts"]["log_id"])
        if seq:
            if log_id != own_id:
                raise ConflictError("another log was begun")
            if seq > last or seq not in lines:
                raise ConflictError("not durable")
            if encode_text(mac) != lines[seq]:
                raise InvalidRequestError("another mac")
        self.reports.append(seq)
        durable = DurableLine(last, self.durable_mac or b64decode(lines[last]))
        return AuditPositionAnswer(own_id, durable, KEY1.public_key)

    def _lines(self) -> list[bytes]:
        return [line for file in each_segment(str(self.directory)) for line in file.lines()]


class Rig:
    """Directories below `base`: `log`, `state`, `w1` and so on. `steps` runs the auditor."""

    def __init__(
        self, base: Path, *, witnesses: int = 0, quorum: int | None = None, resubmit_seconds: int = 300
    ) -> None:
        self.base = base
        self.log_dir = base / "log"
        self.state_dir = base / "state"
        self.log_dir.mkdir()
        base.chmod(0o700)
        (base / "auditor.key").write_text(SIGNING_KEY)
        (base / "auditor.key").chmod(0o600)
        self.clock = Clock()
        self.daemon = Daemon(self.log_dir)
        self.kms: Reporter = self.daemon
        self.logged: list[tuple[str, str]] = []
        self.auditor: Auditor | None = None
        self._arena = SecretArena(8)
        self._quorum = witnesses if quorum is None else quorum
        self._names = [f"witness.example/w{number + 1}" for number in range(witnesses)]
        self._servers: dict[str, ThreadingHTTPServer] = {}
        self._vkeys: dict[str, str] = {}
        self._resubmit_seconds = resubmit_seconds
        self.public_keys: list[Key] = [KEY1]
        self._opened = contextlib.ExitStack()
        for name in self._names:
            self.start_witness(name)

    # --- the log ------------------------------------------------------------------------------------------------------

    def write(self, count: int, key: Key = KEY1, *, signed: bool = True, **options: Any) -> None:
        """Add `count` events to the log, and with `signed` a checkpoint after them."""
        log = open_log(self.log_dir, key, clock=self.clock, **options)
        write_events(log, count)
        if signed:
            log.close()
        else:
            log.sync.fdatasync()
            log.abandon()

    def lines(self) -> list[bytes]:
        """Every line of the log, without its newline."""
        return [line for file in each_segment(str(self.log_dir)) for line in file.lines()]

    # --- the auditor --------------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        keys = json.dumps([encode_text(key.public_key) for key in self.public_keys])
        table = "".join(
            f'[[witness]]\nurl = "{url}"\nkey = "{vkey}"\n'
            for url, vkey in (self.witness(name) for name in self._names)
        )
        return (
            f'version = 1\norigin = "{ORIGIN}"\nkms_socket = "s"\nlog_dir = "{self.log_dir}"\n'
            f'state_dir = "{self.state_dir}"\nsigners = ["file:auditor.key"]\npublic_keys = {keys}\n'
            f"quorum = {self._quorum}\nresubmit_seconds = {self._resubmit_seconds}\n{table}"
        ).encode()

    def start(self) -> Self:
        self.stop()
        files = AuditorFiles(self.base / "auditor.toml")
        config = parse_config(self.config(), "auditor.toml")
        opened = self._opened
        signers = open_signers(config.origin, config.signers, files, self._arena)
        opened.callback(signers.close)
        store = AuditorStore(config.state_dir, config.origin)
        opened.callback(store.close)
        witnesses = Witnesses(config.witness, files)
        opened.callback(witnesses.close)
        self.sinks = self.shippers(config, store)
        self.auditor = Auditor(config, store, signers, witnesses, self.kms, log=self.note, sinks=self.sinks)
        opened.callback(self.auditor.close)
        return self

    def note(self, event: str, why: str) -> None:
        self.logged.append((event, why))

    def shippers(self, config: Config, store: AuditorStore) -> Sequence[Shipper]:
        """The sinks of the auditor: none."""
        return ()

    def begin_in_child(self) -> None:
        """After a fork: the memory of the parent's arena is not there, and must not be freed."""
        self._parents_arena, self._arena = self._arena, SecretArena(8)

    def stop(self) -> None:
        self._opened.close()
        self.auditor = None

    def steps(self, count: int = 1) -> Status:
        if self.auditor is None:
            self.start()
        assert self.auditor is not None
        for _ in range(count):
            self.auditor.step()
        return self.auditor.status()

    def vkey(self) -> str:
        signers = open_signers(ORIGIN, ["file:auditor.key"], AuditorFiles(self.base / "auditor.toml"), self._arena)
        try:
            return signers.verifiers[0].text()
        finally:
            signers.close()

    def published(self) -> tuple[int, bytes]:
        """Size and root of the published tree checkpoint; 0 if there is none."""
        path = self.state_dir / "tree" / "checkpoint"
        if not path.exists():
            return 0, b""
        checkpoint = parse_checkpoint(parse_note(path.read_bytes()).text)
        return checkpoint.size, checkpoint.root

    # --- witnesses ----------------------------------------------------------------------------------------------------

    def start_witness(self, name: str) -> None:
        directory = self.base / name.rpartition("/")[2]
        served = cosigning.Witness(str(directory), name, dict([cosigning.parse_vkey(self.vkey())]))
        self._servers[name] = cosigning.serve(served)
        self._vkeys[name] = served.vkey

    def stop_witness(self, name: str) -> None:
        server = self._servers.pop(name)
        server.shutdown()
        server.server_close()

    def witness(self, name: str) -> tuple[str, str]:
        """URL and verifier key."""
        server = self._servers.get(name)
        port = 1 if server is None else server.server_address[1]
        return f"http://127.0.0.1:{port}", self._vkeys[name]

    def known_size(self, name: str) -> int:
        """Of the tree that the witness has cosigned last."""
        path = self.base / name.rpartition("/")[2] / hashlib.sha256(ORIGIN.encode()).hexdigest()
        return int(json.loads(path.read_text())["size"]) if path.exists() else 0

    def close(self) -> None:
        self.stop()
        for name in list(self._servers):
            self.stop_witness(name)
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def root_of(lines: Sequence[bytes]) -> bytes:
    """The root of the tree over audit lines without their newlines."""
    return make_tree.root_of([make_tree.leaf_of(line + b"\n") for line in lines])
