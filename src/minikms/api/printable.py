"""Text of others as it is shown: of a peer, a file's name, a database. A terminal obeys none of it."""

from __future__ import annotations


def clean(text: str) -> str:
    """The text with a question mark for each control character."""
    return "".join(char if char.isprintable() else "?" for char in text)
