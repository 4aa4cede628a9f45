"""The embedded client has the methods of AsyncClient, and refuses what only a daemon does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from minikms.client import DecryptItem, EncryptItem, errors
from minikms.embedded import EmbeddedClient


def test_verbs_answer_as_the_daemon_answers_them(tmp_path: Path) -> None:
    async def main() -> None:
        client = await EmbeddedClient.open(tmp_path / "kms")
        try:
            assert await client.health()
            made = await client.create_dek_for_thread("t", purpose="data")
            assert await client.get_wrapped(made.key_id) == made.wrapped
            assert (await client.get_key(made.key_id)).state == "active"
            assert [key.key_id for key in (await client.list_keys(limit=5)).keys] == [made.key_id]
            data_key = await client.generate_data_key(made.key_id, aad=b"a")
            assert await client.decrypt(made.key_id, data_key.ciphertext, aad=b"a") == data_key.plaintext
            assert len(await client.random(7)) == 7
            items = [EncryptItem(key_id=made.key_id, plaintext=b"%d" % number) for number in range(600)]
            sealed = [one for one in await client.encrypt_batch(items) if isinstance(one, bytes)]
            opened = await client.decrypt_batch([DecryptItem(key_id=made.key_id, ciphertext=one) for one in sealed])
            assert opened == [item.plaintext for item in items]
        finally:
            await client.close()

    asyncio.run(main())


def test_it_neither_rotates_nor_prunes(tmp_path: Path) -> None:
    async def main() -> None:
        client = await EmbeddedClient.open(tmp_path / "kms")
        try:
            for call in (client.rotate_kek(), client.prune_kek()):
                with pytest.raises(errors.NotFoundError, match="use the daemon"):
                    await call
        finally:
            await client.close()

    asyncio.run(main())
