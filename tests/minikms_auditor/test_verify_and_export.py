"""`minikms audit verify --checkpoint`, `export` and `verify-export` beside a tree that witnesses have cosigned."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.api.base64 import encode_text
from minikms.audit import Event, record
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.tiles import TilesError
from minikms.cli import audit, audit_tree, receipt
from minikms.cli.console import DataFiles
from minikms_auditor import command
from minikms_daemon.audit.maintenance import LogRetention, compress_closed, remove_segments
from tests.harness import witness as cosigning
from tests.minikms.audit.logmaker import KEY1, KEY2, SECOND, open_log, write_events
from tests.minikms.audit.make_vectors import make_receipt
from tests.minikms_auditor.rig import Rig

KEY_ID, OTHER = f"k_01jd{5:022}", f"k_01jd{6:022}"
W1, W2 = "witness.example/w1", "witness.example/w2"
Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, witnesses=2) as rig:
        yield rig


@pytest.fixture
def verify(rig: Rig, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Exit status and output. `changed`: arguments, instead of those of the rig."""

    def run(**changed: Any) -> tuple[int, str]:
        arguments = {
            "files": DataFiles(str(rig.log_dir)),
            "public_key": [encode_text(KEY1.public_key)],
            "checkpoint": str(rig.state_dir / "tree" / "checkpoint"),
            "log_key": [rig.vkey()],
            "witness": [rig.witness(name)[1] for name in (W1, W2)],
            **changed,
        }
        capsys.readouterr()
        status = audit.verify(**arguments)
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def older_copy(rig: Rig) -> bytes:
    return (rig.log_dir / "minikms-audit.log").read_bytes()


