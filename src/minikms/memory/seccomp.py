"""The seccomp filter (seccomp(2)): the system calls that the process gives up.

Owns: the list of calls, the reason for each, and the filter's program. The list denies, because nobody knows every call
that an interpreter and its C libraries make, and a call that fails unexpectedly in an error path is a fault of its own.
The unit file adds systemd's list of allowed calls. Invariants: a denied call fails with EPERM; a call through the table
of another architecture ends the process, because its numbers mean other calls; the filter is permanent and applies to
every later thread, so it is installed while there is one thread. It must never depend on memory behind a pointer, which
another thread could change after the check. So `clone3`, whose flags are behind a pointer, fails as on a kernel that
does not have it, and C libraries use `clone` instead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from minikms.memory import libc

# Each call with its number on x86_64 (asm/unistd_64.h) and aarch64 (asm-generic/unistd.h); None: there is none.
_READS_OTHER_PROCESSES: Final = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
}
_RUNS_CODE_IN_THE_KERNEL: Final = {
    "bpf": (321, 280),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
_KNOWN_TO_BE_RISKY: Final = {  # most local privilege escalations of recent years used one of these calls
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "modify_ldt": (154, None),
    "personality": (135, 92),
}
_CHANGES_THE_FILE_SYSTEM_VIEW: Final = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
_CHANGES_THE_MACHINE: Final = {
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
}
_STARTS_PROGRAMS: Final = {"execve": (59, 221), "execveat": (322, 281)}

DENIED: Final = (
    _READS_OTHER_PROCESSES
    | _RUNS_CODE_IN_THE_KERNEL
    | _KNOWN_TO_BE_RISKY
    | _CHANGES_THE_FILE_SYSTEM_VIEW
    | _CHANGES_THE_MACHINE
)
DENIED_PROGRAMS: Final = _STARTS_PROGRAMS

SOCKET: Final = (41, 198)
CLONE: Final = (56, 220)
CLONE3: Final = (435, 435)
IOCTL: Final = (16, 29)
_NEW_NAMESPACES: Final = 0x7E020000  # linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_TYPES_INTO_A_TERMINAL: Final = (0x5412, 0x541C)  # asm-generic/ioctls.h: TIOCSTI, TIOCLINUX
_X32_BIT: Final = 0x40000000  # asm/unistd.h: calls of the x32 table arrive with the architecture of x86_64

# linux/audit.h
AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_PR_GET_SECCOMP: Final = 21
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2

# linux/seccomp.h and linux/bpf_common.h
_RET_KILL_PROCESS: Final = 0x80000000
_RET_ERRNO: Final = 0x00050000
_RET_ALLOW: Final = 0x7FFF0000
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NUMBER_OFFSET: Final = 0  # struct seccomp_data
_ARCHITECTURE_OFFSET: Final = 4
_FIRST_ARGUMENT_OFFSET: Final = 16  # the low word: both architectures are little-endian
_SECOND_ARGUMENT_OFFSET: Final = 24
_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class Instruction(NamedTuple):
    """One instruction. `then`, `otherwise`: how many instructions to skip if the condition is true or false."""

    code: int
    value: int
    then: int = 0
    otherwise: int = 0


def filter_program(machine: str, *, allow_exec: bool, allow_network: bool) -> list[Instruction]:
    """The filter for `machine` (its name in uname(2)).

    Args:
        allow_exec: do not deny execve(2).
        allow_network: do not deny sockets of other families than AF_UNIX.

    Raises:
        OSError: EOPNOTSUPP, because this module does not have the call numbers of the machine.
    """
    if machine not in AUDIT_ARCH:
        raise OSError(errno.EOPNOTSUPP, f"the system call numbers of {machine} are not known")
    column = list(AUDIT_ARCH).index(machine)
    calls = DENIED if allow_exec else DENIED | DENIED_PROGRAMS
    numbers = [numbers[column] for numbers in calls.values() if numbers[column] is not None]
    deny = Instruction(_RETURN, _RET_ERRNO | errno.EPERM)
    program = [
        Instruction(_LOAD_WORD, _ARCHITECTURE_OFFSET),
        Instruction(_JUMP_EQUAL, AUDIT_ARCH[machine], then=1),
        Instruction(_RETURN, _RET_KILL_PROCESS),
        Instruction(_LOAD_WORD, _NUMBER_OFFSET),
        Instruction(_JUMP_AT_LEAST, _X32_BIT, otherwise=1),
        deny,
    ]
    for number in numbers:
        program += [Instruction(_JUMP_EQUAL, number or 0, otherwise=1), deny]
    program += _by_flags(column)
    if not allow_network:
        program += [
            Instruction(_JUMP_EQUAL, SOCKET[column], otherwise=3),
            Instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET),
            Instruction(_JUMP_EQUAL, socket.AF_UNIX, then=1),
            deny,
        ]
    return [*program, Instruction(_RETURN, _RET_ALLOW)]


def _by_flags(column: int) -> list[Instruction]:
    """Allow threads and processes but no namespaces; deny ioctls that simulate input to a terminal."""
    deny, allow = Instruction(_RETURN, _RET_ERRNO | errno.EPERM), Instruction(_RETURN, _RET_ALLOW)
    sends, links = _TYPES_INTO_A_TERMINAL
    return [
        Instruction(_JUMP_EQUAL, CLONE3[column], otherwise=1),
        Instruction(_RETURN, _RET_ERRNO | errno.ENOSYS),
        Instruction(_JUMP_EQUAL, CLONE[column], otherwise=4),
        Instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET),
        Instruction(_JUMP_ANY_BIT, _NEW_NAMESPACES, otherwise=1),
        deny,
        allow,
        Instruction(_JUMP_EQUAL, IOCTL[column], otherwise=5),
        Instruction(_LOAD_WORD, _SECOND_ARGUMENT_OFFSET),
        Instruction(_JUMP_EQUAL, sends, then=1),
        Instruction(_JUMP_EQUAL, links, otherwise=1),
        deny,
        allow,
    ]


def install_filter(*, allow_exec: bool, allow_network: bool) -> None:
    """Give up the calls permanently.

    Raises:
        OSError: EOPNOTSUPP on an unknown architecture, EINVAL if the kernel has no filters, EACCES without
            `no_new_privs`.
    """
    machine = os.uname().machine if ctypes.sizeof(ctypes.c_void_p) == 8 else f"32-bit {os.uname().machine}"
    install_program(filter_program(machine, allow_exec=allow_exec, allow_network=allow_network))


def install_program(steps: Sequence[Instruction]) -> None:
    """Apply a program permanently to this thread and those that it starts. Raises OSError like `install_filter`."""
    code = b"".join(_INSTRUCTION.pack(step.code, step.then, step.otherwise, step.value) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(steps), ctypes.addressof(buffer))
    address = ctypes.c_void_p(ctypes.addressof(program))
    libc.prctl("prctl(PR_SET_SECCOMP)", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address)
    if libc.prctl("prctl(PR_GET_SECCOMP)", _PR_GET_SECCOMP) != _SECCOMP_MODE_FILTER:
        raise OSError(errno.EPERM, "the kernel accepted the filter but does not apply it")
