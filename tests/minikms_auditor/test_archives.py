"""Tiles move into archives, and every reader still finds them."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from minikms.audit import tree
from minikms.audit.export import tile_reader
from minikms.audit.tiles import Tiles, TilesError, archive_path, tile_path
from minikms_auditor.store import AuditorState, AuditorStore, TreeLine
from tests.harness.disk_faults import failing_os
from tests.minikms_auditor.killing import killed_before_call

ORIGIN = "kms.example/audit"
WHOLE = 256 * 256
"""Leaves below a full tile of the second level."""
LEAVES = [sha256(b"%d" % number).digest() for number in range(2 * WHOLE + 700)]


def grow(directory: Path, size: int, leaves: Sequence[bytes] = LEAVES) -> None:
    """Make the tree in `directory` one of `size` leaves, without archives: as an earlier version has left it."""
    with closing(AuditorStore(str(directory), ORIGIN)) as store:
        edge = store.edge.copy()
        for leaf in leaves[edge.size : size]:
            edge.append(leaf)
        line = TreeLine("0" * 32, size, bytes(32), bytes(32))
        store.commit(edge, AuditorState(1, ORIGIN, size, edge.root(), line=line))


def archive(directory: Path) -> None:
    with closing(AuditorStore(str(directory), ORIGIN)) as store:
        store.archive()


def files(directory: Path) -> set[str]:
    found = ((parent, name) for parent, _, names in os.walk(directory / "tree") for name in names)
    return {os.path.relpath(os.path.join(*each), directory / "tree") for each in found}


def assert_readable(directory: Path, size: int, leaves: Sequence[bytes] = LEAVES) -> None:
    """By commands, which get a copy of the tree, and by the next start."""
    tiles = Tiles(tile_reader(directory / "tree"), size)
    assert list(tiles.leaves()) == leaves[:size]
    with closing(AuditorStore(str(directory), ORIGIN)) as store:
        for index in (0, 255, 256, WHOLE - 1, size - 1):
            proof = tree.inclusion_proof(tiles.node, index, size)
            tree.check_inclusion(leaves[index], index, size, proof, store.state.root)
        assert store.edge.last_leaf(store.read) == leaves[size - 1]
        for old in (1, 300, WHOLE, size):
            assert len(tree.consistency_proof(tiles.node, old, size)) <= tree.PROOF_HASHES_MAX


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory without archives, with one full tile of the second level."""
    directory = tmp_path_factory.mktemp("earlier") / "state"
    grow(directory, WHOLE + 300)
    return directory


@pytest.fixture
def state(earlier: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(earlier, tmp_path / "state")


def test_a_tree_of_an_earlier_version_is_archived_and_grows(state: Path) -> None:
    assert len(files(state)) > 256
    archive(state)
    assert_readable(state, WHOLE + 300)
    content = (state / "tree" / archive_path(0, 0)).read_bytes()
    assert content == b"".join(LEAVES[:WHOLE])
    grow(state, WHOLE * 2)
    archive(state)
    held = {"archive/0/000", "archive/0/001", "tile/1/000", "tile/1/001"}
    assert {name for name in files(state) if ".p/" not in name} == {*held, "logs.json"}
    assert_readable(state, WHOLE * 2)
    grow(state, WHOLE * 2 + 700)
    archive(state)
    held |= {"tile/0/512", "tile/0/513"}
    assert {name for name in files(state) if ".p/" not in name} == {*held, "logs.json"}
    assert_readable(state, WHOLE * 2 + 700)


def test_a_kill_at_any_call_of_archiving_loses_no_tile(earlier: Path, tmp_path: Path) -> None:
    number, killed = 1, True
    while killed:
        state = shutil.copytree(earlier, tmp_path / "state")
        killed = killed_before_call(number, partial(archive, state))
        assert_readable(state, WHOLE + 300)
        archive(state)
        assert not (state / "tree" / tile_path(0, 255)).exists()
        assert not [name for name in files(state) if ".tmp-" in name]
        assert (state / "tree" / archive_path(0, 0)).read_bytes() == b"".join(LEAVES[:WHOLE])
        shutil.rmtree(state)
        number += 1 if number < 8 else 130
    assert number > 200


def test_no_tile_is_removed_before_its_archive_is_durable(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(state)
    with failing_os(monkeypatch, "rename"), pytest.raises(Exception, match="cannot be written"):
        archive(state)
    assert files(state) >= before
    (state / "tree" / tile_path(0, 7)).write_bytes(b"short")
    with pytest.raises(TilesError, match="damaged"):
        archive(state)
    assert files(state) >= before


def test_archives_beyond_an_older_state_are_made_again(state: Path) -> None:
    """`state.json` of an earlier copy is put back, and the tree goes on with other lines."""
    older = (state / "state.json").read_bytes()
    grow(state, 2 * WHOLE)
    archive(state)
    (state / "state.json").write_bytes(older)
    assert_readable(state, WHOLE + 300)
    others = [*LEAVES[: WHOLE + 300], *(leaf[::-1] for leaf in LEAVES[WHOLE + 300 :])]
    grow(state, 2 * WHOLE, others)
    assert_readable(state, 2 * WHOLE, others)
    archive(state)
    assert_readable(state, 2 * WHOLE, others)
