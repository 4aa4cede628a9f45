"""The flags with which the `minikms` command runs the daemon, and how they reach it.

Owns: `Flags`, the file that holds them until the daemon has read it, and the words of its command line. Invariants: a
root key is named by its source, and never a part of them; the file has no name, and is closed before anything is read
from a peer.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal, NoReturn

DAEMON: Final = "minikms_daemon"
BIND_VARIABLE: Final = "LD_BIND_NOW"
COLLECTED_OBJECTS_MIN: Final = 100_000
"""New objects between two garbage collections (gc.set_threshold) of a command: what it imports stays, and collecting
that takes a tenth of its start.
"""
ALLOWED_UIDS_VARIABLE: Final = "PROGRESSDB_MINIKMS_ALLOWED_UIDS"
ADMIN_UIDS_VARIABLE: Final = "PROGRESSDB_MINIKMS_ADMIN_UIDS"
UNLOCK_UIDS_VARIABLE: Final = "PROGRESSDB_MINIKMS_UNLOCK_UIDS"
UNLOCK_UIDS: Final = "0"
"""Unless told: systemd listens for the unlock service, as root."""
EXIT_FAILED: Final = 1
EXIT_MISSING: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as in shells."""
DATA_USER_ADVICE: Final = "The files of a key service are its user's alone: run this as that user, or as root"
FLAGS_BYTES_MAX: Final = 1024 * 1024
"""Paths and lists of uids; more than a command line takes."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `minikms serve` resolved from flags and environment; `minikms_daemon.server.settings` checks the rest.
    `data_dir`: an absolute path. `root`: a source, such as `file:PATH`. `key_owner`: of a key file that its group may
    read. The daemon stops at the end of file of `parent_fd`. `sealed`: every start waits for an unseal. `root_lease`:
    seconds for which a root key of the unlock service is used without another grant; None: for ever.
    `refuse_when_unshipped`: no key is used while an auditor has left more durable lines of the audit log. `version`,
    `commit`: of the distribution.
    """

    socket: str
    data_dir: str
    root: str
    key_owner: tuple[int, int] | None
    rewritable: bool
    unlock_uids: str
    root_lease: int | None
    pin: str | None
    policy: str | None
    allowed_uids: str
    admin_uids: str
    parent_fd: int | None
    sealed: bool
    socket_mode: str
    socket_group: str | None
    make_socket_dir: bool
    require_hardening: bool
    accept_restore: bool
    accept_audit_loss: bool
    expect_audit_head: str | None
    audit_dir: str | None
    refuse_when_unshipped: int | None
    audit_fsync: Literal["never", "interval", "turn"]
    audit_hash_thread_ids: bool
    audit_segment_mib: int
    audit_segment_days: int
    audit_keep_mib: int
    audit_keep_days: int
    cache_keys: int | None
    log_format: Literal["json", "console"]
    version: str
    commit: str


def become_daemon(flags: Flags, words: Sequence[str]) -> NoReturn:
    """Replaces this process by the daemon. `words`: the command line, which /proc/PID/cmdline goes on to show.

    With LD_BIND_NOW the dynamic linker binds every symbol at the start. Without it, it looks up each library function
    when the interpreter first calls it, and saves the vector registers on the stack meanwhile (ld.so(8)). After AES on
    a processor with AVX-512 they hold the whole key schedule, and what is written below the stack pointer stays until a
    deeper call overwrites it. Raises OSError.
    """
    os.execve(  # noqa: S606  without a shell
        sys.executable,
        [sys.executable, *_interpreter_options(), "-P", "-m", DAEMON, str(write_flags(flags)), *words],
        {**os.environ, BIND_VARIABLE: "1"},
    )


def write_flags(flags: Flags) -> int:
    """The descriptor of a file without a name, which the next program inherits."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("minikms-flags", 0)
    else:
        import tempfile  # which the daemon must not have

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.set_inheritable(descriptor, True)
    os.write(descriptor, json.dumps(asdict(flags)).encode("ascii"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def read_flags(descriptor: int) -> dict[str, object]:
    """The members of the `Flags` behind the descriptor, which is closed. Raises OSError, ValueError."""
    with open(descriptor, "rb") as file:
        members: dict[str, object] = json.loads(file.read(FLAGS_BYTES_MAX))
    return members


def _interpreter_options() -> list[str]:
    """The options of this interpreter, such as `-X dev`."""
    options: list[str] = []
    words = iter(sys.orig_argv[1:])
    for word in words:
        last = re.match(r"(-[^-XWmc]*)[mc]", word)  # `-Im` is `-I -m`
        if last or not word.startswith("-"):
            options += [last[1]] if last and last[1] != "-" else []
            break
        options.append(word)
        if word in ("-X", "-W"):
            options.append(next(words))
    return options
