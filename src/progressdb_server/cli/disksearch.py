"""Search of the files of a directory for a text, in every encoding in which it could have been written.

Owns: the encodings (UTF-8, hex, base64 at each of its three alignments), and reading files of any size. Invariant: a
file that cannot be read raises; a file that was not read is never reported as clean. The files must not change
meanwhile.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 1024 * 1024
TEXT_CHARS_MIN: Final = 8
"""A shorter text gives too few base64 characters that do not depend on its neighbours, and is found by chance."""
LINE_BYTES: Final = 16


@dataclass(frozen=True)
class Found:
    """The files and bytes that were searched, and each (file, text) that was found."""

    files: int
    size: int
    hits: list[tuple[Path, str]]


def forms(text: str) -> list[bytes]:
    """Byte strings of which stored data with `text` contains one. Raises ValueError below TEXT_CHARS_MIN characters."""
    if len(text) < TEXT_CHARS_MIN:
        raise ValueError(f"a text of at least {TEXT_CHARS_MIN} characters is needed")
    raw = text.encode()
    found = [raw, raw.hex().encode(), raw.hex().upper().encode()]
    for before in range(3):
        # The text after `before` unknown bytes, without the characters that depend on neighbouring bytes.
        encoded = base64.b64encode(b"\0" * before + raw)
        found.append(encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6])
    return found


def search(directory: Path, texts: list[str]) -> Found:
    """Search every regular file under `directory`. Raises OSError if one cannot be read."""
    needles = [(form, text) for text in dict.fromkeys(texts) for form in forms(text)]
    overlap = max(len(form) for form, _ in needles) - 1
    files, size = 0, 0
    hits: dict[tuple[Path, str], None] = {}
    for path in _files(directory):
        files += 1
        for chunk, new_bytes in _chunks(path, overlap):
            size += new_bytes
            hits.update(dict.fromkeys((path, text) for form, text in needles if form in chunk))
    return Found(files, size, list(hits))


def _files(directory: Path) -> Iterator[Path]:
    for root, _, names in os.walk(directory, onerror=_raise):
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _chunks(path: Path, overlap: int) -> Iterator[tuple[bytes, int]]:
    """Pieces that overlap, so that a match across a boundary is within one, and how many bytes of each are new."""
    kept = b""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield kept + piece, len(piece)
            kept = (kept + piece)[-overlap:]


def hexdump(raw: bytes, *, plain_bytes: int) -> Iterator[str]:
    """Lines of offset, hex and ASCII. A mark shows where the sealed part begins, after `plain_bytes` bytes."""
    for start in range(0, len(raw), LINE_BYTES):
        line = raw[start : start + LINE_BYTES]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        mark = "  <- encrypted from here on" if start <= plain_bytes < start + len(line) else ""
        yield f"{start:04x}  {line.hex(' '):<{3 * LINE_BYTES}} {text:<{LINE_BYTES}}{mark}"
