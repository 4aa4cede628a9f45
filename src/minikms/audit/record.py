"""One audit line: the event, its canonical bytes, and the way back.

Owns: the shape of an event, the one byte string that stands for it, the frame of a line, and the escaping of text.
Invariants: an event has exactly one encoding (`parse_line` refuses every other); a line is printable ASCII without a
backslash, so that it needs no JSON escape, can't be split by a control character and can't drive a terminal; a line
is at most `LINE_BYTES_MAX` long. The format is written down in docs/spec/audit.md.

It must never: do I/O, read a clock, hold key material, or make an event of plaintext, ciphertext or key bytes.
"""

from __future__ import annotations

import binascii
import hmac
import re
from typing import Annotated, ClassVar, Final

import msgspec

from minikms import api
from minikms.errors import MiniKmsError

FORMAT_VERSION: Final = 1

LINE_BYTES_MAX: Final = 1024 * 1024
"""With its newline. `sanitise` brings any event below it: two lists of 1,024 short texts and 64 facts are 0.7 MiB."""
TEXT_CHARS_MAX: Final = 256
DETAIL_CHARS_MAX: Final = 1024
LIST_ITEMS_MAX: Final = api.BATCH_ITEMS_MAX
FACTS_COUNT_MAX: Final = 64
INVALID_ID_CHARS_MAX: Final = 40

MAC_BYTES: Final = 32
MAC_CHARS: Final = 44
ZERO_MAC: Final = bytes(MAC_BYTES)
"""What the first line of a log is chained to."""

LINE_PREFIX: Final = b'{"event":'
LINE_MIDDLE: Final = b',"sig":"'
LINE_SUFFIX: Final = b'"}'
_TAIL_BYTES: Final = len(LINE_MIDDLE) + MAC_CHARS + len(LINE_SUFFIX)

ACTOR_SELF: Final = "minikms"
"""The actor of lines that the log and the daemon write about themselves."""

TYPE_GENESIS: Final = "genesis"
TYPE_START: Final = "start"
TYPE_STOP: Final = "stop"
TYPE_CHECKPOINT: Final = "checkpoint"
TYPE_RECOVERY: Final = "recovery"
TYPE_RESUMED: Final = "resumed"
TYPE_CONFIG_CHANGE: Final = "config_change"
TYPE_SEGMENT_OPEN: Final = "segment_open"
TYPE_SEGMENT_CLOSE: Final = "segment_close"
TYPE_AUDIT_KEY: Final = "audit_key"
TYPE_RETENTION: Final = "retention"
TYPE_DISK_FULL: Final = "disk_full"
TYPE_DISK_OK: Final = "disk_ok"
TYPE_REFUSED: Final = "refused"

SIGNED_TYPES: Final = frozenset({TYPE_CHECKPOINT, TYPE_SEGMENT_CLOSE, TYPE_AUDIT_KEY})
"""Lines that carry an Ed25519 signature over what stands before them."""

_SEQ_PREFIX: Final = LINE_PREFIX + b'{"seq":'
SEQ_DIGITS_MAX: Final = 19

_THREAD_LABEL: Final = b"minikms/audit/thread-id/v1\x00"
_THREAD_PREFIX: Final = "hmac-sha256:"
_THREAD_MAC_BYTES: Final = 16

INTEGER_MAX: Final = 2**63 - 1
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=INTEGER_MAX)]
Facts = dict[str, str | NonNegative]


class MalformedLineError(MiniKmsError):
    """The bytes are not a line of an audit log; the text says which rule they break."""

    code: ClassVar[str] = "audit_malformed"


def _outcome_ok() -> str:
    return "ok"


