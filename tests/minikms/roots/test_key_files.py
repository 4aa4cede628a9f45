"""Key files: which are read, how one is replaced, and what is never left beside it."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.key_file import (
    FileOwner,
    holds_key,
    key_text,
    make_key_file,
    read_key_file,
    remove_leftover,
    replace_key,
    rewrite_key_file,
)

KEY = bytes(range(32))
NEW = bytes(range(200, 232))


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with SecretArena(64, force_fallback=True) as made:
        yield made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(KEY.hex() + "\n")
    return path


def slot_of(arena: SecretArena, key: bytes) -> SecretSlot:
    slot = arena.allocate()
    slot.view[:] = key
    return slot


def rewrite(path: Path, key: SecretSlot, arena: SecretArena) -> None:
    with key_text(key, arena) as text:
        rewrite_key_file(path, text)


@pytest.mark.parametrize("text", [KEY.hex(), KEY.hex() + "\n", KEY.hex().upper() + "\n"])
def test_a_key_is_64_hexadecimal_digits_with_or_without_a_newline(
    key_file: Path, arena: SecretArena, text: str
) -> None:
    key_file.write_text(text)
    with read_key_file(key_file, arena) as slot:
        assert bytes(slot.view) == KEY


@pytest.mark.parametrize(
    "text", ["", "\n", KEY.hex()[:-1], KEY.hex() + "0", KEY.hex() + "\n\n", KEY.hex() + " ", "x" * 64, KEY.hex() * 2]
)
def test_any_other_text_is_refused_without_being_repeated(key_file: Path, arena: SecretArena, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(StartError, match="exactly 64 hexadecimal characters") as refused:
        read_key_file(key_file, arena)
    assert len(text) < 10 or text[:10] not in str(refused.value)
    assert arena.in_use == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_can_read_is_refused_with_the_fix(key_file: Path, arena: SecretArena, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(StartError, match="chmod 600"):
        read_key_file(key_file, arena)


def test_a_group_that_the_caller_names_may_read_the_file(key_file: Path, arena: SecretArena) -> None:
    """As of a Kubernetes secret with fsGroup, or of a systemd credential."""
    key_file.chmod(0o440)
    own = FileOwner(key_file.stat().st_uid, key_file.stat().st_gid)
    with read_key_file(key_file, arena, shared=own) as slot:
        assert bytes(slot.view) == KEY


def test_a_file_that_its_group_reads_is_refused_with_both_ways_out(key_file: Path, arena: SecretArena) -> None:
    key_file.chmod(0o440)
    status = key_file.stat()
    with pytest.raises(StartError, match=rf"chmod 600 .*--master-key-owner {status.st_uid}:{status.st_gid}$"):
        read_key_file(key_file, arena)


@pytest.mark.parametrize("mode", [0o444, 0o460, 0o441, 0o450])
def test_the_named_group_may_read_the_file_and_nothing_else(key_file: Path, arena: SecretArena, mode: int) -> None:
    key_file.chmod(mode)
    own = FileOwner(key_file.stat().st_uid, key_file.stat().st_gid)
    with pytest.raises(StartError, match="chmod 600"):
        read_key_file(key_file, arena, shared=own)


@pytest.mark.parametrize("more", [(1, 0), (0, 1)])
def test_a_file_of_another_owner_or_group_is_not_shared(
    key_file: Path, arena: SecretArena, more: tuple[int, int]
) -> None:
    key_file.chmod(0o440)
    other = FileOwner(key_file.stat().st_uid + more[0], key_file.stat().st_gid + more[1])
    with pytest.raises(StartError, match="chmod 600"):
        read_key_file(key_file, arena, shared=other)


def test_only_a_regular_file_is_read_and_a_pipe_does_not_block(tmp_path: Path, arena: SecretArena) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(0o700)
    for name in ("pipe", "directory"):
        with pytest.raises(StartError, match="not a regular file"):
            read_key_file(tmp_path / name, arena)
    with pytest.raises(StartError, match="can't be read"):
        read_key_file(tmp_path / "missing", arena)


def test_a_rewritten_file_has_the_new_key_and_the_old_mode(key_file: Path, arena: SecretArena) -> None:
    key_file.chmod(0o400)
    with slot_of(arena, NEW) as new, slot_of(arena, KEY) as old:
        rewrite(key_file, new, arena)
        assert holds_key(key_file, new, arena)
        assert not holds_key(key_file, old, arena)
    assert key_file.read_text() == NEW.hex() + "\n"
    assert key_file.stat().st_mode & 0o777 == 0o400
    assert os.listdir(key_file.parent) == ["key"]
    assert arena.in_use == 0


def test_behind_a_link_the_file_is_replaced_and_the_link_stays(key_file: Path, arena: SecretArena) -> None:
    """Otherwise the old key would stay where the link pointed, and the link would be a file."""
    link = key_file.with_name("link")
    (key_file.parent / "deep").mkdir()
    target = key_file.rename(key_file.parent / "deep" / "key")
    link.symlink_to(target)
    with slot_of(arena, NEW) as new:
        rewrite(link, new, arena)
        assert holds_key(link, new, arena)
    assert link.is_symlink()
    assert target.read_text() == NEW.hex() + "\n"


@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_a_failed_rewrite_leaves_the_old_file_and_no_other(
    key_file: Path, arena: SecretArena, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with slot_of(arena, NEW) as new, monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, call, refuse)
        rewrite(key_file, new, arena)
    assert key_file.read_text() == KEY.hex() + "\n"
    assert os.listdir(key_file.parent) == ["key"]
    assert arena.in_use == 0


def test_a_leftover_of_a_crash_is_removed_by_the_next_start_or_write(key_file: Path, arena: SecretArena) -> None:
    leftover = key_file.with_name(".key.new")
    leftover.write_text(NEW.hex())
    remove_leftover(key_file)
    assert os.listdir(key_file.parent) == ["key"]
    remove_leftover(key_file)
    leftover.write_text("half")
    leftover.chmod(0o666)
    with slot_of(arena, NEW) as new:
        rewrite(key_file, new, arena)
    assert os.listdir(key_file.parent) == ["key"]
    assert key_file.stat().st_mode & 0o777 == 0o600


def test_a_development_key_is_made_once_and_is_private(tmp_path: Path, arena: SecretArena) -> None:
    path = tmp_path / "dev"
    make_key_file(path, arena)
    text = path.read_text()
    assert (len(text), path.stat().st_mode & 0o777) == (65, 0o600)
    make_key_file(path, arena)
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["dev"]
    assert arena.in_use == 0


def test_partial_writes_never_make_a_shorter_key_file(
    key_file: Path, arena: SecretArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writev = os.write, os.writev
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [buffers[0][:5]]))
    with slot_of(arena, NEW) as new:
        rewrite(key_file, new, arena)
        assert holds_key(key_file, new, arena)


def test_a_failed_read_leaves_nothing_in_the_arena(
    key_file: Path, arena: SecretArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StartError, match="can't be read: Input/output error") as refused:
        read_key_file(key_file, arena)
    assert refused.value.__cause__ is None
    assert arena.in_use == 0


async def test_a_cancelled_rewrite_zeroes_the_text_after_the_write_only(key_file: Path, arena: SecretArena) -> None:
    disk = ThreadPoolExecutor(1)
    blocked = threading.Event()
    disk.submit(blocked.wait)
    try:
        with slot_of(arena, NEW) as new:
            task = asyncio.ensure_future(replace_key(key_file, new, arena, disk))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
            blocked.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert holds_key(key_file, new, arena)
    finally:
        blocked.set()
        disk.shutdown()
