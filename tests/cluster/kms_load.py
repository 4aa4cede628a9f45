"""Clients of the members of a key service, which record what they asked and what they were answered.

Owns: the operations of a mixed load. Each member has a client that asks it all the time, whether it serves or not, so
that a second one that answers is seen. Changes go to the member that serves, and from one to the next until it is
found. Every choice is drawn from a seed. What happens when depends on the machine.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import minikms
from minikms.api import contract
from minikms.api.errors import KmsRefusedError, KmsTimeoutError, KmsUnavailableError
from tests.cluster.kms_history import AWAY, FAULT, OK, WRONG, Call

PROBE_S_MAX: Final = 1.5
"""A decryption at one member. Shorter than a lease, so that one begins soon after a member that stood still goes on."""
CHANGE_S_MAX: Final = 8.0
PROBE_PAUSE_S: Final = 0.02
PAUSE_S_MAX: Final = 0.1
"""Between two operations of another client."""
GIVE_UP_S: Final = 90.0
KEYS_MAX: Final = 200
"""That are used at a time."""
ADMIN_PAUSE_S: Final = 2.0
AWAY_CODES: Final = frozenset(
    {
        contract.CODE_STANDBY, contract.CODE_SEALED, contract.CODE_SHUTTING_DOWN, contract.CODE_INTERRUPTED,
        contract.CODE_STORAGE_UNAVAILABLE, contract.CODE_AUDIT_UNAVAILABLE, contract.CODE_TIMEOUT,
    }
)  # fmt: skip


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Key(NamedTuple):
    key_id: str
    ciphertext: bytes
    plaintext: bytes


class Asked(NamedTuple):
    call: Call
    value: Any


class Client:
    """One thread of the load."""

    def __init__(self, load: Load, seed: str, *, timeout_s: float = CHANGE_S_MAX) -> None:
        self.load = load
        self.random = random.Random(seed)
        self._members = {
            name: minikms.Client(path, server_uids=[load.server_uid], timeout_s=timeout_s, wait_s=0)
            for name, path in load.members.items()
        }

    def close(self) -> None:
        for client in self._members.values():
            client.close()

    def once(
        self,
        kind: str,
        member: str,
        ask: Callable[[minikms.Client], Any],
        key: str = "",
        *,
        wanted: bytes | None = None,
    ) -> Asked:
        """Ask a member, and record it."""
        value: Any = None
        begin = now_s()
        try:
            value = ask(self._members[member])
            outcome = OK if wanted is None or value == wanted else WRONG
        except KmsRefusedError as error:
            outcome = AWAY if error.code in AWAY_CODES else error.code
            if error.code == contract.CODE_INTERNAL:
                self.load.errors.append(f"{kind} by {member} at {begin:.3f} was answered internal")
        except (KmsUnavailableError, KmsTimeoutError):
            outcome = AWAY
        end = now_s()
        made = key or getattr(value, "key_id", "") or getattr(value, "slot_id", "")
        call = Call(kind, member, begin, end, outcome, made, getattr(value, "kek_version", 0))
        self.load.history.append(call)
        return Asked(call, value)

    def do(
        self, kind: str, ask: Callable[[minikms.Client], Any], key: str = "", *, wanted: bytes | None = None
    ) -> Asked:
        """Ask the member that serves, until one answers or it is time to give up."""
        give_up = now_s() + GIVE_UP_S
        while True:
            member = self.load.serving
            asked = self.once(kind, member, ask, key, wanted=wanted)
            if asked.call.outcome != AWAY or now_s() > give_up or self.load.stopping:
                return asked
            self.load.replace(member)
            time.sleep(PAUSE_S_MAX)

    # --- operations ---------------------------------------------------------------------------------------------------
    def probe(self, member: str) -> None:
        if key := self.load.some_key(self.random):
            asked = self.read(key, member)
            if asked.call.outcome == OK:
                self.load.serving = member
        time.sleep(PROBE_PAUSE_S)

    def read(self, key: Key, member: str = "") -> Asked:
        """At this member, or at the one that serves."""

        def ask(client: minikms.Client) -> bytes:
            return client.decrypt(key.key_id, key.ciphertext)

        if member:
            return self.once("decrypt", member, ask, key.key_id, wanted=key.plaintext)
        return self.do("decrypt", ask, key.key_id, wanted=key.plaintext)

    def make(self) -> None:
        begin = now_s()
        made = self.do("create", lambda client: client.create_dek_for_thread(f"t{self.random.randrange(50)}"))
        key_id = made.call.key
        if made.call.outcome != OK:
            return
        plaintext = self.random.randbytes(32)
        encrypted = self.do("encrypt", lambda client: client.encrypt(key_id, plaintext), key_id)
        if encrypted.call.outcome != OK:
            return
        read = self.do("encrypt", lambda client: client.get_key(key_id), key_id)
        if read.call.outcome == OK:  # it was made under the newest version at a moment between
            self.load.history.append(
                Call("kek", read.call.member, begin, read.call.end, version=read.value.kek_version)
            )
        self.load.add(Key(key_id, encrypted.value, plaintext))

    def end(self) -> None:
        """Retire a key, destroy it, and see whether it stays so at each member; and an earlier one."""
        key = self.load.taken(self.random)
        if key is None:
            return
        retired = self.do("retire", lambda client: client.retire_key(key.key_id), key.key_id)
        if retired.call.outcome != OK:
            return
        self.load.ended.append(key)
        for one in (key, self.random.choice(self.load.ended)):
            self._encrypt_late(one.key_id)
        if self.random.random() < 0.3:
            return  # it stays retired
        self.do("destroy", lambda client: client.destroy_key(key.key_id), key.key_id)
        for member in self.load.members:
            self.read(key, member)

    def _encrypt_late(self, key_id: str) -> None:
        self.do("encrypt", lambda client: client.encrypt(key_id, b"too late"), key_id)

    def administer(self) -> None:
        """A rotation of the KEK; a root key that is added, opens, and is removed sometimes."""
        self.do("rotate", lambda client: client.rotate_kek(wait=False, timeout_s=CHANGE_S_MAX))
        time.sleep(ADMIN_PAUSE_S)
        root = secrets.token_hex(32)
        added = self.do("add_root", lambda client: client.add_root(root, provider="test"))
        if added.call.outcome == OK:
            slot = added.call.key
            self.do("test_root", lambda client: client.test_root(slot, root), slot)
            time.sleep(ADMIN_PAUSE_S)
            self.do("test_root", lambda client: client.test_root(slot, root), slot)
            self.do("remove_root", lambda client: client.remove_root(slot), slot)
        time.sleep(ADMIN_PAUSE_S)


class Load:
    """What the clients share. `members`: the socket of each, by its name. `server_uid`: who serves it."""

    def __init__(self, members: Mapping[str, Path], seed: int, *, server_uid: int) -> None:
        self.members = dict(members)
        self.server_uid = server_uid
        self.history: list[Call] = []
        self.errors: list[str] = []
        self.serving = next(iter(self.members))
        self._seed = seed
        self._keys: list[Key] = []
        self.ended: list[Key] = []
        self._made: list[Key] = []
        self._all: list[Key] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def replace(self, member: str) -> None:
        """It does not serve."""
        with self._lock:
            if self.serving == member:
                names = list(self.members)
                self.serving = names[(names.index(member) + 1) % len(names)]

    def add(self, key: Key) -> None:
        with self._lock:
            self._all.append(key)
            self._made.append(key)
            self._keys = [*self._keys, key][-KEYS_MAX:]

    def some_key(self, drawn: random.Random) -> Key | None:
        with self._lock:
            return drawn.choice(self._keys) if self._keys else None

    def taken(self, drawn: random.Random) -> Key | None:
        """One that this client alone changes. It is still used."""
        with self._lock:
            if len(self._made) < 2:
                return None
            return self._made.pop(drawn.randrange(len(self._made)))

    @contextlib.contextmanager
    def fault(self, name: str) -> Iterator[None]:
        begin = now_s()
        yield
        self.history.append(Call(FAULT + name, "", begin, now_s()))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The clients run during the block. Afterwards each key is opened once more."""
        turns: list[tuple[str, Callable[[Client], None], float]] = [
            (f"probe {name}", partial(Client.probe, member=name), PROBE_S_MAX) for name in self.members
        ]
        turns += [(f"make {number}", Client.make, CHANGE_S_MAX) for number in range(2)]
        turns += [("end", Client.end, CHANGE_S_MAX), ("administer", Client.administer, CHANGE_S_MAX)]
        workers = [threading.Thread(target=self._work, args=turn) for turn in turns]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        self._stop.clear()
        last = Client(self, "last")
        for key in self._all:
            if last.read(key).call.outcome == AWAY:
                self.errors.append("no member serves at the end")
                break
        last.close()

    def _work(self, name: str, turn: Callable[[Client], None], timeout_s: float) -> None:
        client = Client(self, f"{self._seed} {name}", timeout_s=timeout_s)
        try:
            while not self.stopping:
                turn(client)
                if not name.startswith("probe"):
                    time.sleep(client.random.uniform(0, PAUSE_S_MAX))
        except Exception as error:  # noqa: BLE001  the thread would end unseen
            self.errors.append(f"{name}: {error!r}")
        finally:
            client.close()
