"""What the daemon is told at start: flags and environment.

Owns: the settings and their checks. Invariants: an empty environment variable counts as unset; a flag wins over its
variable; two sources of the root key are refused. It must never hold the root key, only where it comes from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from minikms.audit.chain import head_of_text
from minikms.audit.log import DEFAULT_LIMITS, Limits
from minikms.audit.maintenance import KEEP_ALL, Retention
from minikms.audit.record import Head
from minikms.errors import StartError
from minikms.policy import parse_uids

ALLOWED_UIDS_VARIABLE: Final = "PROGRESSDB_MINIKMS_ALLOWED_UIDS"
ADMIN_UIDS_VARIABLE: Final = "PROGRESSDB_MINIKMS_ADMIN_UIDS"
MASTER_KEY_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY"
MASTER_KEY_FILE_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_FILE"
SOCKET_VARIABLE: Final = "PROGRESSDB_KMS_SOCKET"
DATA_DIR_VARIABLE: Final = "PROGRESSDB_KMS_DATA_DIR"
DEV_KEY_SUFFIX: Final = ".master-key"

AuditFsync = Literal["never", "interval", "turn"]
LogFormat = Literal["json", "console"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    socket: str
    data_dir: str
    allowed_uids: frozenset[int]
    admin_uids: frozenset[int] = frozenset()
    dev: bool = False
    master_key_file: Path | None = None
    master_key_fd: int | None = None
    parent_fd: int | None = None
    socket_mode: int = 0o600
    socket_group: str | None = None
    audit_fsync: AuditFsync = "interval"
    cache_keys_max: int | None = None
    require_hardening: bool = False
    rewrite_master_key_file: bool = False
    accept_audit_loss: bool = False
    accept_restore: bool = False
    expect_audit_head: Head | None = None
    audit_hash_thread_ids: bool = False
    audit_limits: Limits = DEFAULT_LIMITS
    audit_keep: Retention = KEEP_ALL
    audit_copy: str | None = None
    log_format: LogFormat = "console"

    @property
    def dev_key_file(self) -> Path:
        """Beside the data directory: a backup of the directory alone does not hold its own key."""
        path = Path(self.data_dir)
        return path.with_name(path.name + DEV_KEY_SUFFIX)


def from_environment(
    environ: Mapping[str, str],
    *,
    socket: str | None,
    data_dir: str | None,
    allowed_uids: str | None,
    admin_uids: str | None,
    master_key_file: Path | None,
    master_key_fd: int | None,
    rewrite_master_key_file: bool,
    **others: object,
) -> Settings:
    """Settings from flags (None: not given) over the environment. Raises StartError, saying what to give."""
    socket = socket or environ.get(SOCKET_VARIABLE) or ""
    if not socket:
        raise StartError(f"give the socket to serve on: --socket PATH, or {SOCKET_VARIABLE}")
    data_dir = data_dir or environ.get(DATA_DIR_VARIABLE) or ""
    if not data_dir:
        raise StartError(f"give the directory for keys and audit log: --data-dir DIR, or {DATA_DIR_VARIABLE}")
    if environ.get(MASTER_KEY_VARIABLE):
        raise StartError(f"{MASTER_KEY_VARIABLE} must have been moved out of the environment before this")
    if master_key_file is None and environ.get(MASTER_KEY_FILE_VARIABLE):
        master_key_file = Path(environ[MASTER_KEY_FILE_VARIABLE])
    if master_key_file is not None and master_key_fd is not None:
        raise StartError(
            f"both a master key and a master key file are given; unset one of {MASTER_KEY_VARIABLE} and "
            f"{MASTER_KEY_FILE_VARIABLE} (or --master-key-file)"
        )
    if rewrite_master_key_file and master_key_file is None:
        raise StartError("--rewrite-master-key-file needs the key file that it is to rewrite: give --master-key-file")
    allowed = allowed_uids or environ.get(ALLOWED_UIDS_VARIABLE) or ""
    admins = admin_uids or environ.get(ADMIN_UIDS_VARIABLE) or ""
    return Settings(
        socket=socket,
        data_dir=os.path.abspath(data_dir),
        allowed_uids=parse_uids(allowed, source=ALLOWED_UIDS_VARIABLE) if allowed else frozenset((os.geteuid(),)),
        admin_uids=parse_uids(admins, source=ADMIN_UIDS_VARIABLE) if admins else frozenset(),
        master_key_file=master_key_file,
        master_key_fd=master_key_fd,
        rewrite_master_key_file=rewrite_master_key_file,
        **others,  # type: ignore[arg-type]  # passed through from the command, whose signature is typed
    )


def audit_limits(*, segment_mib: int, segment_days: int) -> Limits:
    return Limits(segment_bytes=segment_mib * 1024 * 1024, segment_age_s=segment_days * 24 * 3600)


def audit_keep(*, mib: int, days: int) -> Retention:
    return Retention(bytes_max=mib * 1024 * 1024, days_min=days)


def parse_head(text: str | None) -> Head | None:
    """A line of the audit log that was written. Raises StartError."""
    if text is None:
        return None
    head = head_of_text(text)
    if head is None:
        raise StartError("--expect-audit-head is SEQ:SIG, as `head` in `minikms status` or `minikms audit verify`")
    return head


def parse_mode(text: str) -> int:
    """Octal permission bits. Raises StartError."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise StartError("--socket-mode must be octal permission bits such as 0660")
    return mode


def parse_choice(text: str, choices: tuple[str, ...], flag: str) -> str:
    """`text`, when it is one of `choices`. Raises StartError."""
    if text not in choices:
        raise StartError(f"{flag} must be one of {', '.join(choices)}")
    return text
