"""A key service inside the test's process: real AES-GCM, real keys in memory, the interface of the server's seam.

It binds as the key service does: a record opens only under its own key, its thread and its additional data. `down`
makes it unavailable, `delay_s` slow; calls of the verbs in `holds` are counted by `held` and wait for `go_on`; `calls`
counts all.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.api.errors import KmsRefusedError, KmsUnavailableError, refusal
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from minikms.client.items import chunks

T = TypeVar("T")
R = TypeVar("R")


def to_seal(key_id: str, plaintext: bytes, aad: bytes, thread_id: str, request_id: str | None = None) -> EncryptItem:
    return EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)


def to_open(key_id: str, ciphertext: bytes, aad: bytes, thread_id: str) -> DecryptItem:
    return DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id)


def outcomes(work: Callable[[T], R], items: Sequence[T]) -> list[R | KmsRefusedError]:
    """What `work` makes of each item, or its refusal."""
    answers: list[R | KmsRefusedError] = []
    for item in items:
        try:
            answers.append(work(item))
        except KmsRefusedError as refused:
            answers.append(refused)
    return answers


class SealingProvider:
    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, AESGCM]] = {}
        self.retired: set[str] = set()
        self.destroyed: set[str] = set()
        self.born = "2023-01-01T00:00:00Z"
        self.created_at: dict[str, str] = {}
        self.page = 2
        self.calls: Counter[str] = Counter()
        self.down = False
        self.delay_s = 0.0
        self.holds: set[str] = set()
        self.held = 0
        self.go_on = asyncio.Event()

    async def _answer(self, verb: str) -> None:
        self.calls[verb] += 1
        if verb in self.holds:
            self.held += 1
            await self.go_on.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.down:
            raise KmsUnavailableError("the key service is down")

    def keys_of(self, thread_id: str, *, active: bool = True) -> list[str]:
        return [k for k, (t, _) in self.keys.items() if t == thread_id and not (active and k in self.retired)]

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer:
        await self._answer("create")
        key_id = f"k_{len(self.keys):026d}"
        self.keys[key_id] = (thread_id, AESGCM(AESGCM.generate_key(256)))
        if replaces is not None:
            self.retired.add(replaces)
        return api.CreateDekAnswer(key_id, b"wrapped")

    def _key(self, key_id: str, thread_id: str | None) -> AESGCM:
        if key_id not in self.keys:
            raise refusal("key_not_found", "key not found")
        if key_id in self.destroyed:
            raise refusal("key_destroyed", "key destroyed")
        owner, cipher = self.keys[key_id]
        if owner != thread_id:
            raise refusal("wrong_thread", "wrong thread")
        return cipher

    def _seal(self, item: EncryptItem) -> bytes:
        cipher = self._key(item.key_id, item.thread_id)
        if item.key_id in self.retired:
            raise refusal("key_retired", "key retired")
        nonce = os.urandom(24)
        return nonce + cipher.encrypt(nonce, item.plaintext, item.key_id.encode() + b"|" + item.aad)

    def _open(self, item: DecryptItem) -> bytes:
        cipher = self._key(item.key_id, item.thread_id)
        try:
            return cipher.decrypt(item.ciphertext[:24], item.ciphertext[24:], item.key_id.encode() + b"|" + item.aad)
        except (InvalidTag, ValueError) as error:  # the latter for a nonce that is cut short
            raise refusal("decryption_failed", "decryption failed") from error

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None = None
    ) -> bytes:
        await self._answer("encrypt")
        return self._seal(
            EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        )

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]:
        await self._answer("encrypt_batch")
        return outcomes(self._seal, items)

    async def decrypt_batch(
        self, items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        for _ in chunks(items):  # as the client: an item that no request can hold is an error of the whole batch
            pass
        await self._answer("decrypt_batch")
        return outcomes(self._open, items)

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        await self._answer("retire_key")
        self.retired.add(key_id)
        return self._described(key_id)

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        await self._answer("reencrypt_batch")
        thread_id = self.keys[from_key_id][0]

        def moved(item: ReencryptItem) -> bytes:
            plaintext = self._open(to_open(from_key_id, item.ciphertext, item.aad, thread_id))
            return self._seal(to_seal(to_key_id, plaintext, item.aad, thread_id))

        return outcomes(moved, items)

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None = None
    ) -> list[KmsRefusedError | None]:
        await self._answer("check_batch")
        self._key(key_id, thread_id)
        opened = outcomes(lambda item: self._open(to_open(key_id, item.ciphertext, item.aad, thread_id or "")), items)
        return [outcome if isinstance(outcome, KmsRefusedError) else None for outcome in opened]

    def _described(self, key_id: str) -> api.KeyAnswer:
        return api.KeyAnswer(
            key_id=key_id,
            thread_id=self.keys[key_id][0],
            purpose="thread",
            state="retired" if key_id in self.retired else "active",
            kek_version=1,
            created_at=self.created_at.get(key_id, self.born),
        )

    async def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> api.KeyListAnswer:
        """Pages of `page` keys, whatever the limit, so that few keys make several pages."""
        await self._answer("list_keys")
        found = [
            self._described(key_id)
            for key_id, (owner, _) in sorted(self.keys.items())
            if key_id not in self.destroyed and thread_id in (None, owner) and key_id > (cursor or "")
        ]
        found = [key for key in found if state in (None, key.state)]
        more = found[self.page : self.page + 1]
        return api.KeyListAnswer(found[: self.page], found[self.page - 1].key_id if more else None)

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        await self._answer("get_key")
        self._key(key_id, self.keys.get(key_id, ("",))[0])
        return self._described(key_id)

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer:
        await self._answer("destroy_key")
        if thread_id is not None and key_id not in self.destroyed:
            self._key(key_id, thread_id)
        if key_id not in self.retired:
            raise refusal("conflict", "a key that is active can't be destroyed")
        self.destroyed.add(key_id)
        return api.DestroyKeyAnswer(key_id, "destroyed", 0, [])

    async def status(self) -> api.StatusAnswer:
        await self._answer("status")
        return api.StatusAnswer(status="ok")

    async def close(self) -> None:
        return None
