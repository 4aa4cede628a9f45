"""The root key source `unlock:SOCKET`: the unlock service hands the root key over.

Owns: the key service's side of `minikms.processes.handover`, for a command that waits and for the event loop of the
daemon, and what each failure is called. Invariants: nothing is sent before the uid of the listener was checked; the
root key goes from the socket straight into the arena; an exchange ends after ANSWER_SECONDS_MAX, however its bytes
arrive; only a whole answer of the service itself counts as a refusal. It must never keep the root key.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from minikms.api.errors import StartError, StartLaterError
from minikms.client.connecting import server_uid
from minikms.keys import keyring
from minikms.memory.arena import SLOT_BYTES, SecretArena, SecretSlot
from minikms.platform import clock
from minikms.processes.handover import (
    ANSWER_SECONDS_MAX,
    AWAY,
    KEY,
    REFUSED,
    TEXT_BYTES_MAX,
    Purpose,
    Question,
    parse_sentence,
)
from minikms.roots.providers import GivenKey, RootProvider

_TOO_LATE: Final = f"the unlock service has given no whole answer within {ANSWER_SECONDS_MAX:.0f} s"


class RootAwayError(StartLaterError):
    """There is no root key now, and it is not known whether the provider would refuse it."""


class RootRefusedError(StartLaterError):
    """The provider itself has refused the root key, as the unlock service says."""


@dataclass(frozen=True)
class ReceivedKey(GivenKey):
    """A root key that the unlock service gave, when it was asked at `asked_ns` of `clock.boot_ns`."""

    name: ClassVar[str] = "unlock"
    asked_ns: int


@dataclass(frozen=True)
class UnlockService(RootProvider):
    """`uids`: who may listen on the socket at `path`. `keyring_file` reads the keyring, whose id the question names."""

    name: ClassVar[str] = "unlock"
    path: str
    uids: frozenset[int]
    keyring_file: Callable[[], bytes]

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        if new_keyring:
            raise StartError("the unlock service opens a keyring that exists: make one with `minikms init`")

    def read(self, arena: SecretArena) -> SecretSlot:
        """For a command: blocks. Raises RootAwayError, RootRefusedError, and StartError for the keyring."""
        until_s = time.monotonic() + ANSWER_SECONDS_MAX
        with self._asked("start") as (connection, question), _slot(arena) as slot:
            readable = select.poll()
            readable.register(connection, select.POLLIN)
            for _ in _exchange(connection, question, slot):
                if not readable.poll(max(0.0, until_s - time.monotonic()) * 1000):
                    raise RootAwayError(_TOO_LATE)
        return slot

    async def ask(self, purpose: Purpose, arena: SecretArena) -> ReceivedKey:
        """For the daemon: its event loop goes on meanwhile. The caller releases the slot. Raises as `read`."""
        asked_ns = clock.boot_ns()
        with self._asked(purpose) as (connection, question), _slot(arena) as slot:
            try:
                async with asyncio.timeout(ANSWER_SECONDS_MAX):
                    for _ in _exchange(connection, question, slot):
                        await _readable(connection)
            except TimeoutError:
                raise RootAwayError(_TOO_LATE) from None
        return ReceivedKey(slot, asked_ns)

    @contextlib.contextmanager
    def _asked(self, purpose: Purpose) -> Iterator[tuple[socket.socket, bytes]]:
        """A connection to a listener that was checked, and what to ask. Errors of the socket become RootAwayError."""
        question = Question(purpose, keyring.parse_file(self.keyring_file())[0].keyring_id).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.setblocking(False)  # connect(2) on a Unix socket connects at once, or fails
                connection.connect(self.path)
                uid = server_uid(connection)
                if uid not in self.uids:
                    expected = " or ".join(map(str, sorted(self.uids)))
                    raise RootAwayError(
                        f"uid {uid} listens at {self.path}, expected is uid {expected} (--unlock-uids); nothing was "
                        "sent"
                    )
                yield connection, question
            except OSError as error:
                why = os.strerror(error.errno) if error.errno else "no reason known"
                raise RootAwayError(f"no unlock service answers at {self.path}: {why}") from None


@contextlib.contextmanager
def _slot(arena: SecretArena) -> Iterator[SecretSlot]:
    """A slot, which stays if the block ends without an error."""
    slot = arena.allocate()
    try:
        yield slot
    except BaseException:
        slot.release()
        raise


def _exchange(connection: socket.socket, question: bytes, slot: SecretSlot) -> Generator[None, None, None]:
    """Asks, and reads the root key into the slot. It goes on each time that the connection is readable."""
    if connection.send(question) != len(question):
        raise RootAwayError("the unlock service takes no question")
    kind = bytearray(1)
    yield from _received(connection, lambda: memoryview(kind))
    if kind == KEY:
        size = 0
        while size < SLOT_BYTES and (count := (yield from _received(connection, lambda: slot.view, size))):
            size += count
        if size < SLOT_BYTES or (yield from _received(connection, lambda: memoryview(kind))):
            raise RootAwayError("the answer of the unlock service does not have the length of a root key")
        return
    text, part = bytearray(), bytearray(TEXT_BYTES_MAX)
    while len(text) < TEXT_BYTES_MAX and (count := (yield from _received(connection, lambda: memoryview(part)))):
        text += part[:count]
    if kind == REFUSED:
        raise RootRefusedError(f"the provider refuses the root key: {parse_sentence(bytes(text))}")
    if kind == AWAY:
        raise RootAwayError(f"the unlock service has no root key now: {parse_sentence(bytes(text))}")
    raise RootAwayError("the unlock service has ended the connection, or its answer is none of this version")


def _received(connection: socket.socket, into: Callable[[], memoryview], start: int = 0) -> Generator[None, None, int]:
    """The number of bytes that have come, 0 at the end. No slice of `into` is kept over a wait: see the arena."""
    while True:
        try:
            return connection.recv_into(into()[start:])
        except BlockingIOError:
            yield
        except ValueError:  # of a released view
            raise RootAwayError("a seal has interrupted the question to the unlock service") from None


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()

    def reads() -> None:
        loop.remove_reader(connection.fileno())
        came.set_result(None)

    loop.add_reader(connection.fileno(), reads)
    try:
        await came
    finally:
        loop.remove_reader(connection.fileno())
