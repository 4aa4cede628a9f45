"""What a policy decides for its callers, for a caller that none limits.

Invariant: it has the methods of `minikms_daemon.service.access.ScopedKeys` that are about the policy.
"""

from __future__ import annotations

from typing import Literal, Self

StatusView = Literal["whole", "without_key_files", "reduced"]
"""How much of `/status` a caller may see."""


class UnlimitedCaller:
    """Everything is allowed, and no policy can change meanwhile."""

    status_view: StatusView = "whole"

    def refresh(self) -> None:
        """Takes the policy in force, after a wait."""

    def permit_all_threads(self) -> None:
        """For a verb that concerns the keys of every thread."""

    def allows_thread(self, thread_id: str) -> bool:
        return True

    def of_verb(self, verb: object) -> Self:
        """The keys for what another verb does."""
        return self
