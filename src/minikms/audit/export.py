"""Lines with proofs: which leaf a line is, the text of a proof (C2SP tlog-proof), and checking both.

Owns: the index of a tree (`logs.json`), which maps a line of a log to its leaf; the form of an exported line; and the
comparison of a whole log with a tree. Invariants: the index is a hint, which proofs or the tree's root confirm; an
exported line proves itself, with nothing but the keys of a `note.WitnessPolicy`. It must never call a line proven
before its leaf leads to the root of a tree checkpoint whose signatures were checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from minikms.api.base64 import decode_exact, encode_text
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError
from minikms.audit import tree
from minikms.audit.note import (
    NOTE_BYTES_MAX,
    VerifiedCheckpoint,
    WitnessPolicy,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
)
from minikms.audit.record import LINE_BYTES_MAX
from minikms.audit.tiles import CHECKPOINT_NAME, TILE_BYTES, Read, RightEdge, Tiles, place_in_archive
from minikms.audit.tree import HASH_BYTES, PROOF_HASHES_MAX, ProofError, leaf_of

INDEX_NAME: Final = "logs.json"
INDEX_BYTES_MAX: Final = 4 * 1024 * 1024
PROOF_HEADER: Final = "c2sp.org/tlog-proof@v1"
PROOF_CHARS_MAX: Final = NOTE_BYTES_MAX + 8 * 1024
EXPORTED_BYTES_MAX: Final = 2 * LINE_BYTES_MAX + 2 * PROOF_CHARS_MAX
"""The size of one exported line, whose quotation marks JSON escapes."""
CHECKPOINTS_CACHED_MAX: Final = 16


class LogRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The leaves of one log: from `first_leaf` on to the next range, each the line after the one before."""

    log_id: str
    first_leaf: int
    first_seq: int


class NotInTreeError(KmsRefusedError):
    """The tree does not have the line."""

    code = "audit_not_in_tree"


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the log, without its newline, and its proof."""

    line: str
    proof: str


def parse_index(content: bytes) -> tuple[LogRange, ...]:
    try:
        return msgspec.json.decode(content, type=tuple[LogRange, ...])
    except UNDECODABLE:
        raise NotInTreeError(f"{INDEX_NAME} of the tree is damaged") from None


def leaf_index(logs: Sequence[LogRange], log_id: str, seq: int, size: int) -> int:
    """The leaf of line `seq` of a log, in a tree of `size` leaves. Raises NotInTreeError."""
    for number, each in enumerate(logs):
        end = logs[number + 1].first_leaf if number + 1 < len(logs) else size
        index = each.first_leaf + seq - each.first_seq
        if each.log_id == log_id and each.first_leaf <= index < min(end, size):
            return index
    raise NotInTreeError(f"line {seq} of the log {log_id} is not under the tree checkpoint")


class Prover:
    """Makes proofs for lines, under one tree checkpoint. Its signatures are checked by who reads the proofs."""

    def __init__(self, note: bytes, logs: Sequence[LogRange], read: Read) -> None:
        self.checkpoint = parse_checkpoint(parse_note(note).text)
        self._note = note.decode()
        self._logs = logs
        self._tiles = Tiles(read, self.checkpoint.size)

    @property
    def newest_log(self) -> str:
        """The id of the log that the tree goes on with."""
        return self._logs[-1].log_id if self._logs else ""

    def prove(self, log_id: str, seq: int, line: bytes) -> Exported:
        """Proves that the line is in the tree. Raises NotInTreeError, ProofError if another line is there, and
        TilesError.
        """
        size, root = self.checkpoint.size, self.checkpoint.root
        index = leaf_index(self._logs, log_id, seq, size)
        hashes = tree.inclusion_proof(self._tiles.node, index, size)
        try:
            tree.check_inclusion(leaf_of(line), index, size, hashes, root)
        except ProofError:
            raise ProofError(f"line {seq} of the log is not the one in the tree") from None
        lines = [PROOF_HEADER, f"index {index}", *map(encode_text, hashes), "", self._note]
        return Exported(line.decode("ascii"), "\n".join(lines))


def open_tree(directory: Path) -> Prover:
    """The tree in a directory, as an auditor has it there: its newest tree checkpoint, index and tiles. Raises
    NotInTreeError, NoteError, OSError.
    """
    note = read_bounded(directory / CHECKPOINT_NAME, NOTE_BYTES_MAX)
    index = read_bounded(directory / INDEX_NAME, INDEX_BYTES_MAX)
    if note is None or index is None:
        raise NotInTreeError(f"there is no {CHECKPOINT_NAME} and {INDEX_NAME} of a tree in {directory}")
    return Prover(note, parse_index(index), tile_reader(directory))


def tile_reader(directory: Path) -> Read:
    """Reads the tiles of the tree in a directory, also those in archives."""

    def read(path: str) -> bytes | None:
        content = read_bounded(directory / path, TILE_BYTES)
        place = place_in_archive(path) if content is None else None
        if place is None:
            return content
        content = read_bounded(directory / place[0], TILE_BYTES, offset=place[1])
        return content and content[:TILE_BYTES]

    return read


def read_bounded(path: Path, bytes_max: int, *, offset: int = 0) -> bytes | None:
    """At most `bytes_max` + 1 bytes of a file from `offset` on; None if there is none. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(fd, "rb") as file:
        if offset:
            file.seek(offset)
        return file.read(bytes_max + 1)