class Event(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """What happened. An empty optional field is absent from the line. `seq` and `ts` are given when it is written.

    seq: place in the log, from 1. ts: Unix time in nanoseconds. type: the verb, or one of the TYPE_ words.
    actor: who ("peer_uid:<n>", or `ACTOR_SELF`). outcome: "ok" or an error code of the API. count: items of a batch,
    or refusals that one line stands for. key_ids: the distinct keys of a batch. detail: a few words for a person.
    facts: what a program reads besides, by name: what the log says about itself, configuration.
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
    # A factory, so that "ok" is written out and a line without an outcome is not canonical.
    outcome: str = msgspec.field(default_factory=_outcome_ok)
    request_id: str = ""
    request_ids: list[str] = []
    detail: str = ""
    facts: Facts = {}


class Head(msgspec.Struct, frozen=True):
    """The end of a log: the last line's `seq` and its MAC as 32 bytes."""

    seq: int
    sig: bytes


# "deterministic" sorts the names of `facts`; the fields of the struct keep their order.
encode_event = msgspec.json.Encoder(order="deterministic").encode
_decode_event = msgspec.json.Decoder(Event, strict=True).decode

_FOREIGN_BYTES: Final = re.compile(rb"[^ -\[\]-~]")
_FOREIGN_TEXT: Final = re.compile(r"[^ !#$&-\[\]-~]")


def is_clean(blob: bytes) -> bool:
    """Whether freshly encoded events need no escaping: ASCII, and no backslash, percent sign or DEL in them.

    msgspec escapes quotes, backslashes and control characters with a backslash, so its absence rules those out.
    """
    return blob.isascii() and b"\\" not in blob and b"%" not in blob and b"\x7f" not in blob


def escape(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """`text` with each byte outside printable ASCII, and each `"`, `\\` and `%`, as `%XX` (RFC 3986), cut short.

    Two texts that differ within the bound stay different, and the result holds nothing that JSON would escape.
    """
    # A text longer than the bound is longer still when escaped: cutting first keeps the work bounded.
    return _FOREIGN_TEXT.sub(_percent, text[:chars_max])[:chars_max]


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def shorten(text: str) -> str:
    """An id that a caller sent and that is not valid, as far as an audit line repeats it."""
    return escape(text, INVALID_ID_CHARS_MAX)


def settle_facts(event: Event) -> None:
    """Turn each fact that a line can't hold (a float, a negative number, …) into text, in place.

    The verifier would refuse such a line, and with it the log: whoever made the event must not be able to do that.
    """
    for name, value in event.facts.items():
        if type(value) is not str and not (type(value) is int and 0 <= value <= INTEGER_MAX):
            event.facts[name] = str(value)


def sanitise(event: Event) -> None:
    """Escape and cut every text of `event`, in place, so that its line obeys the invariants of this module."""
    event.type = escape(event.type)
    event.actor = escape(event.actor)
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


def frame(event_bytes: bytes, sig: bytes) -> bytes:
    """The line of an encoded event and its 32-byte MAC, with its newline."""
    return b'{"event":%b,"sig":"%b"}\n' % (event_bytes, binascii.b2a_base64(sig, newline=False))


def split_line(line: bytes) -> tuple[bytes, bytes]:
    """The exact event bytes and the 32-byte MAC of a line without its newline.

    Raises MalformedLineError when the frame is not exactly that of `frame`.
    """
    if len(line) >= LINE_BYTES_MAX:
        raise MalformedLineError(f"longer than {LINE_BYTES_MAX} bytes")
    if not line:
        raise MalformedLineError("blank")
    if found := _FOREIGN_BYTES.search(line):
        raise MalformedLineError(f"byte 0x{found[0][0]:02x} at offset {found.start()} does not belong in a line")
    middle = len(line) - _TAIL_BYTES
    if not (line.startswith(LINE_PREFIX) and line.endswith(LINE_SUFFIX) and line.startswith(LINE_MIDDLE, middle)):
        raise MalformedLineError('not of the form {"event":{…},"sig":"…"}')
    sig64 = line[middle + len(LINE_MIDDLE) : -len(LINE_SUFFIX)]
    try:
        sig = binascii.a2b_base64(sig64, strict_mode=True)
    except binascii.Error:
        raise MalformedLineError("the sig is not base64") from None
    if len(sig) != MAC_BYTES or binascii.b2a_base64(sig, newline=False) != sig64:
        raise MalformedLineError("the sig is not 32 bytes in canonical base64")
    return line[len(LINE_PREFIX) : middle], sig


def decode_event(event_bytes: bytes) -> Event:
    """The event of its canonical bytes. Raises MalformedLineError for any other bytes, however equal in meaning."""
    try:
        event = _decode_event(event_bytes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedLineError(f"the event is not valid: {error}") from None
    if encode_event(event) != event_bytes:
        raise MalformedLineError("the event is not in canonical form")
    if event.seq == 0 or event.ts == 0:
        raise MalformedLineError("the event has no seq or no ts")
    return event


def parse_line(line: bytes) -> tuple[Event, bytes, bytes]:
    """(event, exact event bytes, MAC) of a line without its newline. Raises MalformedLineError."""
    event_bytes, sig = split_line(line)
    return decode_event(event_bytes), event_bytes, sig


def line_start(seq: int) -> bytes:
    """What the line of that number begins with."""
    return b"%b%d," % (_SEQ_PREFIX, seq)


def peek_seq(line: bytes) -> int:
    """The `seq` that a line claims, without judging it; 0 when it is not where it belongs."""
    digits, comma, _ = line[len(_SEQ_PREFIX) : len(_SEQ_PREFIX) + SEQ_DIGITS_MAX + 1].partition(b",")
    return int(digits) if comma and line.startswith(_SEQ_PREFIX) and digits.isdigit() else 0


def hash_thread_id(thread_id: str, audit_key: memoryview) -> str:
    """How a thread id is recorded when the log must not name threads: a keyed HMAC-SHA-256, 128 bits of it, in hex."""
    mac = hmac.digest(audit_key, _THREAD_LABEL + thread_id.encode(), "sha256")
    return _THREAD_PREFIX + mac[:_THREAD_MAC_BYTES].hex()
