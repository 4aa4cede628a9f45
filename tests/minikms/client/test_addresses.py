"""Several addresses of one key service: which one gets a call, and what the caller learns if none serves."""

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from minikms.api import errors
from minikms.client import AsyncClient, Client, EncryptItem, connecting
from minikms.client.addresses import ADDRESSES_COUNT_MAX, Addresses, Rounds, split
from minikms.client.base import CREATING_CONNECTIONS_MAX
from minikms.client.connecting import SocketEndpoint
from tests.minikms.client.hostile import CLOSE, FULL, SILENT, Step, answer, array_answer, hostile
from tests.minikms.client.using import CREATE_CALL, CREATED, ENCRYPT_CALL, KEY, SEALED, WAIT_S, Use
from tests.minikms.http.http_harness import EchoApp, run, serving

STANDBY = answer(b'{"error":"a standby","code":"standby"}', 503)
IS_SEALED = answer(b'{"error":"sealed","code":"sealed"}', 503)
STOPPING = answer(b'{"error":"stopping","code":"shutting_down"}', 503)
FORBIDDEN = answer(b'{"error":"no","code":"forbidden"}', 403)
AWAY = "/nowhere/s"


@pytest.mark.parametrize(
    ("text", "found"),
    [("/a", ["/a"]), ("/a, /b", ["/a", "/b"]), ("https://a,https://b:1", ["https://a", "https://b:1"])],
)
def test_commas_separate_addresses_in_a_text(text: str, found: list[str]) -> None:
    assert list(split(text)) == found
    assert split(Path(text)) == (Path(text),)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "text",
    [
        "/a,",
        ",/a",
        "/a,/a",
        "/a,https://b",
        "/a," + "x" * 108,
        ",".join(f"/{number}" for number in range(ADDRESSES_COUNT_MAX + 1)),
    ],
)
def test_addresses_that_can_not_be_one_key_service_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"addresses|socket path"):
        kind(text)


@pytest.mark.parametrize("first", [STANDBY, STOPPING, CLOSE])
def test_a_call_goes_on_to_the_address_that_serves_and_stays(use: Use, first: Step) -> None:
    """Through `CLOSE` only one that may run twice."""
    call, wire = (ENCRYPT_CALL, SEALED) if first == CLOSE else (CREATE_CALL, CREATED)
    with hostile([first]) as a, hostile([wire, wire]) as b:
        results = use(f"{AWAY},{a.path},{b.path}", call, call)
        assert [isinstance(result, Exception) for result in results] == [False, False]
        assert (a.connections, b.connections) == (1, 1)


def test_the_engine_answers_standby_and_the_next_address_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(app: EchoApp, session: object, request: object) -> bytes:
        raise errors.StandbyError

    async def main(path: str) -> None:
        async with serving() as standby:
            async with AsyncClient(f"{standby.path},{path}") as kms:
                assert (await kms.create_dek_for_thread("t")).key_id == KEY
                assert kms.address == path
            async with AsyncClient(standby.path, wait_s=0.05) as kms:
                with pytest.raises(errors.StandbyError, match="another one serves"):
                    await kms.create_dek_for_thread("t")

    monkeypatch.setattr(EchoApp, "handle", handle)
    with hostile([CREATED]) as b:
        run(main(b.path))


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (b"garbage\r\n\r\n", errors.KmsProtocolError),
        (SILENT, errors.KmsTimeoutError),
        (b"HTTP/1.1 200", errors.KmsTimeoutError),
        (answer(b"{}", 503)[:20], errors.KmsTimeoutError),
        (answer(b'{"error":"x","code":"interrupted"}', 503), errors.RequestInterruptedError),
        (IS_SEALED, errors.SealedError),
    ],
)
def test_a_call_that_may_have_begun_ends_and_the_next_begins_elsewhere(use: Use, step: Step, kind: Any) -> None:
    with hostile([step]) as a, hostile([CREATED]) as b:
        first, second = use(f"{a.path},{b.path}", CREATE_CALL, CREATE_CALL, timeout_s=0.5)
        assert (type(first), second.key_id) == (kind, KEY)
        assert len(b.requests) == 1


def test_a_lost_request_is_repeated_elsewhere_only_where_that_is_harmless(use: Use) -> None:
    for call, wire, requests in ((CREATE_CALL, CREATED, 0), (ENCRYPT_CALL, SEALED, 1)):
        with hostile([b"", CLOSE]) as a, hostile([wire]) as b:
            [result] = use(f"{a.path},{b.path}", call)
            assert isinstance(result, errors.KmsUnavailableError) == (requests == 0)
            assert len(b.requests) == requests


def test_a_refusal_of_the_caller_is_final_and_asks_no_other_host(use: Use) -> None:
    with hostile([FORBIDDEN]) as a, hostile([SEALED]) as b:
        [result] = use(f"{a.path},{b.path}", ENCRYPT_CALL)
        assert isinstance(result, errors.ForbiddenError)
        assert b.connections == 0


