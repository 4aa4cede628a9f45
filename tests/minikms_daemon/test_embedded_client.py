"""The embedded client has the methods of AsyncClient, and refuses what only a daemon does."""

import asyncio
import os
import warnings
from functools import partial
from pathlib import Path

import pytest

from minikms.api import errors
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from minikms.memory.arena import SecretArena
from minikms_daemon import embedded
from minikms_daemon.embedded import EmbeddedClient, EmbeddedError
from tests.harness.members import make_first
from tests.harness.vaults import key_file


async def test_verbs_answer_as_the_daemon_answers_them(tmp_path: Path) -> None:
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


async def test_it_neither_rotates_nor_prunes(tmp_path: Path) -> None:
    client = await EmbeddedClient.open(tmp_path / "kms")
    try:
        for call in (client.rotate_kek(), client.prune_kek()):
            with pytest.raises(errors.NotFoundError, match="use the daemon"):
                await call
    finally:
        await client.close()


async def test_a_host_of_several_is_served_by_its_daemon_alone(tmp_path: Path) -> None:
    await make_first(tmp_path / "kms")
    with pytest.raises(EmbeddedError, match="use its daemon"):
        await EmbeddedClient.open(tmp_path / "kms", master_key_file=key_file(tmp_path / "kms"))


async def test_a_closed_client_refuses_every_method(tmp_path: Path) -> None:
    client = await EmbeddedClient.open(tmp_path / "kms")
    key_id = (await client.create_dek_for_thread("t", purpose="data")).key_id
    sealed = await client.encrypt(key_id, b"x")
    await client.close()
    await client.close()
    for call in (
        client.health(),
        client.status(),
        client.create_dek_for_thread("t"),
        client.get_or_create_dek_for_thread("t"),
        client.get_wrapped(key_id),
        client.encrypt(key_id, b"x"),
        client.decrypt(key_id, sealed),
        client.encrypt_batch([EncryptItem(key_id=key_id, plaintext=b"x")] * 600),
        client.decrypt_batch([DecryptItem(key_id=key_id, ciphertext=sealed)]),
        client.reencrypt_batch(key_id, key_id, [ReencryptItem(ciphertext=sealed)]),
        client.check_batch(key_id, [ReencryptItem(ciphertext=sealed)]),
        client.generate_data_key(key_id),
        client.random(1),
        client.rotate_kek(new_kek_hex=bytearray(b"a" * 64)),
        client.list_keys(),
        client.get_key(key_id),
        client.retire_key(key_id),
        client.destroy_key(key_id),
        client.prune_kek(),
    ):
        with pytest.raises(errors.KmsClosedError, match=r"^the client is closed$"):
            await call


async def test_a_close_waits_for_the_calls_in_progress(tmp_path: Path) -> None:
    client = await EmbeddedClient.open(tmp_path / "kms")
    creating = [asyncio.create_task(client.create_dek_for_thread(f"t{number}")) for number in range(20)]
    await asyncio.sleep(0)
    await client.close()
    assert all(task.done() for task in creating)
    made = {(await task).key_id for task in creating}
    assert len(made) == len(creating)
    again = await EmbeddedClient.open(tmp_path / "kms")
    try:
        assert {(await again.get_key(key_id)).key_id for key_id in made} == made
    finally:
        await again.close()


async def test_a_forked_child_seals_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arena shows zeros where the keys are, and it would repeat nonces of its parent."""
    monkeypatch.setattr(embedded, "SecretArena", partial(SecretArena, force_fallback=True))

    client = await EmbeddedClient.open(tmp_path / "kms")
    try:
        key_id = (await client.create_dek_for_thread("t")).key_id
        await client.encrypt(key_id, b"x")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks beside threads
            pid = os.fork()
        if pid == 0:
            try:
                client.encrypt(key_id, b"x").send(None)  # without the loop, which is the parent's
            except errors.KmsClosedError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        await client.close()
