"""The local provider: the same behaviour and the same files as the daemon's, in one process."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from progressdb_server.kms.provider import LocalProviderError, Provider, RemoteProvider, open_local
from progressdb_server.kms.supervisor import ChildOptions, Supervisor


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


def test_a_server_that_uses_miniKMS_does_not_load_the_key_services_code() -> None:
    program = "import progressdb_server.server, sys; print([name for name in sys.modules if name in sys.argv])"
    inner = ["minikms_daemon.embedded", "minikms.custody", "minikms.memory", "minikms_daemon.service"]
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
