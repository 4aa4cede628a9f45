"""What `minikms doctor` finds.

Owns: the shape of a finding. Invariant: each says what to do. A `problem` keeps something from working or being
safe; an `advice` does not.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """`area` groups findings on the page; `what` is the fact, `do` the next step."""

    level: Literal["problem", "advice"]
    area: str
    what: str
    do: str


def problem(area: str, what: str, do: str) -> Finding:
    return Finding("problem", area, what, do)


def advice(area: str, what: str, do: str) -> Finding:
    return Finding("advice", area, what, do)
