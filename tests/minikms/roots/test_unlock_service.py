"""The key service's side of a hand-over: who is asked, what is taken as an answer, and what stays in the arena."""

import asyncio
import functools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.memory.arena import SecretArena
from minikms.processes import handover
from minikms.processes.handover import KEY, TEXT_BYTES_MAX, Question
from minikms.roots import unlock_service
from minikms.roots.providers import RootAwayError, RootRefusedError
from minikms.roots.unlock_service import ReceivedKey, UnlockService
from tests.harness.unlocking import AWAY, REFUSED, UnlockListener, half_sent

ROOT = os.urandom(32)


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with SecretArena(64) as made:
        yield made
        assert made.in_use == 0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[UnlockListener]:
    with UnlockListener(tmp_path / "s", KEY + ROOT) as made:
        yield made


@functools.cache
def keyring_id() -> str:
    return "kr_0123456789abcdef"


def service(listener: UnlockListener, uid: int | None = None) -> UnlockService:
    return UnlockService(str(listener.path), frozenset({os.geteuid() if uid is None else uid}), keyring_id)


def test_the_root_key_comes_for_the_keyring_that_is_named(listener: UnlockListener, arena: SecretArena) -> None:
    with service(listener).read(arena) as slot:
        assert bytes(slot.view) == ROOT
    assert listener.asked == [Question("start", "kr_0123456789abcdef")]


def test_a_key_that_comes_in_parts_is_put_together(listener: UnlockListener, arena: SecretArena) -> None:
    sent, rest = threading.Event(), threading.Event()
    rest.set()
    listener.answer = half_sent(ROOT, sent, rest)
    with service(listener).read(arena) as slot:
        assert bytes(slot.view) == ROOT


def test_a_full_queue_of_the_listener_is_no_absence(
    tmp_path: Path, arena: SecretArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every member of its group can fill it."""
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as other:
        full.bind(str(tmp_path / "s"))
        full.listen(0)
        other.connect(str(tmp_path / "s"))

        def serve() -> None:
            full.accept()[0].close()
            with full.accept()[0] as connection:
                connection.recv(handover.QUESTION_BYTES_MAX)
                connection.sendall(KEY + ROOT)

        serving, sleep = threading.Thread(target=serve, daemon=True), asyncio.sleep

        async def pause(seconds: float) -> None:
            if serving.ident is None:
                serving.start()
            await sleep(seconds)

        monkeypatch.setattr(asyncio, "sleep", pause)
        asked = UnlockService(str(tmp_path / "s"), frozenset({os.geteuid()}), keyring_id)
        with asked.read(arena) as slot:
            assert bytes(slot.view) == ROOT
        serving.join()


def test_nothing_is_sent_to_a_listener_of_another_user(listener: UnlockListener, arena: SecretArena) -> None:
    own = os.geteuid()
    with pytest.raises(RootAwayError, match=rf"^uid {own} listens at .* expected is uid 77 .*nothing was sent"):
        service(listener, 77).read(arena)
    with pytest.raises(RootAwayError):
        service(listener, 78).read(arena)
    assert set(listener.asked) <= {None}  # the end of a connection, without a byte


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        KEY,
        KEY + ROOT[:31],
        KEY + ROOT + b"\0",
        KEY + os.urandom(1 << 20),
        b"\xff" + ROOT,
        b"\0" * 33,
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\xff" + os.urandom(1 << 20),
    ],
    ids=["none", "no key", "short", "long", "1 MB", "no kind", "zeros", "http", "garbage"],
)
def test_any_other_answer_is_no_key_and_no_refusal(listener: UnlockListener, arena: SecretArena, answer: bytes) -> None:
    listener.answer = answer
    with pytest.raises(RootAwayError):
        service(listener).read(arena)


def test_a_refusal_differs_from_an_absence_with_its_sentence(listener: UnlockListener, arena: SecretArena) -> None:
    listener.answer = REFUSED
    with pytest.raises(RootRefusedError, match=r"provider refuses the root key: AccessDeniedException$"):
        service(listener).read(arena)
    listener.answer = AWAY
    with pytest.raises(RootAwayError, match=r"has no root key now: the token is not plugged in$"):
        service(listener).read(arena)
    listener.answer = handover.AWAY + b"\x1b[2J" + b"x" * (1 << 20)
    with pytest.raises(RootAwayError) as away:
        service(listener).read(arena)
    assert "\x1b" not in str(away.value) and len(str(away.value)) < 2 * TEXT_BYTES_MAX


def test_bytes_that_drip_do_not_extend_the_time(
    listener: UnlockListener, arena: SecretArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of a key nor those of a refusal, which counts when it is whole only."""
    monkeypatch.setattr(unlock_service, "ANSWER_SECONDS_MAX", 0.2)
    ended = threading.Event()

    def drip(first: bytes, connection: socket.socket) -> None:
        connection.sendall(first)
        while not ended.wait(0.02):
            connection.sendall(b"x")

    for first in (KEY, handover.REFUSED):
        listener.answer = functools.partial(drip, first)
        with pytest.raises(RootAwayError, match="no whole answer"):
            service(listener).read(arena)
    ended.set()


def test_a_socket_that_nobody_serves_is_away(tmp_path: Path, arena: SecretArena) -> None:
    with UnlockListener(tmp_path / "s") as closed:
        source = service(closed)
    with pytest.raises(RootAwayError, match=r"no unlock service answers at .*: Connection refused"):
        source.read(arena)
    os.unlink(tmp_path / "s")
    with pytest.raises(RootAwayError, match="No such file"):
        source.read(arena)


async def test_a_seal_leaves_no_half_of_a_key(listener: UnlockListener) -> None:
    """The arena is zeroed while the answer is half sent; the other half goes nowhere."""
    sent, rest = threading.Event(), threading.Event()
    listener.answer = half_sent(ROOT, sent, rest)
    with SecretArena(64) as arena:
        asking = asyncio.ensure_future(service(listener).ask("start", arena))
        await asyncio.to_thread(sent.wait)
        await asyncio.sleep(0.05)
        arena.zero_all()
        rest.set()
        with pytest.raises(RootAwayError, match="seal has interrupted"):
            await asking
        slots = [arena.allocate() for _ in range(arena.slots)]
        assert not any(any(slot.view) for slot in slots)


@pytest.mark.uvloop
async def test_an_answer_in_the_turn_of_its_cancellation_is_no_error(tmp_path: Path, arena: SecretArena) -> None:
    """As when a request to seal and the root key come together."""
    stray: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: stray.append(context))
    asking: asyncio.Task[ReceivedKey]
    sealing, sealed = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listening, sealing, sealed:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        loop.add_reader(sealed, lambda: asking.cancel())  # noqa: PLW0108  it is made below
        await asyncio.sleep(0)  # so that it is looked at first
        source = UnlockService(str(tmp_path / "s"), frozenset({os.geteuid()}), keyring_id)
        asking = loop.create_task(source.ask("start", arena))
        await asyncio.sleep(0.01)
        with listening.accept()[0] as answering:
            sealing.send(b"x")
            answering.send(KEY)
            with pytest.raises(asyncio.CancelledError):
                await asking
        loop.remove_reader(sealed)
    assert stray == []


def test_it_makes_no_keyring(listener: UnlockListener, arena: SecretArena) -> None:
    with pytest.raises(StartError, match="minikms init"):
        service(listener).prepare(arena, new_keyring=True)
    assert listener.asked == []
