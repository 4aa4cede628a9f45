"""One audit line: the event, its canonical bytes, and the parser. docs/spec/audit.md specifies the format.

Owns: the fields of an event, its only encoding, the frame of a line, and the escaping of text. Invariants: an event has
exactly one encoding, and `parse_line` rejects every other one; a line is printable ASCII without a backslash, so it
needs no JSON escape, a control character can't split it, and it can't send commands to a terminal; a line has at most
`LINE_BYTES_MAX` bytes.

It must never do I/O, read a clock, hold key material, or put plaintext, ciphertext or key bytes into an event.
"""

from __future__ import annotations

import hmac
import re
from typing import Annotated, Final

import msgspec

from minikms import api
from minikms.api.base64 import decode_exact, encode
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError

FORMAT_VERSION: Final = 1

LINE_BYTES_MAX: Final = 1024 * 1024
"""Includes the newline. `sanitise` keeps every event below it: two lists of 1,024 short texts and 64 facts are
0.7 MiB."""
TEXT_CHARS_MAX: Final = 256
ACTOR_CHARS_MAX: Final = 600
"""The name of a principal has 200 characters, each of which may take three once it is escaped."""
DETAIL_CHARS_MAX: Final = 1024
LIST_ITEMS_MAX: Final = api.BATCH_ITEMS_MAX
FACTS_COUNT_MAX: Final = 64

MAC_BYTES: Final = 32
MAC_CHARS: Final = 44
ZERO_MAC: Final = bytes(MAC_BYTES)
"""The MAC that precedes the first line of a log."""

LINE_PREFIX: Final = b'{"event":'
LINE_MIDDLE: Final = b',"sig":"'
LINE_SUFFIX: Final = b'"}'
_SIG_PART_BYTES: Final = len(LINE_MIDDLE) + MAC_CHARS + len(LINE_SUFFIX)

ACTOR_SELF: Final = "minikms"
"""The actor of events that the log and the daemon record about themselves."""

TYPE_GENESIS: Final = "genesis"
TYPE_CHECKPOINT: Final = "checkpoint"
TYPE_RECOVERY: Final = "recovery"
TYPE_RESUMED: Final = "resumed"
TYPE_SEGMENT_OPEN: Final = "segment_open"
TYPE_SEGMENT_CLOSE: Final = "segment_close"
TYPE_AUDIT_KEY: Final = "audit_key"
TYPE_RETENTION: Final = "retention"
TYPE_DISK_FULL: Final = "disk_full"
TYPE_DISK_OK: Final = "disk_ok"
TYPE_REFUSED: Final = "refused"

SIGNED_TYPES: Final = frozenset({TYPE_CHECKPOINT, TYPE_SEGMENT_CLOSE, TYPE_AUDIT_KEY})
"""Types of lines that carry an Ed25519 signature over the lines before them."""

_SEQ_PREFIX: Final = LINE_PREFIX + b'{"seq":'
SEQ_DIGITS_MAX: Final = 19

THREAD_LABEL: Final = b"minikms/audit/thread-id/v1\x00"
_THREAD_PREFIX: Final = "hmac-sha256:"
_THREAD_MAC_BYTES: Final = 16

INTEGER_MAX: Final = 2**63 - 1
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=INTEGER_MAX)]
Facts = dict[str, str | NonNegative]


class MalformedLineError(KmsRefusedError):
    """The bytes are not a line of an audit log. The error text names the rule that they break."""

    code = "audit_malformed"


