"""Trees, notes and cosignatures by `aics-tlog` and `aics-witness` of PyPI, which share no code with the project."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from minikms.audit import note as notes
from minikms.audit import tree
from minikms.audit.note import Checkpoint, Note, NoteError, VerifierKey, WitnessPolicy, open_checkpoint, parse_vkey
from minikms.audit.tiles import RightEdge, Tiles
from minikms.audit.tree import ProofError
from tests import needs
from tests.minikms_auditor.rig import ORIGIN, Rig

needs.python(3, 12)
tlog = needs.library("aics_tlog")
witnesses = needs.library("aics_witness")

SIZES = (1, 2, 3, 7, 255, 256, 257, 300, 512, 513, 777)
ENTRIES = [tree.entry_of(b"line %d" % number) for number in range(max(SIZES))]
LOG_KEY, WITNESS_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
WITNESS = "witness.example/aics"


def altered(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_roots_and_proofs_are_the_same(size: int) -> None:
    edge, theirs = RightEdge(), tlog.MerkleTree(ENTRIES[:size])
    for entry in ENTRIES[:size]:
        edge.append(tree.leaf_of_entry(entry))
    made = {tile.path: tile.content for tile in edge.take_tiles()}
    wanted = tlog.TileWriter(ENTRIES[:size]).materialise()
    assert made == {path: content for path, content in wanted.items() if not path.startswith("tile/entries/")}
    node = Tiles(wanted.get, size).node
    root = theirs.root()
    assert edge.root() == root
    for index in {0, size // 2, size - 1}:
        proof = tree.inclusion_proof(node, index, size)
        leaf = tlog.leaf_hash(ENTRIES[index])
        assert proof == theirs.inclusion_proof(index)
        assert tlog.verify_inclusion(leaf, index, size, proof, root)
        tree.check_inclusion(leaf, index, size, theirs.inclusion_proof(index), root)
        for hashes in (proof[:-1], [*proof[:-1], altered(proof[-1], 0)] if proof else [bytes(32)]):
            if hashes != proof:
                assert not tlog.verify_inclusion(leaf, index, size, hashes, root)
                with pytest.raises(ProofError):
                    tree.check_inclusion(leaf, index, size, hashes, root)
    for old in {1, size // 2 or 1, size}:
        proof = tree.consistency_proof(node, old, size)
        assert proof == theirs.consistency_proof(old)
        assert tlog.verify_consistency(old, size, theirs.root(old), root, proof)


def ours() -> bytes:
    """A tree checkpoint with the signature of its log and a cosignature, by the project's functions."""
    text = Checkpoint(ORIGIN, 3, bytes(range(32))).text()
    log = VerifierKey(ORIGIN, notes.TYPE_ED25519, LOG_KEY.public_key().public_bytes_raw())
    witness = VerifierKey(WITNESS, notes.TYPE_COSIGNATURE, WITNESS_KEY.public_key().public_bytes_raw())
    cosigned = (7).to_bytes(8, "big") + WITNESS_KEY.sign(notes.cosigned_message(text, 7))
    signatures = (notes.sign(log, LOG_KEY.sign(text.encode())), notes.sign(witness, cosigned))
    return Note(text, signatures).encode()


def theirs() -> bytes:
    checkpoint = tlog.Checkpoint(ORIGIN, 3, bytes(range(32)))
    signed = tlog.sign_checkpoint(checkpoint, LOG_KEY, ORIGIN)
    _, cosigned = tlog.sign_cosignature(WITNESS_KEY, WITNESS, 7, ORIGIN, 3, bytes(range(32)))
    return bytes(tlog.Note(text=signed.text, signatures=(*signed.signatures, cosigned)).to_bytes())


def test_both_make_the_same_note_and_neither_accepts_another_byte() -> None:
    assert ours() == theirs()
    log, witness = (
        tlog.vkey_from_ed25519(ORIGIN, LOG_KEY.public_key()),
        tlog.cosignature_vkey(WITNESS, WITNESS_KEY.public_key()),
    )
    keys = [parse_vkey(tlog.format_vkey(key)) for key in (log, witness)]
    policy = WitnessPolicy((keys[0],), (keys[1],), 1)

    def is_accepted(content: bytes) -> bool:
        try:
            parsed = tlog.parse_note(content)
        except ValueError:
            return False
        return bool(tlog.verify_checkpoint(parsed, log, [witness], 1, expected_origin=ORIGIN).ok)

    assert is_accepted(ours())
    assert open_checkpoint(theirs(), policy).cosigned == ((WITNESS, 7),)
    for place in range(len(theirs())):
        assert not is_accepted(altered(theirs(), place))
        with pytest.raises(NoteError):
            open_checkpoint(altered(theirs(), place), policy)


class WitnessedRig(Rig):
    """Its only witness is the one that `table` of the configuration names."""

    table = ""

    def config(self) -> bytes:
        return super().config() + self.table.encode()


@contextlib.contextmanager
def aics_witness(file: Path, log_key: str) -> Iterator[str]:
    """A running one; its table of the configuration."""
    logs = [witnesses.LogConfig.from_strings(ORIGIN, [log_key])]
    with witnesses.WitnessStore(file, create=True) as store:
        witness = witnesses.Witness(WITNESS, WITNESS_KEY, store, logs)
        server = witnesses.make_server(witness)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f'[[witness]]\nurl = "{server.url}"\nkey = "{witness.vkey_text}"\n'
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def test_another_witness_cosigns_a_real_auditor_and_refuses_a_fork(tmp_path: Path) -> None:
    (base := tmp_path / "rig").mkdir()
    with WitnessedRig(base, quorum=1) as rig, aics_witness(tmp_path / "witness.db", rig.vkey()) as rig.table:
        for count in (1, 2, 250, 3):
            rig.write(count)
            status = rig.steps()
            assert (status.alarm, status.errors, status.witnesses[0].error) == ("", (), "")
            assert rig.published()[0] == len(rig.lines())
        assert status.witnesses[0].cosigned_at <= time.time()
        (other := tmp_path / "other").mkdir()
        with WitnessedRig(other, quorum=1) as fork:
            fork.table = rig.table
            fork.write(20)
            assert "knows a tree of" in fork.steps().alarm
