"""Several addresses of one key service, of which one serves: where a call begins, and where it goes on.

Owns: how they are written; `Addresses`, which the calls of a client share; `Rounds`, the attempts of one call. Rules:

1. A call begins at the address that served last. One that can't be reached, refuses because it does not serve, or gives
   no valid answer in time is left: the next call begins at the one after it.
2. The call itself goes on only if `Attempts` would repeat it, or if no request was sent. After `sealed` it goes on if
   its verb is repeatable: a request in flight may have been carried out.
3. When all have refused, they are tried again after a random pause, while one may serve soon and none is sealed. All
   attempts together take no longer than one may.
4. An untrusted server gets no byte. Whoever listens at one address must not keep a call from the others, so it goes on,
   also after a refused certificate: an alert of TLS proves nothing. `warnings` name such an address.
5. Any other refusal, such as `forbidden`, is the answer: policies may differ, and no call looks for a laxer one.

It must never import asyncio or ssl.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import Any, Final

from minikms.api import errors
from minikms.api.errors import KmsError, KmsUnavailableError, SealedError, StandbyError
from minikms.client.calls import Attempts
from minikms.client.connecting import Endpoint

ADDRESSES_COUNT_MAX: Final = 8
REASON_CHARS_MAX: Final = 200
"""The characters for one address in an error that names all."""
FINDING_SHARE: Final = 0.75
"""The share of a call's time after which no attempt begins, so that the last one has time for its answer."""
_NOT_SERVING: Final = StandbyError | SealedError | errors.ShuttingDownError | errors.RequestInterruptedError
_NOT_TRUSTED: Final = errors.KmsUntrustedServerError | errors.KmsCredentialsError


def split(address: str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """The addresses between the commas of a text; a path object is one. Raises ValueError."""
    if not isinstance(address, str) or "," not in address:
        return (address,)
    parts = [each.strip() for each in address.split(",")]
    if len(parts) > ADDRESSES_COUNT_MAX or len(set(parts)) < len(parts):
        raise ValueError(f"several addresses are at most {ADDRESSES_COUNT_MAX}, each given once")
    if len({"://" in each for each in parts}) > 1:
        raise ValueError("several addresses are all paths of sockets, or all URLs")
    return parts


class Addresses:
    """The addresses of a client. `first` is where the next call begins."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.first = self.endpoints[0]
        self._untrusted: dict[Endpoint, str] = {}

    @property
    def warnings(self) -> Sequence[str]:
        texts = [text for endpoint in self.endpoints for text in endpoint.warnings]
        texts += [text for endpoint, text in list(self._untrusted.items()) if endpoint is not self.first]
        return list(dict.fromkeys(texts))  # the same files serve all

    def leave(self, endpoint: Endpoint, error: KmsError) -> bool:
        """Whether the error means that this address does not serve. Then no further call begins there."""
        answered = isinstance(error, errors.KmsRefusedError) and not isinstance(error, _NOT_SERVING)
        if answered or isinstance(error, errors.KmsClosedError):
            return False
        self._untrusted.pop(endpoint, None)
        if isinstance(error, _NOT_TRUSTED):
            self._untrusted[endpoint] = str(error)
        if endpoint is self.first:  # otherwise another call was here before
            following = self.endpoints.index(endpoint) + 1
            self.first = self.endpoints[following % len(self.endpoints)]
        return True


class Rounds(Attempts):
    """The attempts of one call at several addresses: one at each in a round."""

    __slots__ = ("_addresses", "_ends_s", "_last_s", "_now_s", "_reasons", "_untried")

    def __init__(self, addresses: Addresses, now_s: float, timeout_s: float, **limits: Any) -> None:
        super().__init__(addresses.first, now_s, timeout_s, **limits)
        found_s = max(self._until_s, self._full_until_s)
        self._last_s = now_s + (found_s - now_s) * FINDING_SHARE
        self._ends_s = max(found_s, now_s + timeout_s)
        self._now_s = now_s
        self._addresses = addresses
        self._untried = list(addresses.endpoints)
        self._reasons: dict[Endpoint, KmsError] = {}

    @property
    def connect_s(self) -> float:
        """A share for each address that is left."""
        return (self._last_s - self._now_s) / len(self._untried)

    def is_harmless(self, error: KmsError) -> bool:
        if isinstance(error, errors.KmsProtocolError):
            return isinstance(error.__cause__, OSError)  # of connecting: nothing was sent
        if isinstance(error, SealedError):
            return self._repeatable
        return isinstance(error, _NOT_TRUSTED) or super().is_harmless(error)

    def pause_s(self, error: KmsError, now_s: float) -> float | None:
        """The pause before the next attempt, and sets the next address. Raises KmsError, which names all, if all have
        refused.
        """
        if not self._addresses.leave(self.endpoint, error):
            return super().pause_s(error, now_s)
        if not self.is_harmless(error):
            return None
        reason = self._reasons[self.endpoint] = copy.copy(error)  # without a traceback: it leads to this object
        reason.__cause__ = copy.copy(error.__cause__)
        self._untried.remove(self.endpoint)
        likeliest = min(self._reasons.values(), key=self._rank)
        pause_s = 0.0
        if not self._untried:
            self._untried = list(self._addresses.endpoints)
            until_s = self._full_until_s if isinstance(likeliest, StandbyError) else self._until_s
            waits = super().is_harmless(likeliest) and until_s > now_s
            pause_s = self.random_pause_s(until_s - now_s) if waits else math.inf
        if now_s + pause_s >= self._last_s:
            raise self._all_refused(likeliest)
        self._now_s = now_s + pause_s
        self.timeout_s = min(self.timeout_s, self._ends_s - self._now_s)
        first = self._addresses.first
        self.endpoint = first if first in self._untried else self._untried[0]
        return pause_s

    def _rank(self, error: KmsError) -> int:
        """The lowest decides whether to wait, and the error for all has its class."""
        if isinstance(error, SealedError | StandbyError):
            return isinstance(error, StandbyError)
        return 2 if super().is_harmless(error) else 3

    def _all_refused(self, likeliest: KmsError) -> KmsError:
        reasons = []
        for endpoint, error in self._reasons.items():
            reason = str(error).partition(". ")[0][:REASON_CHARS_MAX]  # without advice for this address alone
            reasons.append(reason if endpoint.address in reason else f"{endpoint.address}: {reason}")
        likeliest.args = (f"no address of the key service serves: {'; '.join(reasons)}", *likeliest.args[1:])
        if isinstance(likeliest, KmsUnavailableError):
            likeliest.sent = any(getattr(error, "sent", False) for error in self._reasons.values())
        return likeliest
