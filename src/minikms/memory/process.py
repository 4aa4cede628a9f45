"""Hardening: the rights that the process gives up before it reads a key.

Owns: the measures, their order, and the report of which are in force. Invariants: each measure is taken and then
checked; a measure that fails does not hide another; the report claims only what the kernel has confirmed. The measures
are permanent, and some bind only one thread. So they are taken while there is one thread, after the sockets are bound
and the configured files are known, and before any key is read. It must never open a file for the caller, nor take other
measures than requested.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from minikms.api.errors import StartError
from minikms.memory import libc
from minikms.memory.arena import SecretArena
from minikms.memory.landlock import restrict_filesystem
from minikms.memory.seccomp import install_filter

UMASK: Final = 0o077
NETWORK_PATHS: Final = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/run/systemd/resolve",
    "/etc/ssl/certs", "/etc/pki", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates",
)  # fmt: skip
"""What a process reads that connects to other hosts by name, and checks their certificates with the machine's CAs."""
JOINED_SECONDS_MAX: Final = 1.0
JOINED_SECONDS: Final = 0.001
"""Between two looks at the threads."""

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
    """One measure. why: if it is not in force, the reason, as a sentence without a full stop."""

    name: str
    in_force: bool
    why: str = ""

    def status(self) -> dict[str, str | bool]:
        """For `/status`."""
        status: dict[str, str | bool] = {"measure": self.name, "in_force": self.in_force}
        if not self.in_force:
            status["why"] = self.why
        return status


def harden(
    arena: SecretArena | None,
    *,
    read: Sequence[str],
    write: Sequence[str],
    allow_exec: bool = False,
    allow_network: bool = False,
    keep_capabilities: bool = False,
    require: bool = False,
) -> tuple[Measure, ...]:
    """Take every measure that this machine allows, and report which are in force.

    Args:
        arena: made before, because its pages may need a right that is given up here. None: the process holds no key.
        read: files and directories that may still be read later (Landlock), besides those of `write`.
        write: directories in which files may still be made, changed, renamed and removed later (Landlock).
        allow_exec: programs may still be started later; their files must be in `read`.
        allow_network: sockets other than Unix sockets may still be opened later.
        keep_capabilities: keep root's capabilities, such as the one to read another user's key file.
        require: raise if a measure is missing (`--require-hardening`).

    Raises:
        StartError: a measure is missing and `require` is set, or the process has more than one thread.
    """
    _require_one_thread()
    measures: list[Measure] = []
    if arena is not None:
        measures.append(Measure("keys_in_secret_memory", not arena.lacks, "; ".join(arena.lacks)))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("core_dumps_off", _forbid_core_dumps),
        ("umask_077", _set_umask),
        ("memory_locked", _lock_memory),
        ("no_new_privileges", _forbid_new_privileges),
        ("capabilities_dropped", _keep_capabilities if keep_capabilities else drop_capabilities),
        ("not_dumpable", _forbid_dumps_and_tracing),
        ("filesystem_restricted", lambda: restrict_filesystem(read=read, write=write, execute=allow_exec)),
        ("system_calls_filtered", lambda: install_filter(allow_exec=allow_exec, allow_network=allow_network)),
    ]
    measures += [_take(name, step) for name, step in steps]
    missing = [f"{measure.name} ({measure.why})" for measure in measures if not measure.in_force]
    if require and missing:
        raise StartError(f"hardening is required, but these measures are not in force: {'; '.join(missing)}")
    return tuple(measures)


def forbid_dumps() -> None:
    """No core dump, and no other process of this user reads this one's memory. For a short command that is not
    hardened by `harden`. A measure that the system refuses is skipped.
    """
    for step in (_forbid_core_dumps, _forbid_dumps_and_tracing):
        _take("", step)


