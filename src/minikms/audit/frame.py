"""What the bytes of a compressed segment must be: one zstd frame (RFC 8878) with a checksum, and nothing else.

Owns: walking the frame's blocks without decompressing them. A decompressor that reads a stream stops at the end of its
input, be it in the middle of a frame, before the checksum or after a part of another one: so whether a file was cut is
asked here. It must never allocate by what a file says of itself.
"""

from __future__ import annotations

import os
from typing import Final

import zstandard

WINDOW_BYTES_MAX: Final = 8 * 1024 * 1024
"""For the decompressor: a larger window would need more memory than one chunk and one line."""
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES_MAX: Final = 18
_CHECKSUM_BYTES: Final = 4
_BLOCK_HEADER_BYTES: Final = 3
_BLOCK_RLE: Final = 1
_BLOCK_RESERVED: Final = 3


def fault_of(fd: int) -> str:
    """Why the file `fd` is not one whole frame; empty when it is. Raises OSError."""
    head = os.pread(fd, _HEADER_BYTES_MAX, 0)
    if not head.startswith(_MAGIC):
        return "it does not begin with a zstd frame"
    try:
        has_checksum = zstandard.get_frame_parameters(head).has_checksum
        at = zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        return str(error)
    if not has_checksum:
        return "its frame has no checksum"
    size = os.fstat(fd).st_size
    last = False
    while not last:
        header = int.from_bytes(os.pread(fd, _BLOCK_HEADER_BYTES, at), "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _BLOCK_RESERVED:
            return "its frame is damaged"
        at += _BLOCK_HEADER_BYTES + (1 if kind == _BLOCK_RLE else length)
        if at > size:
            return "its frame is cut off"
    at += _CHECKSUM_BYTES
    if at != size:
        return "its frame is cut off" if at > size else "something follows its frame"
    return ""
