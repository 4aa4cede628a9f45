"""A file that grows by durable appends: nothing that was acknowledged is lost, and a failure is never built upon."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from minikms.custody.appended_file import AppendedFile
from minikms.custody.files import TEMP_PREFIX
from minikms.errors import StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os
from tests.minikms.custody.power_loss import Disk

NAME = "lines"


def opened(directory: int) -> AppendedFile:
    return AppendedFile(directory, NAME, bytes_max=100)


def test_a_run_begins_with_a_replacement_and_then_appends(directory: int, tmp_path: Path) -> None:
    file = opened(directory)
    assert (file.read(), file.appendable) == (None, False)
    with pytest.raises(StorageUnavailableError):
        file.append(b"a\n")
    file.replace(b"a\n")
    file.append(b"b\n")
    file.append(b"c\n")
    assert (tmp_path / NAME).read_bytes() == b"a\nb\nc\n" == file.read()
    file.close()
    file.close()
    again = opened(directory)
    assert (again.read(), again.appendable) == (b"a\nb\nc\n", False)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_after_a_failed_append_the_file_is_replaced(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = opened(directory)
    file.replace(b"a\n")
    with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError) as caught:
        file.append(b"b\n")
    assert "/" not in str(caught.value)
    assert not file.appendable
    with pytest.raises(StorageUnavailableError):
        file.append(b"c\n")
    file.replace(b"a\nc\n")
    file.append(b"d\n")
    assert (tmp_path / NAME).read_bytes() == b"a\nc\nd\n"
    file.close()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failed_replacement_leaves_the_file_unappendable(
    directory: int, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = opened(directory)
    file.replace(b"a\n")
    with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
        file.replace(b"b\n")
    assert not file.appendable
    assert file.read() == b"a\n"


def test_what_can_not_be_read_is_not_taken_for_an_empty_file(directory: int, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"x" * 101)
    with pytest.raises(StorageUnavailableError):
        opened(directory).read()
    (tmp_path / NAME).unlink()
    os.symlink("/etc/hostname", tmp_path / NAME)
    with pytest.raises(StorageUnavailableError):
        opened(directory).read()


@pytest.mark.parametrize("seed", range(3))
def test_after_a_power_loss_every_acknowledged_line_is_there(directory: int, seed: int) -> None:
    file = opened(directory)
    file.replace(b"one\n")
    file.close()
    acknowledged = b"one\n"
    rng = random.Random(seed)

    def check(disk: Disk) -> None:
        for image in disk.images(rng, 20):
            assert image[NAME].startswith(acknowledged)
            assert all(name == NAME or name.startswith(TEMP_PREFIX) for name in image)

    disk = Disk(directory, check)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        file.replace(acknowledged + b"two\n")
        acknowledged += b"two\n"
        for line in (b"three\n", b"four\n"):
            file.append(line)
            acknowledged += line
            check(disk)
        file.close()
    assert disk.events > 6