def name_thread(name: str) -> None:
    """Name the calling thread for `top -H` and the like: at most 15 bytes (PR_SET_NAME of prctl(2))."""
    if libc.LINUX:
        libc.library().prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def library_paths() -> list[str]:
    """Directories of the C library and of its loader, which may load a library of theirs when a thread ends. They have
    no Python module, or none that a process without imports could use.
    """
    try:
        with open("/proc/self/maps", "rb") as file:
            mapped = {os.fsdecode(line.split(None, 5)[-1].rstrip(b"\n")) for line in file if b"/" in line}
    except OSError:  # no procfs
        return ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    names = re.compile(r"(libc|ld)[-.]")
    directories = {os.path.dirname(path) for path in mapped if names.match(os.path.basename(path))}
    return sorted(directories | {"/etc/ld.so.cache"})


def interpreter_paths() -> list[str]:
    """Paths that the interpreter may read after the start: modules and shared libraries that it loads on first use."""
    # `python -m` adds the working directory to the module path. It may be any directory; that of a service is the root.
    try:
        here = os.getcwd()
    except FileNotFoundError:  # the directory was removed, so there is nothing to read
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


def _require_one_thread() -> None:
    """Raise StartError if there are more threads: some measures would bind only this one. A thread that was joined may
    still be about to end (CPython before 3.13).
    """
    ends_s = time.monotonic() + JOINED_SECONDS_MAX
    try:
        while (count := len(os.listdir("/proc/self/task"))) != 1:
            if threading.active_count() > 1 or time.monotonic() > ends_s:
                raise StartError(f"the process must be hardened while it has one thread, and it has {count}")
            time.sleep(JOINED_SECONDS)
    except OSError:  # no procfs
        return


def _forbid_core_dumps() -> None:
    """setrlimit(2). A core pattern that pipes to a program ignores it; `not_dumpable` covers that case."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _set_umask() -> None:
    os.umask(UMASK)


def _lock_memory() -> None:
    """mlockall(2), only without a limit: with a limit, an allocation would fail later, during a request."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if soft != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError):  # Python raises ValueError if the process may not raise the hard limit
            raise OSError(
                errno.EPERM, f"RLIMIT_MEMLOCK is {soft} bytes and must be infinite (LimitMEMLOCK=infinity in the unit)"
            ) from None
    if libc.library().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        if ctypes.get_errno() == errno.EPERM:
            raise OSError(errno.EPERM, libc.LOCKING_FILTERED)
        libc.raise_errno("mlockall")


def _forbid_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: no program that is started gains rights. Landlock and seccomp require it without rights."""
    libc.prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)
    if libc.prctl("prctl(PR_GET_NO_NEW_PRIVS)", _PR_GET_NO_NEW_PRIVS) != 1:
        raise OSError(errno.EPERM, "the kernel did not keep no_new_privs")


def _forbid_dumps_and_tracing() -> None:
    """PR_SET_DUMPABLE(2const): no core dump; no other process of this user can attach or read memory or environment."""
    libc.prctl("prctl(PR_SET_DUMPABLE)", _PR_SET_DUMPABLE, 0)
    if libc.prctl("prctl(PR_GET_DUMPABLE)", _PR_GET_DUMPABLE) != 0:
        raise OSError(errno.EPERM, "the kernel did not make the process undumpable")


def _keep_capabilities() -> None:
    raise OSError(errno.ECANCELED, "kept as configured")


def drop_capabilities() -> None:
    """capabilities(7): empty the ambient, bounding, effective, permitted and inheritable sets."""
    libc.prctl("prctl(PR_CAP_AMBIENT)", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    capability = 0
    while _bounded(capability):
        try:
            libc.prctl("prctl(PR_CAPBSET_DROP)", _PR_CAPBSET_DROP, capability)
        except PermissionError:  # without CAP_SETPCAP; with no_new_privs the bounding set has no effect
            break
        capability += 1
    if not _has_capabilities():  # an ordinary user; the unit's filter then denies capset(2)
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
    """Whether the kernel knows this capability. After the last one it returns EINVAL."""
    try:
        libc.prctl("prctl(PR_CAPBSET_READ)", _PR_CAPBSET_READ, capability)
    except OSError:
        return False
    return True
