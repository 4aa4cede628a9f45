"""Two hosts of one key service: real daemons, the tables in memory, and what carries changes between both.

Owns: the directories of the two members, their daemons, whose lease takes LEASE_S, and a replicator of each, a thread
that can be paused. It asserts nothing.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from minikms import Client, api
from minikms.api.errors import KmsError
from minikms.crypto import slots
from minikms.crypto.aead import NonceSource
from minikms.custody.replica_file import Mark
from minikms.keys import root_slots
from minikms.keys.keyring import Member
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from minikms.platform.clock import boot_ns
from tests.harness.live_daemon import LiveDaemon
from tests.harness.members import write_mark
from tests.harness.replica_database import ReplicaDatabase, Tables
from tests.harness.small_disks import small_disk
from tests.harness.waiting import wait_until

LAUNCHER = ("-m", "tests.minikms_daemon.replica.hosts")
LEASE_SECOND_NS = 250_000_000
LEASE_S = api.LEASE_SECONDS * LEASE_SECOND_NS / 1e9
STALE_S = LEASE_S * 1.3
AT = "2026-01-01T00:00:00Z"
POLICY = f"""
version = 1
[[grant]]
principals = ["uid:{os.geteuid()}"]
roles = ["create", "encrypt", "decrypt", "monitor", "rotate", "destroy", "unseal", "ship", "replicate"]
threads = ["*"]
"""


class Replicator:
    """Of one host. `run` is a thread; a test that calls the steps itself has it paused."""

    def __init__(self, kms: Client, database: ReplicaDatabase, lock: threading.Lock, renewed: dict[int, float]) -> None:
        self.kms = kms
        self.tables, self.database, self._lock = database.tables, database, lock
        self._renewed = renewed
        """When each term was renewed last, for all hosts."""
        self.member_id = kms.replica_follow(api.ASK_POSITION).member_id
        self.term = 0
        self.asked_ns = 0
        self.paused = threading.Event()
        self.idle = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """It does nothing in the block."""
        self.paused.set()
        self.idle.wait()
        try:
            yield
        finally:
            self.paused.clear()

    def follow(self) -> api.ReplicaPosition:
        position = self.kms.replica_follow(api.ASK_POSITION)
        with self._lock:
            self.tables.seals = max(self.tables.seals, position.seals)
            if position.wants:
                self.tables.wanted = self.member_id
            filled = bool(self.tables.keyring)
            parts = self.tables.parts(position.number, position.tombstones) if filled else []
        for part in parts:
            position = self.kms.replica_follow(part)
        with self._lock:
            self.tables.seals = max(self.tables.seals, position.seals)
        return position

    def take_over(self, position: api.ReplicaPosition) -> None:
        at = Mark(member_id=position.member_id, name="", number=position.number, term=position.term)
        with self._lock:
            if self.database.take_over(at, position.keyring_id, self.tables.term):
                self.term, self.asked_ns = self.tables.term, boot_ns()
                self._renewed[self.term] = time.monotonic()
                self.tables.wanted = ""

    def grant(self, **members: Any) -> api.ReplicaNextAnswer:
        """Grants the lease of the last commit, then makes the next one."""
        with self._lock:
            head = {"term": self.term, "number": self.tables.number, "seals": self.tables.seals}
            wanted = self.tables.wanted or msgspec.UNSET
        request = api.ReplicaNextRequest(**{**head, "asked_ns": self.asked_ns, "wanted": wanted, **members})
        answer = self.kms.replica_next(request)
        asked_ns = boot_ns()
        with self._lock:
            self.tables.seals = max(self.tables.seals, answer.position.seals)
            if self.has_head:
                if answer.release:
                    self.tables.member = ""
                elif answer.commit is None or self.database.commit(self.term, self.member_id, answer.commit):
                    self.asked_ns, self._renewed[self.term] = asked_ns, time.monotonic()
        return answer

    @property
    def has_head(self) -> bool:
        return (self.tables.term, self.tables.member) == (self.term, self.member_id)

    def step(self) -> None:
        if self.has_head and self.grant().position.mode in ("serving", "taking_over"):
            return
        position = self.follow()
        with self._lock:
            stale = time.monotonic() - self._renewed.get(self.tables.term, 0) > STALE_S
            free = not self.tables.member or (stale and not self.has_head)
            mine = self.tables.wanted in ("", self.member_id)
        if position.ready and free and mine and (self.tables.keyring or position.begins):
            self.take_over(position)
        else:
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._over:
            if self.paused.is_set():
                self.idle.set()
                time.sleep(0.01)
                continue
            self.idle.clear()
            try:
                self.step()
            except KmsError:
                time.sleep(0.05)


class Hosts:
    """`a` made the keyring, and fills the tables; `b` joins it. Only `a` has a replicator that runs at first."""

    def __init__(
        self, base: Path, undo: contextlib.ExitStack, *, launcher: tuple[str, ...] = LAUNCHER, forked: bool = True
    ) -> None:
        self.disk_b = undo.enter_context(small_disk(base / "b"))
        self.database, self._lock = ReplicaDatabase(), threading.Lock()
        self._undo = undo
        self._renewed: dict[int, float] = {}
        (base / "policy").mkdir()
        self.policy = policy = base / "policy" / "policy.toml"
        policy.write_text(POLICY)
        flags = ("--policy", str(policy))
        (base / "a").mkdir()
        self.a = undo.enter_context(LiveDaemon(base / "a", "file", *flags, forked=forked, launcher=launcher))
        self.a.stop()
        root = os.urandom(32)
        join(self.a, base / "b" / "data", root)
        self.a.start()
        self.b = undo.enter_context(LiveDaemon(base / "b", "file", *flags, forked=forked, launcher=launcher, root=root))
        self.replicator_a, self.replicator_b = self.replicator(self.a), self.replicator(self.b)

    def replicator(self, daemon: LiveDaemon) -> Replicator:
        kms = self._undo.enter_context(Client(daemon.socket, wait_s=0, timeout_s=30))
        return Replicator(kms, self.database, self._lock, self._renewed)

    def empty_database(self) -> None:
        """As an operator does after a restore of an older one."""
        with self._lock:
            vars(self.database.tables).update(vars(Tables()))

    def client(self) -> Client:
        """Of both, as a message server has it."""
        return Client(f"{self.a.socket},{self.b.socket}", wait_s=30, timeout_s=30)


def join(a: LiveDaemon, data_dir: Path, root: bytes) -> None:
    """Makes the stopped `a` a member, and the directory of another one, whose root key is given."""
    file = a.data_dir / "keyring.json"
    with SecretArena(256) as arena:
        unlocked, slot = UnlockedKeyring.open(arena, memoryview(a.root()), file.read_bytes(), nonces=NonceSource().next)
        body = unlocked.body
        with arena.allocate() as auth:
            slot_id = root_slots.next_slot_id(body)
            new = slots.newcomer(memoryview(root), auth.view, body.keyring_id, slot_id, unlocked.invitation_key())
        added = unlocked.make_slot_for(new, "file", at=AT)
        audit = unlocked.make_member_audit(fill_random, at=AT)
        first = Member("m1", "a", slot.slot_id, AT, body.key_version)
        second = Member(f"m{slot_id[1:]}", "b", slot_id, AT, body.key_version, audit)
        body = root_slots.add_slot(msgspec.structs.replace(body, members=(first, second)), added, at=AT)
        file.write_bytes(unlocked.encode(body))
        unlocked.release()
    shutil.copytree(a.data_dir, data_dir, ignore=shutil.ignore_patterns("minikms-audit*", "*.lock"))
    write_mark(a.data_dir, Mark(member_id=first.member_id, name="a", begins=True))
    write_mark(data_dir, Mark(member_id=second.member_id, name="b"))


@contextlib.contextmanager
def hosts(base: Path) -> Iterator[Hosts]:
    """Both, with `a` serving."""
    with contextlib.ExitStack() as undo:
        both = Hosts(base, undo)
        undo.enter_context(both.replicator_a)
        wait_until(lambda: both.replicator_a.kms.replica_status().mode == "serving")
        undo.enter_context(both.replicator_b)
        yield both


if __name__ == "__main__":
    from minikms.cli import main
    from minikms_daemon.replica import member
    from minikms_daemon.server import lease
    from tests.harness import in_process

    lease.SECOND_NS = LEASE_SECOND_NS  # type: ignore[misc]  # final in production
    api.POLL_SECONDS_MAX = LEASE_S / 10  # type: ignore[misc]  # as above
    member.SEAL_SECONDS_MAX = LEASE_S  # type: ignore[misc]  # as above
    in_process.install()
    sys.argv = ["minikms", *sys.argv[3:]]  # -m minikms, for which this stands
    main()
