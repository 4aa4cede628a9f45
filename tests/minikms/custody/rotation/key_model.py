"""A model of the key service, and an operator who uses a real one in random order.

Owns: what a client may expect after any sequence of creates, records, replacements, retirements, destructions, both
forms of rotation, prunings, restarts and kills, also in the middle of each. Invariants: the model is a dict of keys and
a list of records. An acknowledged change holds for ever. A change that a kill interrupted may have happened or not; it
is looked up once after the restart. Every other answer of the daemon must match the model.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import minikms
from minikms.api.errors import (
    ConflictError,
    DecryptionError,
    KeyDestroyedError,
    KeyRetiredError,
    KmsError,
    KmsRefusedError,
)
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from minikms_daemon.rotation import PACES
from tests.harness.scripts import verify_audit
from tests.minikms.custody.rotation.crash_points import Daemon, wait_until_settled

T = TypeVar("T")

THREADS = ("t0", "t1", "t2")
KILL_WITHIN_SECONDS = 0.03


@dataclass
class Key:
    thread_id: str
    state: str = "active"


@dataclass
class Record:
    key_id: str
    sealed: bytes
    plaintext: bytes
    aad: bytes


@dataclass
class Run:
    """One daemon, one model, one sequence of steps."""

    base: Path
    seed: int
    keys: dict[str, Key] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        (self.base / "key").touch(0o600)
        self.roots = [os.urandom(32).hex()]  # those that may open the keyring, newest last
        self._write_root(self.roots[0])
        self.daemon = Daemon(self.base)
        assert self.daemon.start(), self.daemon.log()
        self.client = self.daemon.client(wait_s=5.0)

    def go(self, steps: int) -> None:
        """Raises AssertionError, naming the seed and the steps so far."""
        moves = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        weights = [WEIGHTS.get(move.__name__, 1) for move in moves]
        try:
            for _ in range(steps):
                [move] = self.random.choices(moves, weights)
                self.trace.append(move.__name__)
                move()
            self.check()
            self.client.close()
            self.daemon.stop()
            verify_audit(self.base / "data", self.daemon.key_file)
        except (AssertionError, KmsError) as error:
            raise AssertionError(f"seed {self.seed}, after {self.trace}: {error!r}") from error
        finally:
            self.client.close()
            self.daemon.kill()

    # --- keys -----------------------------------------------------------------------------------------------------

    def do_create(self) -> None:
        thread_id = self.random.choice(THREADS)
        created = self.client.create_dek_for_thread(thread_id)
        assert created.key_id not in self.keys
        self.keys[created.key_id] = Key(thread_id)

    def do_replace(self) -> None:
        old = self._some("active", "retired")
        if old is not None:
            thread_id = self.keys[old].thread_id
            new = self.client.create_dek_for_thread(thread_id, replaces=old).key_id
            self.keys[old].state = "retired"
            self.keys[new] = Key(thread_id)

    def do_retire(self) -> None:
        key_id = self._some("active", "retired", "destroyed")
        if key_id is None:
            return
        if self.keys[key_id].state == "destroyed":
            self._expect(KeyDestroyedError, lambda: self.client.retire_key(key_id))
        else:
            assert self.client.retire_key(key_id).state == "retired"
            self.keys[key_id].state = "retired"

    def do_destroy(self) -> None:
        key_id = self._some("active", "retired", "destroyed")
        if key_id is None:
            return
        if self.keys[key_id].state == "active":
            self._expect(ConflictError, lambda: self.client.destroy_key(key_id))
        else:
            assert self.client.destroy_key(key_id).state == "destroyed"
            self.keys[key_id].state = "destroyed"

    # --- records --------------------------------------------------------------------------------------------------

    def do_encrypt(self) -> None:
        key_id = self._some("active", "retired", "destroyed")
        if key_id is None:
            return
        plaintext, aad = self.random.randbytes(20), self.random.randbytes(3)
        if self.keys[key_id].state == "active":
            sealed = self.client.encrypt(key_id, plaintext, aad=aad, thread_id=self.keys[key_id].thread_id)
            self.records.append(Record(key_id, sealed, plaintext, aad))
        else:
            wrong = KeyRetiredError if self.keys[key_id].state == "retired" else KeyDestroyedError
            self._expect(wrong, lambda: self.client.encrypt(key_id, plaintext))

    def do_encrypt_batch(self) -> None:
        key_ids = self.random.choices(list(self.keys), k=10) if self.keys else []
        items = [EncryptItem(key_id=key_id, plaintext=self.random.randbytes(9), aad=b"b") for key_id in key_ids]
        for item, outcome in zip(items, self.client.encrypt_batch(items), strict=True):
            if self.keys[item.key_id].state == "active":
                assert isinstance(outcome, bytes), outcome
                self.records.append(Record(item.key_id, outcome, item.plaintext, item.aad))
            else:
                assert isinstance(outcome, KeyRetiredError | KeyDestroyedError), outcome

    def do_reencrypt(self) -> None:
        target = self._some("active")
        sources = [
            key_id
            for key_id, key in self.keys.items()
            if target is not None and key.state != "destroyed" and key.thread_id == self.keys[target].thread_id
        ]
        if target is None or not sources:
            return
        source = self.random.choice(sources)
        moved = [record for record in self.records if record.key_id == source][:20]
        items = [ReencryptItem(ciphertext=record.sealed, aad=record.aad) for record in moved]
        for record, outcome in zip(moved, self.client.reencrypt_batch(source, target, items), strict=True):
            assert isinstance(outcome, bytes), outcome
            self.records.append(Record(target, outcome, record.plaintext, record.aad))

    def do_check_batch(self) -> None:
        """Of one key: its own records open, another's do not."""
        key_id = self._some("active", "retired", "destroyed")
        if key_id is None:
            return
        asked = self.random.sample(self.records, min(20, len(self.records)))
        asked += [record for record in self.records if record.key_id == key_id][:20]
        items = [ReencryptItem(ciphertext=record.sealed, aad=record.aad) for record in asked]
        if self.keys[key_id].state == "destroyed" and items:
            self._expect(KeyDestroyedError, lambda: self.client.check_batch(key_id, items))
            return
        verdicts = self.client.check_batch(key_id, items, thread_id=self.keys[key_id].thread_id)
        for record, verdict in zip(asked, verdicts, strict=True):
            assert isinstance(verdict, type(None) if record.key_id == key_id else DecryptionError), verdict

    def do_check(self) -> None:
        self.check()

    # --- KEK and root key -----------------------------------------------------------------------------------------

    def do_rotate(self) -> None:
        self._let_a_root_rotation_end()
        priority = self.random.choice((None, *PACES))
        self.client.rotate_kek(verify=self._samples(), priority=priority)

    def do_rotate_root(self) -> None:
        wait_until_settled(self.client)
        new = os.urandom(32).hex()
        self.client.rotate_kek(new_kek_hex=new)
        self.roots.append(new)

    def do_begin_rotation(self) -> None:
        self._let_a_root_rotation_end()
        self.client.rotate_kek(wait=False)

    def _let_a_root_rotation_end(self) -> None:
        """A rotation of the KEK alone joins one like it that runs, but is refused while the root changes too."""
        if len(self.roots) > 1:
            wait_until_settled(self.client)

    def do_prune(self) -> None:
        wait_until_settled(self.client)
        self.client.prune_kek(backups=self.random.random() < 0.7)

    # --- starts and kills -----------------------------------------------------------------------------------------

    def do_restart(self) -> None:
        self.client.close()
        self.daemon.stop()
        self._start()

    def do_kill(self) -> None:
        self.client.close()
        self.daemon.kill()
        self._start()

    def do_kill_while_creating(self) -> None:
        thread_id = self.random.choice(THREADS)
        created = self._killed_during(lambda client: client.create_dek_for_thread(thread_id))
        if created is not None:
            self.keys[created.key_id] = Key(thread_id)

    def do_kill_while_replacing(self) -> None:
        old = self._some("active")
        if old is None:
            return
        thread_id = self.keys[old].thread_id
        created = self._killed_during(lambda client: client.create_dek_for_thread(thread_id, replaces=old))
        if created is not None:
            self.keys[created.key_id] = Key(thread_id)
            self.keys[old].state = "retired"
        self._look_up(old, created is not None)

    def do_kill_while_retiring(self) -> None:
        key_id = self._some("active")
        if key_id is not None:
            done = self._killed_during(lambda client: client.retire_key(key_id))
            if done is not None:
                self.keys[key_id].state = "retired"
            self._look_up(key_id, done is not None)

    def do_kill_while_destroying(self) -> None:
        key_id = self._some("retired")
        if key_id is not None:
            done = self._killed_during(lambda client: client.destroy_key(key_id))
            if done is not None:
                self.keys[key_id].state = "destroyed"
            self._look_up(key_id, done is not None)

    def do_kill_while_rotating(self) -> None:
        self._killed_during(lambda client: client.rotate_kek())

    def do_kill_while_rotating_the_root(self) -> None:
        wait_until_settled(self.client)
        new = os.urandom(32).hex()
        self.roots.append(new)  # it may open from now on
        self._killed_during(lambda client: client.rotate_kek(new_kek_hex=new))

    def do_kill_while_pruning(self) -> None:
        wait_until_settled(self.client)
        self._killed_during(lambda client: client.prune_kek(backups=True))

    # --- judging --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every record is readable or gone as it should be, and the listing is the model."""
        items = [DecryptItem(key_id=record.key_id, ciphertext=record.sealed, aad=record.aad) for record in self.records]
        for record, outcome in zip(self.records, self.client.decrypt_batch(items), strict=True):
            if self.keys[record.key_id].state == "destroyed":
                assert isinstance(outcome, KeyDestroyedError), outcome
            else:
                assert outcome == record.plaintext, outcome
        listed = self._listed()
        expected = {key_id: key.state for key_id, key in self.keys.items() if key.state != "destroyed"}
        # Beside those that were answered, keys may exist whose answer a kill cut off.
        assert expected.items() <= listed.items(), (expected, listed)
        assert not any(self.keys[key_id].state == "destroyed" for key_id in listed.keys() & self.keys.keys())
        told = self.client.status()
        assert told.keys.unreadable == 0, told.keys

    def _listed(self) -> dict[str, str]:
        deadline = time.monotonic() + 60
        while True:
            listed: dict[str, str] = {}
            page = self.client.list_keys(limit=self.random.randint(1, 20))
            listed |= {key.key_id: key.state for key in page.keys}
            complete = not page.indexing
            while page.next_cursor is not None:
                page = self.client.list_keys(cursor=page.next_cursor)
                listed |= {key.key_id: key.state for key in page.keys}
            if complete:
                return listed
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _samples(self) -> list[DecryptItem]:
        alive = [record for record in self.records if self.keys[record.key_id].state != "destroyed"]
        chosen = self.random.sample(alive, min(5, len(alive)))
        return [DecryptItem(key_id=record.key_id, ciphertext=record.sealed, aad=record.aad) for record in chosen]

    # --- helpers --------------------------------------------------------------------------------------------------

    def _some(self, *states: str) -> str | None:
        fitting = [key_id for key_id, key in self.keys.items() if key.state in states]
        return self.random.choice(fitting) if fitting else None

    def _expect(self, kind: type[KmsRefusedError], call: Callable[[], object]) -> None:
        try:
            result = call()
        except kind:
            return
        raise AssertionError(f"{kind.__name__} was expected, not {result!r}")

    def _killed_during(self, call: Callable[[minikms.Client], T]) -> T | None:
        """What `call` answered, None if it did not: the daemon is killed while it is under way, and started again."""
        answers: list[T] = []

        def perform() -> None:
            with minikms.Client(self.base / "s", wait_s=0) as client:
                try:
                    answers.append(call(client))
                except KmsError:
                    return

        thread = threading.Thread(target=perform)
        thread.start()
        time.sleep(self.random.random() * KILL_WITHIN_SECONDS)
        self.client.close()
        self.daemon.kill()
        thread.join()
        self._start()
        return answers[0] if answers else None

    def _look_up(self, key_id: str, acknowledged: bool) -> None:
        """After a kill: takes the state of the key into the model, and checks it against what was acknowledged."""
        self._listed()  # what the scan of a start finishes is finished then
        try:
            state: str = self.client.get_key(key_id).state
        except KeyDestroyedError:
            state = "destroyed"
        assert state == self.keys[key_id].state or not acknowledged, f"{key_id} is {state}"
        order = ("active", "retired", "destroyed")
        assert order.index(state) - order.index(self.keys[key_id].state) in (0, 1)
        self.keys[key_id].state = state

    def _start(self) -> None:
        """With one of the root keys that an operator may still have; the newest that opens is kept in mind."""
        tries = [*self.roots] if self.random.random() < 0.5 else self.roots[::-1]
        for root in tries:
            self._write_root(root)
            if self.daemon.start():
                break
        else:
            raise AssertionError(f"no root key opens: {self.daemon.log()}")
        self.client = self.daemon.client(wait_s=5.0)
        told = self.client.status()
        if len(told.root.slots) == 1 and told.rotation is None:
            self.roots = [(self.base / "key").read_text().strip()]

    def _write_root(self, root: str) -> None:
        (self.base / "key").write_text(root + "\n")


WEIGHTS = {
    "do_create": 6,
    "do_encrypt": 6,
    "do_encrypt_batch": 4,
    "do_replace": 3,
    "do_retire": 2,
    "do_reencrypt": 3,
    "do_rotate": 3,
    "do_begin_rotation": 2,
    "do_check_batch": 2,
    "do_check": 2,
}
