"""Automatic batching: what travels together, and that nobody is lost, mixed up or left waiting."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, asynchronous, batching
from minikms.client.batching import Batcher, OneLoop
from minikms.client.items import DecryptItem, EncryptItem, Outcome, checked_cost_bytes
from tests.harness import garbage
from tests.minikms.client.hostile import SILENT, answer, array_answer, hostile

KEY = "k_" + "0" * 26


def item(plaintext: bytes) -> EncryptItem:
    return EncryptItem(key_id=KEY, plaintext=plaintext)


class Daemon:
    """Answers each item with its own plaintext in capitals, once `go` is set; refuses what begins with `no`."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.go = asyncio.Event()
        self.failure: BaseException | None = None

    async def send(self, items: list[EncryptItem]) -> list[Outcome]:
        self.batches.append([entry.plaintext for entry in items])
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return [
            errors.KeyRetiredError("no") if entry.plaintext.startswith(b"no") else entry.plaintext.upper()
            for entry in items
        ]


@asynccontextmanager
async def batched() -> AsyncIterator[tuple[Daemon, Batcher[EncryptItem]]]:
    daemon = Daemon()
    batcher = Batcher(daemon.send, 5.0, OneLoop())
    try:
        yield daemon, batcher
    finally:
        await batcher.close()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_call_leaves_at_once() -> None:
    async with batched() as (daemon, batcher):
        call = asyncio.create_task(batcher.submit(item(b"a")))
        await turns()
        assert daemon.batches == [[b"a"]]
        daemon.go.set()
        assert await call == b"A"


async def test_calls_made_while_a_batch_is_in_flight_travel_as_the_next_one() -> None:
    async with batched() as (daemon, batcher):
        first = asyncio.create_task(batcher.submit(item(b"a")))
        await turns()
        rest = [asyncio.create_task(batcher.submit(item(b"%d" % number))) for number in range(5)]
        await turns()
        assert daemon.batches == [[b"a"]]
        daemon.go.set()
        assert await first == b"A"
        assert await asyncio.gather(*rest) == [b"0", b"1", b"2", b"3", b"4"]
        assert daemon.batches == [[b"a"], [b"0", b"1", b"2", b"3", b"4"]]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.binary(max_size=4), st.booleans(), st.integers(0, 3)), max_size=40))
def test_each_call_gets_the_outcome_of_its_own_item(calls: list[tuple[bytes, bool, int]]) -> None:
    async def test() -> None:
        async with batched() as (daemon, batcher):
            daemon.go.set()
            tasks = []
            for plaintext, cancelled, pause in calls:
                task = asyncio.create_task(batcher.submit(item(plaintext)))
                tasks.append(task)
                await turns(pause)
                if cancelled:
                    task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for (plaintext, cancelled, _), result in zip(calls, results, strict=True):
                if plaintext.startswith(b"no") and not isinstance(result, asyncio.CancelledError):
                    assert isinstance(result, errors.KeyRetiredError)
                elif not (cancelled and isinstance(result, asyncio.CancelledError)):
                    assert result == plaintext.upper()

    asyncio.run(test())


async def test_a_caller_that_gave_up_before_its_batch_left_is_not_sent() -> None:
    async with batched() as (daemon, batcher):
        first = asyncio.create_task(batcher.submit(item(b"a")))
        await turns()
        gone, stays = (asyncio.create_task(batcher.submit(item(name))) for name in (b"gone", b"stays"))
        await turns()
        gone.cancel()
        daemon.go.set()
        assert [*await asyncio.gather(first, stays)] == [b"A", b"STAYS"]
        assert daemon.batches[1] == [b"stays"]