def test_one_that_is_full_is_asked_again_and_no_other(use: Use) -> None:
    with hostile([FULL], [CREATED]) as a, hostile([CREATED]) as b:
        [result] = use(f"{a.path},{b.path}", CREATE_CALL, timeout_s=WAIT_S)
        assert (result.key_id, a.connections, b.connections) == (KEY, 2, 0)


def test_a_foreign_users_socket_gets_no_byte_and_hides_no_other(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    real = connecting.server_uid
    with hostile([CREATED]) as a, hostile([CREATED], [SEALED]) as b:
        monkeypatch.setattr(
            connecting, "server_uid", lambda sock: 54321 if sock.getpeername() == a.path else real(sock)
        )
        [made] = use(f"{a.path},{b.path}", CREATE_CALL)
        assert made.key_id == KEY
        with Client(f"{a.path},{b.path}") as kms:
            kms.encrypt(KEY, b"x")
            [warning] = kms.warnings
            assert a.path in warning and "54321" in warning
        [refused] = use(f"{AWAY},{a.path}", CREATE_CALL, wait_s=0)
        assert isinstance(refused, errors.KmsUnavailableError)
        assert "54321" in str(refused)
    assert a.requests == []


def test_one_error_names_each_address_with_its_reason(use: Use) -> None:
    with hostile([STOPPING]) as a, hostile([STOPPING]) as b:
        [all_away] = use(f"{AWAY},{AWAY}2", ENCRYPT_CALL, wait_s=0)
        [stopping] = use(f"{a.path},{b.path}", CREATE_CALL, wait_s=0)
    assert isinstance(all_away, errors.KmsUnavailableError) and not all_away.sent
    assert "No such file" in str(all_away) and f"{AWAY}2" in str(all_away)
    assert (type(stopping), stopping.code, stopping.status) == (errors.ShuttingDownError, "shutting_down", 503)
    assert f"{a.path}: stopping; {b.path}: stopping" in str(stopping)


def test_a_call_waits_for_a_take_over(use: Use) -> None:
    with hostile([STANDBY], [STANDBY], [CREATED]) as a, hostile(*[[STANDBY]] * 9) as b:
        [made] = use(f"{b.path},{a.path}", CREATE_CALL, timeout_s=WAIT_S, wait_s=0)
        assert made.key_id == KEY


def test_while_all_are_sealed_no_call_waits(use: Use) -> None:
    with hostile([IS_SEALED]) as a, hostile([IS_SEALED]) as b:
        [refused] = use(f"{a.path},{b.path},{AWAY}", ENCRYPT_CALL, timeout_s=WAIT_S, wait_s=WAIT_S)
        assert isinstance(refused, errors.SealedError)
        assert (len(a.requests), len(b.requests)) == (1, 1)


def test_many_calls_at_once_find_the_serving_address_without_a_storm() -> None:
    """At most one connection of each pooled call to each address, and those that wait go straight there."""
    scripts = [[CREATED] * 64] * 64

    async def main(path: str) -> None:
        async with AsyncClient(path) as kms:
            await asyncio.gather(*(kms.create_dek_for_thread("t") for _ in range(64)))

    with hostile(*[[STANDBY] * 64] * 64) as a, hostile(*scripts) as b:
        asyncio.run(main(f"{AWAY},{a.path},{b.path}"))
        most = CREATING_CONNECTIONS_MAX
        assert a.connections <= most and b.connections <= most and len(b.requests) == 64
    with hostile(*[[STANDBY] * 64] * 64) as a, hostile(*scripts) as b, Client(f"{a.path},{b.path}") as client:
        threads = [threading.Thread(target=client.create_dek_for_thread, args=("t",)) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert a.connections <= 64 and b.connections <= 64 and len(b.requests) == 64


def test_a_switch_in_the_middle_of_a_batch_loses_no_item(use: Use) -> None:
    """The blocking client sends 1,024 items in a request, the other 256."""
    items = [EncryptItem(key_id=KEY, plaintext=b"")] * 2048
    results, moved = [], 0
    for count in (1024, 256):
        outcomes = array_answer([[b"x"] * count])
        with hostile(*[[outcomes, STANDBY, STANDBY]] * 2) as a, hostile(*[[outcomes] * 8] * 8) as b:
            results += use(f"{a.path},{b.path}", ("encrypt_batch", {"items": items}))
            moved += bool(a.requests and b.requests)
    assert [b"x"] * 2048 in results and moved == 1


def test_all_attempts_end_within_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: each connects as long as it may, and each answer takes as long as it may."""
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    addresses = Addresses([SocketEndpoint(f"/{number}", None) for number in range(3)])
    for error, wait_s in ((errors.KmsUnavailableError("away"), 2.0), (errors.StandbyError(), 0.0)):
        now_s = 0.0
        rounds = Rounds(addresses, now_s, 10.0, repeatable=True, wait_s=wait_s, full_s=10.0)
        with pytest.raises(type(error), match=r"/0.*/1.*/2"):
            while True:
                assert 0 < rounds.connect_s <= rounds.timeout_s
                now_s += rounds.connect_s if isinstance(error, errors.KmsUnavailableError) else 0.3
                assert now_s <= 10.0
                pause_s = rounds.pause_s(error, now_s)
                assert pause_s is not None
                now_s += pause_s
