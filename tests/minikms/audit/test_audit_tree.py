"""Trees over audit lines: hashes, proofs and tiles, against RFC 6962 computed word by word."""

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as some

from minikms.audit import tiles, tree
from minikms.audit.tiles import TILE_WIDTH, RightEdge, Tile, Tiles, TilesError
from minikms.audit.tree import ProofError
from tests.harness import witness

# The leaves and roots of the tests of Certificate Transparency, which RFC 6962 came from.
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZES = [1, 2, 3, 7, 8, 255, 256, 257, 300, 511, 512, 513, 1000, 1023]


def leaf(number: int) -> bytes:
    return tree.leaf_of(b"line %d" % number)


def mth(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 section 2.1, over leaf hashes."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:split]) + mth(leaves[split:])).digest()


class Grown:
    """A tree of `size` leaves whose tiles lie in a dictionary, committed at some sizes on the way."""

    def __init__(self, size: int, commits: Sequence[int] = ()) -> None:
        self.files: dict[str, bytes] = {}
        self.edge = RightEdge()
        self.leaves = [leaf(number) for number in range(size)]
        for each in self.leaves:
            self.edge.append(each)
            if self.edge.size in commits:
                self.commit()
        self.commit()
        self.tiles = Tiles(self.files.get, size)

    def commit(self) -> None:
        self.files.update((tile.path, tile.content) for tile in self.edge.take_tiles())


GROWN = Grown(1100, range(0, 1100, 37))


def test_hashes_are_those_of_rfc_6962() -> None:
    leaves = [hashlib.sha256(b"\x00" + bytes.fromhex(text)).digest() for text in INPUTS]
    for size, root in enumerate(ROOTS):
        edge = RightEdge()
        for each in leaves[:size]:
            edge.append(each)
        assert edge.root().hex() == root


def test_an_entry_is_the_hash_of_a_line_with_its_newline() -> None:
    entry = hashlib.sha256(b"{}\n").digest()
    assert tree.entry_of(b"{}") == entry
    assert tree.leaf_of(b"{}") == hashlib.sha256(b"\x00" + entry).digest()


@pytest.mark.parametrize("size", [0, *SIZES])
def test_the_edge_and_the_tiles_have_the_same_root(size: int) -> None:
    grown = Grown(size)
    assert grown.edge.root() == mth(grown.leaves)
    assert RightEdge.load(grown.files.get, size).root() == mth(grown.leaves)
    assert list(grown.tiles.leaves()) == grown.leaves


@given(some.integers(0, 1100), some.integers(0, 1100))
def test_a_consistency_proof_is_one_that_a_witness_accepts(one: int, other: int) -> None:
    old, new = sorted((one, other))
    proof = tree.consistency_proof(GROWN.tiles.node, old, new)
    if old in (0, new):
        assert not proof
    else:
        assert witness.consistent(old, new, mth(GROWN.leaves[:old]), mth(GROWN.leaves[:new]), proof)


@given(some.data())
def test_an_inclusion_proof_verifies_for_its_leaf_alone(data: some.DataObject) -> None:
    size = data.draw(some.integers(1, 1100))
    index = data.draw(some.integers(0, size - 1))
    proof = tree.inclusion_proof(GROWN.tiles.node, index, size)
    root = mth(GROWN.leaves[:size])
    tree.check_inclusion(GROWN.leaves[index], index, size, proof, root)
    wrong = [(leaf(2000), index, size), (GROWN.leaves[index], index ^ 1, size), (GROWN.leaves[index], size, size)]
    for each, at, of in wrong:
        if size > 1 or each != GROWN.leaves[index] or at >= of:
            with pytest.raises(ProofError):
                tree.check_inclusion(each, at, of, proof, root)
    for changed in altered(proof):
        with pytest.raises(ProofError):
            tree.check_inclusion(GROWN.leaves[index], index, size, changed, root)


def altered(proof: list[bytes]) -> list[list[bytes]]:
    found = [[*proof, bytes(32)], [bytes(32)] * (tree.PROOF_HASHES_MAX + 1)]
    if proof:
        found += [proof[:-1], proof[1:], [*proof[:-1], bytes(32)]]
    return found


@given(some.lists(some.integers(0, 700), max_size=8), some.integers(0, 700))
def test_the_tiles_do_not_depend_on_when_they_were_written(commits: list[int], size: int) -> None:
    whole, grown = Grown(size), Grown(size, commits)
    for path, content in whole.files.items():
        assert grown.files[path] == content
    edge = RightEdge.load(grown.files.get, size)
    for number in range(size, size + 300):
        edge.append(leaf(number))
        grown.edge.append(leaf(number))
    assert edge.take_tiles() == grown.edge.take_tiles()


def test_tiles_have_the_names_of_the_text() -> None:
    assert tiles.tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tiles.tile_path(1, 0, 17) == "tile/1/000.p/17"
    assert Tile(2, 5, bytes(32)).path == "tile/2/005.p/1"
    # The example of the text: a tree of size 70,000.
    assert [tiles.tile_width(0, index, 70_000) for index in (0, 272, 273, 274)] == [256, 256, 112, 0]
    assert [tiles.tile_width(1, index, 70_000) for index in (0, 1)] == [256, 17]
    assert [tiles.tile_width(2, index, 70_000) for index in (0, 1)] == [1, 0]
    edge = RightEdge()
    for number in range(TILE_WIDTH):
        edge.append(leaf(number))
    assert [tile.path for tile in edge.take_tiles()] == ["tile/0/000", "tile/1/000.p/1"]


def test_a_full_tile_serves_where_the_partial_one_was_removed() -> None:
    files = {path: content for path, content in Grown(600).files.items() if ".p/" not in path}
    assert list(Tiles(files.get, 300).leaves()) == [leaf(number) for number in range(300)]


def test_a_tile_that_is_missing_or_has_another_size_is_refused() -> None:
    files = Grown(300).files
    whole = files["tile/0/001.p/44"]
    for content in (whole[:-1], whole + b"x", b"", None):
        changed = {**files, "tile/0/001.p/44": content}
        with pytest.raises(TilesError):
            list(Tiles(changed.get, 300).leaves())


def test_a_proof_of_a_leaf_or_tree_that_is_not_there_is_refused() -> None:
    node = GROWN.tiles.node
    for index, size in ((-1, 5), (5, 5), (0, 0)):
        with pytest.raises(ProofError):
            tree.inclusion_proof(node, index, size)
    for old, new in ((-1, 5), (6, 5)):
        with pytest.raises(ProofError):
            tree.consistency_proof(node, old, new)
