"""The chain: MACs and signatures that reveal an edited, missing, repeated or reordered line.

Owns: the MAC of a line, the events that the log writes about itself (genesis, checkpoint, segment, key change), what
their signatures cover, and the signer that makes those signatures. Rules:

1. sig(n) = HMAC-SHA-256(audit key, sig(n-1) || exact event bytes of n); sig(0) is 32 zero bytes.
2. A signed line (`checkpoint`, `segment_close`, `audit_key`) has an Ed25519 signature (RFC 8032) over SIGNED_LABEL and
   its event bytes without `facts.signature`. Its facts contain the log's id, the MAC of the previous line, and the
   SHA-256 of the lines from the previous signed line of the file (or the file's first line) to the previous line. The
   first line of a later file contains the SHA-256 of the previous line. So each signature covers all earlier lines, and
   the public key alone is enough to check them.
3. A receipt has a signature of its own, over RECEIPT_LABEL and its event bytes without `facts.signature`.
4. The MAC key and the signing seed are views of the arena, and each call reads them again. An HMAC object holds
   midstates that are enough to forge MACs, so `make_lines` frees it before it returns. Each call of `Ed25519Signer`
   makes and frees its own private key object. OpenSSL clears both when they are freed.

It must never do I/O, read a clock, copy a key or keep a key object.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from minikms.api.base64 import decode_exact, encode, encode_text
from minikms.audit import record
from minikms.audit.record import ACTOR_SELF, LINE_BYTES_MAX, Event, Facts, LineRef, encode_event

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
SIGNED_LABEL: Final = b"minikms/audit/signed-line/v1\x00"
RECEIPT_LABEL: Final = b"minikms/audit/receipt/v1\x00"
RECEIPT_FACT: Final = "tombstone"
"""A line with this fact is a receipt: it is signed by itself."""
LOG_ID_BYTES: Final = 16

_SHA256: Final = SHA256()
_LINE_BEGIN: Final = record.LINE_PREFIX
_LINE_SIG: Final = record.LINE_MIDDLE
_LINE_END: Final = record.LINE_SUFFIX + b"\n"


class Ed25519Signer:
    """Signs with Ed25519, by a 32-byte seed in the caller's arena."""

    def __init__(self, seed: memoryview) -> None:
        self._seed = seed

    def public_key(self) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._seed).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._seed).sign(message)


