"""After a power loss at any system call every promise holds, and every file is whole."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.platform import files
from minikms.platform.files import TEMP_PREFIX, FileWrite, remove_file, replace_file, write_files
from tests.minikms.custody.power_loss import Disk

SAMPLES = 25

Allowed = dict[str, set[bytes | None]]
"""For each name the contents that it may have; None stands for absence."""


def check_at_every_call(directory: int, allowed: Allowed, change: Callable[[], object], *, seed: int) -> int:
    """Makes a change on the model disk. After `change` has returned, the old contents are not allowed."""
    rng = random.Random(seed)

    def check(disk: Disk) -> None:
        for image in disk.images(rng, SAMPLES):
            for name, contents in allowed.items():
                assert image.get(name) in contents, f"{name} after system call {disk.events}"
            assert all(name in allowed or name.startswith(TEMP_PREFIX) for name in image)

    disk = Disk(Path(os.readlink(f"/proc/self/fd/{directory}")), check)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        change()
    for contents in allowed.values():
        contents.difference_update({b"old", None})
    check(disk)
    assert disk.events > 2
    return disk.events


@pytest.mark.parametrize("seed", range(3))
def test_a_replaced_file_is_old_or_new_and_new_on_return(directory: int, seed: int) -> None:
    replace_file(directory, "f", b"old")
    check_at_every_call(directory, {"f": {b"old", b"new"}}, lambda: replace_file(directory, "f", b"new"), seed=seed)


def test_the_model_disk_notices_a_missing_sync(directory: int, tmp_path: Path) -> None:
    """Tests the model itself: without its syncs a replacement would lose the file."""
    replace_file(directory, "f", b"old")

    class Mute(Disk):
        def _fsync(self, *_: object) -> None:
            pass

    seen: set[bytes | None] = set()
    disk = Mute(tmp_path, lambda disk: seen.update(image.get("f") for image in disk.images(random.Random(1), 100)))
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        replace_file(directory, "f", b"new")
    assert seen > {b"old", b"new"}


@pytest.mark.parametrize("way", ["syncfs", "fsync"])
@pytest.mark.parametrize("seed", range(3))
def test_files_of_a_group_are_old_or_new_and_new_on_return(
    directory: int, monkeypatch: pytest.MonkeyPatch, way: str, seed: int
) -> None:
    monkeypatch.setattr(files, "syncfs_reports", lambda _directory: way == "syncfs")
    for number in range(3):
        replace_file(directory, f"f{number}", b"old")
    writes = [FileWrite(f"f{number}", b"new") for number in range(6)]
    allowed: Allowed = {write.name: {b"old" if at < 3 else None, b"new"} for at, write in enumerate(writes)}
    check_at_every_call(directory, allowed, lambda: write_files(directory, writes), seed=seed)


def test_a_removed_file_stays_removed_after_the_return(directory: int, tmp_path: Path) -> None:
    replace_file(directory, "f", b"content")
    disk = Disk(tmp_path, lambda disk: None)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        remove_file(directory, "f")
    assert all("f" not in image for image in disk.images(random.Random(1), SAMPLES))
