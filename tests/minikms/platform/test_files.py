"""A file is replaced whole or not at all, and a failure leaves the old content and no other file."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import InvalidRequestError, StorageUnavailableError
from minikms.cli.console import explained
from minikms.commands.usage import EXIT_MISSING
from minikms.platform import files, sync
from minikms.platform.files import (
    FileWrite,
    make_file,
    make_files,
    open_directory,
    overwrite_file,
    read_file_bounded,
    read_files_of,
    remove_file,
    replace_file,
    replace_file_from,
    sweep_temps,
    write_files,
)
from tests.harness.disk_faults import failing, failing_os


@pytest.fixture(params=["syncfs", "fsync"])
def sync_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to sync a group, whatever the file system of the tests is."""
    way: str = request.param
    monkeypatch.setattr(files, "syncfs_reports", lambda _directory: way == "syncfs")
    return way


@pytest.mark.parametrize("call", ["write", "rename", "fsync", "open"])
def test_an_operator_reads_which_file_and_a_client_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    directory = open_directory(tmp_path)
    with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError) as caught:
        replace_file(directory, "secret", b"new")
    os.close(directory)
    assert explained(caught.value) == (
        f"a file cannot be written: No space left on device{', at its sync' if call == 'fsync' else ''}: secret",
        EXIT_MISSING,
    )
    assert str(caught.value) == "a file cannot be written"


def test_a_failed_sync_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call, wait in (("fsync", sync.sync_directory), ("fdatasync", lambda path: sync.sync_data(os.open(path, 0)))):
        with failing_os(monkeypatch, call), pytest.raises(OSError, match="at its sync") as caught:
            wait(tmp_path)
        assert caught.value.filename == str(tmp_path)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_new_file_is_private_whole_and_alone(tmp_path: Path, directory: int) -> None:
    replace_file(directory, "keyring.json", b"content")
    assert (tmp_path / "keyring.json").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "keyring.json").stat().st_mode) == 0o600
    assert names(tmp_path) == ["keyring.json"]


def test_replacing_makes_a_new_file_and_never_writes_into_the_old_one(tmp_path: Path, directory: int) -> None:
    replace_file(directory, "f", b"old")
    os.link(tmp_path / "f", tmp_path / "backup")
    replace_file(directory, "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert (tmp_path / "backup").read_bytes() == b"old"


def test_content_may_come_in_parts(tmp_path: Path, directory: int) -> None:
    replace_file_from(directory, "f", (bytes([number]) * 3 for number in range(4)))
    assert (tmp_path / "f").read_bytes() == b"\0\0\0\1\1\1\2\2\2\3\3\3"


def test_an_error_of_the_content_source_leaves_the_old_file(tmp_path: Path, directory: int) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("source")

    replace_file(directory, "f", b"old")
    with pytest.raises(KeyError):
        replace_file_from(directory, "f", chunks())
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_short_writes_are_continued(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    replace_file(directory, "f", b"ten bytes!")
    real_at = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_at(fd, data[:3], at))
    overwrite_file(directory, "f", b"10 others.", sync=True)
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"10 others."


@pytest.mark.parametrize(
    ("call", "at"), [("open", 1), ("write", 1), ("write", 2), ("fsync", 1), ("close", 1), ("rename", 1)]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_before_the_rename_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch, call: str, at: int, number: int
) -> None:
    replace_file(directory, "f", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), at=at, number=number))
        with pytest.raises(StorageUnavailableError) as refused:
            replace_file_from(directory, "f", (b"new", b"er"))
    assert "secret" not in str(refused.value)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]
    replace_file(directory, "f", b"retried")
    assert (tmp_path / "f").read_bytes() == b"retried"


def test_a_failed_sync_of_the_directory_raises_and_leaves_a_whole_file(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(directory, "f", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, at=2))
        with pytest.raises(StorageUnavailableError):
            replace_file(directory, "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_after_a_failed_sync_the_retry_syncs_another_file(
    directory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        if len(synced) == 1:
            # Held open, so that the file system can't give its number to the next one.
            held.append(os.dup(fd))
            raise OSError(errno.EIO, "")
        real(fd)

    held: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageUnavailableError):
            replace_file(directory, "f", b"one")
        replace_file(directory, "f", b"one")
    os.close(held[0])
    assert synced[0] != synced[1] == (tmp_path / "f").stat().st_ino


