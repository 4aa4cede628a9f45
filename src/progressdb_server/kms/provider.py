"""The provider protocol: the seam between the message server and whoever holds the keys.

Invariants: ids are checked by the provider's far side; a failure is one of the errors below, and its text may be shown
to a client. Every item is bound to its `aad` (the storage key of the record) and its thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from minikms import api


class ProviderError(Exception):
    """Base of the errors of this seam; never raised itself."""


class ProviderUnavailableError(ProviderError):
    """The key service did not answer in time or is down. `retry_after_s` is what to tell the client."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProviderRefusedError(ProviderError):
    """The key service refused. `code` is one of the stable words of `minikms.api`."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class KeyHandle(NamedTuple):
    key_id: str
    wrapped: bytes


class Seal(NamedTuple):
    """One record to encrypt."""

    key_id: str
    plaintext: bytes
    aad: bytes
    thread_id: str
    request_id: str = ""


class Open(NamedTuple):
    """One record to decrypt. `ciphertext` is nonce(12) | ciphertext | tag(16)."""

    key_id: str
    ciphertext: bytes
    aad: bytes
    thread_id: str
    request_id: str = ""


class Provider(Protocol):
    @property
    def encrypts(self) -> bool:
        """False only for the one that seals nothing, whose stores are marked (progressdb_server/unencrypted.py)."""
        ...

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str = ""
    ) -> KeyHandle:
        """A new key for the thread, durable before this returns."""
        ...

    async def encrypt_with_key(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes: ...

    async def decrypt_with_key(
        self, key_id: str, ciphertext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes: ...

    async def encrypt_many(self, items: Sequence[Seal]) -> list[bytes | ProviderRefusedError]:
        """In order; a refused item does not stop the others. Raises ProviderUnavailableError for the whole. Any number
        of items."""
        ...

    async def decrypt_many(self, items: Sequence[Open]) -> list[bytes | ProviderRefusedError]: ...

    async def retire(self, key_id: str, *, request_id: str = "") -> None: ...

    async def reencrypt_many(
        self, from_key_id: str, to_key_id: str, items: Sequence[tuple[bytes, bytes]], *, request_id: str = ""
    ) -> list[bytes | ProviderRefusedError]:
        """Each item is (ciphertext, aad). Plaintext never leaves the key service."""
        ...

    async def check_many(
        self, key_id: str, items: Sequence[tuple[bytes, bytes]], *, thread_id: str, request_id: str = ""
    ) -> list[ProviderRefusedError | None]:
        """Each item is (ciphertext, aad); in order, None if it opens under the key, or why not. Any number of items.

        Plaintext never leaves the key service. Raises ProviderRefusedError for the key, ProviderUnavailableError for
        the whole.
        """
        ...

    async def list_keys(
        self, *, thread_id: str | None = None, state: api.State | None = None, cursor: str | None = None
    ) -> api.KeyListAnswer:
        """A page of keys; go on with `next_cursor` while there is one."""
        ...

    async def destroy(self, key_id: str, *, request_id: str = "") -> None:
        """Destroys a retired key for good; once more for one that is destroyed changes nothing."""
        ...

    async def status(self) -> dict[str, object]: ...

    async def close(self) -> None: ...
