"""The files and messages of the unlock service: known answers, bounds, and what a crash leaves."""

import json
import os
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.processes import handover
from minikms.processes.handover import Question, parse_question
from minikms_unlock import files
from minikms_unlock.files import Config
from tests import needs

KNOWN = json.loads((Path(__file__).parents[1] / "vectors" / "formats.json").read_text())["unlock"]


def config_in(directory: Path, source: str = KNOWN["source"]) -> Config:
    return Config(1, source, os.geteuid(), str(directory / "pin"), str(directory))


def test_the_messages_are_the_known_ones() -> None:
    for purpose, text in KNOWN["questions"].items():
        question = parse_question(text.encode())
        assert question == Question(purpose, KNOWN["keyring_id"]) and question.encode() == text.encode()
    answers = {name: bytes.fromhex(text) for name, text in KNOWN["answers"].items()}
    assert answers["key"][:1] == handover.KEY and len(answers["key"]) == 33
    assert answers["refused"] == handover.REFUSED + handover.sentence("denied")
    assert answers["away"] == handover.AWAY + handover.sentence("away")


def test_the_files_are_the_known_ones(tmp_path: Path) -> None:
    path, config = tmp_path / "unlock.toml", config_in(tmp_path)
    files.make_config(path, files.default_config(KNOWN["source"]))
    assert path.read_text() == KNOWN["configuration"] and path.stat().st_mode & 0o777 == 0o644
    assert files.read_config(path) == files.default_config(KNOWN["source"])
    files.write_wrapped(config, KNOWN["keyring_id"], bytes.fromhex(KNOWN["wrapped"]))
    assert (tmp_path / "root.json").read_text() == KNOWN["root_json"]
    assert files.read_wrapped(config).blob.hex() == KNOWN["wrapped"]


def test_a_configuration_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "unlock.toml"
    path.write_text("theirs")
    with pytest.raises(FileExistsError):
        files.make_config(path, files.default_config("tpm2:"))
    assert path.read_text() == "theirs"


@pytest.mark.parametrize("source", ["", "x" * 2049, "tpm2:\n", "tpm2:é"])
def test_a_source_out_of_its_bounds_is_refused(source: str) -> None:
    with pytest.raises(StartError, match="1 to 2048 printable ASCII"):
        files.default_config(source)


def test_paths_of_a_configuration_are_relative_to_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "unlock.toml"
    path.write_text('version = 1\nsource = "tpm2:"\nuser = 7\npin = "pins/a"\ndirectory = "state"\n')
    found = files.read_config(path)
    assert (found.pin, found.directory, found.uid) == (str(tmp_path / "pins" / "a"), str(tmp_path / "state"), 7)


def test_root_writes_as_the_owner_of_the_directory(tmp_path: Path) -> None:
    """A link that the owner has put there is replaced, not followed."""
    needs.root()
    tmp_path.chmod(0o755)
    directory, target = tmp_path / "state", tmp_path / "target"
    directory.mkdir(mode=0o700)
    os.chown(directory, 45_680, 45_681)
    target.write_text("root's")
    (directory / "root.json").symlink_to(target)
    files.write_wrapped(config_in(directory), KNOWN["keyring_id"], b"blob")
    found = (directory / "root.json").lstat()
    assert (found.st_uid, found.st_gid, found.st_mode) == (45_680, 45_681, 0o100600)
    assert target.read_text() == "root's" and os.geteuid() == 0
