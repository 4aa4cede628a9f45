"""The page docs/spec/tree.md is enough: the product and code that was written from it alone accept the same trees."""

import hashlib
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms.api.base64 import encode_text
from minikms.api.errors import KmsRefusedError
from minikms.audit import tree
from minikms.audit.export import Exported, ProofChecker
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.note import WitnessPolicy, open_checkpoint, parse_vkey
from minikms.audit.tiles import RightEdge, Tiles, tile_path
from minikms.cli import audit, audit_tree
from minikms.cli.console import DataFiles
from minikms_daemon.audit.maintenance import LogRetention, remove_segments
from tests.minikms.audit.logmaker import KEY1, SECOND, open_log, write_events
from tests.minikms_auditor.rig import Rig
from tests.vectors import make_tree as independent

KNOWN: dict[str, Any] = json.loads(independent.FILE.read_text())
NOTE: bytes = KNOWN["checkpoint"].encode()
POLICY = WitnessPolicy(
    tuple(map(parse_vkey, (KNOWN["log_key"], KNOWN["second_key"]))), tuple(map(parse_vkey, KNOWN["witness_keys"])), 2
)
KEYS = ([KNOWN["log_key"], KNOWN["second_key"]], KNOWN["witness_keys"], 2)


@cache
def lines() -> list[bytes]:
    """Made by the first test, not by every process that collects this one: they take a third of a second."""
    return independent.vector_lines(max(independent.SIZES))


def test_the_script_reproduces_the_vectors() -> None:
    subprocess.run([sys.executable, independent.__file__, "--check"], check=True)


def test_roots_tiles_and_proofs_are_the_known_ones() -> None:
    edge = RightEdge()
    made: dict[str, bytes] = {}
    roots: dict[int, str] = {}
    for line in lines():
        edge.append(tree.leaf_of(line.removesuffix(b"\n")))
        if edge.size in independent.SIZES:
            roots[edge.size] = edge.root().hex()
            made |= {tile.path: tile.content for tile in edge.take_tiles()}
        if edge.size == 600:
            node = Tiles(dict(made).get, 600).node
    assert list(roots.items()) == list(map(tuple, KNOWN["roots"]))
    assert made[tile_path(0, 0)][:32].hex() == KNOWN["first_leaf"]
    assert {path: hashlib.sha256(made[path]).hexdigest() for path in KNOWN["tiles"]} == KNOWN["tiles"]
    largest = independent.tiles_of([tree.leaf_of(line.removesuffix(b"\n")) for line in lines()])
    assert {path: made[path] for path in largest} == largest
    assert [tile_path(*tile) for *tile, _ in KNOWN["tile_paths"]] == [path for *_, path in KNOWN["tile_paths"]]
    for proof, known in ((tree.inclusion_proof, "inclusion"), (tree.consistency_proof, "consistency")):
        assert [[at, size, [each.hex() for each in proof(node, at, size)]] for at, size, _ in KNOWN[known]] == KNOWN[
            known
        ]


def test_the_known_notes_and_exported_lines_are_believed() -> None:
    opened = open_checkpoint(NOTE, POLICY)
    assert opened.note.encode() == NOTE and opened.checkpoint.size == 600
    assert [opened.quorum_time(quorum) for quorum in (1, 2)] == KNOWN["newest_at"]
    assert [key.text() for key in (*POLICY.log_keys, *POLICY.witnesses)] == [*KEYS[0], *KEYS[1]]
    for exported in KNOWN["exported"]:
        proven = ProofChecker(POLICY).check(msgspec.json.decode(exported, type=Exported))
        assert (proven.line + b"\n", proven.index) == (
            lines()[proven.index],
            independent.verify_exported(exported, *KEYS)[0],
        )


def believed_by_product(exported: Exported) -> bool:
    try:
        ProofChecker(POLICY).check(exported)
    except KmsRefusedError:
        return False
    return True