def test_a_whole_and_fresh_log_is_intact_with_its_age(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    rig.steps()
    status, text = verify()
    assert status == 0, text
    assert "cosigned by witness.example/w1, witness.example/w2" in text
    assert "no line that is older is missing" in text
    rig.write(5)
    assert verify()[0] == 0, "newer lines than the tree checkpoint are no fault"
    status, text = verify(json=True)
    tree = json.loads(text)["tree"]
    assert (status, tree["origin"], tree["faults"]) == (0, "kms.example/audit", [])


def test_without_a_witness_the_age_is_unknown(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    rig.steps()
    status, text = verify(witness=None)
    assert (status, "age         unknown" in text) == (2, True)


def test_a_cut_log_is_named_also_where_a_signed_line_ends_it(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    cut = older_copy(rig)
    rig.write(20)
    rig.steps()
    (rig.log_dir / "minikms-audit.log").write_bytes(cut)
    assert verify(checkpoint=None, log_key=None, witness=None)[0] == 0, "the log alone does not show it"
    status, text = verify()
    assert status == 1
    assert "the log ends at line 22, and the tree has" in text and "(truncated)" in text


def test_a_fork_is_named(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    cut = older_copy(rig)
    rig.write(20)
    rig.steps()
    (rig.log_dir / "minikms-audit.log").unlink()
    (rig.log_dir / "minikms-audit.log").write_bytes(cut)
    rig.write(60)
    for tiles in (None, str(rig.state_dir / "tree")):
        status, text = verify(tiles=tiles)
        assert (status, "(altered)" in text) == (1, True), text
    assert "line 23 is not the one in the tree" in text


def test_a_log_begun_anew_is_named(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    rig.steps()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(60)
    assert verify()[0] == 1
    status, text = verify(tiles=str(rig.state_dir / "tree"))
    assert (status, "(foreign)" in text) == (1, True), text


def test_a_log_that_continues_the_tree_anew_verifies_with_its_tiles(rig: Rig, verify: Verify) -> None:
    rig.write(20)
    rig.steps()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(60)
    rig.steps()
    status, text = verify(tiles=str(rig.state_dir / "tree"))
    assert status == 0, text


def test_an_older_copy_of_everything_is_stale(rig: Rig, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log, tree and tree checkpoint were put back together: only the cosignatures' time tells."""
    rig.write(20)
    rig.steps()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    status, text = verify()
    assert (status, "(stale)" in text) == (1, True), text
    assert verify(max_age="2h")[0] == 0
    monkeypatch.setattr(time, "time", lambda: now - 3700)
    assert "in the future" in verify()[1]


def test_a_quorum_that_is_missing_makes_nothing_known(rig: Rig, verify: Verify, tmp_path: Path) -> None:
    rig.write(20)
    rig.steps()
    third = cosigning.Witness(str(tmp_path / "w3"), "witness.example/w3", {}).vkey
    keys = [rig.witness(W1)[1], third]
    status, text = verify(witness=keys)
    assert (status, "1 cosignatures of the 2" in text) == (2, True), text
    assert verify(witness=keys, quorum=1)[0] == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"log_key": None}, "--log-key"),
        ({"checkpoint": None}, "give --checkpoint"),
        ({"max_age": "soon"}, "--max-age"),
        ({"checkpoint": "missing"}, "no file"),
        ({"tiles": "missing"}, "logs.json"),
        ({"quorum": 3}, "quorum"),
        ({"log_key": ["kms.example/audit+00000000+AQ=="]}, "verifier key"),
    ],
)
def test_wrong_flags_are_named(rig: Rig, verify: Verify, changed: dict[str, Any], said: str) -> None:
    rig.write(20)
    rig.steps()
    status, text = verify(**changed)
    assert (status, said in text) == (2, True), text


def test_a_log_whose_first_segments_were_removed_needs_tiles(rig: Rig, verify: Verify) -> None:
    rig.clock.step = CHORES_NS
    log = open_log(rig.log_dir, clock=rig.clock, limits=LogLimits(segment_bytes=3000, reserve_bytes=0))
    write_events(log, 60)
    log.sync.fdatasync()
    rig.daemon.durable_seq = None
    rig.steps()
    rig.clock.now += 3600 * SECOND
    assert remove_segments(log, LogRetention(bytes_max=4000, days_min=0))
    log.sign_and_sync()
    log.close()
    compress_closed(str(rig.log_dir))
    assert rig.steps().alarm == ""
    status, text = verify()
    assert (status, "give --tiles" in text) == (2, True), text
    status, text = verify(tiles=str(rig.state_dir / "tree"))
    assert status == 0, text


def test_altered_tiles_are_named(rig: Rig, verify: Verify, tmp_path: Path) -> None:
    rig.write(20)
    rig.steps()
    tree = shutil.copytree(rig.state_dir / "tree", tmp_path / "tree")
    [tile] = (tree / "tile" / "0" / "000.p").iterdir()
    tile.write_bytes(bytes([tile.read_bytes()[0] ^ 1]) + tile.read_bytes()[1:])
    status, text = verify(tiles=str(tree))
    assert (status, "line 1 is not the one in the tree" in text) == (1, True), text


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(rig: Rig, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def run(**changed: Any) -> tuple[int, Path]:
        arguments = {"data_dir": str(rig.log_dir), "tiles": str(rig.state_dir / "tree"), **changed}
        capfd.readouterr()
        status = audit_tree.export(**arguments)
        path = tmp_path / "exported"
        path.write_text(capfd.readouterr().out)
        return status, path

    return run


def check(rig: Rig, path: Path, **changed: Any) -> int:
    witnesses = [rig.witness(name)[1] for name in (W1, W2)]
    return audit_tree.verify_export(str(path), **{"log_key": [rig.vkey()], "witness": witnesses, **changed})


def test_exported_lines_prove_themselves_without_the_log(
    rig: Rig, export: Callable[..., tuple[int, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    rig.write(300)
    rig.steps()
    rig.write(5)
    status, path = export()
    lines = [json.loads(line)["line"].encode() for line in path.read_bytes().splitlines()]
    assert (status, lines) == (0, rig.lines()[: rig.published()[0]])
    shutil.rmtree(rig.log_dir)
    assert check(rig, path) == 0
    assert check(rig, path, log_key=["kms.example/other+00000000+AQ=="]) == 2


def test_an_export_of_a_time_is_whole_within_it(
    rig: Rig, export: Callable[..., tuple[int, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    rig.clock.step = 3600 * SECOND
    rig.write(10)
    rig.steps()
    first, last = (json.loads(rig.lines()[at])["event"]["ts"] // SECOND for at in (3, 7))
    since, until = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment)) for moment in (first, last))
    status, path = export(since=since, until=until)
    assert (status, len(path.read_bytes().splitlines())) == (0, 4)
    assert check(rig, path, json=True) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["first_seq"], report["last_seq"], report["complete"]) == (4, 7, True)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    check(rig, path, json=True)
    assert json.loads(capfd.readouterr().out)["complete"] is False


def test_an_altered_export_is_refused(rig: Rig, export: Callable[..., tuple[int, Path]]) -> None:
    rig.write(300)
    rig.steps()
    path = export()[1]
    first = json.loads(path.read_bytes().splitlines()[100])
    head, _, note = first["proof"].partition("\n\n")
    header, index, *hashes = head.split("\n")
    proofs = [
        "\n".join([header, "index 99", *hashes]) + "\n\n" + note,
        "\n".join([header, "index 0100", *hashes]) + "\n\n" + note,
        "\n".join([header, index, *hashes[1:]]) + "\n\n" + note,
        "\n".join([header, index, *hashes, *hashes]) + "\n\n" + note,
        "\n".join(["c2sp.org/tlog-proof@v2", index, *hashes]) + "\n\n" + note,
        "\n".join([header, *hashes]) + "\n\n" + note,
        head + "\n\n" + note.replace("kms.example/audit\n", "kms.example/other\n"),
        head + "\n\n" + "".join(note.splitlines(keepends=True)[:-1]),
        head,
        "",
    ]
    changed = [{**first, "proof": proof} for proof in proofs]
    changed += [{**first, "line": first["line"].replace('"pid":77', '"pid":78')}, {"line": first["line"]}, {}]
    path.write_text(
        json.dumps({**first, "proof": f"{header}\nextra AAAA\n{index}\n" + "\n".join(hashes) + f"\n\n{note}"})
    )
    assert check(rig, path) == 0, "extra data is allowed and ignored"
    for each in changed:
        path.write_text(json.dumps(each) + "\n")
        assert check(rig, path) == 1, each
    path.write_text("")
    assert check(rig, path) == 2


def test_an_export_counts_each_line_once_and_in_order(rig: Rig, export: Callable[..., tuple[int, Path]]) -> None:
    rig.write(20)
    rig.steps()
    path = export()[1]
    lines = path.read_bytes().splitlines(keepends=True)
    for rows in ([1, 0, 2, 3], [0, 1, 1, 2], [0, 1, 0]):
        path.write_bytes(b"".join(lines[row] for row in rows))
        assert check(rig, path) == 1, rows


def test_exported_events_hold_line_and_proof(rig: Rig, export: Callable[..., tuple[int, Path]], tmp_path: Path) -> None:
    rig.write(20)
    rig.steps()
    status, path = export(format="ocsf")
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert status == 0 and [event["raw_data"].encode() for event in events] == rig.lines()
    proven = [{"line": event["raw_data"], "proof": event["unmapped"]["proof"]} for event in events]
    (tmp_path / "proven").write_text("\n".join(map(json.dumps, proven)))
    assert check(rig, tmp_path / "proven") == 0


def test_a_line_that_is_not_the_one_in_the_tree_is_not_exported(
    rig: Rig, export: Callable[..., tuple[int, Path]]
) -> None:
    rig.write(20)
    rig.steps()
    path = rig.log_dir / "minikms-audit.log"
    path.write_bytes(path.read_bytes().replace(b'"pid":77', b'"pid":78', 1))
    assert export()[0] == 1


def test_an_altered_tile_is_accused_and_not_the_log(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whoever reads it: also before a witness gets a proof that it would take for that of another tree."""
    rig.write(300)
    rig.steps()
    tile = rig.state_dir / "tree" / "tile" / "0" / "000"
    content = tile.read_bytes()
    tile.write_bytes(content[:320] + bytes(32) + content[352:])
    config = tmp_path / "auditor.toml"
    config.write_bytes(rig.config())
    for line in (1, 11):
        with pytest.raises(TilesError, match="the tile tile/0/000 is not the one that the tile above it names"):
            command.prove(line, config=config)
    capsys.readouterr()


def test_prove_prints_one_line_of_an_export(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rig.write(20)
    rig.steps()
    config = tmp_path / "auditor.toml"
    config.write_bytes(rig.config())
    assert command.prove(7, config=config) == 0
    path = tmp_path / "proven"
    path.write_text(capsys.readouterr().out)
    assert check(rig, path) == 0
    assert json.loads(path.read_text())["line"].encode() == rig.lines()[6]


def test_the_commands_of_an_operator(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "auditor.toml"
    config.write_bytes(rig.config())
    rig.write(20)
    rig.steps()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(7, KEY2)
    assert command.status(config=config) == 0
    assert rig.vkey() in capsys.readouterr().out
    assert command.checkpoint(config=config) == 0
    assert capsys.readouterr().out.encode() == (rig.state_dir / "tree" / "checkpoint").read_bytes()
    rig.steps()
    assert command.status(config=config) == 1
    assert "STOPPED" in capsys.readouterr().out
    assert command.accept_log(config=config) == 1
    key = encode_text(KEY2.public_key)
    assert key in capsys.readouterr().out
    assert command.accept_log(encode_text(bytes(32)), config=config) == 0
    assert "No log that begins with it waits now" in capsys.readouterr().out
    assert command.accept_log(key, config=config) == 0
    assert "goes on within seconds" in capsys.readouterr().out
    assert rig.start().steps().alarm == ""
    assert command.accept_log(config=config) == 2


# --- receipts ---------------------------------------------------------------------------------------------------------


def test_a_receipt_has_its_place_in_the_tree(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(tiles: str) -> dict[str, Any]:
        capsys.readouterr()
        assert receipt.show(KEY_ID, data_dir=str(rig.log_dir), tiles=tiles) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    def check(content: dict[str, Any], **changed: Any) -> tuple[int, str]:
        (tmp_path / "receipt").write_text(json.dumps(content))
        keys = {"public_key": [encode_text(KEY1.public_key)], "log_key": [rig.vkey()]}
        status = receipt.verify(str(tmp_path / "receipt"), **{**keys, **changed})
        output = capsys.readouterr()
        return status, output.out + output.err

    rig.write(20)
    rig.steps()
    log = open_log(rig.log_dir, clock=rig.clock)
    facts = record.parse_line(make_receipt())[0].facts
    for key_id in (KEY_ID, OTHER):
        log.add(Event(type="destroy_key", actor="peer_uid:0", key_id=key_id, facts=dict(facts)))
    log.close()
    tiles = str(rig.state_dir / "tree")
    early = printed(tiles)
    assert set(early) == {"version", "line"}, "no tree checkpoint has it yet"
    rig.steps()
    proven = printed(tiles)
    shutil.rmtree(rig.log_dir)
    place = f"leaf {json.loads(proven['line'])['event']['seq'] - 1} of kms.example/audit, "
    witnesses = [rig.witness(name)[1] for name in (W1, W2)]
    assert place + "cosigned by a quorum at" in check(proven, witness=witnesses)[1]
    assert place + "no witness has cosigned" in check(proven)[1]
    assert "not checked: --log-key was not given" in check(proven, log_key=None)[1]
    for wrong in (early, {**early, "proof": proven["proof"].replace("index 2", "index 1", 1)}, {**early, "proof": "x"}):
        assert check(wrong)[0] == 1
    cut = proven["proof"].rsplit("\u2014", 2)[0]
    assert (check({**early, "proof": cut})[0], check({**early, "proof": cut}, witness=witnesses)[0]) == (0, 1)
