"""The known answers of docs/spec/audit-vectors.json hold for both verifiers and for the writer."""

import json
from pathlib import Path
from typing import Any

import pytest

from minikms.audit import receipt, record
from minikms.audit.record import MalformedLineError
from minikms.audit.tree import ProofError
from tests.minikms.audit import independent_verifier, make_vectors
from tests.minikms.audit.logmaker import KEY1, KEY2, verify


@pytest.fixture
def vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(make_vectors.VECTORS.read_text("ascii"))
    return loaded


def test_the_file_is_what_its_script_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_vectors.main(["--check"]) == 0, capsys.readouterr().out


def test_the_script_notices_a_file_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "vectors.json"
    changed.write_text(make_vectors.VECTORS.read_text("ascii").replace("17", "18", 1), "ascii")
    monkeypatch.setattr(make_vectors, "VECTORS", changed)
    assert make_vectors.main(["--check"]) == 1
    assert "is not what would be written" in capsys.readouterr().out


def test_the_log_in_it_is_intact_for_both_verifiers(vectors: dict[str, Any], tmp_path: Path) -> None:
    make_vectors.put(vectors["files"], tmp_path)
    report = verify(tmp_path, KEY1, KEY2)
    assert (report.intact, report.segments, report.checkpoints) == (True, 2, 4)
    assert verify(tmp_path, KEY1, public_only=True).intact
    given = {key["version"]: bytes.fromhex(key["audit_key"]) for key in vectors["keys"]}
    assert given == {1: bytes(KEY1.mac_key), 2: bytes(KEY2.mac_key)}


def test_the_second_verifier_is_a_program_of_its_own(
    vectors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert independent_verifier.main([str(tmp_path), "x"]) == 2
    make_vectors.put(vectors["files"], tmp_path)
    keys = [f"{key['version']}:{key['audit_key']}" for key in vectors["keys"]]
    arguments = [str(tmp_path), vectors["keys"][0]["public_key"], *keys]
    assert independent_verifier.main(list(arguments)) == 0
    assert independent_verifier.main([*arguments, "--expect-head", f"3:{'A' * 43}="]) == 1
    vectors["files"]["minikms-audit.log"].pop(1)
    make_vectors.put(vectors["files"], tmp_path)
    assert independent_verifier.main(list(arguments)) == 1
    capsys.readouterr()


def test_the_refused_lines_are_refused_by_both(vectors: dict[str, Any]) -> None:
    for refused in vectors["refused_lines"]:
        line = bytes.fromhex(refused["line_hex"])
        with pytest.raises(MalformedLineError):
            record.parse_line(line)
        with pytest.raises(independent_verifier.Fault):
            independent_verifier.parse(line)
    assert len({refused["line_hex"] for refused in vectors["refused_lines"]}) == len(make_vectors.REFUSED)


def test_the_receipt_is_one_and_the_refused_are_none_for_both(vectors: dict[str, Any]) -> None:
    key, good = KEY1.public_key, vectors["receipt"]
    event, other = receipt.check(receipt.parse(good.encode()), [key]), independent_verifier.receipt(good, key)
    assert (event.key_id, event.facts) == (other["key_id"], other["facts"])
    for refused in vectors["refused_receipts"]:
        assert refused["receipt"] != good, refused["what"]
        with pytest.raises(ProofError):
            receipt.check(receipt.parse(refused["receipt"].encode()), [key])
        with pytest.raises(independent_verifier.Fault):
            independent_verifier.receipt(refused["receipt"], key)


def test_the_escapes_are_those_of_the_writer(vectors: dict[str, Any]) -> None:
    assert [record.escape(escape["text"]) for escape in vectors["escapes"]] == [
        escape["written"] for escape in vectors["escapes"]
    ]
    hidden = vectors["hidden_thread_id"]
    assert record.hash_thread_id(hidden["thread_id"], KEY1.mac_key) == hidden["recorded"]
