"""The settings of a daemon, as `minikms serve` makes them from flags and environment.

Invariant: they are complete and checked. They say where the root key comes from; they must never hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minikms.audit.maintenance import KEEP_ALL, Retention
from minikms.daemon.policy_file import PolicyFile
from minikms.datadir import DEFAULT_OPTIONS, Options
from minikms.roots.providers import RootProvider

LogFormat = Literal["json", "console"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`data_dir` is an absolute path. The daemon stops at the end of file of `parent_fd`. `sealed`: every start waits
    for an unseal. `allowed_uids`: with a policy file None means the uids that it names; otherwise they narrow those.
    `root_lease`: seconds for which a root key of the unlock service is used without another grant; None: for ever.
    `refuse_when_unshipped`: no key is used while an auditor has left more durable lines of the audit log.
    """

    socket: str
    data_dir: str
    root: RootProvider
    root_lease: int | None = None
    allowed_uids: frozenset[int] | None
    admin_uids: frozenset[int] = frozenset()
    policy: PolicyFile | None = None
    parent_fd: int | None = None
    sealed: bool = False
    socket_mode: int = 0o600
    socket_group: str | None = None
    make_socket_dir: bool = False
    require_hardening: bool = False
    opening: Options = DEFAULT_OPTIONS
    audit_keep: Retention = KEEP_ALL
    refuse_when_unshipped: int | None = None
    log_format: LogFormat = "console"
