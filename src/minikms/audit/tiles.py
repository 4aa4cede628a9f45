"""Trees in tiles, by C2SP tlog-tiles: paths, the tiles of a growing tree, and looking up hashes in them.

Owns: the layout (`tile/<level>/<index>[.p/<width>]`, and `archive/<level>/<index>` for tiles below a full one), which
tiles a tree of a size has, and the right edge of a tree, from which it grows. Invariants: memory is bounded by one tile
for each level, and for a reader by `TILES_CACHED_MAX` and `NODES_CACHED_MAX`; a tile of another size than its width is
refused. Entry bundles are not part of it: the entry of a line is its SHA-256, which any holder of the line can compute.
It must never do I/O; a reader gets a function that returns the content of a path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from minikms.api.errors import KmsRefusedError
from minikms.audit import tree
from minikms.audit.tree import HASH_BYTES

TILE_HEIGHT: Final = 8
TILE_WIDTH: Final = 1 << TILE_HEIGHT
TILE_BYTES: Final = TILE_WIDTH * HASH_BYTES
TILES_CACHED_MAX: Final = 64
NODES_CACHED_MAX: Final = 4096
"""The proofs of adjacent leaves share most of their hashes."""
CHECKPOINT_NAME: Final = "checkpoint"
TILES_NAME: Final = "tile"
ARCHIVE_NAME: Final = "archive"

Read = Callable[[str], bytes | None]
"""The content of a path relative to the tree's directory, of at most `TILE_BYTES` + 1 bytes; None if there is none."""


class TilesError(KmsRefusedError):
    """A tile is missing, or is not one."""

    code = "audit_tiles"


class Tile(NamedTuple):
    """A tile that was made. `width`: its number of hashes, from 1 to `TILE_WIDTH`."""

    level: int
    number: int
    content: bytes

    @property
    def width(self) -> int:
        return len(self.content) // HASH_BYTES

    @property
    def path(self) -> str:
        return tile_path(self.level, self.number, self.width)


def tile_path(level: int, index: int, width: int = TILE_WIDTH) -> str:
    """`tile/0/x001/x234/067`, and for a partial tile `tile/0/x001/x234/067.p/8`."""
    parts = [f"{index % 1000:03}"]
    while index := index // 1000:
        parts.insert(0, f"x{index % 1000:03}")
    partial = "" if width == TILE_WIDTH else f".p/{width}"
    return f"{TILES_NAME}/{level}/{'/'.join(parts)}{partial}"


def archive_path(level: int, index: int) -> str:
    """The path of the archive of 256 tiles of `level` whose hashes are in tile `index` of the level above."""
    return ARCHIVE_NAME + tile_path(level, index).removeprefix(TILES_NAME)


def place_in_archive(path: str) -> tuple[str, int] | None:
    """The path of the archive that a tile may be in, and its offset there; None for what is not a full tile."""
    tiles, *parts = path.split("/")
    if tiles != TILES_NAME or parts[-2].endswith(".p"):
        return None
    archive, place = divmod(int("".join(part.removeprefix("x") for part in parts[1:])), TILE_WIDTH)
    return archive_path(int(parts[0]), archive), place * TILE_BYTES


def tile_width(level: int, index: int, size: int) -> int:
    """The number of hashes of a tile in a tree of `size` leaves; 0 if the tree does not have the tile."""
    hashes = size >> (TILE_HEIGHT * level)
    return min(max(hashes - index * TILE_WIDTH, 0), TILE_WIDTH)


