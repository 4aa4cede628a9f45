"""A model of a disk that loses power: what may be left of a directory when only synced data is certain.

Owns: a model beside the real directory and the directories in it, which are durable once they are made. The code under
test makes real system calls, but for the syncs. Each call is recorded here, and after each one `on_event` may ask for
the images that a power loss at this point could leave:
- The content of a file is the content of its last sync, or what was written since: all, a part, or zeros of that
  length. If parts of it were overwritten, each sector (512 bytes) is as before or as after.
- Each creation, rename, link and removal since the last sync of the directory has happened or not, independently.
It must not be kinder than a disk: a sync of a file does not make its name durable here, though it does on ext4.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.custody import journal
from minikms.custody.journal_format import SECTOR_BYTES
from minikms.platform import files, sync

At = tuple[int, str]
"""The inode of a directory, and a name in it."""


class Inode:
    """A file. `stuck`: a sync of it failed, so the kernel has marked the pages clean, and no later sync writes them."""

    stuck = False

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.durable = content

    def sync(self) -> None:
        if not self.stuck:
            self.durable = bytes(self.content)

    def fail(self) -> None:
        self.stuck = self.stuck or self.durable != self.content

    def after_crash(self, rng: random.Random) -> bytes:
        written = bytes(self.content)
        if written == self.durable:
            return written
        if len(written) == len(self.durable):
            share, content = rng.choice([0, 0.5, 1]), bytearray(self.durable)
            for begin in range(0, len(content), SECTOR_BYTES):
                if rng.random() < share:
                    content[begin : begin + SECTOR_BYTES] = written[begin : begin + SECTOR_BYTES]
            return bytes(content)
        kept = len(self.durable) if written.startswith(self.durable) else 0
        cut = rng.randint(kept, len(written))
        zeros = written[:cut] + bytes(len(written) - cut)
        return rng.choice([self.durable, written, written[:cut], zeros])


Names = dict[At, Inode]


class Disk:
    """Records what happens below `root` after `begin`. What is there at `begin` is durable."""

    def __init__(self, root: Path, on_event: Callable[[Disk], None]) -> None:
        self.root = root
        self._on_event = on_event
        self._watching = True
        self._files: dict[int, Inode] = {}
        self._names: Names = {}
        self._durable: Names = {}
        self._pending: list[tuple[int, Callable[[Names], None]]] = []
        self.events = 0
        self.fails: Callable[[], bool] = lambda: False
        """Whether the next sync fails."""

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                self._names[path.parent.stat().st_ino, path.name] = Inode(path.read_bytes())
        self._durable = dict(self._names)
        for name in ("open", "dup", "write", "pwrite", "fsync", "fdatasync", "rename", "link", "unlink"):
            patch.setattr(os, name, self._recorded(getattr(os, name), getattr(self, f"_{name}")))
        for module in (files, journal):
            patch.setattr(module, "syncfs", self._recorded(sync.syncfs, self._syncfs))

    def images(self, rng: random.Random, samples: int) -> Iterator[dict[str, bytes]]:
        """The files of images that a power loss now may leave, drawn at random, by their paths below the root."""
        places = self._places()
        for _ in range(samples):
            names, share = dict(self._durable), rng.choice([0, 0.5, 1])
            for _at, change in self._pending:
                if rng.random() < share:
                    change(names)
            yield {os.path.join(places[at], name): inode.after_crash(rng) for (at, name), inode in names.items()}

    def check(self) -> None:
        self._watching = False
        try:
            self._on_event(self)
        finally:
            self._watching = True

    def _places(self) -> dict[int, str]:
        directories = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
        return {path.stat().st_ino: str(path.relative_to(self.root)).removeprefix(".") for path in directories}

    def _recorded(self, real: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        syncs = "sync" in record.__name__  # the real disk need not be synced

        def call(*args: Any, **kwargs: Any) -> Any:
            result = None if syncs else real(*args, **kwargs)
            if self._watching and syncs and self.fails():
                for inode in [self._files[args[0]]] if args[0] in self._files else self._dirty(record):
                    inode.fail()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self._watching:
                record(result, *args, **kwargs)
                self.events += 1
                self.check()
            return result

        return call

    @staticmethod
    def _at(name: str, dir_fd: int | None) -> At:
        directory, base = os.path.split(name)
        status = os.stat(directory) if dir_fd is None else os.fstat(dir_fd)
        return status.st_ino, base

    def _change(self, at: int, change: Callable[[Names], None]) -> None:
        change(self._names)
        self._pending.append((at, change))

    def _put(self, at: At, inode: Inode) -> None:
        def put(names: Names) -> None:
            names[at] = inode

        self._change(at[0], put)

    def _take(self, at: At, inode: Inode | None = None) -> None:
        def take(names: Names) -> None:
            if inode is None or names.get(at) is inode:
                names.pop(at, None)

        self._change(at[0], take)

    def _open(self, fd: int, name: str, flags: int, *_: Any, dir_fd: int | None = None) -> None:
        self._files.pop(fd, None)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return
        at = self._at(name, dir_fd)
        if flags & os.O_CREAT and at not in self._names:
            self._put(at, Inode())
        self._files[fd] = self._names[at]
        if flags & os.O_TRUNC:
            self._files[fd].content.clear()

    def _dup(self, copy: int, fd: int) -> None:
        self._files[copy] = self._files[fd]

    def _write(self, count: int, fd: int, data: bytes) -> None:
        self._files[fd].content += bytes(data)[:count]

    def _pwrite(self, count: int, fd: int, data: bytes, offset: int) -> None:
        content = self._files[fd].content
        assert offset <= len(content), "a hole in the file"
        content[offset : offset + count] = bytes(data)[:count]

    def _fsync(self, _: None, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            self._files[fd].sync()
            return
        at = status.st_ino
        others = {name: inode for name, inode in self._durable.items() if name[0] != at}
        self._durable = others | {name: inode for name, inode in self._names.items() if name[0] == at}
        self._pending = [pending for pending in self._pending if pending[0] != at]

    _fdatasync = _fsync

    def _syncfs(self, *_: object) -> None:
        for inode in self._dirty(self._syncfs):
            inode.sync()
        self._durable = dict(self._names)
        self._pending.clear()

    def _dirty(self, record: Callable[..., None]) -> set[Inode]:
        """What a failed sync of no file may lose: all files if it is one of the file system, none of a directory."""
        return {*self._names.values(), *self._files.values()} if record == self._syncfs else set()

    def _rename(
        self, _: None, old: str, new: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        source, target = self._at(old, src_dir_fd), self._at(new, dst_dir_fd)
        inode = self._names[source]
        if source[0] != target[0]:
            self._put(target, inode)
            self._take(source, inode)
            return

        def rename(names: Names) -> None:
            if names.get(source) is inode:
                del names[source]
            names[target] = inode

        self._change(source[0], rename)

    def _link(self, _: None, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int, **_named: Any) -> None:
        self._put(self._at(new, dst_dir_fd), self._names[self._at(old, src_dir_fd)])

    def _unlink(self, _: None, name: str, *, dir_fd: int | None = None) -> None:
        self._take(self._at(name, dir_fd))
