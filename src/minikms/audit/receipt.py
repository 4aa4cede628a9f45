"""The receipt of a destroyed key: the line of the log that says so, with a signature of its own.

Owns: the facts of such a line, the file that a receipt is, and its verification. Invariants: the audit public key alone
proves the line, whatever the rest of the log; where the file has a proof, the keys of a `note.WitnessPolicy` prove its
place in the tree too. The file comes from anywhere, so it is bounded before it is decoded. It must never give an event
whose signature was not checked.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from minikms import api
from minikms.api.base64 import decode_exact
from minikms.api.decoding import UNDECODABLE
from minikms.audit import record
from minikms.audit.chain import RECEIPT_FACT, RECEIPT_LABEL, SIGNATURE_BYTES, signature_is_valid, signed_message
from minikms.audit.export import EXPORTED_BYTES_MAX
from minikms.audit.record import Event, MalformedLineError
from minikms.audit.rules import whole_number
from minikms.audit.tree import ProofError

VERSION: Final = 1
RECEIPT_BYTES_MAX: Final = EXPORTED_BYTES_MAX
UNIX_SECONDS_MAX: Final = 2**37
"""The latest time of a destruction: before the year 6400, so that it is a date."""
_INTEGERS: Final = frozenset(("backups_removed", "destroyed_at", "epoch", RECEIPT_FACT))
_TEXTS: Final = frozenset(("archives", "signature", "tombstone_tag"))


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """line: without its newline. proof: as of `minikms audit export`, if the tree has the line."""

    version: int
    line: str
    proof: str = ""


def is_receipt(event: Event) -> bool:
    """Whether the event has the facts of a receipt. Says nothing about its signature."""
    facts = event.facts
    return (
        (event.type, event.outcome) == (api.DESTROY_KEY.name, "ok")
        and facts.keys() == _INTEGERS | _TEXTS
        and all(isinstance(facts[name], int) == (name in _INTEGERS) for name in facts)
        and whole_number(facts, "destroyed_at") < UNIX_SECONDS_MAX
        and api.KEY_ID_PATTERN.fullmatch(event.key_id) is not None
    )


def parse(content: bytes) -> Receipt:
    try:
        if len(content) > RECEIPT_BYTES_MAX:
            raise ProofError(f"a receipt has at most {RECEIPT_BYTES_MAX} bytes")
        receipt = msgspec.json.decode(content, type=Receipt)
    except UNDECODABLE:
        raise ProofError("the file is not a receipt") from None
    if receipt.version != VERSION:
        raise ProofError(f"the receipt has version {receipt.version}; this program knows version {VERSION}")
    return receipt


def check(receipt: Receipt, public_keys: Collection[bytes]) -> Event:
    """The event of the receipt's line, if one of the keys has signed it. Raises ProofError."""
    try:
        event = record.parse_line(receipt.line.encode("utf-8", "replace"))[0]
    except MalformedLineError as error:
        raise ProofError(f"the line of the receipt is not one of an audit log: {error}") from None
    if not is_receipt(event):
        raise ProofError("the line of the receipt does not say that a key was destroyed")
    signature = decode_exact(event.facts["signature"], SIGNATURE_BYTES) or b""
    message = signed_message(event, RECEIPT_LABEL)
    if not any(signature_is_valid(key, signature, message) for key in public_keys):
        raise ProofError("no given audit key has signed the line of the receipt")
    return event
