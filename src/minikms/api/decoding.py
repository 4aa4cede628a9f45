"""What msgspec raises for bytes that are no value of the type: `UNDECODABLE`, for every room that decodes."""

from __future__ import annotations

from typing import Final

UNDECODABLE: Final = (ValueError, RecursionError)
"""ValueError is the base of msgspec's own errors and of that for a text that is no UTF-8. RecursionError is for deep
nesting."""
