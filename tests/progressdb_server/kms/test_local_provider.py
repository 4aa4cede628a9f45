"""The local provider: the same behaviour and the same files as the daemon's, in one process."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from progressdb_server.kms.provider import LocalProviderError, Provider, RemoteProvider, open_local
from progressdb_server.kms.supervisor import ChildOptions, Supervisor
from progressdb_server.store.model import NewMessage
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import messages_of
from tests.progressdb_server.store.opened_store import opened as opened_store


def run(directory: Path, test: Callable[[Provider], Awaitable[None]]) -> None:
    async def main() -> None:
        provider = await open_local(directory / "kms")
        try:
            await test(provider)
        finally:
            await provider.close()
            await provider.close()

    asyncio.run(main())


async def opened(provider: Provider, key_id: str, sealed: bytes) -> bytes | KmsRefusedError:
    """A record that was sealed with the additional data `a`."""
    [outcome] = await provider.decrypt_batch([DecryptItem(key_id=key_id, ciphertext=sealed, aad=b"a", thread_id="t")])
    return outcome


def test_it_answers_as_the_remote_one_does(directory: Path) -> None:
    async def test(provider: Provider) -> None:
        old = await provider.create_dek_for_thread("t")
        sealed = await provider.encrypt(old.key_id, b"text", aad=b"a", thread_id="t", request_id="r")
        assert await opened(provider, old.key_id, sealed) == b"text"
        good, bad = await provider.encrypt_batch(
            [
                EncryptItem(key_id=old.key_id, plaintext=b"1", thread_id="t", request_id="r-1"),
                EncryptItem(key_id=old.key_id, plaintext=b"2", thread_id="another"),
            ]
        )
        assert isinstance(good, bytes)
        assert isinstance(bad, KmsRefusedError)
        assert bad.code == api.CODE_WRONG_THREAD
        assert await provider.decrypt_batch([DecryptItem(key_id=old.key_id, ciphertext=good, thread_id="t")]) == [b"1"]
        new = await provider.create_dek_for_thread("t", replaces=old.key_id)
        with pytest.raises(KmsRefusedError) as refused:
            await provider.encrypt(old.key_id, b"x", aad=b"", thread_id="t", request_id=None)
        assert refused.value.code == api.CODE_KEY_RETIRED
        [moved] = await provider.reencrypt_batch(old.key_id, new.key_id, [ReencryptItem(ciphertext=sealed, aad=b"a")])
        assert isinstance(moved, bytes)
        assert await opened(provider, new.key_id, moved) == b"text"
        opens, failed = await provider.check_batch(
            old.key_id,
            [ReencryptItem(ciphertext=sealed, aad=b"a"), ReencryptItem(ciphertext=moved, aad=b"a")],
            thread_id="t",
        )
        assert opens is None
        assert isinstance(failed, KmsRefusedError)
        assert failed.code == api.CODE_DECRYPTION_FAILED
        with pytest.raises(KmsRefusedError) as refused:
            await provider.check_batch(
                old.key_id, [ReencryptItem(ciphertext=sealed, aad=b"a")], thread_id="another", request_id="r-2"
            )
        assert refused.value.code == api.CODE_WRONG_THREAD
        await provider.retire_key(new.key_id)
        status = await provider.status()
        assert (status.status, status.pid, status.uid) == ("ok", os.getpid(), os.geteuid())
        assert status.epoch > 0
        assert status.audit.head.seq > 5
        assert status.keys.by_state == {"retired": 2} or status.keys.indexing

    run(directory, test)


def test_its_data_opens_in_the_daemon_and_comes_back(directory: Path) -> None:
    kept: dict[str, bytes] = {}

    async def write(provider: Provider) -> None:
        key = await provider.create_dek_for_thread("t")
        kept[key.key_id] = await provider.encrypt(key.key_id, b"text", aad=b"a", thread_id="t", request_id=None)

    async def read(provider: Provider) -> None:
        for key_id, sealed in kept.items():
            assert await opened(provider, key_id, sealed) == b"text"

    async def with_daemon() -> None:
        options = ChildOptions(socket_path=str(directory / "s"), data_dir=str(directory / "kms"), dev=True)
        supervisor = Supervisor(options)
        await supervisor.start()
        provider = RemoteProvider(directory / "s")
        try:
            await read(provider)
            await write(provider)
        finally:
            await provider.close()
            await supervisor.stop()

    run(directory, write)
    asyncio.run(with_daemon())
    assert len(kept) == 2
    run(directory, read)


def test_a_directory_that_a_process_owns_is_refused(directory: Path) -> None:
    async def test(provider: Provider) -> None:
        with pytest.raises(LocalProviderError, match="another process"):
            await open_local(directory / "kms")

    run(directory, test)


def test_a_wrong_root_key_is_refused_and_the_directory_given_up(directory: Path) -> None:
    async def test(provider: Provider) -> None:
        await provider.create_dek_for_thread("t")

    run(directory, test)
    wrong = directory / "wrong"
    wrong.write_text("00" * 32)
    wrong.chmod(0o600)

    async def refused() -> None:
        with pytest.raises(LocalProviderError):
            await open_local(directory / "kms", master_key_file=wrong)

    asyncio.run(refused())
    run(directory, test)


def test_a_thread_whose_key_was_retired_by_hand_takes_writes_and_is_read(directory: Path) -> None:
    async def test(provider: Provider) -> None:
        async with opened_store(MemoryEngine(), provider) as store:
            for body in range(3):
                await store.messages.create(NewMessage(author="ann", thread="t", body=body))
                key_id = await store.rekeying.key_of_thread("t")
                assert key_id is not None
                await provider.retire_key(key_id)
            assert [message.value for message in await messages_of(store, "t")] == [0, 1, 2]
            assert store.metrics.keys_renewed == 2
        keys = await provider.list_keys(thread_id="t", state=None, cursor=None, limit=None)
        assert [key.state for key in keys.keys] == ["retired"] * 3

    run(directory, test)


def test_a_server_that_uses_miniKMS_does_not_load_the_key_services_code() -> None:
    program = "import progressdb_server.server, sys; print([name for name in sys.modules if name in sys.argv])"
    inner = ["minikms.embedded", "minikms.custody", "minikms.memory", "minikms.service"]
    ran = subprocess.run(
        [sys.executable, "-c", program, *inner], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "[]\n"


def test_a_server_refuses_it_without_the_flag_for_development(directory: Path) -> None:
    environment = {**os.environ, "PROGRESSDB_KMS_PROVIDER": "local"}
    command = [sys.executable, "-m", "progressdb_server", "--db", str(directory), "--addr", "127.0.0.1:0"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "it needs --dev" in ran.stderr


def test_an_older_keyring_is_refused_as_the_daemon_refuses_it(directory: Path) -> None:
    """It would raise the old keyring's epoch past what the audit log tells, and nobody would see it again."""

    async def test(provider: Provider) -> None:
        await provider.create_dek_for_thread("t")

    run(directory, test)
    keyring = directory / "kms" / "keyring.json"
    older = keyring.read_bytes()
    run(directory, test)
    keyring.write_bytes(older)
    with pytest.raises(LocalProviderError, match="older than the audit log"):
        run(directory, test)