class Proven(msgspec.Struct, frozen=True):
    """A line that was proven: its leaf, and the tree checkpoint above it."""

    line: bytes
    index: int
    opened: VerifiedCheckpoint


class ProofChecker:
    """Checks exported lines. The signatures of a tree checkpoint are checked once."""

    def __init__(self, policy: WitnessPolicy) -> None:
        policy.check()
        self._policy = policy
        self.quorum = policy.quorum
        self._opened: dict[str, VerifiedCheckpoint] = {}

    def check(self, exported: Exported) -> Proven:
        head, separator, note = exported.proof.partition("\n\n")
        if len(exported.proof) > PROOF_CHARS_MAX or not separator:
            raise ProofError("the proof is not one, or is too long")
        header, *rest = head.split("\n", PROOF_HASHES_MAX + 3)
        if rest and rest[0].startswith("extra "):
            del rest[0]
        if header != PROOF_HEADER or not rest:
            raise ProofError(f"the proof does not begin with {PROOF_HEADER}")
        word, _, number = rest[0].partition(" ")
        hashes = [decode_exact(text, HASH_BYTES) for text in rest[1:]]
        if word != "index" or not number.isascii() or not number.isdigit() or str(int(number[:20])) != number:
            raise ProofError("the proof does not name the index of a leaf")
        line = exported.line.encode("utf-8", "replace")
        opened = self._open(note)
        checkpoint = opened.checkpoint
        known = [each for each in hashes if each is not None]
        if len(known) != len(hashes) or len(line) >= LINE_BYTES_MAX:
            raise ProofError("the proof holds what is no hash, or the line is too long")
        tree.check_inclusion(leaf_of(line), int(number), checkpoint.size, known, checkpoint.root)
        return Proven(line, int(number), opened)

    def _open(self, note: str) -> VerifiedCheckpoint:
        opened = self._opened.get(note)
        if opened is None:
            opened = open_checkpoint(note.encode("utf-8", "replace"), self._policy)
            if len(self._opened) >= CHECKPOINTS_CACHED_MAX:
                self._opened.clear()
            self._opened[note] = opened
        return opened


class TreeFault(msgspec.Struct, frozen=True):
    """Why a log is not the one of a tree. kind: as of a `minikms.audit.rules.Finding`."""

    kind: str
    text: str


def compare(
    lines: Iterable[tuple[int, bytes]], size: int, root: bytes, leaves: Iterator[bytes] | None, first_leaf: int
) -> list[TreeFault]:
    """What differs between a log and the tree of `size` leaves under `root`; empty if every leaf from `first_leaf` on
    is the log's line of that place. `lines`: seq and line. `leaves`: those of the tiles; None if the log's own lines
    are all of the tree, and `first_leaf` is 0.

    Raises TilesError.
    """
    edge = RightEdge()
    for _, leaf in zip(range(first_leaf), leaves or (), strict=False):
        edge.append(leaf)
    faults: list[TreeFault] = []
    last_seq = 0
    for (seq, line), _ in zip(lines, range(size - first_leaf), strict=False):
        own, last_seq = leaf_of(line), seq
        leaf = own if leaves is None else next(leaves)
        if own != leaf and not faults:
            faults.append(TreeFault("altered", f"line {seq} is not the one in the tree"))
        edge.append(leaf)
    missing = size - edge.size
    if missing:
        text = f"the log ends at line {last_seq}, and the tree has {missing} more line(s)"
        faults.append(TreeFault("truncated", text))
    for leaf in leaves or ():
        edge.append(leaf)
    if edge.size == size and edge.root() != root and not (leaves is None and faults):
        what = "the lines of the log" if leaves is None else "the tiles"
        faults.append(TreeFault("altered", f"{what} do not lead to the root of the tree checkpoint"))
    return faults
