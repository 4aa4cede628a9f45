"""The settings of a daemon, from the flags that the command resolved.

Invariant: they are complete and checked. They say where the root key comes from; they must never hold it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from minikms.api.errors import StartError
from minikms.audit.chain import parse_head
from minikms.audit.log import LogLimits
from minikms.audit.record import LineRef
from minikms.audit.repair import IF_RESTORED
from minikms.custody.vault import CACHE_KEYS_MAX
from minikms.datadir import DEFAULT_OPTIONS, Options, root_provider
from minikms.platform.process_metrics import Build
from minikms.policy.policy import parse_uids
from minikms.processes.flags import (
    ADMIN_UIDS_VARIABLE,
    ALLOWED_UIDS_VARIABLE,
    UNLOCK_UIDS_VARIABLE,
    Flags,
    read_flags,
)
from minikms.roots.key_file import FileOwner
from minikms.roots.pin import PinFile
from minikms.roots.providers import KeyFile, RootProvider
from minikms.roots.sources import parse_source
from minikms_daemon.audit.maintenance import KEEP_ALL, LogRetention

MIB_BYTES: Final = 1024 * 1024
UNKNOWN_BUILD: Final = Build("", "", "")
DAY_SECONDS: Final = 24 * 3600
IF_RESTORED_UNDER_SERVER: Final = (
    "If you restored a copy on purpose, start the message server once with --accept-restore (the runbook says how)"
)
"""The message server remembers the line that is missing, and gave it to the daemon that it started."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags, and what was made of those that are texts. `allowed_uids`: with a policy file None means the uids that
    it names; otherwise they narrow those.
    """

    flags: Flags
    root: RootProvider
    allowed_uids: frozenset[int] | None
    admin_uids: frozenset[int] = frozenset()
    socket_mode: int = 0o600
    opening: Options = DEFAULT_OPTIONS
    audit_keep: LogRetention = KEEP_ALL
    build: Build = UNKNOWN_BUILD


def settings_of(words: Sequence[str]) -> Settings:
    """The settings of the flags behind the descriptor that the first word is; it is closed. Raises StartError."""
    try:
        flags = msgspec.convert(read_flags(int(words[0])), Flags)
    except (IndexError, OSError, ValueError):
        raise StartError("the daemon is started by `minikms serve`") from None
    return Settings(
        flags=flags,
        root=_root(flags),
        allowed_uids=parse_uids(flags.allowed_uids, source=ALLOWED_UIDS_VARIABLE) if flags.allowed_uids else None,
        admin_uids=parse_uids(flags.admin_uids, source=ADMIN_UIDS_VARIABLE) if flags.admin_uids else frozenset(),
        socket_mode=_mode(flags.socket_mode),
        opening=Options(
            accept_restore=flags.accept_restore,
            accept_audit_loss=flags.accept_audit_loss,
            expect_audit_head=expected_head(flags.expect_audit_head),
            if_restored=IF_RESTORED if flags.parent_fd is None else IF_RESTORED_UNDER_SERVER,
            audit_dir=flags.audit_dir,
            audit_fsync=flags.audit_fsync,
            audit_hash_thread_ids=flags.audit_hash_thread_ids,
            audit_limits=LogLimits(
                segment_bytes=flags.audit_segment_mib * MIB_BYTES, segment_age_s=flags.audit_segment_days * DAY_SECONDS
            ),
            pin=PinFile(Path(flags.pin)) if flags.pin else None,
            cache_keys_max=flags.cache_keys or CACHE_KEYS_MAX,
        ),
        audit_keep=LogRetention(bytes_max=flags.audit_keep_mib * MIB_BYTES, days_min=flags.audit_keep_days),
        build=Build(flags.version, flags.commit, ".".join(map(str, sys.version_info[:3]))),
    )


def _root(flags: Flags) -> RootProvider:
    root = root_provider(
        parse_source(flags.root),
        flags.data_dir,
        shared=None if flags.key_owner is None else FileOwner(*flags.key_owner),
        unlock_uids=parse_uids(flags.unlock_uids, source=UNLOCK_UIDS_VARIABLE),
    )
    return replace(root, rewritable=flags.rewritable) if isinstance(root, KeyFile) else root


def expected_head(text: str | None) -> LineRef | None:
    """A line of the audit log that was written, as SEQ:SIG. Raises StartError."""
    if text is None:
        return None
    head = parse_head(text)
    if head is None:
        raise StartError("--expect-audit-head is SEQ:SIG, as `head` in `minikms status` or `minikms audit verify`")
    return head


def _mode(text: str) -> int:
    """Octal permission bits. Raises StartError."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise StartError("--socket-mode must be octal permission bits such as 0660")
    return mode
