"""Merkle trees over audit lines (RFC 6962): hashes, inclusion and consistency proofs.

Owns: the entry and the leaf of a line, making proofs, and checking one of inclusion; witnesses check one of
consistency. A proof is made from the hashes of complete subtrees, which the caller looks up (`Node`). Invariants: a
check either returns or raises ProofError; its work and memory are bounded by `PROOF_HASHES_MAX`. It must never do I/O.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final

from minikms.api.errors import KmsRefusedError

HASH_BYTES: Final = 32
SIZE_MAX: Final = 2**63 - 1
"""The size of a tree, in leaves."""
PROOF_HASHES_MAX: Final = 63
"""The hashes of a proof: no proof in a tree of `SIZE_MAX` leaves has more (C2SP tlog-witness)."""
EMPTY_ROOT: Final = sha256(b"").digest()

Node = Callable[[int, int], bytes]
"""The hash of a complete subtree, by its level and its index: of the leaves from index * 2**level on."""


class ProofError(KmsRefusedError):
    """A proof does not show what it should."""

    code = "audit_proof"


def entry_of(line: bytes) -> bytes:
    """The entry of an audit line, given without its newline: 32 bytes, which hide the line."""
    return sha256(line + b"\n").digest()


def leaf_of(line: bytes) -> bytes:
    """The leaf hash of an audit line, given without its newline."""
    return leaf_of_entry(entry_of(line))


def leaf_of_entry(entry: bytes) -> bytes:
    return sha256(b"\x00" + entry).digest()


def parent(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees."""
    return sha256(b"\x01" + left + right).digest()


def complete_hash(hashes: Sequence[bytes]) -> bytes:
    """The hash of a complete subtree whose nodes of some level are `hashes`: a power of two of them."""
    level = list(hashes)
    while len(level) > 1:
        level = [parent(level[at], level[at + 1]) for at in range(0, len(level), 2)]
    return level[0]


def inclusion_proof(node: Node, index: int, size: int) -> list[bytes]:
    """The proof that leaf `index`, from 0, is in the tree of `size` leaves (RFC 6962 section 2.1.1)."""
    if not 0 <= index < size:
        raise ProofError(f"a tree of {size} leaves has no leaf {index}")
    begin, end = 0, size
    proof: list[bytes] = []
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if index < middle:
            proof.append(_hash_of(node, middle, end))
            end = middle
        else:
            proof.append(_hash_of(node, begin, middle))
            begin = middle
    return proof[::-1]


def consistency_proof(node: Node, old_size: int, size: int) -> list[bytes]:
    """The proof that the tree of `size` leaves extends that of `old_size` (RFC 6962 section 2.1.2). It is empty from
    the empty tree, and between equal sizes.
    """
    if not 0 <= old_size <= size:
        raise ProofError(f"a tree of {size} leaves does not extend one of {old_size}")
    if old_size == 0:
        return []
    begin, end = 0, size
    proof: list[bytes] = []
    while end != old_size:
        middle = begin + _split(end - begin)
        if old_size <= middle:
            proof.append(_hash_of(node, middle, end))
            end = middle
        else:
            proof.append(_hash_of(node, begin, middle))
            begin = middle
    if begin:  # otherwise the remaining subtree is the old tree, whose root the verifier knows
        proof.append(_hash_of(node, begin, end))
    return proof[::-1]


def check_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes) -> None:
    """RFC 9162 section 2.1.3.2. `leaf`: its hash. Raises ProofError."""
    if not 0 <= index < size <= SIZE_MAX or len(proof) > PROOF_HASHES_MAX:
        raise ProofError("the proof is not one of the tree's size")
    number, last, computed = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProofError("the proof is too long")
        if number & 1 or number == last:
            computed = parent(sibling, computed)
            while not number & 1 and number:
                number >>= 1
                last >>= 1
        else:
            computed = parent(computed, sibling)
        number >>= 1
        last >>= 1
    if last or not hmac.compare_digest(computed, expected_root):
        raise ProofError("the proof does not lead to the root")


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return int(1 << ((size - 1).bit_length() - 1))


def _hash_of(node: Node, begin: int, end: int) -> bytes:
    """The hash of the leaves from `begin` to before `end`, a subtree of a tree that `_split` has divided."""
    lefts: list[bytes] = []
    while (end - begin) & (end - begin - 1):
        half = _split(end - begin)
        lefts.append(node(half.bit_length() - 1, begin // half))
        begin += half
    level = (end - begin).bit_length() - 1
    computed = node(level, begin >> level)
    for left in reversed(lefts):
        computed = parent(left, computed)
    return computed
