"""The local provider: the same behaviour and the same files as the daemon's, in one process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from minikms import api
from progressdb_server.kms.local import LocalProvider, LocalProviderError
from progressdb_server.kms.provider import Open, Provider, ProviderRefusedError, Seal
from progressdb_server.kms.remote import RemoteProvider
from progressdb_server.kms.supervisor import ChildOptions, Supervisor


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kms") as name:
        yield Path(name)


def run(directory: Path, test: Callable[[Provider], Awaitable[None]]) -> None:
    async def main() -> None:
        provider = await LocalProvider.open(directory / "kms")
        try:
            await test(provider)
        finally:
            await provider.close()
            await provider.close()

    asyncio.run(main())


def test_it_answers_as_the_remote_one_does(directory: Path) -> None:
    async def test(provider: Provider) -> None:
        old = await provider.create_dek_for_thread("t")
        sealed = await provider.encrypt_with_key(old.key_id, b"text", aad=b"a", thread_id="t", request_id="r")
        assert await provider.decrypt_with_key(old.key_id, sealed, aad=b"a", thread_id="t") == b"text"
        good, bad = await provider.encrypt_many(
            [Seal(old.key_id, b"1", b"", "t", "r-1"), Seal(old.key_id, b"2", b"", "another")]
        )
        assert isinstance(good, bytes)
        assert isinstance(bad, ProviderRefusedError)
        assert bad.code == api.CODE_WRONG_THREAD
        assert await provider.decrypt_many([Open(old.key_id, good, b"", "t")]) == [b"1"]
        new = await provider.create_dek_for_thread("t", replaces=old.key_id)
        with pytest.raises(ProviderRefusedError) as refused:
            await provider.encrypt_with_key(old.key_id, b"x", aad=b"", thread_id="t")
        assert refused.value.code == api.CODE_KEY_RETIRED
        [moved] = await provider.reencrypt_many(old.key_id, new.key_id, [(sealed, b"a")])
        assert isinstance(moved, bytes)
        assert await provider.decrypt_with_key(new.key_id, moved, aad=b"a", thread_id="t") == b"text"
        opens, refused = await provider.check_many(old.key_id, [(sealed, b"a"), (moved, b"a")], thread_id="t")
        assert opens is None
        assert isinstance(refused, ProviderRefusedError)
        assert refused.code == api.CODE_DECRYPTION_FAILED
        with pytest.raises(ProviderRefusedError) as refused:
            await provider.check_many(old.key_id, [(sealed, b"a")], thread_id="another", request_id="r-2")
        assert refused.value.code == api.CODE_WRONG_THREAD
        await provider.retire(new.key_id)
        status = await provider.status()
        assert isinstance(status["epoch"], int)
        audit = status["audit"]
        assert isinstance(audit, dict)
        assert audit["head"]["seq"] > 5

    run(directory, test)


def test_its_data_opens_in_the_daemon_and_comes_back(directory: Path) -> None:
    kept: dict[str, bytes] = {}

    async def write(provider: Provider) -> None:
        key = await provider.create_dek_for_thread("t")
        kept[key.key_id] = await provider.encrypt_with_key(key.key_id, b"text", aad=b"a", thread_id="t")

    async def read(provider: Provider) -> None:
        for key_id, sealed in kept.items():
            assert await provider.decrypt_with_key(key_id, sealed, aad=b"a", thread_id="t") == b"text"

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
            await LocalProvider.open(directory / "kms")

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
            await LocalProvider.open(directory / "kms", master_key_file=wrong)

    asyncio.run(refused())
    run(directory, test)


def test_a_server_that_uses_miniKMS_does_not_even_load_the_key_services_code() -> None:
    program = "import progressdb_server.server, sys; print([name for name in sys.modules if name in sys.argv])"
    inner = ["minikms.embedded", "minikms.custody", "minikms.memory", "minikms.service"]
    ran = subprocess.run([sys.executable, "-c", program, *inner], capture_output=True, text=True, timeout=30)
    assert ran.stdout == "[]\n"


def test_a_server_refuses_it_without_the_flag_for_development(directory: Path) -> None:
    environment = {**os.environ, "PROGRESSDB_KMS_PROVIDER": "local"}
    command = [sys.executable, "-m", "progressdb_server", "--db", str(directory), "--addr", "127.0.0.1:0"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
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
