"""A key provider inside the test's process: real AES-GCM, real keys in memory, the protocol of the server's seam.

It binds as the key service does: a record opens only under its own key, its thread and its additional data. `down`
makes it unavailable, `delay_s` slow; `calls` counts.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from progressdb_server.kms.provider import KeyHandle, Open, ProviderRefusedError, ProviderUnavailableError, Seal


class SealingProvider:
    encrypts = True

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, AESGCM]] = {}
        self.retired: set[str] = set()
        self.destroyed: set[str] = set()
        self.born = "2026-01-01T00:00:00Z"
        self.created_at: dict[str, str] = {}
        self.uses: dict[str, int] = {}
        self.page = 2
        self.calls: Counter[str] = Counter()
        self.down = False
        self.delay_s = 0.0

    async def _answer(self, verb: str) -> None:
        self.calls[verb] += 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.down:
            raise ProviderUnavailableError("the key service is down", 3)

    def keys_of(self, thread_id: str, *, active: bool = True) -> list[str]:
        return [k for k, (t, _) in self.keys.items() if t == thread_id and not (active and k in self.retired)]

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str = ""
    ) -> KeyHandle:
        await self._answer("create")
        key_id = f"k_{len(self.keys):026d}"
        self.keys[key_id] = (thread_id, AESGCM(AESGCM.generate_key(256)))
        if replaces is not None:
            self.retired.add(replaces)
        return KeyHandle(key_id, b"wrapped")

    def _key(self, key_id: str, thread_id: str) -> AESGCM:
        if key_id not in self.keys:
            raise ProviderRefusedError("key not found", "key_not_found")
        if key_id in self.destroyed:
            raise ProviderRefusedError("key destroyed", "key_destroyed")
        owner, cipher = self.keys[key_id]
        if owner != thread_id:
            raise ProviderRefusedError("wrong thread", "wrong_thread")
        return cipher

    def _seal(self, item: Seal) -> bytes:
        cipher = self._key(item.key_id, item.thread_id)
        if item.key_id in self.retired:
            raise ProviderRefusedError("key retired", "key_retired")
        nonce = os.urandom(12)
        return nonce + cipher.encrypt(nonce, item.plaintext, item.key_id.encode() + b"|" + item.aad)

    def _open(self, item: Open) -> bytes:
        cipher = self._key(item.key_id, item.thread_id)
        try:
            return cipher.decrypt(item.ciphertext[:12], item.ciphertext[12:], item.key_id.encode() + b"|" + item.aad)
        except InvalidTag as error:
            raise ProviderRefusedError("decryption failed", "decryption_failed") from error

    async def encrypt_with_key(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        await self._answer("encrypt")
        return self._seal(Seal(key_id, plaintext, aad, thread_id))

    async def decrypt_with_key(
        self, key_id: str, ciphertext: bytes, *, aad: bytes, thread_id: str, request_id: str = ""
    ) -> bytes:
        await self._answer("decrypt")
        return self._open(Open(key_id, ciphertext, aad, thread_id))

    async def encrypt_many(self, items: Sequence[Seal]) -> list[bytes | ProviderRefusedError]:
        await self._answer("encrypt_many")
        answers: list[bytes | ProviderRefusedError] = []
        for item in items:
            try:
                answers.append(self._seal(item))
            except ProviderRefusedError as refused:
                answers.append(refused)
        return answers

    async def decrypt_many(self, items: Sequence[Open]) -> list[bytes | ProviderRefusedError]:
        await self._answer("decrypt_many")
        answers: list[bytes | ProviderRefusedError] = []
        for item in items:
            try:
                answers.append(self._open(item))
            except ProviderRefusedError as refused:
                answers.append(refused)
        return answers

    async def retire(self, key_id: str, *, request_id: str = "") -> None:
        await self._answer("retire")
        self.retired.add(key_id)

    async def reencrypt_many(
        self, from_key_id: str, to_key_id: str, items: Sequence[tuple[bytes, bytes]], *, request_id: str = ""
    ) -> list[bytes | ProviderRefusedError]:
        await self._answer("reencrypt_many")
        thread_id = self.keys[from_key_id][0]
        answers: list[bytes | ProviderRefusedError] = []
        for ciphertext, aad in items:
            try:
                plaintext = self._open(Open(from_key_id, ciphertext, aad, thread_id))
                answers.append(self._seal(Seal(to_key_id, plaintext, aad, thread_id)))
            except ProviderRefusedError as refused:
                answers.append(refused)
        return answers

    async def check_many(
        self, key_id: str, items: Sequence[tuple[bytes, bytes]], *, thread_id: str, request_id: str = ""
    ) -> list[ProviderRefusedError | None]:
        await self._answer("check_many")
        self._key(key_id, thread_id)
        verdicts: list[ProviderRefusedError | None] = []
        for ciphertext, aad in items:
            try:
                self._open(Open(key_id, ciphertext, aad, thread_id))
                verdicts.append(None)
            except ProviderRefusedError as refused:
                verdicts.append(refused)
        return verdicts

    async def list_keys(
        self, *, thread_id: str | None = None, state: api.State | None = None, cursor: str | None = None
    ) -> api.KeyListAnswer:
        await self._answer("list_keys")
        found = [
            api.KeyAnswer(
                key_id=key_id,
                thread_id=owner,
                purpose="thread",
                state="retired" if key_id in self.retired else "active",
                kek_version=1,
                created_at=self.created_at.get(key_id, self.born),
                uses_max=self.uses.get(key_id, 0),
            )
            for key_id, (owner, _) in sorted(self.keys.items())
            if key_id not in self.destroyed and thread_id in (None, owner) and key_id > (cursor or "")
        ]
        found = [key for key in found if state in (None, key.state)]
        more = found[self.page : self.page + 1]
        return api.KeyListAnswer(found[: self.page], found[self.page - 1].key_id if more else None)

    async def destroy(self, key_id: str, *, request_id: str = "") -> None:
        await self._answer("destroy")
        if key_id not in self.retired:
            raise ProviderRefusedError("a key that is active can't be destroyed", "conflict")
        self.destroyed.add(key_id)

    async def status(self) -> dict[str, object]:
        await self._answer("status")
        return {"epoch": 1, "audit": {"seq": 1, "sig": ""}}

    async def close(self) -> None:
        return None
