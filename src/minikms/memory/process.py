"""What the process gives up before it reads a key, so that a fault or a neighbour gets little.

Owns: the measures, their order, and the report of which are in force. Invariants: each measure is tried and then
checked; one that fails never hides another; the report never claims what the kernel did not confirm. All of them are
for good, and some bind one thread only, so they are taken while there is one thread, after the sockets are bound and
the configured files are known, and before any key is read. It must never open a file for the caller or change what is
asked of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from minikms.errors import StartError
from minikms.memory import libc
from minikms.memory.arena import SecretArena
from minikms.memory.landlock import restrict_filesystem
from minikms.memory.seccomp import install_filter

UMASK: Final = 0o077

# sys/mman.h: mlockall(2). ONFAULT: a page is locked when it is first used, so untouched thread stacks cost nothing.
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4

# linux/prctl.h
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# linux/capability.h: capset(2)
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAPABILITY_HEADER: Final = struct.Struct("=Ii")  # version, pid (0: this thread)
_CAPABILITY_DATA: Final = struct.Struct("=6I")  # effective, permitted, inheritable; low words, then high words


class Measure(NamedTuple):
    """One measure: its stable name, whether it is in force, and if not, why, in a sentence without an end."""

    name: str
    in_force: bool
    why: str = ""

    def status(self) -> dict[str, str | bool]:
        """For `/status`."""
        told: dict[str, str | bool] = {"measure": self.name, "in_force": self.in_force}
        if not self.in_force:
            told["why"] = self.why
        return told


def harden(
    arena: SecretArena,
    *,
    read: Sequence[str],
    write: Sequence[str],
    allow_exec: bool = False,
    allow_network: bool = False,
    keep_capabilities: bool = False,
    require: bool = False,
) -> tuple[Measure, ...]:
    """Take every measure that this machine allows, and tell which those are.

    Args:
        arena: made already, for its pages may need a right that is given up here.
        read: files and directories that are still read later (Landlock), beside those of `write`.
        write: directories in which files are still made, changed, renamed and removed later (Landlock).
        allow_exec: programs are still started later (a root provider's helper); their files must be among `read`.
        allow_network: sockets other than Unix ones are still opened later.
        keep_capabilities: keep root's capabilities, such as the one to read a key file of another user.
        require: refuse to go on when a measure is missing (`--require-hardening`).

    Raises:
        StartError: a measure is missing and `require` is set; or the process has more than one thread.
    """
    _require_one_thread()
    measures = [_measure_arena(arena)]
    steps: list[tuple[str, Callable[[], None]]] = [
        ("core_dumps_off", _forbid_core_dumps),
        ("umask_077", _set_umask),
        ("memory_locked", _lock_memory),
        ("no_new_privileges", _forbid_new_privileges),
        ("capabilities_dropped", _keep_capabilities if keep_capabilities else _drop_capabilities),
        ("not_dumpable", _forbid_dumps_and_tracing),
        ("filesystem_restricted", lambda: restrict_filesystem(read=read, write=write, execute=allow_exec)),
        ("system_calls_filtered", lambda: install_filter(allow_exec=allow_exec, allow_network=allow_network)),
    ]
    measures += [_take(name, step) for name, step in steps]
    missing = [f"{measure.name} ({measure.why})" for measure in measures if not measure.in_force]
    if require and missing:
        raise StartError(f"hardening is required, but these measures are not in force: {'; '.join(missing)}")
    return tuple(measures)


def name_thread(name: str) -> None:
    """Name the calling thread for `top -H` and the like: at most 15 bytes (PR_SET_NAME of prctl(2))."""
    if libc.LINUX:
        libc.library().prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def interpreter_paths() -> list[str]:
    """What the interpreter itself may still read after the start: modules and shared libraries, loaded on first use."""
    # `python -m` puts the working directory on the module path, and that may be anywhere: a service's is the root.
    try:
        here = os.getcwd()
    except FileNotFoundError:  # removed under us: then nothing is there to be read
        here = "/"
    searched = {os.path.normpath(path) for path in sys.path if os.path.isabs(path)} - {here, "/"}
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths: Iterable[str] = (
        *searched, own, sys.prefix, sys.base_prefix, sys.exec_prefix,
        "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache",
    )  # fmt: skip
    return sorted(set(paths))


def _take(name: str, step: Callable[[], None]) -> Measure:
    try:
        step()
    except OSError as error:
        return Measure(name, False, error.strerror or type(error).__name__)
    except AttributeError:  # the C library has no such function
        return Measure(name, False, f"{sys.platform} has no such call")
    return Measure(name, True)


def _measure_arena(arena: SecretArena) -> Measure:
    return Measure("keys_in_secret_memory", not arena.lacks, "; ".join(arena.lacks))


def _require_one_thread() -> None:
    """Measures that bind one thread would leave the others free."""
    try:
        count = len(os.listdir("/proc/self/task"))
    except OSError:  # no procfs
        return
    if count != 1:
        raise StartError(f"the process must be hardened while it has one thread, and it has {count}")


def _forbid_core_dumps() -> None:
    """setrlimit(2). Also holds where a core pattern pipes to a program, which `not_dumpable` is for."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _set_umask() -> None:
    os.umask(UMASK)


def _lock_memory() -> None:
    """mlockall(2), only without a limit: with one, an allocation would fail later, in the middle of a request."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # ValueError: Python's word for raising a hard limit without the right to
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise OSError(
            errno.EPERM, f"RLIMIT_MEMLOCK is {soft} bytes and must be infinite (LimitMEMLOCK=infinity in the unit)"
        ) from None
    if libc.library().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        libc.raise_errno("mlockall")


def _forbid_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: nothing that is started gains rights. Without rights, Landlock and seccomp demand it."""
    libc.prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)
    if libc.prctl("prctl(PR_GET_NO_NEW_PRIVS)", _PR_GET_NO_NEW_PRIVS) != 1:
        raise OSError(errno.EPERM, "the kernel did not keep no_new_privs")


