"""LangGraph Server: the handlers that encrypt what the server stores itself, under one key for each tenant.

Owns: `server_encryption`, an `Encryption` of langgraph_sdk. Invariants: each value that is not named as plain is
encrypted, whatever it is; the keys of a JSON object stay; a value of JSON is bound to its tenant and its key, a blob to
its tenant alone, because the server moves values between models and fields. What does not open is never returned, and a
value that can be read is returned although its key can't be replaced.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Final

from langgraph_sdk import Encryption
from langgraph_sdk.encryption.types import DecryptResult, EncryptionContext, Json

from minikms.api.errors import KmsError
from minikms_adapters.errors import AdapterError
from minikms_adapters.records import (
    KmsClient,
    Place,
    RecordSealer,
    StepRunner,
    Steps,
    as_json,
    asynchronous,
    from_json,
    json_bytes,
    key_of,
    thread_name,
)

PLAIN: Final = frozenset({"assistant_id", "graph_id", "owner", "run_id", "tenant_id", "thread_id"})
"""The keys of JSON objects whose values the server filters by."""


def server_encryption(kms: KmsClient, *, key_by: str = "tenant_id", plain: Collection[str] = PLAIN) -> Encryption:
    """The object that the path under `encryption` in `langgraph.json` names.

    `key_by` is the member of the encryption context whose value has the key: that of a tenant, a user or a thread. The
    values of `plain` stay in plaintext. A handler raises AdapterError for a context without that member, RecordError
    for a value that does not open.
    """
    handlers = _Handlers(kms, key_by, frozenset(plain))
    encryption = Encryption()
    encryption.encrypt.blob(handlers.encrypt_blob)
    encryption.decrypt.blob(handlers.decrypt_blob)
    encryption.encrypt.json(handlers.encrypt_json)
    encryption.decrypt.json(handlers.decrypt_json)
    return encryption


class _Handlers:
    def __init__(self, kms: KmsClient, key_by: str, plain: frozenset[str]) -> None:
        self._runner = StepRunner(kms)
        self._sealer = RecordSealer()
        self._key_by = key_by
        self._plain = plain

    def _encrypt_blob(self, ctx: EncryptionContext, blob: bytes) -> Steps[bytes]:
        [record] = yield from self._sealer.seal([(self._place(ctx, "blob"), bytes(blob))])
        return record

    def _decrypt_blob(self, ctx: EncryptionContext, blob: bytes) -> Steps[bytes | DecryptResult[bytes]]:
        [plaintext], replacements = yield from self._open([(self._place(ctx, "blob"), bytes(blob))])
        return DecryptResult(plaintext, *replacements) if replacements else plaintext

    def _encrypt_json(self, ctx: EncryptionContext, data: Json) -> Steps[Json]:
        names = [name for name in data if name not in self._plain]
        values = [(self._place(ctx, "json", name), json_bytes(data[name])) for name in names]
        records = yield from self._sealer.seal(values)
        return data | dict(zip(names, map(as_json, records), strict=True))

    def _decrypt_json(self, ctx: EncryptionContext, data: Json) -> Steps[Json | DecryptResult[Json]]:
        names = [name for name in data if name not in self._plain]
        values = [(self._place(ctx, "json", name), from_json(data[name])) for name in names]
        plaintexts, replacements = yield from self._open(values)
        opened = data | dict(zip(names, map(json.loads, plaintexts), strict=True))
        if not replacements:
            return opened
        return DecryptResult(opened, data | dict(zip(names, map(as_json, replacements), strict=True)))

    encrypt_blob, decrypt_blob = asynchronous(_encrypt_blob), asynchronous(_decrypt_blob)
    encrypt_json, decrypt_json = asynchronous(_encrypt_json), asynchronous(_decrypt_json)

    def _place(self, ctx: EncryptionContext, *parts: str) -> Place:
        """The place of a value. Raises AdapterError for a context that names no key."""
        owner = ctx.metadata.get(self._key_by)
        if not isinstance(owner, str) or not owner:
            raise AdapterError(
                f"the encryption context has no {self._key_by}: a handler `@encryption.context` sets it, or the header "
                "X-Encryption-Context"
            )
        thread = thread_name("langgraph-server", owner)
        return Place(thread, ("langgraph-server", *parts), f"{' '.join(parts)} of {self._key_by} {owner}")

    def _open(self, records: Sequence[tuple[Place, object]]) -> Steps[tuple[list[bytes], list[bytes]]]:
        """The plaintexts; and all records anew, if the thread has another key than one of them."""
        plaintexts = yield from self._sealer.open(records)
        stored = [(place, record) for place, record in records if isinstance(record, bytes)]
        try:
            for place, record in stored:
                if key_of(record) != (yield from self._sealer.current_key(place.thread)):
                    moved = yield from self._sealer.move(records)
                    anew = [new or old for new, (_, old) in zip(moved, stored, strict=True)]
                    return plaintexts, anew if any(moved) else []
        except KmsError:
            pass  # what was read is good; a later read replaces it
        return plaintexts, []
