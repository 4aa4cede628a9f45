"""The pin file: which root keys and keyrings it lets through, and who may have written it."""

import hmac
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.api.errors import NotPinnedError, StartError
from minikms.roots import pin
from minikms.roots.pin import PinFile
from tests import needs

ROOT, OTHER = memoryview(bytes(range(32))), memoryview(bytes(range(1, 33)))
KEYRING, OTHER_KEYRING = "kr_0011223344556677", "kr_7766554433221100"
ANOTHER_UID = 45_679


@pytest.fixture
def file(tmp_path: Path) -> PinFile:
    """A pin file of ROOT, in a directory of root's."""
    needs.root()
    directory = tmp_path / "pins"
    directory.mkdir(0o755)
    made = PinFile(directory / "pin")
    assert made.add(ROOT, KEYRING) == "new"
    return made


def test_the_pinned_root_and_keyring_pass(file: PinFile) -> None:
    file.check_opens(ROOT, KEYRING)
    file.check_new(ROOT)
    content = json.loads(file.path.read_text())
    fingerprint = hmac.digest(ROOT, b"minikms/root-fingerprint/v1\0", "sha256").hex()[:16]
    assert content["pins"] == {fingerprint: hmac.digest(ROOT, b"minikms/root-pin/v1\0", "sha256").hex()}
    assert file.path.stat().st_mode & 0o777 == 0o644


def test_another_root_or_keyring_is_refused_with_what_to_do(file: PinFile) -> None:
    with pytest.raises(StartError, match="minikms pin add SOURCE"):
        file.check_opens(OTHER, KEYRING)
    with pytest.raises(StartError, match=f"is for keyring {KEYRING}, but the keyring is {OTHER_KEYRING}"):
        file.check_opens(ROOT, OTHER_KEYRING)
    with pytest.raises(StartError, match="there is no keyring"):
        file.check_opens(ROOT, None)
    with pytest.raises(NotPinnedError, match="minikms pin add SOURCE"):
        file.check_new(OTHER)


def test_pins_are_added_to_the_same_keyring_only(file: PinFile) -> None:
    inode = file.path.stat().st_ino
    assert file.add(OTHER, KEYRING) == "new"
    assert file.add(OTHER, KEYRING) == "known"
    file.check_new(OTHER)
    file.check_opens(ROOT, KEYRING)
    assert file.path.stat().st_ino == inode, "the daemon's Landlock rule is bound to it"
    with pytest.raises(StartError, match="is for keyring"):
        file.add(OTHER, OTHER_KEYRING)


def test_there_is_a_limit_of_pins(file: PinFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "PINS_COUNT_MAX", 1)
    with pytest.raises(StartError, match="names 1 root keys already"):
        file.add(OTHER, KEYRING)


def to_link(path: Path) -> None:
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved)


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_the_daemon_can_read_a_file_made_under_any_umask(tmp_path: Path) -> None:
    needs.root()
    before = os.umask(0o077)
    try:
        made = PinFile(tmp_path / "pin")
        made.add(ROOT, KEYRING)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o644


def test_a_pin_that_was_removed_opens_nothing_and_the_last_one_stays(file: PinFile) -> None:
    file.add(OTHER, KEYRING)
    assert file.remove(ROOT)
    assert not file.remove(ROOT)
    file.check_opens(OTHER, KEYRING)
    with pytest.raises(StartError, match="does not name the root key"):
        file.check_opens(ROOT, KEYRING)
    with pytest.raises(StartError, match="only this root key"):
        file.remove(OTHER)
    file.check_opens(OTHER, KEYRING)


def test_a_pin_over_a_damaged_file_is_the_only_one_and_the_result_says_so(file: PinFile) -> None:
    """As after a crash in the middle of a write."""
    file.path.write_bytes(file.path.read_bytes()[:-20])
    assert not file.exists()
    assert file.add(OTHER, KEYRING) == "replaced"
    file.check_opens(OTHER, KEYRING)
    with pytest.raises(StartError, match="does not name the root key"):
        file.check_opens(ROOT, KEYRING)


