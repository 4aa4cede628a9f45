"""A DEK as it lies on disk: its record, wrapped under one KEK version.

Owns: the record's fields, its strict parsing, wrapping and unwrapping. Invariants: a record whose id, format or
algorithm isn't what is expected does not parse; unwrapping binds it to its id, thread, purpose, algorithm and KEK
version, so a swapped or foreign file does not open. `version` grows by one at each rewrap. It must never hold the
unwrapped key. docs/spec/formats.md describes the file.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from minikms import api
from minikms.crypto import aead, labels
from minikms.errors import DecryptionError, KeyUnreadableError
from minikms.keys.keyring import VERSION_MAX as KEK_VERSION_MAX
from minikms.keys.states import DekState, move_dek

FORMAT: Final = 1
FILE_BYTES_MAX: Final = 16 * 1024
REWRAPS_MAX: Final = 2**31
"""Above every `version` of a record."""

_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


class DekRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    id: str
    created_at: str
    wrapped: bytes
    thread_id: str
    format: int
    version: int
    kek_version: int
    purpose: api.Purpose
    algorithm: str
    state: DekState
    retired_at: str = ""
    replaces: str = ""
    replaced_by: str = ""

    def aad(self, kek_version: int) -> bytes:
        return labels.dek_aad(
            key_id=self.id,
            thread_id=self.thread_id,
            purpose=self.purpose,
            algorithm=self.algorithm,
            kek_version=kek_version,
        )


_decoder = msgspec.json.Decoder(DekRecord)
_encoder = msgspec.json.Encoder()


def encode(record: DekRecord) -> bytes:
    return _encoder.encode(record) + b"\n"


def parse(data: bytes, key_id: str) -> DekRecord:
    """The record in `data`, which must be that of `key_id`. Raises KeyUnreadableError, saying what is wrong with the
    file.
    """
    if len(data) > FILE_BYTES_MAX:
        raise KeyUnreadableError(f"the file of key {key_id} is larger than {FILE_BYTES_MAX} bytes")
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise KeyUnreadableError(f"the file of key {key_id} is damaged or of an unknown format version") from None
    if record.format != FORMAT:
        raise KeyUnreadableError(f"the file of key {key_id} has format version {record.format}; this is {FORMAT}")
    if record.id != key_id:
        raise KeyUnreadableError(f"the file of key {key_id} holds another key's record")
    if not _is_known(record):
        raise KeyUnreadableError(
            f"the file of key {key_id} names an algorithm, version, state or time that is not known"
        )
    if not all(_is_key_id_or_empty(other) for other in (record.replaces, record.replaced_by)):
        raise KeyUnreadableError(f"the file of key {key_id} names an impossible key")
    if api.THREAD_ID_PATTERN.fullmatch(record.thread_id) is None:
        raise KeyUnreadableError(f"the file of key {key_id} names an impossible thread")
    return record


def _is_known(record: DekRecord) -> bool:
    times = [record.created_at] if record.state == "active" else [record.created_at, record.retired_at]
    return (
        record.algorithm == labels.ALGORITHM
        and 1 <= record.version < REWRAPS_MAX
        and 1 <= record.kek_version < KEK_VERSION_MAX
        and (record.state == "retired" or (record.state == "active" and not record.retired_at))
        and all(_TIME.fullmatch(time) for time in times)
    )


def _is_key_id_or_empty(text: str) -> bool:
    return not text or api.KEY_ID_PATTERN.fullmatch(text) is not None


def new(
    *,
    key_id: str,
    thread_id: str,
    purpose: api.Purpose,
    created_at: str,
    kek: memoryview,
    kek_version: int,
    dek: memoryview,
    nonce: bytes,
    replaces: str = "",
) -> DekRecord:
    """The record of a fresh DEK, wrapped under `kek`."""
    record = DekRecord(
        id=key_id,
        created_at=created_at,
        wrapped=b"",
        thread_id=thread_id,
        format=FORMAT,
        version=1,
        kek_version=kek_version,
        purpose=purpose,
        algorithm=labels.ALGORITHM,
        state="active",
        replaces=replaces,
    )
    return msgspec.structs.replace(record, wrapped=aead.seal(kek, nonce, dek, record.aad(kek_version)))


def unwrap_into(record: DekRecord, kek: memoryview, target: memoryview) -> None:
    """Writes the DEK into `target`, 32 bytes of the arena. Raises KeyUnreadableError."""
    try:
        aead.open_into(kek, record.wrapped, record.aad(record.kek_version), target)
    except DecryptionError:
        raise KeyUnreadableError(
            f"key {record.id} does not unwrap: its file was altered, swapped, or comes from another installation"
        ) from None


def rewrap(record: DekRecord, dek: memoryview, kek: memoryview, kek_version: int, nonce: bytes) -> DekRecord:
    """The record wrapped under another KEK version; state and everything else stay as they are."""
    return msgspec.structs.replace(
        record,
        wrapped=aead.seal(kek, nonce, dek, record.aad(kek_version)),
        kek_version=kek_version,
        version=record.version + 1,
    )


def retired(record: DekRecord, *, at: str, replaced_by: str = "") -> DekRecord:
    """Raises ConflictError unless the key is active."""
    return msgspec.structs.replace(
        record, state=move_dek(record.state, "retire"), retired_at=at, replaced_by=replaced_by
    )