class RightEdge:
    """The last tile of each level of a tree, which is all that is needed to extend it and to compute its root."""

    def __init__(self) -> None:
        self.size = 0
        self._levels: list[bytearray] = []
        self._full: list[Tile] = []

    @classmethod
    def load(cls, read: Read, size: int) -> RightEdge:
        """Loads the right edge of the tree of `size` leaves. Raises TilesError."""
        edge, tiles = cls(), Tiles(read, size)
        edge.size = size
        while size:
            index, width = divmod(size, TILE_WIDTH)
            level = len(edge._levels)
            edge._levels.append(bytearray(tiles.tile(level, index) if width else b""))
            size = index
        return edge

    def last_leaf(self, read: Read) -> bytes:
        """The last leaf hash of a tree that is not empty. Raises TilesError."""
        lowest = self._levels[0] or Tiles(read, self.size).tile(0, (self.size - 1) // TILE_WIDTH)
        return bytes(lowest[-HASH_BYTES:])

    def copy(self) -> RightEdge:
        """Another edge, without the full tiles that nobody has taken."""
        duplicate = RightEdge()
        duplicate.size = self.size
        duplicate._levels = [bytearray(level) for level in self._levels]
        return duplicate

    def append(self, leaf: bytes) -> None:
        """Extend the tree by a leaf hash."""
        self.size += 1
        if not self._levels:
            self._levels.append(bytearray())
        lowest = self._levels[0]
        lowest += leaf
        if len(lowest) == TILE_BYTES:
            self._carry()

    def _carry(self) -> None:
        """Move the full tiles out, and their hashes to the level above."""
        level, index = 0, self.size
        while len(self._levels[level]) == TILE_BYTES:
            index >>= TILE_HEIGHT
            content = bytes(self._levels[level])
            self._full.append(Tile(level, index - 1, content))
            self._levels[level].clear()
            level += 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += tree.complete_hash(_hashes(content))

    def take_tiles(self) -> list[Tile]:
        """The tiles that became full since the last call, and the partial ones of the present size."""
        tiles, self._full = self._full, []
        size = self.size
        for level, content in enumerate(self._levels):
            if content:
                tiles.append(Tile(level, size >> TILE_HEIGHT, bytes(content)))
            size >>= TILE_HEIGHT
        return tiles

    def root(self) -> bytes:
        root: bytes | None = None
        for content in self._levels:
            hashes = _hashes(bytes(content))
            while hashes:
                width = len(hashes) & -len(hashes)  # the rightmost complete subtree
                last = tree.complete_hash(hashes[-width:])
                root = last if root is None else tree.parent(last, root)
                del hashes[-width:]
        return tree.EMPTY_ROOT if root is None else root


class Tiles:
    """Looks up hashes of the tree of `size` leaves."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self.tile = functools.lru_cache(TILES_CACHED_MAX)(self._checked)
        """The content of a tile, by level and index; of a full one as the tile above it names it. Raises TilesError."""
        self.node: tree.Node = functools.lru_cache(NODES_CACHED_MAX)(self._node)

    def _tile(self, level: int, index: int) -> bytes:
        width = tile_width(level, index, self._size)
        path = tile_path(level, index, width)
        content = self._read(path) if width else None
        if content is None and 0 < width < TILE_WIDTH:  # partial tiles may be removed once there is the full one
            whole = self._read(tile_path(level, index))
            content = whole and whole[: width * HASH_BYTES]
        if content is None:
            raise TilesError(f"the tile {path} of the tree is missing")
        if len(content) != width * HASH_BYTES:
            raise TilesError(f"the tile {path} does not hold {width} hashes")
        return content

    def _checked(self, level: int, index: int) -> bytes:
        content = self._tile(level, index)
        is_full = len(content) == TILE_BYTES
        if is_full and tree.complete_hash(_hashes(content)) != self._node(TILE_HEIGHT * (level + 1), index):
            raise TilesError(f"the tile {tile_path(level, index)} is not the one that the tile above it names")
        return content

    def _node(self, level: int, index: int) -> bytes:
        tile_level, height = divmod(level, TILE_HEIGHT)
        tile_index, first = divmod(index << height, TILE_WIDTH)
        content = self.tile(tile_level, tile_index)
        return tree.complete_hash(_hashes(content[first * HASH_BYTES : (first + (1 << height)) * HASH_BYTES]))

    def leaves(self) -> Iterator[bytes]:
        """Every leaf hash in order, checked against nothing."""
        for index in range(-(-self._size // TILE_WIDTH)):
            yield from _hashes(self._tile(0, index))


def _hashes(content: bytes) -> list[bytes]:
    return [content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES)]