class Event(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One audit event. An empty optional field is absent from the line. The writer sets `seq` and `ts`.

    seq: number of the line in the log, from 1. ts: Unix time in nanoseconds. type: the verb, or one of the TYPE_
    constants. actor: "peer_uid:<n>", the name of a principal behind a proxy, or `ACTOR_SELF`. outcome: "ok" or an error
    code of the API. count: number of items in a batch, or of refusals that the event summarises. key_ids: the distinct
    keys of a batch. detail: a short text for people. facts: named values for programs, such as the chain's own data and
    configuration.
    """

    seq: NonNegative = 0
    ts: NonNegative = 0
    type: str
    actor: str
    pid: NonNegative = 0
    key_id: str = ""
    key_ids: list[str] = []
    thread_id: str = ""
    count: NonNegative = 0
    # `omit_defaults` does not apply to this factory: "ok" is written out, and a line without an outcome is rejected.
    outcome: str = msgspec.field(default_factory=lambda: "ok")
    request_id: str = ""
    request_ids: list[str] = []
    detail: str = ""
    facts: Facts = {}


class LineRef(msgspec.Struct, frozen=True):
    """A position in a log: a line's `seq` and its 32-byte MAC. The head of a log is that of its last line."""

    seq: int
    sig: bytes


# "deterministic" sorts the keys of `facts`; the fields of the struct keep their order.
encode_event = msgspec.json.Encoder(order="deterministic").encode
_decode_event = msgspec.json.Decoder(Event, strict=True).decode

_ALLOWED_BYTES: Final = bytes(byte for byte in range(0x20, 0x7F) if byte != ord("\\"))
_ESCAPED_CHARS: Final = re.compile(r"[^ !#$&-\[\]-~]")


def is_clean(blob: bytes) -> bool:
    """Whether encoded events need no escaping: they are ASCII without backslash, percent sign and DEL.

    msgspec escapes quotes, backslashes and control characters with a backslash, so this test also finds those.
    """
    return blob.isascii() and b"\\" not in blob and b"%" not in blob and b"\x7f" not in blob


def escape(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """`text` with each byte outside printable ASCII, and each `"`, `\\` and `%`, as `%XX` (RFC 3986), truncated.

    Texts that differ within the first `chars_max` escaped characters stay different. JSON escapes nothing in it.
    """
    # Escaping only lengthens a text, so truncating first keeps the work bounded.
    return _ESCAPED_CHARS.sub(_percent, text[:chars_max])[:chars_max]


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def text_facts(event: Event) -> None:
    """Turn each fact that is neither text nor an integer from 0 to `INTEGER_MAX` into text, in place.

    The verifier rejects a line with such a fact, so one event could make the whole log fail verification.
    """
    for name, value in event.facts.items():
        if type(value) is not str and not (type(value) is int and 0 <= value <= INTEGER_MAX):
            event.facts[name] = str(value)


def sanitise(event: Event) -> None:
    """Escape and truncate every text of `event`, in place, so that its line keeps the invariants of this module."""
    event.type = escape(event.type)
    event.actor = escape(event.actor, ACTOR_CHARS_MAX)
    event.key_id = escape(event.key_id)
    event.thread_id = escape(event.thread_id)
    event.outcome = escape(event.outcome)
    event.request_id = escape(event.request_id)
    event.key_ids = [escape(text) for text in event.key_ids[:LIST_ITEMS_MAX]]
    event.request_ids = [escape(text) for text in event.request_ids[:LIST_ITEMS_MAX]]
    event.detail = escape(event.detail, DETAIL_CHARS_MAX)
    event.facts = {
        escape(name): escape(value, DETAIL_CHARS_MAX) if isinstance(value, str) else value
        for name, value in sorted(event.facts.items())[:FACTS_COUNT_MAX]
    }


def encode_line(event_bytes: bytes, sig: bytes) -> bytes:
    """The line of an encoded event and its 32-byte MAC, with its newline."""
    return b'{"event":%b,"sig":"%b"}\n' % (event_bytes, encode(sig))


def split_line(line: bytes) -> tuple[bytes, bytes]:
    """The exact event bytes and the 32-byte MAC of a line, given without its newline.

    Raises MalformedLineError unless the line has exactly the form that `encode_line` writes.
    """
    if len(line) >= LINE_BYTES_MAX:
        raise MalformedLineError(f"longer than {LINE_BYTES_MAX} bytes")
    if not line:
        raise MalformedLineError("blank")
    if forbidden := line.translate(None, _ALLOWED_BYTES):  # in half the time of a search
        at = line.index(forbidden[0])
        raise MalformedLineError(f"byte 0x{forbidden[0]:02x} at offset {at} is not allowed in a line")
    middle = len(line) - _SIG_PART_BYTES
    if not (line.startswith(LINE_PREFIX) and line.endswith(LINE_SUFFIX) and line.startswith(LINE_MIDDLE, middle)):
        raise MalformedLineError('not of the form {"event":{…},"sig":"…"}')
    sig = decode_exact(line[middle + len(LINE_MIDDLE) : -len(LINE_SUFFIX)], MAC_BYTES)
    if sig is None:
        raise MalformedLineError("the sig is not 32 bytes in canonical base64")
    return line[len(LINE_PREFIX) : middle], sig


def decode_event(event_bytes: bytes) -> Event:
    """The event that these canonical bytes encode. Raises MalformedLineError for any other encoding of an event."""
    try:
        event = _decode_event(event_bytes)
    except UNDECODABLE as error:
        raise MalformedLineError(f"the event is not valid: {error}") from None
    if encode_event(event) != event_bytes:
        raise MalformedLineError("the event is not in canonical form")
    if event.seq == 0 or event.ts == 0:
        raise MalformedLineError("the event has no seq or no ts")
    return event


def parse_line(line: bytes) -> tuple[Event, bytes, bytes]:
    """(event, exact event bytes, MAC) of a line, given without its newline. Raises MalformedLineError."""
    event_bytes, sig = split_line(line)
    return decode_event(event_bytes), event_bytes, sig


def line_start(seq: int) -> bytes:
    """The bytes that line `seq` begins with."""
    return b"%b%d," % (_SEQ_PREFIX, seq)


def peek_seq(line: bytes) -> int:
    """The `seq` at the start of a line that has not been verified; 0 if there is none."""
    digits, comma, _ = line[len(_SEQ_PREFIX) : len(_SEQ_PREFIX) + SEQ_DIGITS_MAX + 1].partition(b",")
    return int(digits) if comma and line.startswith(_SEQ_PREFIX) and digits.isdigit() else 0


def hash_thread_id(thread_id: str, audit_key: memoryview) -> str:
    """The form of a thread id in a log that hides thread ids: 128 bits of HMAC-SHA-256(audit key, id), in hex."""
    mac = hmac.digest(audit_key, THREAD_LABEL + thread_id.encode(), "sha256")
    return _THREAD_PREFIX + mac[:_THREAD_MAC_BYTES].hex()
