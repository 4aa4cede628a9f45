"""Unseal: what an operator gives, and what comes of it.

Owns: the steps of an attempt until the data directory is opened with a root key, and the shares that were entered.
Invariants: one attempt at a time; the rights are those of the policy in force after each wait; an attempt that fails at
any step leaves the daemon sealed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Protocol

from minikms import api
from minikms.api.errors import (
    ConflictError,
    InvalidRequestError,
    KmsRefusedError,
    NotSealedError,
    SealedError,
    StartError,
    UnknownRootError,
    UnsealFailedError,
    WrongRootError,
    WrongShareError,
)
from minikms.crypto.shares import ShareInfo
from minikms.daemon.keybody import SecretText
from minikms.daemon.parts import RunContext
from minikms.daemon.seal.attempts import Attempts
from minikms.daemon.seal.files import Attempt, Kind
from minikms.daemon.seal.opening import Opener
from minikms.daemon.seal.state import SealState
from minikms.datadir import read_keyring
from minikms.keys import keyring
from minikms.keys.collected_shares import COLLECT_SECONDS_MAX, CollectedShares
from minikms.keys.keyring import ShareSet
from minikms.memory.arena import SecretSlot
from minikms.platform import clock
from minikms.policy import Principal
from minikms.roots.providers import GivenKey, RootProvider
from minikms.service.access import renewed
from minikms.service.encoding import Reply, json_answer


class Unsealable(Protocol):
    """What an attempt needs of the server: see `minikms.daemon.seal.seal`."""

    async def files_closed(self) -> None:
        """Returns when the files of the former unsealed time are closed."""

    async def open_and_serve(self, who: Principal, attempt: Attempt, root: RootProvider, seals: int) -> None:
        """Raises UnknownRootError, other KmsRefusedErrors, OSError; no key is left then."""


class Unsealing:
    """The attempts to unseal one process."""

    def __init__(
        self, process: RunContext, state: SealState, opener: Opener, attempts: Attempts, server: Unsealable
    ) -> None:
        self._process = process
        self._state = state
        self._opener = opener
        self._attempts = attempts
        self._server = server
        self.one_attempt = asyncio.Lock()
        self._shares = CollectedShares(process.arena)

    def status(self) -> api.UnsealStatusAnswer:
        state, attempts = self._state, self._attempts.records
        if not state.is_sealed:
            return api.UnsealStatusAnswer(sealed=False)
        return api.UnsealStatusAnswer(
            sealed=True,
            since=state.marker.at,
            by=state.marker.actor,
            stays_sealed=state.is_marked or self._process.settings.sealed,
            from_source=self._opener.source_is_readable,
            shares=self._shares_progress(),
            failed_attempts=len(attempts.failed()) + attempts.dropped,
        )

    def forget_keys(self) -> None:
        """What was given, and what a source that can be read once still holds."""
        self._shares.clear()
        self._opener.discard_source()

    def unseal(self, who: Principal, given: SecretSlot | SecretText | None) -> Awaitable[Reply]:
        """Tries a root key, takes the text of a share, or (None) tries the daemon's own source. After a
        KmsRefusedError the daemon is sealed. The caller releases `given`.
        """
        return self._unseal(who, given, self._state.seals)

    async def _unseal(self, who: Principal, given: SecretSlot | SecretText | None, seals: int) -> Reply:
        async with self.one_attempt:
            self._require_rights(who)
            self._check_may_try(who, given)
            kind: Kind = "from_source" if given is None else "share" if isinstance(given, SecretText) else "root_hex"
            attempt = await self._attempts.begin(who, kind)
            await self._server.files_closed()
            self._state.check_no_seal_since(seals)
            try:
                self._require_rights(who)
            except KmsRefusedError:
                await self._attempts.end(attempt, "failed")
                raise
            if isinstance(given, SecretText):
                share, root = await self._take_share(attempt, given)
                if root is None:
                    return json_answer(self.status())
                try:
                    with root:
                        await self._try(who, attempt, GivenKey(root), seals)
                except WrongRootError:
                    self._shares.drop(share)
                    raise
                finally:
                    self._shares.take_back(share)  # unless it was zeroed meanwhile
            else:
                await self._try(who, attempt, self._process.settings.root if given is None else GivenKey(given), seals)
            return json_answer(api.UnsealStatusAnswer(sealed=False))

    def _require_rights(self, who: Principal) -> None:
        """After a wait, before a key is used: the policy may have changed. Raises UnauthorizedError, ForbiddenError."""
        renewed(who, self._process.policy.policy, api.UNSEAL)

    def _check_may_try(self, who: Principal, given: SecretSlot | SecretText | None) -> None:
        if not self._state.is_sealed:
            raise NotSealedError("the key service is not sealed")
        self._attempts.check_pause(who)
        if given is None and not self._opener.source_is_readable:
            raise ConflictError(
                "the daemon's source of the root key can be read once only, and was read or closed: give the root key, "
                "or restart the daemon with its source"
            )

    async def _try(self, who: Principal, attempt: Attempt, root: RootProvider, seals: int) -> None:
        """Raises WrongRootError, UnsealFailedError, SealedError."""
        try:
            await self._server.open_and_serve(who, attempt, root, seals)
        except UnknownRootError:
            await self._attempts.end(attempt, "wrong_root")
            given = {
                "root_hex": "this root key",
                "from_source": "the root key of the daemon's own source",
                "share": "the root key that these shares give",
            }[attempt.kind]
            raise WrongRootError(
                f"{given} does not open the keyring, or is not pinned; the daemon stays sealed"
            ) from None
        except SealedError:
            raise
        except (KmsRefusedError, OSError) as error:
            self._process.log.warning("unseal failed", why=str(error))
            again = "try again"
            if attempt.kind == "share":
                again = f"enter share {attempt.share} again; the others are still there"
            await self._attempts.end(attempt, "failed")
            raise UnsealFailedError(
                "the daemon stays sealed: its data directory could not be opened. Its own log says why; correct "
                f"that and {again}"
            ) from None

    # --- shares ------------------------------------------------------------------------------------------------------

    async def _take_share(self, attempt: Attempt, text: SecretText) -> tuple[ShareInfo, SecretSlot | None]:
        """The share, and the root key if it was the last one that its set needs. Raises KmsRefusedError."""
        try:
            keyring_id, sets = self._known_sets()
            info = self._shares.add(text.views(), keyring_id, sets, time.monotonic())
            attempt.share = info.number
        except WrongShareError:
            await self._attempts.end(attempt, "wrong_share")
            raise
        except (InvalidRequestError, ConflictError):
            await self._attempts.end(attempt, "refused")
            raise
        except KmsRefusedError:
            await self._attempts.end(attempt, "failed")
            raise
        finally:
            text.release()
        if self._shares.complete:
            try:
                return info, self._shares.combine()
            except KmsRefusedError:
                self._shares.take_back(info)
                await self._attempts.end(attempt, "failed")
                raise
        asyncio.get_running_loop().call_later(COLLECT_SECONDS_MAX + 1, lambda: self._shares.expire(time.monotonic()))
        await self._attempts.end(attempt, "share_kept")
        return info, None

    def _known_sets(self) -> tuple[str, list[ShareSet]]:
        """The keyring's id and sets. It is not authenticated: that decides only which shares are refused."""
        try:
            body, _, _ = keyring.parse_file(read_keyring(self._process.lock.directory))
        except StartError as error:
            self._process.log.warning("unseal failed", why=str(error))
            raise UnsealFailedError("the keyring could not be read; the daemon's own log says why") from None
        return body.keyring_id, [slot.shares for slot in body.slots if slot.shares is not None]

    def _shares_progress(self) -> api.SharesProgress | None:
        self._shares.expire(time.monotonic())
        if not self._shares.numbers:
            return None
        left_ns = int((self._shares.expires_at - time.monotonic()) * 1_000_000_000)
        return api.SharesProgress(
            set_id=self._shares.set_id,
            numbers=list(self._shares.numbers),
            threshold=self._shares.threshold,
            expires_at=clock.rfc3339(clock.now_ns() + left_ns),
        )
