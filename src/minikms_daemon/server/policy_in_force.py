"""The policy in force, without a policy file: the uids of the command line, for the whole run.

Owns: what the other parts of a process ask of the policy. `minikms_daemon.server.policy_file` has the same with a file.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from minikms import api
from minikms.api import Condition
from minikms.api.errors import ConflictError
from minikms.audit import Event
from minikms.custody.vault import Indexing, Permit, Vault, permitted
from minikms.policy.policy import Policy

if TYPE_CHECKING:
    from minikms.policy.meters import Meters
    from minikms_daemon.service.access import Access


class PolicyInForce:
    """What the parts of a process share. `meters`: the use of the limits; None without a policy file."""

    meters: Meters | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    async def reload(self, event: Event, permit: Permit = permitted) -> api.PolicyAnswer:
        """Refuses: there is no file to read. Raises ConflictError."""
        raise ConflictError("the key service was started without --policy, so there is no policy file to read")

    def facts(self) -> dict[str, str | int]:
        """For the audit log: the policy file in force; empty without one."""
        return {}

    def status(self) -> dict[str, object] | None:
        """For `/status`; None without a policy file."""
        return None

    def conditions(self) -> Iterable[Condition]:
        return ()

    def access(
        self, *, vault: Vault, indexing: Indexing, refusals: Counter[str], limited: Callable[[Event], None]
    ) -> Access | None:
        """What decides for callers that the policy limits; None where it limits none."""
        return None

    def chores(self, hangup: asyncio.Event, audit: Callable[[Event], None]) -> list[Callable[[], Awaitable[None]]]:
        """The background work of the process. `hangup` is set by SIGHUP."""
        return []

    async def save(self) -> None:
        """Keeps what the next start needs, after the last request."""
