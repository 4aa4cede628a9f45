"""The secret arena: the only memory that holds raw keys.

Owns: the arena's pages, the slots in them, and every way in which a key gets into a slot. Invariants:
- A slot is 32 bytes of one mapping that no child inherits, no core dump contains and no swap device receives. With
  `memfd_secret(2)` the kernel also removes the pages from its own map, so that even root can't read them through
  `/proc/<pid>/mem`, and clears them when the process ends in any way. No descriptor of them stays open.
- A slot is all zeros when it is allocated, and is zeroed when it is released. A view of a released slot raises.
- `zero_all` zeroes every slot at once. From then on the view of an earlier slot raises, so no code can encrypt, sign or
  write with a key of zeros. A slice of it that was taken before does not raise: it shows zeros, or the key that the
  slot holds next, so nobody keeps one across turns of the event loop. Only a slot that is `lent` to a worker thread
  keeps its content, until its owner releases it.
- Keys are written in place: by `readv(2)` into the view, or by a decryption into the view. Key text is decoded from one
  view to another through small integers, of which CPython has one shared object each.

It must never make a `bytes`, `str` or `int` of key material, and never print a slot's content.
An arena belongs to the event loop's thread and to the process that made it; neither it nor its slots have a lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import resource
import stat
import sys
from typing import Final, Literal, Self

from minikms.api.errors import ArenaFullError, KeyTextError, StartError
from minikms.memory import libc

SLOT_BYTES: Final = 32
SLOTS_DEFAULT: Final = 1024
RANDOM_DEVICE: Final = "/dev/urandom"

# Linux numbers that not every Python has names for: asm-generic/unistd.h, asm-generic/mman-common.h.
SYS_MEMFD_SECRET: Final = 447
_MADV_DONTFORK: Final = 10
_MADV_DONTDUMP: Final = 16
_MADV_WIPEONFORK: Final = 18
_MAP_FIXED: Final = 0x10

_ZEROES: Final = bytes(64 * 1024)
_HEX_DIGITS: Final = b"0123456789abcdef"
_HEX_INVALID: Final = 0xFF
_HEX_VALUES: Final = bytes(
    int(chr(code), 16) if chr(code) in "0123456789abcdefABCDEF" else _HEX_INVALID for code in range(256)
)

Backing = Literal["memfd_secret", "anonymous"]


class SecretArena:
    """A fixed number of 32-byte slots in locked pages.

    The pages come from `memfd_secret` if the kernel has it. Otherwise they are anonymous memory with `mlock(2)`,
    `MADV_DONTDUMP` and `MADV_WIPEONFORK`, and `lacks` names the protections that are missing.

    Args:
        slots: how many keys it can hold at once. The memory is allocated and locked here, never later.
        force_fallback: use anonymous memory even if `memfd_secret` is available (for tests).

    Raises:
        StartError: the pages are not available, usually because of RLIMIT_MEMLOCK (systemd: `LimitMEMLOCK=`).
    """

    def __init__(self, slots: int = SLOTS_DEFAULT, *, force_fallback: bool = False) -> None:
        if slots < 1:
            raise ValueError("an arena has at least one slot")
        self._pid = os.getpid()
        self._locked_bytes = -(-slots * SLOT_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self._locked_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.backing: Backing = "anonymous"
        self.lacks: tuple[str, ...] = ()
        """The protections that are missing, one sentence each; empty if none is missing."""
        try:
            if force_fallback or not self._back_with_secret_memory():
                self._lock_anonymous_memory()
            self._map[:] = bytes(self._locked_bytes)  # allocates every page now, so that no page fault fails later
            _random_device()  # opened before the file system is restricted
        except BaseException:
            self._map.close()
            raise
        self._root = memoryview(self._map)
        self._slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self._live: dict[int, memoryview] = {}
        self._lent: set[int] = set()
        self._closed = False
        self.used = False
        """Whether the view of a slot was asked for since the last `take_used`."""

    def take_used(self) -> bool:
        """`used`, which is False from here on."""
        used, self.used = self.used, False
        return used

    @property
    def slots(self) -> int:
        return len(self._free) + len(self._live)

    @property
    def in_use(self) -> int:
        return len(self._live)

    @property
    def locked_bytes(self) -> int:
        return self._locked_bytes

    def allocate(self) -> SecretSlot:
        """A zeroed slot.

        Raises:
            ArenaFullError: all slots are in use, or the arena is closed.
        """
        if not self._free:
            raise ArenaFullError("all slots of the key arena are in use")
        index = self._free.pop()
        view = self._root[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]
        self._live[index] = view
        return SecretSlot(self, index, view)

    def allocate_whole(self) -> memoryview:
        """All of an arena that nothing uses yet, as one view, for a secret that is longer than a slot. `close` zeroes
        it.

        Raises:
            ArenaFullError: a slot is in use, or the arena is closed.
        """
        if self._live or not self._free:
            raise ArenaFullError("a part of the key arena is in use")
        view = self._root[: len(self._free) * SLOT_BYTES]
        self._free.clear()
        self._live[0] = view
        return view

    def zero_all(self) -> None:
        """Zero every slot, and make the views of all slots raise. The arena stays open, and all slots are free again.

        A slot that is `lent` keeps its content: it is zeroed when its owner releases it.
        """
        if self._closed or os.getpid() != self._pid:
            return
        lent = {index: self._live[index] for index in self._lent if index in self._live}
        if lent:
            for index, view in self._live.items():
                if index not in lent:
                    zero(view)
        else:
            zero(self._root)
        slots = set(lent)
        for index, view in self._live.items():
            if index not in lent:
                try:
                    view.release()
                except BufferError:  # a running call holds it: its slot is never allocated again
                    slots.add(index)
        self._live = lent
        self._free = [index for index in range(self._slots - 1, -1, -1) if index not in slots]

    def close(self) -> None:
        """Zero every slot, and make every view of a slot raise. Idempotent. It does nothing in a forked child.

        It also unmaps the pages, unless a part of a slot's view is still in use; then they stay mapped and zeroed.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        zero(self._root)
        for view in self._live.values():
            with contextlib.suppress(BufferError):
                view.release()
        self._live.clear()
        self._free.clear()
        self._root.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SecretArena {self.backing}, {self.in_use} of {self.slots} slots in use>"

    def _free_slot(self, index: int, view: memoryview) -> None:
        """Zero the slot and free it. A slot whose view a running call holds is zeroed, but never allocated again."""
        if self._closed or os.getpid() != self._pid or self._live.get(index) is not view:
            return  # not its slot since `zero_all`
        del self._live[index]
        self._lent.discard(index)
        zero(view)
        view.release()
        self._free.append(index)

    def _address(self) -> int:
        """The start address of the mapping, constant until `close`."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def _back_with_secret_memory(self) -> bool:
        """Replace the anonymous pages with those of `memfd_secret(2)`. False if the kernel does not have it.

        The Python object still owns the address range, so views keep it mapped, and the descriptor can be closed.
        """
        if not libc.LINUX:
            return False
        try:
            descriptor = libc.syscall("memfd_secret", SYS_MEMFD_SECRET, os.O_CLOEXEC)
        except OSError as error:
            # ENOSYS: before Linux 5.14, or started with secretmem.enable=0; EPERM: a container's filter.
            if error.errno in (errno.ENOSYS, errno.EPERM):
                return False
            raise StartError(f"the key arena: {error.strerror}") from None
        try:
            os.ftruncate(descriptor, self._locked_bytes)
            mapped = libc.library().mmap(
                self._address(),
                self._locked_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | _MAP_FIXED,
                descriptor,
                0,
            )
            if mapped == ctypes.c_void_p(-1).value:
                raise self._no_locked_memory(ctypes.get_errno())
            self._map.madvise(_MADV_DONTFORK)
        except OSError as error:
            raise StartError(f"the key arena: {error.strerror}") from None
        finally:
            os.close(descriptor)
        self.backing = "memfd_secret"
        return True

    def _lock_anonymous_memory(self) -> None:
        if libc.library().mlock(self._address(), self._locked_bytes) != 0:
            raise self._no_locked_memory(ctypes.get_errno())
        lacks = ["memfd_secret is not available: root can read the key arena through /proc/<pid>/mem"]
        for name, advice, loss in (
            ("MADV_DONTDUMP", _MADV_DONTDUMP, "a core dump would hold the key arena"),
            ("MADV_WIPEONFORK", _MADV_WIPEONFORK, "a forked child would inherit the key arena"),
        ):
            try:
                if not libc.LINUX:
                    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # noqa: TRY301 the refusal of a kernel without it
                self._map.madvise(advice)
            except OSError as error:
                lacks.append(f"{name} is refused ({error.strerror}): {loss}")
        self.lacks = tuple(lacks)

    def _no_locked_memory(self, number: int) -> StartError:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "without limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        needs = f"the key arena needs {self._locked_bytes} bytes of locked memory ({os.strerror(number)})"
        if number == errno.EPERM and limit != 0:
            return StartError(f"{needs}; {libc.LOCKING_FILTERED}")
        return StartError(
            f"{needs}; RLIMIT_MEMLOCK allows {allowed} in all: raise LimitMEMLOCK= in the unit (or `ulimit -l`), or "
            "keep fewer keys in memory"
        )


class SecretSlot:
    """32 writable bytes of an arena, until `release`. The destructor zeroes and frees a slot that was not released."""

    __slots__ = ("_arena", "_index", "_released", "_view")

    def __init__(self, arena: SecretArena, index: int, view: memoryview) -> None:
        self._arena = arena
        self._index = index
        self._released = False
        self._view = view

    @property
    def view(self) -> memoryview:
        """The bytes. After `release` each use of it raises ValueError. Release its slices before."""
        self._arena.used = True
        return self._view

    def release(self) -> None:
        """Zero the slot and free it. Idempotent.

        Raises:
            BufferError: a running call still holds the view; the slot is zeroed and never allocated again.
        """
        if not self._released:
            self._released = True
            self._arena._free_slot(self._index, self._view)

    def lend(self) -> None:
        """A worker thread writes the content out: `SecretArena.zero_all` leaves it, or zeros would be written.

        The owner releases the slot as soon as the worker is done.
        """
        if not self._released:
            self._arena._lent.add(self._index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with contextlib.suppress(BufferError):
            self.release()

    def __repr__(self) -> str:
        return f"<SecretSlot {self._index}, {'released' if self._released else 'in use'}>"

    def __reduce__(self) -> str:
        raise TypeError("a secret slot can't be pickled or copied")


def zero(view: memoryview) -> None:
    """Overwrite a writable, contiguous byte view with zeros, without a temporary of its size."""
    size = len(view)
    if size <= len(_ZEROES):
        view[:] = memoryview(_ZEROES)[:size]
        return
    for start in range(0, size, len(_ZEROES)):
        zero(view[start : start + len(_ZEROES)])


def zero_bytes(data: bytes) -> None:
    """Overwrite a bytes object in place, because a library returned a key in it.

    Only for a fresh object that nobody else refers to. The interpreter shares objects of one byte or none.

    Raises:
        ValueError: the object is so short that it may be shared.
    """
    if len(data) <= 1:
        raise ValueError("a bytes object of at most one byte is shared")
    ctypes.memset(id(data) + bytes.__basicsize__ - 1, 0, len(data))  # the last byte of the header is the text's NUL


@functools.cache
def _random_device() -> int:
    """The open random device. It stays open, so that a process without free descriptors can still make keys.

    Raises:
        StartError: it is missing or not a device. A plain file would give each installation the same keys.
    """
    try:
        descriptor = os.open(RANDOM_DEVICE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise StartError(f"{RANDOM_DEVICE}: {error.strerror}") from None
    if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StartError(f"{RANDOM_DEVICE} is not a device")
    if sys.platform == "linux":
        os.getrandom(1)  # waits until the kernel's generator is seeded, for which the device does not wait: random(4)
    return descriptor


def fill_random(view: memoryview) -> None:
    """Fill a writable byte view with random bytes of the kernel, in place (`readv(2)` on the random device).

    Raises:
        OSError: the device failed. A part of the view may be written; it must not be used.
    """
    filled = 0
    while filled < len(view):
        count = os.readv(_random_device(), [view[filled:]])
        if count == 0:
            raise OSError(errno.EIO, f"{RANDOM_DEVICE} returned no bytes")
        filled += count


def hex_decode_into(source: memoryview, target: memoryview) -> None:
    """Decode hexadecimal ASCII of either case into `target`, which may be the first half of `source`.

    It makes no object that contains more than one byte of the key. The caller zeroes `source`.

    Raises:
        KeyTextError: not exactly two hexadecimal digits for each byte of `target`, which is zeroed.
    """
    if len(source) != 2 * len(target):
        raise KeyTextError(f"a key is {2 * SLOT_BYTES} hexadecimal characters")
    for index in range(len(target)):
        high = _HEX_VALUES[source[2 * index]]
        low = _HEX_VALUES[source[2 * index + 1]]
        if high | low == _HEX_INVALID:
            zero(target)
            raise KeyTextError(f"a key is {2 * SLOT_BYTES} hexadecimal characters")
        target[index] = high * 16 | low  # a shift of zero takes less time


def hex_encode_into(source: memoryview, target: memoryview) -> None:
    """Encode `source` as lower-case hexadecimal ASCII. It makes no object that contains more than one digit."""
    if len(target) != 2 * len(source):
        raise ValueError("a byte has two hexadecimal digits")
    for index, value in enumerate(source):
        target[2 * index] = _HEX_DIGITS[value >> 4]
        target[2 * index + 1] = _HEX_DIGITS[value & 15]


def read_key_fd_into(descriptor: int, slot: SecretSlot) -> None:
    """Read a key of 64 hexadecimal characters and an optional newline from a file, pipe or memfd, up to its end.

    The text passes only through other slots of the same arena. A file is read from its start whatever its offset is,
    because processes that inherit one descriptor share its offset.

    Raises:
        KeyTextError: it contains anything else; the slot is zeroed.
        ArenaFullError: fewer than three slots are free.
        OSError: the descriptor can't be read.
    """
    arena = slot._arena
    target = slot.view
    with arena.allocate() as first, arena.allocate() as second, arena.allocate() as rest:
        count = _read_all(descriptor, [first.view, second.view, rest.view[:2]])
        text_bytes = 2 * SLOT_BYTES
        if count == text_bytes or (count == text_bytes + 1 and rest.view[0] == ord("\n")):
            try:
                hex_decode_into(first.view, target[: SLOT_BYTES // 2])
                hex_decode_into(second.view, target[SLOT_BYTES // 2 :])
            except KeyTextError:
                zero(target)
                raise
            return
    zero(target)
    raise KeyTextError(f"a key is {2 * SLOT_BYTES} hexadecimal characters and an optional newline, and nothing else")


def _read_all(descriptor: int, views: list[memoryview]) -> int:
    """Fill the views in order until they are full or the file ends. Returns the number of bytes."""
    seekable = stat.S_ISREG(os.fstat(descriptor).st_mode)
    total = 0
    pending = list(views)
    while pending:
        count = os.preadv(descriptor, pending, total) if seekable else os.readv(descriptor, pending)
        if count == 0:
            break
        total += count
        while pending and count >= len(pending[0]):
            count -= len(pending[0])
            pending.pop(0)
        if count:
            pending[0] = pending[0][count:]
    return total
