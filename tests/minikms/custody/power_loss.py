"""A model of a disk that loses power: what may be left of a directory when only synced data is certain.

Owns: a model beside the real directory. The code under test makes real system calls. Each call is recorded here, and
after each one `on_event` may ask for the images that a power loss at this point could leave:
- The content of a file is the content of its last sync, or what was written since: all, a part, or zeros of that
  length.
- Each creation, rename, link and removal since the last sync of the directory has happened or not, independently.
It must not be kinder than a disk: a sync of a file does not make its name durable here, though it does on ext4.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minikms.platform import files, sync


class Inode:
    def __init__(self) -> None:
        self.content = bytearray()
        self.durable = b""

    def after_crash(self, rng: random.Random) -> bytes:
        written = bytes(self.content)
        if written == self.durable:
            return written
        kept = len(self.durable) if written.startswith(self.durable) else 0
        cut = rng.randint(kept, len(written))
        zeros = written[:cut] + bytes(len(written) - cut)
        return rng.choice([self.durable, written, written[:cut], zeros])


Names = dict[str, Inode]


class Disk:
    """Records what happens in one directory after `begin`. What is there at `begin` is durable."""

    def __init__(self, directory: int, on_event: Callable[[Disk], None]) -> None:
        self._directory = directory
        self._on_event = on_event
        self._watching = False
        self._files: dict[int, Inode] = {}
        self._names: Names = {}
        self._durable_names: Names = {}
        self._pending: list[Callable[[Names], None]] = []
        self.events = 0

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        for name in os.listdir(self._directory):
            fd = os.open(name, os.O_RDONLY, dir_fd=self._directory)
            inode = self._names[name] = Inode()
            inode.content += os.read(fd, 1 << 24)
            inode.durable = bytes(inode.content)
            os.close(fd)
        self._durable_names = dict(self._names)
        for name in ("open", "close", "write", "pwrite", "fsync", "fdatasync", "rename", "link", "unlink"):
            patch.setattr(os, name, self._recorded(getattr(os, name), getattr(self, f"_{name}")))
        patch.setattr(files, "syncfs", self._recorded(sync.syncfs, self._syncfs))
        self._watching = True

    def images(self, rng: random.Random, samples: int) -> Iterator[dict[str, bytes]]:
        """Images that a power loss now may leave, some of them drawn at random."""
        for _ in range(samples):
            names = dict(self._durable_names)
            for change in self._pending:
                if rng.random() < rng.choice([0, 0.5, 1]):
                    change(names)
            yield {name: inode.after_crash(rng) for name, inode in names.items()}

    def _recorded(self, real: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._watching:
                return real(*args, **kwargs)
            result = real(*args, **kwargs)
            record(result, *args, **kwargs)
            self.events += 1
            self._watching = False
            try:
                self._on_event(self)
            finally:
                self._watching = True
            return result

        return call

    def _change(self, change: Callable[[Names], None]) -> None:
        change(self._names)
        self._pending.append(change)

    def _open(self, fd: int, name: str, flags: int, *_: Any, dir_fd: int | None = None) -> None:
        assert dir_fd == self._directory
        if flags & os.O_CREAT and name not in self._names:
            inode = Inode()

            def create(names: Names) -> None:
                names[name] = inode

            self._change(create)
        self._files[fd] = self._names[name]

    def _close(self, _: None, fd: int) -> None:
        self._files.pop(fd, None)

    def _write(self, count: int, fd: int, data: bytes) -> None:
        self._files[fd].content += bytes(data)[:count]

    def _pwrite(self, count: int, fd: int, data: bytes, offset: int) -> None:
        content = self._files[fd].content
        assert offset <= len(content), "a hole in the file"
        content[offset : offset + count] = bytes(data)[:count]

    def _fsync(self, _: None, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._durable_names = dict(self._names)
            self._pending.clear()
        else:
            self._files[fd].durable = bytes(self._files[fd].content)

    _fdatasync = _fsync

    def _syncfs(self, _: None, directory: int) -> None:
        for inode in {*self._names.values(), *self._files.values()}:
            inode.durable = bytes(inode.content)
        self._fsync(None, directory)

    def _rename(self, _: None, old: str, new: str, **_fds: int) -> None:
        inode = self._names[old]

        def rename(names: Names) -> None:
            if names.get(old) is inode:
                del names[old]
            names[new] = inode

        self._change(rename)

    def _link(self, _: None, old: str, new: str, **_fds: Any) -> None:
        inode = self._names[old]

        def link(names: Names) -> None:
            names[new] = inode

        self._change(link)

    def _unlink(self, _: None, name: str, **_fds: int) -> None:
        def unlink(names: Names) -> None:
            names.pop(name, None)

        self._change(unlink)