def signature_is_valid(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is valid for `message` under the raw `public_key`. False if either is malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class AuditKey(NamedTuple):
    """One version of the audit key: the 32-byte MAC key as a view of the arena, and its signer.

    since: the last line under the previous version. None if there was no previous version, or it is not recorded.
    """

    version: int
    mac_key: memoryview
    signer: Ed25519Signer
    since: LineRef | None = None


class KeyState(NamedTuple):
    """How new the key files beside the log are: the epoch of the keyring, and the number of tombstones."""

    epoch: int = 0
    tombstones: int = 0


def mac(audit_key: memoryview, previous_sig: bytes, event_bytes: bytes) -> bytes:
    """The 32-byte MAC that chains `event_bytes` to the previous line."""
    return hmac.digest(audit_key, previous_sig + event_bytes, "sha256")


def make_lines(
    events: Sequence[Event],
    head: LineRef,
    audit_key: memoryview,
    ts: int,
    *,
    escaped: bool = False,
    signer: Ed25519Signer | None = None,
) -> tuple[bytes, LineRef]:
    """The lines of `events`, chained to `head`, and the new head. Sets `seq` and `ts` of each event. An event without
    text that needs escaping may occur several times; its `seq` is then that of one of its lines.

    `record.sanitise` escapes text that a line can't hold and truncates an event that is too long. `escaped`: an
    earlier call with these events has done that already, if it was necessary. `signer`: of receipts.
    """
    try:
        blob, new_head = _made(events, head, audit_key, ts, signer)
    except UnicodeEncodeError:  # a lone surrogate, for example from a file name
        fits = False
    else:
        fits = escaped or (
            record.is_clean(blob)
            and (len(blob) < LINE_BYTES_MAX or max(map(len, blob.split(b"\n"))) + 1 < LINE_BYTES_MAX)
        )
    if fits:
        return blob, new_head
    for event in events:
        record.sanitise(event)
    return _made(events, head, audit_key, ts, signer)


def _made(
    events: Sequence[Event], head: LineRef, audit_key: memoryview, ts: int, signer: Ed25519Signer | None
) -> tuple[bytes, LineRef]:
    """This is the hot path: one call per event-loop turn. An event takes about 1.3 µs, half of it for the HMAC.

    Copying and using an HMAC object takes 0.7 µs. A one-shot MAC would take 1.6 µs. An event that occurs several times
    in a row is encoded once, because its lines differ only in `seq`, their first field.
    """
    to_bytes, to_base64 = encode_event, encode
    keyed = HMAC(audit_key, _SHA256)
    seq, sig = head.seq, head.sig
    last = seq + len(events)
    parts: list[bytes] = []
    encoded: Event | None = None
    event_bytes = after_seq = b""
    for event in events:
        seq += 1
        if event is encoded:
            after_seq = after_seq or event_bytes[event_bytes.index(b",") :]
            event_bytes = b'{"seq":%d%b' % (seq, after_seq)
        else:
            event.seq = seq
            event.ts = ts
            if event.facts and RECEIPT_FACT in event.facts and signer is not None:
                event.facts["signature"] = encode_text(signer.sign(signed_message(event, RECEIPT_LABEL)))
            event_bytes, encoded, after_seq = to_bytes(event), event, b""
        mac_of_line = keyed.copy() if seq < last else keyed
        mac_of_line.update(sig + event_bytes)
        sig = mac_of_line.finalize()
        parts += (_LINE_BEGIN, event_bytes, _LINE_SIG, to_base64(sig), _LINE_END)
    return b"".join(parts), LineRef(seq, sig)


class Coverage:
    """The lines of one file that the next signed line will cover: their SHA-256, number and bytes."""

    __slots__ = ("_digest", "bytes_count", "lines_count")

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.lines_count = 0
        self.bytes_count = 0

    @classmethod
    def of_line(cls, line: bytes) -> Coverage:
        """The coverage of one line, given with its newline."""
        coverage = cls()
        coverage.add(line, 1)
        return coverage

    def add(self, blob: bytes, lines_count: int) -> None:
        """Add whole lines, with their newlines."""
        self._digest.update(blob)
        self.lines_count += lines_count
        self.bytes_count += len(blob)

    def copy(self) -> Coverage:
        duplicate = Coverage()
        duplicate._digest = self._digest.copy()
        duplicate.lines_count = self.lines_count
        duplicate.bytes_count = self.bytes_count
        return duplicate

    def hex(self) -> str:
        return self._digest.hexdigest()


def signed_message(event: Event, label: bytes = SIGNED_LABEL) -> bytes:
    """The bytes that the signature in a line covers: the label, then the event without `facts.signature`."""
    facts = {name: value for name, value in event.facts.items() if name != "signature"}
    return label + encode_event(msgspec.structs.replace(event, facts=facts))


def signed_line(
    event_type: str,
    *,
    head: LineRef,
    ts: int,
    coverage: Coverage,
    log_id: bytes,
    key: AuditKey,
    state: KeyState,
    extra: Facts | None = None,
) -> tuple[bytes, LineRef]:
    """A line after `head` of a type in `record.SIGNED_TYPES`, and the new head. `coverage`: the lines it covers."""
    facts: Facts = {
        "epoch": state.epoch,
        "key": key.version,
        "lines": coverage.lines_count,
        "lines_sha256": coverage.hex(),
        "log_id": log_id.hex(),
        "previous_sig": encode_text(head.sig),
        "tombstones": state.tombstones,
        **(extra or {}),
    }
    event = Event(seq=head.seq + 1, ts=ts, type=event_type, actor=ACTOR_SELF, facts=facts)
    event.facts["signature"] = encode_text(key.signer.sign(signed_message(event)))
    event_bytes = encode_event(event)
    sig = mac(key.mac_key, head.sig, event_bytes)
    return record.encode_line(event_bytes, sig), LineRef(head.seq + 1, sig)


def genesis_event(log_id: bytes, key_version: int, public_key: bytes, previous: Facts) -> Event:
    """The event of a log's first line. `previous`: facts about an abandoned log, see docs/spec/audit.md."""
    return Event(
        type=record.TYPE_GENESIS,
        actor=ACTOR_SELF,
        facts={
            "format": record.FORMAT_VERSION,
            "key": key_version,
            "log_id": log_id.hex(),
            "public_key": encode_text(public_key),
            "segment": 1,
            **previous,
        },
    )


def segment_open_event(
    log_id: bytes,
    key_version: int,
    public_key: bytes,
    *,
    segment: int,
    previous: LineRef,
    closed: Coverage,
    state: KeyState,
) -> Event:
    """The event of a later file's first line. `previous`: head of the previous file; `closed` covers its last line;
    `state`: that of its last line.
    """
    return Event(
        type=record.TYPE_SEGMENT_OPEN,
        actor=ACTOR_SELF,
        facts={
            "epoch": state.epoch,
            "format": record.FORMAT_VERSION,
            "key": key_version,
            "log_id": log_id.hex(),
            "previous_seq": previous.seq,
            "previous_sha256": closed.hex(),
            "previous_sig": encode_text(previous.sig),
            "public_key": encode_text(public_key),
            "segment": segment,
            "tombstones": state.tombstones,
        },
    )


def parse_head(text: str) -> LineRef | None:
    """The head that is written as `SEQ:SIG` in `text`. None if `text` does not have that form."""
    seq, _, sig64 = text.partition(":")
    sig = decode_exact(sig64, record.MAC_BYTES)
    if sig is None or not (seq.isascii() and seq.isdigit() and len(seq) <= record.SEQ_DIGITS_MAX):
        return None
    return LineRef(int(seq), sig) if 0 < int(seq) <= record.INTEGER_MAX else None
