"""The root key source `unlock:SOCKET`: the unlock service hands the root key over.

Owns: the key service's side of `minikms.processes.handover`, for a command that waits and for the event loop of the
daemon, and what each failure is called. Invariants: nothing is sent before the uid of the listener was checked; the
root key goes from the socket straight into the arena; an exchange ends after ANSWER_SECONDS_MAX, however its bytes
arrive; only a whole answer of the service itself counts as a refusal. It must never keep the root key.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from minikms.api.errors import StartError
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
from minikms.processes.peer import read_peer
from minikms.roots.providers import GivenKey, RootAwayError, RootProvider, RootRefusedError

CONNECT_PAUSE_SECONDS: Final = 0.02
"""Between two tries to connect while the queue of the listener is full."""


@dataclass(frozen=True)
class ReceivedKey(GivenKey):
    """A root key that the unlock service gave, when it was asked at `asked_ns` of `clock.boot_ns`."""

    name: ClassVar[str] = "unlock"
    if_wrong: ClassVar[str] = (
        "The unlock service has wrapped another root key: put the root.json back that was made for this keyring, or "
        "start with another source"
    )
    asked_ns: int


@dataclass(frozen=True)
class UnlockService(RootProvider):
    """`uids`: who may listen on the socket at `path`. `keyring_id` reads the id of the keyring, for the question."""

    name: ClassVar[str] = "unlock"
    path: str
    uids: frozenset[int]
    keyring_id: Callable[[], str]

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        if new_keyring:
            raise StartError("the unlock service opens a keyring that exists: make one with `minikms init`")

    def read(self, arena: SecretArena) -> SecretSlot:
        """For a command, which waits. Raises as `ask`."""
        return asyncio.run(self.ask("start", arena)).slot

    async def ask(self, purpose: Purpose, arena: SecretArena) -> ReceivedKey:
        """The caller releases the slot. Raises RootAwayError, RootRefusedError, and StartError for the keyring."""
        asked_ns = clock.boot_ns()
        question = Question(purpose, self.keyring_id()).encode()
        slot = arena.allocate()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                async with asyncio.timeout(ANSWER_SECONDS_MAX):
                    await self._connect(connection)
                    await _exchange(connection, question, slot)
        except BaseException as error:
            slot.release()
            if isinstance(error, OSError):
                why = os.strerror(error.errno) if error.errno else f"no whole answer within {ANSWER_SECONDS_MAX:.0f} s"
                raise RootAwayError(f"no unlock service answers at {self.path}: {why}") from None
            raise
        return ReceivedKey(slot, asked_ns)

    async def _connect(self, connection: socket.socket) -> None:
        """To a listener that may be asked. Raises RootAwayError, OSError."""
        connection.setblocking(False)  # connect(2) on a Unix socket connects at once, or fails
        while True:
            try:
                connection.connect(self.path)
                break
            except BlockingIOError:  # the listener's queue is full: a member of its group could keep it so for long
                await asyncio.sleep(CONNECT_PAUSE_SECONDS)
        uid = read_peer(connection).uid
        if uid not in self.uids:
            expected = " or ".join(map(str, sorted(self.uids)))
            raise RootAwayError(
                f"uid {uid} listens at {self.path}, expected is uid {expected} (--unlock-uids); nothing was sent"
            )


async def _exchange(connection: socket.socket, question: bytes, slot: SecretSlot) -> None:
    """Asks, and reads the root key into the slot."""
    if connection.send(question) != len(question):
        raise RootAwayError("the unlock service takes no question")
    kind = bytearray(1)
    await _received(connection, lambda: memoryview(kind))
    if kind == KEY:
        size = 0
        while size < SLOT_BYTES and (count := await _received(connection, lambda: slot.view, size)):
            size += count
        if size < SLOT_BYTES or await _received(connection, lambda: memoryview(kind)):
            raise RootAwayError("the answer of the unlock service does not have the length of a root key")
        return
    text, part = bytearray(), bytearray(TEXT_BYTES_MAX)
    while len(text) < TEXT_BYTES_MAX and (count := await _received(connection, lambda: memoryview(part))):
        text += part[:count]
    if kind == REFUSED:
        raise RootRefusedError(f"the provider refuses the root key: {parse_sentence(bytes(text))}")
    if kind == AWAY:
        raise RootAwayError(f"the unlock service has no root key now: {parse_sentence(bytes(text))}")
    raise RootAwayError("the unlock service has ended the connection, or its answer is none of this version")


async def _received(connection: socket.socket, into: Callable[[], memoryview], start: int = 0) -> int:
    """The number of bytes that have come, 0 at the end. No slice of `into` is kept over a wait: see the arena."""
    while True:
        try:
            return connection.recv_into(into()[start:])
        except BlockingIOError:
            await _readable(connection)
        except ValueError:  # of a released view
            raise RootAwayError("a seal has interrupted the question to the unlock service") from None


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()

    def reads() -> None:
        loop.remove_reader(connection.fileno())
        if not came.done():  # cancelled in the same turn
            came.set_result(None)

    loop.add_reader(connection.fileno(), reads)
    try:
        await came
    finally:
        loop.remove_reader(connection.fileno())
