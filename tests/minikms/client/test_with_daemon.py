"""Both clients with the real daemon: every verb does what its docstring says."""

import asyncio
import io
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, Client, EncryptItem, ReencryptItem
from tests.harness.live_daemon import LiveDaemon


class Both:
    """Calls each verb of one client; the asyncio one runs in a loop of its own."""

    def __init__(self, client: Client | AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            async def main() -> Any:
                return await method(*arguments, **named)

            return method(*arguments, **named) if isinstance(self._client, Client) else self._runner.run(main())

        return call


@pytest.fixture(params=[Client, AsyncClient])
def kms(request: pytest.FixtureRequest, daemon_socket: str) -> Iterator[Both]:
    with asyncio.Runner() as runner:
        both = Both(request.param(daemon_socket), runner)
        yield both
        both.close()


def test_the_life_of_a_key(kms: Any) -> None:
    old = kms.create_dek_for_thread("thread-2").key_id
    sealed = kms.encrypt(old, b"text", aad=b"a")
    new = kms.create_dek_for_thread("thread-2", replaces=old).key_id
    assert kms.get_key(old).state == "retired"
    with pytest.raises(errors.KeyRetiredError):
        kms.encrypt(old, b"more")
    [moved, refused] = kms.reencrypt_batch(
        old, new, [ReencryptItem(ciphertext=sealed, aad=b"a"), ReencryptItem(ciphertext=sealed, aad=b"b")]
    )
    assert kms.decrypt(new, moved, aad=b"a") == b"text"
    assert isinstance(refused, errors.DecryptionError)
    both = [ReencryptItem(ciphertext=sealed, aad=b"a"), ReencryptItem(ciphertext=moved, aad=b"a")]
    first, second = kms.check_batch(old, both, thread_id="thread-2", request_id="req-2")
    assert first is None
    assert isinstance(second, errors.DecryptionError)
    assert [type(verdict) for verdict in kms.check_batch(new, both)] == [errors.DecryptionError, type(None)]
    with pytest.raises(errors.WrongThreadError):
        kms.check_batch(old, both, thread_id="thread-3")
    assert kms.retire_key(new).state == "retired"
    assert kms.retire_key(new).state == "retired"
    receipt = kms.destroy_key(old, request_id="req-3")
    assert (receipt.key_id, receipt.state) == (old, "destroyed")
    with pytest.raises(errors.KeyDestroyedError):
        kms.decrypt(old, sealed, aad=b"a")
    with pytest.raises(errors.KeyDestroyedError):
        kms.check_batch(old, both)


async def test_hundreds_of_concurrent_calls_each_get_their_own_answer(daemon_socket: str) -> None:
    async with AsyncClient(daemon_socket) as kms:
        key_id = (await kms.create_dek_for_thread("thread-1")).key_id

        async def one(number: int) -> None:
            aad = b"%d" % number
            sealed = await kms.encrypt(key_id, b"value %d" % number, aad=aad, thread_id="thread-1")
            assert await kms.decrypt(key_id, sealed, aad=aad, thread_id="thread-1") == b"value %d" % number

        await asyncio.gather(*(one(number) for number in range(2000)))


def test_calls_under_way_survive_restarts_of_the_daemon() -> None:
    with tempfile.TemporaryDirectory(prefix="kms") as directory, LiveDaemon(Path(directory), "dev") as daemon:

        async def main() -> None:
            async with AsyncClient(daemon.socket, wait_s=60) as kms:
                key_id = (await kms.create_dek_for_thread("thread-1")).key_id
                sealed = await kms.encrypt(key_id, b"text")
                stop = asyncio.Event()

                async def load() -> int:
                    count = 0
                    while not stop.is_set():
                        assert await kms.decrypt(key_id, sealed) == b"text"
                        await kms.encrypt(key_id, b"more")
                        count += 1
                    return count

                loads = [asyncio.create_task(load()) for _ in range(16)]
                for number in (signal.SIGKILL, signal.SIGTERM):
                    await asyncio.sleep(0.2)
                    daemon.process.send_signal(number)
                    await asyncio.to_thread(daemon.process.wait)
                    await asyncio.to_thread(daemon.start)
                assert await kms.health()
                stop.set()
                assert all(await asyncio.gather(*loads))

        asyncio.run(main())


def test_a_uid_that_is_not_allowed_gets_an_error_that_says_so() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="kms") as directory,
        LiveDaemon(Path(directory), "dev", "--allowed-uids", "54321") as daemon,
        daemon.client() as kms,
    ):
        assert kms.health()
        with pytest.raises(errors.UnauthorizedError):
            kms.status()


def test_a_call_in_another_event_loop_is_refused_at_once(daemon_socket: str) -> None:
    client = AsyncClient(daemon_socket)

    async def create() -> str:
        return (await client.create_dek_for_thread("thread-1")).key_id

    with asyncio.Runner() as first:
        key_id = first.run(create())
        calls = (
            lambda: client.get_key(key_id),
            lambda: client.encrypt(key_id, b"hello"),
            lambda: client.encrypt_batch([EncryptItem(key_id=key_id, plaintext=b"hello")] * 2),
        )

        async def use(call: Any) -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await call()

        for call in calls:
            asyncio.run(use(call))
        first.run(client.close())


class Trickle:
    """A raw file: it gives and takes a few bytes at a time."""

    def __init__(self, content: bytes = b"") -> None:
        self.rest, self.written = content, bytearray()

    def read(self, size: int, /) -> bytes:
        part, self.rest = self.rest[: min(size, 40_000)], self.rest[40_000:]
        return part

    def write(self, data: memoryview, /) -> int:
        self.written += data[:30_000]
        return min(len(data), 30_000)


@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_a_stream_comes_back_whole_and_a_cut_one_is_refused(kms: Both, size: int) -> None:
    plaintext, sealed, opened = bytes(range(256)) * 800, Trickle(), Trickle()
    copied = kms.encrypt_stream(Trickle(plaintext[:size]), sealed)
    assert copied.key_id == kms.get_or_create_dek_for_thread(api.STREAM_THREAD, purpose="data").key_id
    assert copied.size == len(sealed.written) > size
    assert kms.decrypt_stream(Trickle(bytes(sealed.written)), opened) == (copied.key_id, size)
    assert bytes(opened.written) == plaintext[:size]
    with pytest.raises(errors.DecryptionError):
        kms.decrypt_stream(Trickle(bytes(sealed.written[:-1])), Trickle())


def test_a_source_that_has_nothing_yet_is_no_end(kms: Both) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as source, open(writing, "wb") as other:
        other.write(b"the first part")
        other.flush()
        with pytest.raises(BlockingIOError):
            kms.encrypt_stream(source, Trickle())


async def test_a_cancelled_stream_is_never_a_whole_one(daemon_socket: str) -> None:
    reading, writing = os.pipe()
    target = io.BytesIO()
    async with AsyncClient(daemon_socket) as kms:
        with open(reading, "rb", buffering=0) as source, open(writing, "wb", buffering=0) as other:
            other.write(b"the first part")
            call = asyncio.create_task(kms.encrypt_stream(source, target))
            while not target.tell():  # the header: the thread waits for more to read
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.sleep(0)
            other.write(b"the second part")
            with pytest.raises(asyncio.CancelledError):
                await call
        target.seek(0)
        with pytest.raises(errors.DecryptionError):
            await kms.decrypt_stream(target, io.BytesIO())