@pytest.mark.parametrize("taken_by", ["a file", "a dangling symbolic link"])
def test_a_new_file_takes_no_name_that_is_taken(tmp_path: Path, directory: int, taken_by: str) -> None:
    if taken_by == "a file":
        make_file(directory, "f", b"first", sync=True)
    else:
        (tmp_path / "f").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        make_file(directory, "f", b"second", sync=True)
    assert names(tmp_path) == ["f"]
    assert taken_by != "a file" or (tmp_path / "f").read_bytes() == b"first"


def test_the_disk_is_asked_for_all_files_before_one_is_waited_for(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is absent, no file, or of another length is left to a caller that says why."""
    calls: list[str] = []

    def noted(real: Callable[..., object], name: str, *args: object) -> object:
        calls.append(name)
        return real(*args)

    for name in ("posix_fadvise", "pread"):
        monkeypatch.setattr(os, name, partial(noted, getattr(os, name), name))
    for number in range(3):
        (tmp_path / f"f{number}").write_bytes(b"%d" % number)
    (tmp_path / "long").write_bytes(b"12")
    (tmp_path / "directory").mkdir()
    found = read_files_of(["f0", "none", "f1", "long", "directory", "f2"], 1, dir_fd=directory)
    assert found == [b"0", None, b"1", None, None, b"2"]
    assert calls == ["posix_fadvise"] * 5 + ["pread"] * 5


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_new_file_that_the_disk_refuses_is_not_there(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with failing_os(monkeypatch, call), pytest.raises(OSError):
        make_file(directory, "f", b"content", sync=True)
    assert names(tmp_path) == []


def test_a_group_replaces_all_its_files(tmp_path: Path, directory: int, sync_way: str) -> None:
    writes = [FileWrite(f"f{number}", b"%d" % number) for number in range(20)]
    write_files(directory, [write._replace(data=b"old") for write in writes])
    write_files(directory, writes)
    assert names(tmp_path) == sorted(write.name for write in writes)
    assert all((tmp_path / write.name).read_bytes() == write.data for write in writes)


def test_an_empty_group_is_nothing(tmp_path: Path, directory: int, sync_way: str) -> None:
    write_files(directory, [])
    assert names(tmp_path) == []


@pytest.mark.parametrize(("write", "count"), [(write_files, 2), (make_files, 1)])
def test_a_large_group_costs_two_syncs_and_one_of_new_files_one(
    directory: int, sync_way: str, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], count: int
) -> None:
    syncs: list[str] = []
    real_fsync, real_syncfs = os.fsync, sync.syncfs

    def fsync(fd: int) -> None:
        syncs.append("fsync")
        real_fsync(fd)

    def syncfs(fd: int) -> None:
        syncs.append("syncfs")
        real_syncfs(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "syncfs", syncfs)
    write(directory, [FileWrite(f"f{number}", b"x") for number in range(10)])
    assert syncs == (["syncfs"] * count if sync_way == "syncfs" else ["fsync"] * 11)


@pytest.mark.parametrize(("call", "at"), [("open", 1), ("open", 5), ("write", 3), ("first sync", 1)])
def test_a_group_that_fails_before_the_renames_changes_nothing(
    tmp_path: Path, directory: int, sync_way: str, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    writes = [FileWrite(f"f{number}", b"new") for number in range(8)]
    write_files(directory, [write._replace(data=b"old") for write in writes])
    with monkeypatch.context() as patch:
        if call == "first sync" and sync_way == "syncfs":
            patch.setattr(files, "syncfs", failing(sync.syncfs, at=at))
        else:
            name = "fsync" if call == "first sync" else call
            patch.setattr(os, name, failing(getattr(os, name), at=at))
        with pytest.raises(StorageUnavailableError):
            write_files(directory, writes)
    assert names(tmp_path) == sorted(write.name for write in writes)
    assert all((tmp_path / write.name).read_bytes() == b"old" for write in writes)


def test_a_group_that_fails_at_a_rename_has_whole_files(
    tmp_path: Path, directory: int, sync_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = [FileWrite(f"f{number}", b"new") for number in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(os.rename, at=3, times=1))
        with pytest.raises(StorageUnavailableError):
            write_files(directory, writes)
    assert names(tmp_path) == ["f0", "f1"]


def test_of_two_writes_to_a_name_in_a_group_the_later_holds(tmp_path: Path, directory: int, sync_way: str) -> None:
    write_files(directory, [FileWrite("f", b"1"), FileWrite("f", b"2"), FileWrite("g", b"4")])
    assert (tmp_path / "f").read_bytes() == b"2"


def test_if_the_last_sync_of_a_group_fails_the_group_fails(
    tmp_path: Path, directory: int, sync_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = [FileWrite(f"f{number}", b"new") for number in range(6)]
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
        if sync_way == "syncfs":
            patch.setattr(files, "syncfs", failing(sync.syncfs, at=2))
        else:
            patch.setattr(os, "fsync", failing(os.fsync, at=len(writes) + 1))
        write_files(directory, writes)


def test_removing_is_durable_and_repeatable(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(directory, "f", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, at=1))
        with pytest.raises(StorageUnavailableError):
            remove_file(directory, "f")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert remove_file(directory, "f") is False
    assert synced == [directory], "the repetition makes the first removal durable"
    replace_file(directory, "g", b"x")
    assert remove_file(directory, "g") is True
    assert names(tmp_path) == []


def test_only_temporary_files_of_earlier_processes_are_swept(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[int] = []
    rename = os.rename

    def sweeping(*given: Any, **named: Any) -> None:
        swept.append(sweep_temps(directory))
        rename(*given, **named)

    for name in (".tmp-0123456789abcdef-7", ".tmp-0123456789abcdef-", ".tmp-mine", "kept", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(os, "rename", sweeping)
    replace_file(directory, "mine", b"")
    assert swept == [1]
    assert names(tmp_path) == [".hidden", ".tmp-0123456789abcdef-", ".tmp-mine", "kept", "mine"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", ".tmp-x", "a" * 256, "ä", "a\n"])
def test_a_name_that_is_not_a_plain_file_name_touches_nothing(tmp_path: Path, directory: int, name: str) -> None:
    for call in (
        lambda: replace_file(directory, name, b""),
        lambda: make_file(directory, name, b"", sync=True),
        lambda: overwrite_file(directory, name, b"", sync=True),
        lambda: write_files(directory, [FileWrite("good", b""), FileWrite(name, b"")]),
        lambda: remove_file(directory, name),
    ):
        with pytest.raises(InvalidRequestError):
            call()
    assert names(tmp_path) == []


def test_reading_is_bounded(tmp_path: Path, directory: int) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_file_bounded("f", 5, dir_fd=directory) == b"12345"
    assert read_file_bounded(tmp_path / "f", 6) == b"12345"
    with pytest.raises(StorageUnavailableError, match="longer"):
        read_file_bounded("f", 4, dir_fd=directory)


def test_an_absent_file_reads_as_none(directory: int) -> None:
    assert read_file_bounded("absent", 1, dir_fd=directory) is None


def test_only_a_regular_file_is_read_and_a_fifo_does_not_block(tmp_path: Path, directory: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("fifo", "dir", "link"):
        with pytest.raises(StorageUnavailableError) as refused:
            read_file_bounded(name, 10, dir_fd=directory)
        assert str(tmp_path) not in str(refused.value)


def test_a_failed_read_is_a_storage_error(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setattr(os, "read", failing(os.read, at=1))
    with pytest.raises(StorageUnavailableError):
        read_file_bounded("f", 10, dir_fd=directory)


def test_only_a_directory_is_opened_as_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_directory(tmp_path / "absent")
    for name in ("file", "link"):
        with pytest.raises(StorageUnavailableError):
            open_directory(tmp_path / name)
