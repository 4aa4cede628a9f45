"""The handlers of LangGraph Server: what is stored, what opens, and what a rotation replaces."""

import json
import uuid
from operator import attrgetter
from typing import Any

import pytest
from langgraph_sdk import Encryption
from langgraph_sdk.encryption.types import DecryptResult, EncryptionContext

from minikms import Client
from minikms.api.errors import ForbiddenError
from minikms_adapters import AdapterError, DestroyedRecordError, PlaintextRecordError, WrongPlaceError
from minikms_adapters.langgraph.encryption import server_encryption
from minikms_adapters.records import key_of
from tests.minikms_adapters.test_records import Counting

pytestmark = pytest.mark.filterwarnings("ignore::langgraph_sdk.encryption.LangGraphBetaWarning")
METADATA: dict[str, Any] = {
    "tenant_id": "acme",
    "owner": "ada",
    "salary": 48_000,
    "note": {"ünï": [None, 1.5]},
    "no": None,
}
BLOB = b"\0checkpoint\xff"


@pytest.fixture
def encryption(kms: Client) -> Encryption:
    return server_encryption(kms)


def context(tenant: str | None, model: str = "thread", field: str = "metadata") -> EncryptionContext:
    return EncryptionContext(model, {} if tenant is None else {"tenant_id": tenant}, field)


@pytest.fixture
def tenant() -> str:
    return str(uuid.uuid4())


def thread_of(tenant: str) -> str:
    return f"langgraph-server.{tenant}"


async def encrypt(encryption: Encryption, ctx: EncryptionContext, value: Any) -> Any:
    handler: Any = (
        attrgetter("_blob_encryptor")(encryption) if isinstance(value, bytes) else encryption.get_json_encryptor()
    )
    return await handler(ctx, value)


async def decrypt(encryption: Encryption, ctx: EncryptionContext, value: Any) -> Any:
    handler: Any = (
        attrgetter("_blob_decryptor")(encryption) if isinstance(value, bytes) else encryption.get_json_decryptor()
    )
    return await handler(ctx, value)


async def test_values_keep_the_keys_of_the_json_and_open_under_another_model(
    encryption: Encryption, tenant: str
) -> None:
    stored = await encrypt(encryption, context(tenant, "cron"), METADATA)
    assert list(stored) == list(METADATA) and stored["owner"] == "ada"
    assert "48000" not in json.dumps(stored) and stored["no"] is not None
    assert await decrypt(encryption, context(tenant, "run", "kwargs"), json.loads(json.dumps(stored))) == METADATA
    blob = await encrypt(encryption, context(tenant), BLOB)
    assert BLOB not in blob and await decrypt(encryption, context(tenant, "checkpoint"), blob) == BLOB


async def test_what_was_moved_altered_or_never_encrypted_does_not_open(encryption: Encryption, tenant: str) -> None:
    stored = await encrypt(encryption, context(tenant), METADATA)
    blob = await encrypt(encryption, context(tenant), BLOB)
    for wrong, of, error in (
        (stored | {"salary": stored["note"]}, tenant, WrongPlaceError),
        (stored | {"salary": 1}, tenant, PlaintextRecordError),
        (stored, "another", WrongPlaceError),
        (blob, "another", WrongPlaceError),
        (blob[:-1], tenant, WrongPlaceError),
        (BLOB, tenant, PlaintextRecordError),
    ):
        with pytest.raises(error):
            await decrypt(encryption, context(of), wrong)
    for nobody in (None, ""):
        with pytest.raises(AdapterError, match="X-Encryption-Context"):
            await encrypt(encryption, context(nobody), METADATA)


async def test_what_lies_under_a_retired_key_is_replaced(encryption: Encryption, kms: Client, tenant: str) -> None:
    stored = await encrypt(encryption, context(tenant), METADATA)
    blob = await encrypt(encryption, context(tenant), BLOB)
    old = key_of(blob)
    new = kms.create_dek_for_thread(thread_of(tenant), replaces=old, purpose="data").key_id
    kms.retire_key(old)
    later = await encrypt(encryption, context(tenant), METADATA | {"salary": 50_000})  # learns of the new key
    for value, plaintext in ((stored, METADATA), (stored | {"note": later["note"]}, METADATA), (blob, BLOB)):
        result = await decrypt(encryption, context(tenant), value)
        assert isinstance(result, DecryptResult) and result.plaintext == plaintext
        assert await decrypt(encryption, context(tenant), result.replacement) == plaintext
    assert key_of(result.replacement) == new
    kms.destroy_key(old)
    with pytest.raises(DestroyedRecordError):
        await decrypt(encryption, context(tenant), blob)


class WithoutReplacement(Counting):
    """A client whose user may not re-encrypt."""

    def reencrypt_batch(self, *_: object) -> None:
        raise ForbiddenError("not permitted")


async def test_a_read_is_one_exchange_and_needs_no_replacement(kms: Client, tenant: str) -> None:
    client = WithoutReplacement(kms)
    encryption = server_encryption(client)  # type: ignore[arg-type]  # a stand-in
    blob = await encrypt(encryption, context(tenant), BLOB)
    client.calls.clear()
    assert await decrypt(encryption, context(tenant), blob) == BLOB
    assert client.calls == ["decrypt_batch"]
    kms.create_dek_for_thread(thread_of(tenant), replaces=key_of(blob), purpose="data")
    await encrypt(server_encryption(kms), context(tenant), BLOB)
    assert await decrypt(server_encryption(client), context(tenant), blob) == BLOB  # type: ignore[arg-type]  # as above
