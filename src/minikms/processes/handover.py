"""What the key service and the unlock service say to each other: one question and one answer on each connection.

Owns: both messages (docs/spec/unlock.md), their bounds and the time limits of an exchange. Invariants: a question has
no secret; an answer begins with its kind, and after `KEY` has the 32 bytes of the root key, which both sides keep in
the arena. It does no I/O and must never see a root key.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple, cast

from minikms.api.printable import clean

Purpose = Literal["start", "renew"]
KEY: Final = b"K"
REFUSED: Final = b"R"
"""The provider said, authenticated, that it does not give the key: the key service seals itself at once."""
AWAY: Final = b"A"
"""Everything else: the provider does not answer, or it can't be known who answered."""

QUESTION_BYTES_MAX: Final = 64
TEXT_BYTES_MAX: Final = 512
QUESTION_SECONDS_MAX: Final = 2.0
"""Until the unlock service has a whole question."""
ANSWER_SECONDS_MAX: Final = 20.0
"""Until the key service has a whole answer. Well below WatchdogSec= of its unit."""
_QUESTION: Final = re.compile(rb"minikms-unlock/1 (start|renew) (kr_[0-9a-f]{16})\n")


class Question(NamedTuple):
    """`start`: for a start or an unseal. `renew`: for the lease of the root key that is in use."""

    purpose: Purpose
    keyring_id: str

    def encode(self) -> bytes:
        return f"minikms-unlock/1 {self.purpose} {self.keyring_id}\n".encode("ascii")


def parse_question(data: bytes) -> Question | None:
    """None where this is no question of this version."""
    match = _QUESTION.fullmatch(data)
    return None if match is None else Question(cast("Purpose", match[1].decode()), match[2].decode())


def sentence(text: str) -> bytes:
    """What follows REFUSED or AWAY: why, for people."""
    return clean(text).encode("ascii", "replace")[:TEXT_BYTES_MAX]


def parse_sentence(data: bytes) -> str:
    """The text of the other side, safe to log."""
    return clean(data[:TEXT_BYTES_MAX].decode("ascii", "replace"))
