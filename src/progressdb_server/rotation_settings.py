"""The section `rotation` of the configuration, and how a duration is written.

Owns: their shape and rules. Pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_DURATION: Final = re.compile(r"([1-9][0-9]{0,8})([smhd])", re.ASCII)
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration_s(text: str) -> int:
    """Seconds of `90d`, `12h`, `30m` or `45s`. Raises ValueError with the reason."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("must be a number and one of s, m, h, d, as in 90d")
    return int(match[1]) * _UNIT_S[match[2]]


class Rotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of threads' keys. An empty duration is never."""

    max_age: str = ""
    max_uses: int = 0
    """0: only what a key may be used for at all."""
    records_per_second: int = 10_000
    """Re-encrypted by background jobs; 0 is as fast as it goes."""
    destroy_old_after: str = ""
    """Of the old keys of rotations that start by themselves."""

    @property
    def max_age_s(self) -> int:
        return duration_s(self.max_age) if self.max_age else 0

    @property
    def destroy_old_after_s(self) -> int:
        return duration_s(self.destroy_old_after) if self.destroy_old_after else 0

    def check(self) -> None:
        """Raises ValueError with the setting and the reason."""
        for name, text in (("max_age", self.max_age), ("destroy_old_after", self.destroy_old_after)):
            try:
                duration_s(text or "1s")
            except ValueError as error:
                raise ValueError(f"rotation.{name} {error}") from None
        if self.max_uses < 0 or self.records_per_second < 0:
            raise ValueError("rotation.max_uses and rotation.records_per_second must be 0 (off) or more")