def test_no_directory_above_the_file_belongs_to_another_user(tmp_path: Path) -> None:
    """Neither one that its path names, nor one that a link in its path leads to."""
    needs.root()
    foreign = tmp_path / "foreign"
    (foreign / "pins").mkdir(parents=True, mode=0o755)
    made = PinFile(foreign / "pins" / "pin")
    made.add(ROOT, KEYRING)
    (tmp_path / "link").symlink_to(foreign / "pins")
    (foreign / "back").symlink_to(tmp_path / "own")
    (tmp_path / "own").mkdir(mode=0o755)
    os.chown(foreign, ANOTHER_UID, 0)
    PinFile(tmp_path / "own" / "pin").add(ROOT, KEYRING)
    for path in (made.path, tmp_path / "link" / "pin", foreign / "back" / "pin"):
        with pytest.raises(StartError, match="every directory above"):
            PinFile(path).check_opens(ROOT, KEYRING)


def test_no_link_to_the_file_lies_in_the_directory_of_another_user(tmp_path: Path) -> None:
    """That user could let it lead to another file of root's, such as an older pin file, or to none."""
    needs.root()
    pins, foreign, sticky = tmp_path / "pins", tmp_path / "foreign", tmp_path / "sticky"
    for directory in (pins, foreign, sticky):
        directory.mkdir(0o755)
    PinFile(pins / "pin").add(ROOT, KEYRING)
    (foreign / "to_pins").symlink_to(pins)
    (tmp_path / "chain").symlink_to(foreign / "to_pins")
    (tmp_path / "relative").symlink_to("foreign/to_pins")
    (tmp_path / "up").symlink_to("pins/../pins")
    (sticky / "own").symlink_to(pins)
    (sticky / "theirs").symlink_to(pins)
    (tmp_path / "loop").symlink_to("loop")
    sticky.chmod(0o1777)
    os.chown(sticky / "theirs", ANOTHER_UID, 0, follow_symlinks=False)
    trusted = ("pins", "up", "sticky/own")
    for name in (*trusted, "chain", "relative"):
        PinFile(tmp_path / name / "pin").check_opens(ROOT, KEYRING)
    os.chown(foreign, ANOTHER_UID, 0)
    for name in ("chain", "relative", "sticky/theirs"):
        with pytest.raises(StartError, match="every directory above"):
            PinFile(tmp_path / name / "pin").check_opens(ROOT, KEYRING)
    for name in trusted:
        PinFile(tmp_path / name / "pin").check_opens(ROOT, KEYRING)
    with pytest.raises(StartError, match="symbolic links"):
        PinFile(tmp_path / "loop" / "pin").check_opens(ROOT, KEYRING)


SPOILED: dict[str, Callable[[Path], object]] = {
    "another owner": lambda path: os.chown(path, ANOTHER_UID, 0),
    "writable by a group": lambda path: path.chmod(0o664),
    "writable by all": lambda path: path.chmod(0o646),
    "a directory of another owner": lambda path: os.chown(path.parent, ANOTHER_UID, 0),
    "a directory that all may write in": lambda path: path.parent.chmod(0o777),
    "a link": to_link,
    "a FIFO": to_fifo,
    "a directory": to_directory,
    "nothing": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "another format": lambda path: path.write_text(path.read_text().replace("minikms-pin", "other")),
    "another version": lambda path: path.write_text(path.read_text().replace('"version":1', '"version":2')),
    "an unknown member": lambda path: path.write_text(path.read_text().replace('"version"', '"more":1,"version"')),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b" " * pin.FILE_BYTES_MAX),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_file_that_is_damaged_or_not_roots_alone_lets_nothing_through(file: PinFile, what: str) -> None:
    SPOILED[what](file.path)
    with pytest.raises(StartError):
        file.check_opens(ROOT, KEYRING)
    with pytest.raises(NotPinnedError) as refused:
        file.check_new(ROOT)
    assert str(file.path) not in str(refused.value), "it is sent to a client"
