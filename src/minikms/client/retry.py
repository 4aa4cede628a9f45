"""When a failed call may be made again.

Owns: the rule, and the pauses between attempts. A call is repeated while the daemon is away (it restarts, its
connection broke, it is stopping), for a bounded time, and only if repeating is harmless: the verb may be carried out
twice, or the request certainly was not carried out. A timeout, a malformed answer and every refusal other than
`shutting_down` and `interrupted` end the call at once.
"""

from __future__ import annotations

import random
from typing import Final

from minikms.client.errors import KmsError, KmsUnavailableError, RequestInterruptedError, ShuttingDownError

PAUSE_S_MIN: Final = 0.005
PAUSE_S_MAX: Final = 0.25


class Attempts:
    """The attempts of one call. `until_s` is when to give up, by the caller's clock."""

    __slots__ = ("_count", "_repeatable", "_until_s")

    def __init__(self, *, repeatable: bool, until_s: float) -> None:
        self._repeatable = repeatable
        self._until_s = until_s
        self._count = 0

    def pause_s(self, error: KmsError, now_s: float) -> float:
        """How long to wait before the next attempt. Raises `error` if there must not be one."""
        if isinstance(error, KmsUnavailableError):
            harmless = self._repeatable or not error.sent
        elif isinstance(error, RequestInterruptedError):
            harmless = self._repeatable
        else:
            harmless = isinstance(error, ShuttingDownError)
        left_s = self._until_s - now_s
        if not harmless or left_s <= 0:
            raise error
        self._count += 1
        if self._count == 1:
            return 0.0  # a kept connection that a restarted daemon no longer knows: a fresh one will do
        pause = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(self._count, 16))
        return min(left_s, pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads clients, protects nothing
