"""The remote provider against a real (fake) daemon: what the server sees of it, and of its absence."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from minikms import api
from minikms.api.errors import KmsError, KmsProtocolError, KmsUnavailableError, refusal
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from progressdb_server.kms import provider as provider_module
from progressdb_server.kms.provider import Fault, RemoteProvider, fault
from tests.progressdb_server.kms.conftest import Place

Test = Callable[[RemoteProvider], Awaitable[None]]
Daemon = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def daemon(place: Place) -> Iterator[Daemon]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [place.binary, "--socket", place.socket, "--data-dir", str(place.data)], stderr=subprocess.DEVNULL
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@asynccontextmanager
async def remote(place: Place) -> AsyncIterator[RemoteProvider]:
    provider = RemoteProvider(place.socket)
    try:
        yield provider
    finally:
        await provider.close()


async def test_requests_that_arrive_while_the_daemon_is_down_wait_for_it(place: Place, daemon: Daemon) -> None:
    async with remote(place) as provider:
        waiting = asyncio.create_task(provider.create_dek_for_thread("t"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        process = daemon()
        key = await waiting
        sealed = await provider.encrypt(key.key_id, b"text", aad=b"", thread_id="t")
        process.kill()
        process.wait()
        opened = asyncio.create_task(provider.decrypt(key.key_id, sealed, aad=b"", thread_id="t"))
        await asyncio.sleep(0.1)
        daemon()
        assert await opened == b"text"


async def test_every_call_to_a_daemon_that_stays_away_fails_after_the_wait(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "WAIT_S", 0.2)
    async with remote(place) as provider:
        calls = [
            provider.create_dek_for_thread("t"),
            provider.encrypt("k", b"x", aad=b"", thread_id="t"),
            provider.decrypt("k", b"x", aad=b"", thread_id="t"),
            provider.encrypt_batch([EncryptItem(key_id="k", plaintext=b"x")]),
            provider.decrypt_batch([DecryptItem(key_id="k", ciphertext=b"x")]),
            provider.reencrypt_batch("k", "l", [ReencryptItem(ciphertext=b"x")]),
            provider.check_batch("k", [ReencryptItem(ciphertext=b"x")], thread_id="t"),
            provider.retire_key("k"),
            provider.status(),
        ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, KmsUnavailableError)
            assert fault(result) is Fault.SERVICE


async def test_a_daemon_that_hangs_is_unavailable_within_the_timeout(
    place: Place, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = daemon()
    async with remote(place) as provider:
        key = await provider.create_dek_for_thread("t")
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(provider_module, "TIMEOUT_S", 0.5)
        impatient = RemoteProvider(place.socket)
        with pytest.raises(KmsError) as failed:
            await impatient.encrypt(key.key_id, b"x", aad=b"", thread_id="t")
        assert fault(failed.value) is Fault.SERVICE
        os.kill(process.pid, signal.SIGCONT)
        await impatient.close()
        assert await provider.encrypt(key.key_id, b"x", aad=b"", thread_id="t")


def test_a_refusal_is_the_requests_fault_only_where_a_retry_cannot_help() -> None:
    for error in (
        KmsUnavailableError("away"),
        KmsProtocolError("malformed"),
        *(
            refusal(code, "text")
            for code in (
                api.CODE_AUDIT_UNAVAILABLE,
                api.CODE_STORAGE_UNAVAILABLE,
                api.CODE_UNAUTHORIZED,
                api.CODE_SHUTTING_DOWN,
                api.CODE_INTERRUPTED,
                api.CODE_TIMEOUT,
                api.CODE_INTERNAL,
            )
        ),
    ):
        assert fault(error) is Fault.SERVICE
    assert fault(refusal(api.CODE_KEY_UNREADABLE, "text")) is Fault.KEY
    for code in (api.CODE_KEY_RETIRED, api.CODE_WRONG_THREAD, api.CODE_DECRYPTION_FAILED, api.CODE_FORBIDDEN):
        assert fault(refusal(code, "text")) is Fault.REQUEST