async def test_each_caller_of_a_failed_batch_gets_an_exception_of_its_own() -> None:
    async with batched() as (daemon, batcher):
        for failure in (
            errors.KmsUnavailableError("gone", sent=True),
            errors.AuditUnavailableError("no"),
        ):
            daemon.failure = failure
            daemon.go.set()
            results = await asyncio.gather(*(batcher.submit(item(b"x")) for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [type(failure)] * 3
            assert [str(result) for result in results] == [str(failure)] * 3
            assert len({id(result) for result in results}) == 3
        daemon.failure = None
        assert await batcher.submit(item(b"after")) == b"AFTER"


async def test_a_batch_has_at_most_1024_items_and_16_mib() -> None:
    async with batched() as (daemon, batcher):
        daemon.go.set()
        await asyncio.gather(*(batcher.submit(item(b"")) for _ in range(2500)))
        assert [len(batch) for batch in daemon.batches] == [1024, 1024, 452]
        daemon.batches.clear()
        large = bytes(3 * 1024 * 1024)
        await asyncio.gather(*(batcher.submit(item(large)) for _ in range(8)))
        assert [len(batch) for batch in daemon.batches] == [3, 3, 2]


async def test_the_queue_is_bounded_in_items_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with batched() as (daemon, batcher):
        for name, most in (("QUEUE_ITEMS_MAX", 3), ("QUEUE_BYTES_MAX", 3 * checked_cost_bytes(item(b"x")))):
            daemon.go.clear()
            with monkeypatch.context() as patch:
                patch.setattr(batching, name, most)
                first = asyncio.create_task(batcher.submit(item(b"x")))
                await turns()
                waiting = [asyncio.create_task(batcher.submit(item(b"x"))) for _ in range(3)]
                await turns()
                with pytest.raises(errors.KmsUnavailableError, match="too many"):
                    await batcher.submit(item(b"x"))
                daemon.go.set()
                assert await asyncio.gather(first, *waiting) == [b"X"] * 4
                assert await batcher.submit(item(b"x")) == b"X"


async def test_an_item_that_waited_too_long_fails_and_is_not_sent() -> None:
    daemon = Daemon()
    batcher = Batcher(daemon.send, 0.3, OneLoop())
    first = asyncio.create_task(batcher.submit(item(b"first")))
    await turns()
    late = asyncio.create_task(batcher.submit(item(b"late")))
    await asyncio.sleep(0.4)
    daemon.go.set()
    assert await first == b"FIRST"
    with pytest.raises(errors.KmsTimeoutError):
        await late
    assert daemon.batches == [[b"first"]]
    await batcher.close()


async def test_closing_fails_whoever_waits_in_flight_and_in_the_queue() -> None:
    async with batched() as (_, batcher):
        flying = asyncio.create_task(batcher.submit(item(b"a")))
        await turns()
        queued = asyncio.create_task(batcher.submit(item(b"b")))
        await turns()
        await batcher.close()
        results = await asyncio.gather(flying, queued, return_exceptions=True)
        assert [type(result) for result in results] == [errors.KmsClosedError] * 2
        with pytest.raises(errors.KmsClosedError):
            await batcher.submit(item(b"c"))


async def test_closing_before_the_first_turn_leaves_nobody_waiting() -> None:
    async with batched() as (_, batcher):
        call = asyncio.create_task(batcher.submit(item(b"a")))
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(errors.KmsClosedError):
            await call


async def test_a_spoiling_item_is_refused_alone() -> None:
    async with batched() as (daemon, batcher):
        daemon.go.set()
        good = asyncio.create_task(batcher.submit(item(b"good")))
        with pytest.raises(errors.TooLargeError):
            await batcher.submit(item(bytes(api.PLAINTEXT_BYTES_MAX + 1)))
        assert await good == b"GOOD"


# --- the whole client ---


def batch_of(request: bytes) -> list[dict[str, str]]:
    body: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
    items: list[dict[str, str]] = body.get("items", [body])
    return items


def test_one_call_uses_the_single_verb_and_several_use_a_batch() -> None:
    """All of them use one connection."""
    single = answer(b'{"ciphertext":"YQ=="}')
    batch = array_answer([[b"b", ["no", "key_not_found"]]])
    with hostile([single, batch, single]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                assert await kms.encrypt(KEY, b"1", request_id="r-1") == b"a"
                both = [kms.encrypt(KEY, b"2", thread_id="t"), kms.encrypt(KEY, b"3", aad=b"x")]
                good, bad = await asyncio.gather(*both, return_exceptions=True)
                assert good == b"b"
                assert isinstance(bad, errors.KeyNotFoundError)
                assert await kms.encrypt(KEY, b"4") == b"a"

        asyncio.run(main())
        assert server.connections == 1
        assert [request.split(b" ")[1] for request in server.requests] == [b"/encrypt", b"/encrypt_batch", b"/encrypt"]
        assert batch_of(server.requests[0]) == [{"key_id": KEY, "plaintext": "MQ==", "request_id": "r-1"}]
        head, _, body = server.requests[1].partition(b"\r\n\r\n")
        assert b"\r\nContent-Type: application/msgpack\r\n" in head
        assert msgspec.msgpack.decode(body) == [[[KEY, b"2", b"", "t", None], [KEY, b"3", b"x", None, None]]]


def test_a_batch_whose_connection_breaks_is_sent_again_whole() -> None:
    batch = array_answer([[b"a", b"b"]])
    with hostile([batch[:30], "close"], [batch]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                answers = await asyncio.gather(kms.encrypt(KEY, b"1"), kms.encrypt(KEY, b"2"))
                assert [*answers] == [b"a", b"b"]

        asyncio.run(main())
        assert server.requests[0] == server.requests[1]


def test_an_answer_with_too_few_items_fails_all_of_them() -> None:
    with hostile([array_answer([[b"a"]])]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                results = await asyncio.gather(kms.encrypt(KEY, b"1"), kms.encrypt(KEY, b"2"), return_exceptions=True)
                assert [type(result) for result in results] == [errors.KmsProtocolError] * 2

        asyncio.run(main())


def test_a_slow_encrypt_does_not_hold_up_decrypt_or_status() -> None:
    plain = answer(b'{"plaintext":"YQ=="}')
    with hostile([SILENT], [plain], [answer(b"{}")]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                stuck = asyncio.create_task(kms.encrypt(KEY, b"1"))
                while not server.requests:
                    await asyncio.sleep(0.001)
                assert await kms.decrypt(KEY, b"x") == b"a"
                assert await kms.status() == api.StatusAnswer()
                assert not stuck.done()
                await kms.close()
                with pytest.raises(errors.KmsClosedError):
                    await stuck

        asyncio.run(main())


def test_single_calls_share_a_bounded_pool_and_wait_a_bounded_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "POOL_CONNECTIONS_MAX", 8)
    with hostile(*[[SILENT]] * 20) as server:

        async def main() -> None:
            async with AsyncClient(server.path, timeout_s=0.3, wait_s=0) as kms:
                results = await asyncio.gather(*(kms.status() for _ in range(20)), return_exceptions=True)
                assert {type(result) for result in results} == {errors.KmsTimeoutError}

        asyncio.run(main())
        assert server.connections <= 16  # eight, and eight more once those timed out


def test_calls_that_make_keys_have_a_bounded_share_of_their_own() -> None:
    """A group of new keys in the service is as large as the calls under way; others do not wait for them."""
    creates_max = 48
    with hostile(*[[SILENT]] * creates_max, [answer(b"{}")]) as server:

        async def main() -> None:
            async with AsyncClient(server.path, timeout_s=60) as kms:
                creates = [asyncio.ensure_future(kms.create_dek_for_thread("t")) for _ in range(creates_max + 16)]
                while len(server.requests) < creates_max:
                    await asyncio.sleep(0.001)
                await turns()
                assert await kms.status() == api.StatusAnswer()
                assert (server.connections, len(server.requests)) == (creates_max + 1, creates_max + 1)
                await kms.close()
                await asyncio.gather(*creates, return_exceptions=True)

        asyncio.run(main())


@pytest.mark.parametrize("name", ["status", "decrypt"])
def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of the pool, and of the batches."""
    monkeypatch.setattr(asynchronous, "POOL_IDLE_S_MAX", 0.01)
    arguments = (KEY, b"x") if name == "decrypt" else ()
    with hostile([answer(b"{}") if name == "status" else answer(b'{"plaintext":"YQ=="}')]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                await getattr(kms, name)(*arguments)
                assert await asyncio.to_thread(server.ended.wait, 60)

        asyncio.run(main())


def test_a_cancelled_call_takes_its_connection_with_it() -> None:
    with hostile([SILENT], [answer(b'{"a":1}')]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                call = asyncio.create_task(kms.status())
                while not server.requests:
                    await asyncio.sleep(0.001)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await kms.status() == api.StatusAnswer()

        asyncio.run(main())
        assert server.connections == 2


class FailingTwice(AsyncClient):
    """Its first request is refused; when the next one is cancelled for that, so is the call."""

    def __init__(self) -> None:
        super().__init__("/nonexistent")
        self.begun = 0
        self.cancels: list[Callable[[], object]] = []

    async def _run_one(self, one: object) -> Any:
        self.begun += 1
        if self.begun == 1:
            raise errors.refusal(api.CODE_NOT_FOUND, "refused")
        try:
            await asyncio.Event().wait()
        finally:
            self.cancels.pop()()


def test_a_call_cancelled_while_it_fails_keeps_no_frame() -> None:
    async def run() -> None:
        async with FailingTwice() as client:
            items = [DecryptItem(key_id=KEY, ciphertext=b"c", thread_id="t")] * (asynchronous.CHUNK_ITEMS_MAX + 1)
            caller = asyncio.ensure_future(client.decrypt_batch(items))
            client.cancels.append(caller.cancel)
            await asyncio.wait([caller])
            assert caller.cancelled()

    garbage.switch_off()
    try:
        asyncio.run(run())
        assert garbage.frames() == []
    finally:
        gc.enable()
