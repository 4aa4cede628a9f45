"""The text of a root key for a request to the daemon.

Owns: reading it from a private file, an inherited descriptor or typed shares into one buffer. Invariants: a root key
never comes from argv or the environment; its text lies in one buffer that is zeroed after it was sent. It must never be
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minikms.memory.arena import SecretSlot


@contextmanager
def key_text(path: Path | None) -> Iterator[bytearray | None]:
    """The 64 characters in a private file, zeroed at the end; None without a file. Raises StartError, OSError."""
    if path is None:
        yield None
        return
    with source_text(f"file:{path}") as (text, _):
        yield text


@contextmanager
def source_text(source: str) -> Iterator[tuple[bytearray, str]]:
    """The 64 characters of a source, zeroed at the end, and the name of its provider. Raises StartError, OSError."""
    from dataclasses import replace

    from minikms.cli.console import named_root
    from minikms.memory.arena import SecretArena
    from minikms.memory.process import forbid_dumps
    from minikms.roots.providers import KeyFile
    from minikms.roots.typed_shares import SLOTS_COUNT_MAX

    forbid_dumps()
    root = named_root(source)
    if isinstance(root, KeyFile):
        root = replace(root, any_owner=True)
    with SecretArena(SLOTS_COUNT_MAX) as arena, root.read(arena) as key, slot_text(key) as text:
        yield text, root.name


@contextmanager
def slot_text(key: SecretSlot) -> Iterator[bytearray]:
    """The 64 characters of a root key in the arena, zeroed at the end."""
    from minikms import api
    from minikms.memory.arena import hex_encode_into

    text = bytearray(api.KEY_HEX_CHARS)
    try:
        with memoryview(text) as view:
            hex_encode_into(key.view, view)
        yield text
    finally:
        text[:] = bytes(len(text))
