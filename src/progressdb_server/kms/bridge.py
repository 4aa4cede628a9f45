"""The security bridge: what the server asks of a key service, on a client of miniKMS.

Owns: the provider's methods, and how the errors of a client look to the server. Invariants: a failure is never an
answer. The texts of the errors raised here may be shown to an HTTP client: they hold no path and nothing of the far
side but its own sentence about the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from minikms import api
from minikms.client import DecryptItem, EncryptItem, KmsError, KmsRefusedError, ReencryptItem
from progressdb_server.kms.provider import (
    KeyHandle,
    Open,
    ProviderError,
    ProviderRefusedError,
    ProviderUnavailableError,
    Seal,
)

RETRY_AFTER_S: Final = 2
LISTED_KEYS_MAX: Final = 512
"""Of a page: the key service reads a file for each key."""

_NOT_THE_REQUESTS_FAULT: Final = frozenset(
    {
        api.CODE_UNAUTHORIZED,
        api.CODE_AUDIT_UNAVAILABLE,
        api.CODE_STORAGE_UNAVAILABLE,
        api.CODE_SHUTTING_DOWN,
        api.CODE_INTERRUPTED,
        api.CODE_TIMEOUT,
        api.CODE_INTERNAL,
    }
)
"""Refusals that say something about the key service, not about what was asked: the same request may succeed later."""


class KeyClient(Protocol):
    """The part of AsyncClient that a provider uses; every method raises KmsError."""

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer: ...

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> bytes: ...

    async def decrypt(
        self, key_id: str, ciphertext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> bytes: ...

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]: ...

    async def decrypt_batch(self, items: Sequence[DecryptItem]) -> list[bytes | KmsRefusedError]: ...

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None
    ) -> list[bytes | KmsRefusedError]: ...

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None
    ) -> list[KmsRefusedError | None]: ...

    async def retire_key(self, key_id: str, *, request_id: str | None) -> api.KeyAnswer: ...

    async def list_keys(
        self, *, thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
    ) -> api.KeyListAnswer: ...

    async def destroy_key(self, key_id: str, *, request_id: str | None) -> api.DestroyKeyAnswer: ...

    async def status(self) -> dict[str, object]: ...

    async def close(self) -> None: ...


class ClientProvider:
    """Implements Provider on a KeyClient, which it closes. Used in one event loop."""

    encrypts: Final = True

    def __init__(self, client: KeyClient) -> None:
        self._client = client

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str = ""
    ) -> KeyHandle:
        try:
            made = await self._client.create_dek_for_thread(thread_id, replaces=replaces, request_id=request_id or None)
        except KmsError as error:
            raise _translated(error) from error
        return KeyHandle(made.key_id, made.wrapped)

    async def encrypt_with_key(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        try:
            return await self._client.encrypt(
                key_id, plaintext, aad=aad, thread_id=thread_id, request_id=request_id or None
            )
        except KmsError as error:
            raise _translated(error) from error

    async def decrypt_with_key(
        self, key_id: str, ciphertext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        try:
            return await self._client.decrypt(
                key_id, ciphertext, aad=aad, thread_id=thread_id, request_id=request_id or None
            )
        except KmsError as error:
            raise _translated(error) from error

    async def encrypt_many(self, items: Sequence[Seal]) -> list[bytes | ProviderRefusedError]:
        sealed = [
            EncryptItem(
                key_id=item.key_id,
                plaintext=item.plaintext,
                aad=item.aad,
                thread_id=item.thread_id,
                request_id=item.request_id or None,
            )
            for item in items
        ]
        try:
            return _outcomes(await self._client.encrypt_batch(sealed))
        except KmsError as error:
            raise _translated(error) from error

    async def decrypt_many(self, items: Sequence[Open]) -> list[bytes | ProviderRefusedError]:
        opened = [
            DecryptItem(
                key_id=item.key_id,
                ciphertext=item.ciphertext,
                aad=item.aad,
                thread_id=item.thread_id,
                request_id=item.request_id or None,
            )
            for item in items
        ]
        try:
            return _outcomes(await self._client.decrypt_batch(opened))
        except KmsError as error:
            raise _translated(error) from error

    async def retire(self, key_id: str, *, request_id: str = "") -> None:
        try:
            await self._client.retire_key(key_id, request_id=request_id or None)
        except KmsError as error:
            raise _translated(error) from error

    async def list_keys(
        self, *, thread_id: str | None = None, state: api.State | None = None, cursor: str | None = None
    ) -> api.KeyListAnswer:
        try:
            return await self._client.list_keys(thread_id=thread_id, state=state, cursor=cursor, limit=LISTED_KEYS_MAX)
        except KmsError as error:
            raise _translated(error) from error

    async def destroy(self, key_id: str, *, request_id: str = "") -> None:
        try:
            await self._client.destroy_key(key_id, request_id=request_id or None)
        except KmsError as error:
            raise _translated(error) from error

    async def reencrypt_many(
        self, from_key_id: str, to_key_id: str, items: Sequence[tuple[bytes, bytes]], *, request_id: str = ""
    ) -> list[bytes | ProviderRefusedError]:
        moved = [ReencryptItem(ciphertext=ciphertext, aad=aad) for ciphertext, aad in items]
        try:
            return _outcomes(
                await self._client.reencrypt_batch(from_key_id, to_key_id, moved, request_id=request_id or None)
            )
        except KmsError as error:
            raise _translated(error) from error

    async def check_many(
        self, key_id: str, items: Sequence[tuple[bytes, bytes]], *, thread_id: str, request_id: str = ""
    ) -> list[ProviderRefusedError | None]:
        checked = [ReencryptItem(ciphertext=ciphertext, aad=aad) for ciphertext, aad in items]
        try:
            verdicts = await self._client.check_batch(
                key_id, checked, thread_id=thread_id, request_id=request_id or None
            )
        except KmsError as error:
            raise _translated(error) from error
        return [
            None if refused is None else ProviderRefusedError(refused.message, refused.code) for refused in verdicts
        ]

    async def status(self) -> dict[str, object]:
        try:
            return await self._client.status()
        except KmsError as error:
            raise _translated(error) from error

    async def close(self) -> None:
        await self._client.close()


def _outcomes(outcomes: Sequence[bytes | KmsRefusedError]) -> list[bytes | ProviderRefusedError]:
    return [
        outcome if isinstance(outcome, bytes) else ProviderRefusedError(outcome.message, outcome.code)
        for outcome in outcomes
    ]


def _translated(error: KmsError) -> ProviderError:
    if isinstance(error, KmsRefusedError) and error.code not in _NOT_THE_REQUESTS_FAULT:
        return ProviderRefusedError(error.message, error.code)
    return ProviderUnavailableError("the key service is not available", RETRY_AFTER_S)