def _forbid_dumps_and_tracing() -> None:
    """PR_SET_DUMPABLE(2const): no core, and no other process of this user attaches, or reads memory and environment."""
    libc.prctl("prctl(PR_SET_DUMPABLE)", _PR_SET_DUMPABLE, 0)
    if libc.prctl("prctl(PR_GET_DUMPABLE)", _PR_GET_DUMPABLE) != 0:
        raise OSError(errno.EPERM, "the kernel did not keep the process from being dumpable")


def _keep_capabilities() -> None:
    raise OSError(errno.ECANCELED, "kept as configured")


def _drop_capabilities() -> None:
    """capabilities(7): empty the ambient, bounding, effective, permitted and inheritable sets."""
    libc.prctl("prctl(PR_CAP_AMBIENT)", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    capability = 0
    while _bounded(capability):
        try:
            libc.prctl("prctl(PR_CAPBSET_DROP)", _PR_CAPBSET_DROP, capability)
        except PermissionError:  # without CAP_SETPCAP; no_new_privs keeps the bounding set from mattering
            break
        capability += 1
    if not _has_capabilities():  # an ordinary user; the unit's filter then denies capset(2) altogether
        return
    if libc.library().capset(_capability_header(), ctypes.create_string_buffer(_CAPABILITY_DATA.size)) != 0:
        libc.raise_errno("capset")
    if _has_capabilities():
        raise OSError(errno.EPERM, "the kernel left some capabilities")


def _has_capabilities() -> bool:
    data = ctypes.create_string_buffer(_CAPABILITY_DATA.size)
    if libc.library().capget(_capability_header(), data) != 0:
        libc.raise_errno("capget")
    return any(_CAPABILITY_DATA.unpack(data.raw))


def _capability_header() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(_CAPABILITY_HEADER.pack(_CAPABILITY_VERSION_3, 0), _CAPABILITY_HEADER.size)


def _bounded(capability: int) -> bool:
    """Whether the kernel knows this capability at all (it answers EINVAL after the last)."""
    try:
        libc.prctl("prctl(PR_CAPBSET_READ)", _PR_CAPBSET_READ, capability)
    except OSError:
        return False
    return True