def believed_by_the_page(exported: Exported) -> bool:
    try:
        independent.verify_exported(msgspec.json.encode(exported).decode(), *KEYS)
    except (independent.Fault, ValueError):
        return False
    return True


def test_both_refuse_an_exported_line_with_a_changed_character() -> None:
    good: Exported = msgspec.json.decode(KNOWN["exported"][1], type=Exported)
    assert believed_by_product(good) and believed_by_the_page(good)
    for member in ("line", "proof"):
        text: str = getattr(good, member)
        for at in range(0, len(text), 7):
            for changed in (text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :], text[:at] + text[at + 1 :]):
                bad = msgspec.structs.replace(good, **{member: changed})
                assert not believed_by_product(bad) and not believed_by_the_page(bad), (member, at)


def test_the_tree_of_an_auditor_is_believed_by_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two logs after each other, of the second only later segments: the lines, the tiles and each exported line."""
    with Rig(tmp_path, witnesses=2) as rig:
        rig.write(30)
        rig.steps()
        (rig.log_dir / "minikms-audit.log").unlink()
        rig.clock.step = CHORES_NS
        log = open_log(rig.log_dir, clock=rig.clock, limits=LogLimits(segment_bytes=60_000, reserve_bytes=0))
        write_events(log, 600, per_commit=20)
        log.sync.fdatasync()
        rig.steps()
        rig.clock.now += 3600 * SECOND
        assert remove_segments(log, LogRetention(bytes_max=80_000, days_min=0))
        log.close()
        rig.steps()
        tiles = rig.state_dir / "tree"
        keys = ([rig.vkey()], [rig.witness(f"witness.example/w{number}")[1] for number in (1, 2)], 2)
        believed = independent.believed((tiles / "checkpoint").read_bytes(), *keys)
        assert believed.newest_at is not None and abs(believed.newest_at - time.time()) < 300
        lines = [line + b"\n" for line in rig.lines()]
        assert json.loads(lines[0])["event"]["type"] == "segment_open"
        independent.verify_lines(believed, lines, tiles)
        for wrong in (lines[:-1], [*lines[:5], *lines[6:]], [lines[0], lines[2], *lines[2:]]):
            with pytest.raises(independent.Fault):
                independent.verify_lines(believed, wrong, tiles)
        capfd.readouterr()
        assert audit_tree.export(data_dir=str(rig.log_dir), tiles=str(tiles)) == 0
        exported = capfd.readouterr().out.splitlines()
        indexes = [independent.verify_exported(each, *keys)[0] for each in exported[::20]]
        assert indexes == list(range(believed.size - len(lines), believed.size, 20))


def test_a_tree_that_was_made_by_the_page_is_believed(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.write(600)
        lines = [line + b"\n" for line in rig.lines()]
        leaves = list(map(independent.leaf_of, lines))
        tiles = tmp_path / "tree"
        for path, content in independent.tiles_of(leaves).items():
            (tiles / path).parent.mkdir(parents=True, exist_ok=True)
            (tiles / path).write_bytes(content)
        log_id = json.loads(lines[0])["event"]["facts"]["log_id"]
        (tiles / "logs.json").write_text(json.dumps([{"log_id": log_id, "first_leaf": 0, "first_seq": 1}]))
        note = independent.signed_note(leaves, dict.fromkeys(independent.WITNESSES, int(time.time())))
        (tiles / "checkpoint").write_bytes(note)
        trusted: dict[str, Any] = {"log_key": KEYS[0], "witness": KEYS[1]}
        asked = {"public_key": [encode_text(KEY1.public_key)], "checkpoint": str(tiles / "checkpoint"), **trusted}
        assert audit.verify(files=DataFiles(str(rig.log_dir)), **asked) == 0
        assert audit.verify(files=DataFiles(str(rig.log_dir)), tiles=str(tiles), **asked) == 0
        exported = tmp_path / "exported"
        exported.write_text("\n".join(independent.exported(lines[at], at, leaves, note) for at in (0, 300, 601)))
        assert audit_tree.verify_export(str(exported), **trusted) == 0
