"""The message server without encryption, to measure the cost of encryption by (`python -m bench append_added`).

Owns: the provider that encrypts nothing, in the place of the one that keeps keys in the server's process. It is part of
no package: nothing that is installed stores plaintext. Run as
`PROGRESSDB_KMS_PROVIDER=local python -m bench.unencrypted <words of progressdb>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from minikms import api
from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from progressdb_server.cli import main
from progressdb_server.kms import provider

MARK: Final = b"plaintext, for benchmarks of this only: "
"""In the place of each record's nonce and tag, and as long, which the store checks. No key opens such a record."""
KEY_ID: Final = "k_none_nothing_is_encrypted"
"""The key id of every thread. No key service has made it."""


class UnencryptedProvider:
    """See `kms.provider.Provider`. A record is MARK and the plaintext."""

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer:
        if replaces is not None:
            raise _no_keys()
        return api.CreateDekAnswer(KEY_ID, b"")

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> bytes:
        return MARK + plaintext

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]:
        return [MARK + item.plaintext for item in items]

    async def decrypt_batch(
        self, items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        return [_opened(item.ciphertext) for item in items]

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        raise _no_keys()

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None = None
    ) -> list[KmsRefusedError | None]:
        outcomes = [_opened(item.ciphertext) for item in items]
        return [outcome if isinstance(outcome, KmsRefusedError) else None for outcome in outcomes]

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        raise _no_keys()

    async def list_keys(
        self, *, thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
    ) -> api.KeyListAnswer:
        return api.KeyListAnswer([])

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        raise _no_keys()

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer:
        raise _no_keys()

    async def status(self) -> api.StatusAnswer:
        raise _no_keys()

    async def close(self) -> None:
        return None


def _opened(record: bytes) -> bytes | KmsRefusedError:
    if not record.startswith(MARK):
        return refusal(api.CODE_DECRYPTION_FAILED, "the record is not one of a server without encryption")
    return record[len(MARK) :]


def _no_keys() -> KmsRefusedError:
    return refusal(api.CODE_NOT_FOUND, "this server encrypts nothing and has no keys")


async def _opened_provider(*given: object, **named: object) -> UnencryptedProvider:
    return UnencryptedProvider()


if __name__ == "__main__":
    provider.open_local = _opened_provider  # before `serve` imports the server
    main()
