"""The policy in force: the file that it comes from, and when that file is read again.

Owns: where a policy file may lie, and who may write it; the start with it; the reload, by a verb or by SIGHUP; what
status and metrics show of it. Invariants: a file that is not valid, or that another user than root and the service's
own could have written, refuses a start; at a reload the policy before it stays in force, with the reason in the log of
the daemon, the audit log, status and metrics. One reload at a time. It must never go on without a policy once the
daemon was started with one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Final

from minikms import api
from minikms.api import Condition
from minikms.api.errors import InvalidPolicyError, StartError, StorageUnavailableError
from minikms.audit import Event
from minikms.conditions import state
from minikms.custody.vault import Indexing, Permit, Vault, permitted
from minikms.platform.files import read_file_bounded, replace_file
from minikms.platform.logs import Log
from minikms.platform.trusted_file import ROOT_UID, directory_read, read_trusted
from minikms.platform.workers import in_worker
from minikms.policy.file_policy import FilePolicy
from minikms.policy.meters import REFRESH_SECONDS, SAVED_BYTES_MAX, SAVED_NAME, Meters
from minikms.policy.rules import POLICY_BYTES_MAX, PolicyFileError, Rules, parse_policy
from minikms.processes.peer import overflow_uid
from minikms.processes.running import every
from minikms_daemon.server.policy_in_force import PolicyInForce
from minikms_daemon.service.access import Access

_WHAT: Final = "policy file"
_NOT_READ: Final = (
    "the file can't be read, or another user could have written it; `minikms status` and the daemon's own log say which"
)


class PolicyFile:
    """The file at `path`, an absolute path. It is read again at each reload."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def directory(self) -> str:
        """The paths that the hardened process must read: a file that replaces this one has another inode."""
        return str(directory_read(self.path))

    def check_apart(self, *, written: Iterable[str], of_root_key: Iterable[str]) -> None:
        """Checks that the policy's directory is apart from everything that the hardened process may write, from the
        files and directories of the root key, and from directories directly below `/`, such as `/etc`.
        """
        own = os.path.realpath(self.directory)
        if os.path.dirname(own) == "/":
            raise StartError(
                f"the policy file {self.path} needs a directory of its own, because the daemon may read everything in "
                f"it, and {own} is no such directory: move the file to one such as /etc/progressdb/policy"
            )
        for path in written:
            writable = os.path.realpath(path)
            if os.path.commonpath((own, writable)) in (own, writable):
                raise StartError(
                    f"the policy file {self.path} needs a directory of its own, apart from {path}: the daemon may "
                    "write there, so whoever takes it over could give itself rights. Move the file"
                )
        for path in of_root_key:
            if os.path.commonpath((own, os.path.realpath(path))) == own:
                raise StartError(
                    f"the policy file {self.path} needs a directory of its own: the daemon may read everything in its "
                    "directory, and the root key lies there too"
                )

    def policy(self, allowed_uids: Iterable[int] | None) -> FilePolicy:
        """The policy of the file. `allowed_uids`: as for `FilePolicy`. Raises StartError."""
        try:
            return FilePolicy(self.read(), allowed_uids, service_uid=os.geteuid(), overflow_uid=overflow_uid())
        except PolicyFileError as error:
            raise StartError(f"the policy file {self.path}: {error}") from None

    def read(self) -> Rules:
        """Blocks on the disk. Raises StartError; PolicyFileError where the content is the reason."""
        trusted = (ROOT_UID, os.geteuid())
        return parse_policy(read_trusted(self.path, trusted, what=_WHAT, bytes_max=POLICY_BYTES_MAX))


class FileInForce(PolicyInForce):
    """The policy of a file, and the use of its limits. Made in the loop's thread. `executor` reads the file, and writes
    what is left of the hourly limits into the data directory.
    """

    policy: FilePolicy
    meters: Meters

    def __init__(
        self, policy: FilePolicy, *, file: PolicyFile, directory_fd: int, executor: Executor, log: Log
    ) -> None:
        super().__init__(policy)
        self._file = file
        self._directory_fd = directory_fd
        self._executor = executor
        self._log = log
        self._since_s = time.monotonic()
        self._last_error = ""
        self._one_reload = asyncio.Lock()
        try:
            saved = read_file_bounded(SAVED_NAME, SAVED_BYTES_MAX, dir_fd=directory_fd)
        except StorageUnavailableError as error:
            log.warning("hourly limits can't be read: they start empty", why=str(error))
            saved = b""
        self.meters = Meters(saved, keep=self._keep_limits)

    # --- the file ----------------------------------------------------------------------------------------------------

    async def reload(self, event: Event, permit: Permit = permitted) -> api.PolicyAnswer:
        """Reads the file, and takes it into force if it is valid. Adds to the event of the audit log which policy is in
        force then. `permit` is called after the wait for another reload. Raises InvalidPolicyError.
        """
        policy = self.policy
        async with self._one_reload:
            permit()
            try:
                rules = await asyncio.get_running_loop().run_in_executor(self._executor, self._file.read)
                policy.replace(rules)
            except StartError as error:
                self._last_error = str(error)
                self._log.error("policy not reloaded", why=str(error), generation=policy.generation)
                event.facts = event.facts | self.facts()
                why = str(error) if isinstance(error, PolicyFileError) else _NOT_READ
                raise InvalidPolicyError(f"the policy before it stays in force: {why}") from None
            self.meters.forget_refusals()
            self._last_error, self._since_s = "", time.monotonic()
            event.facts = event.facts | self.facts()
            self._log.info("policy reloaded", sha256=rules.sha256, generation=policy.generation)
            return api.PolicyAnswer(rules.sha256, policy.generation)

    async def _reload_at_hangup(self, hangup: asyncio.Event, audit: Callable[[Event], None]) -> None:
        """Reads the file again after each SIGHUP. Several signals during one reload are one more reload."""
        while True:
            await hangup.wait()
            hangup.clear()
            event = Event(type=api.RELOAD_POLICY.name, actor="minikms", pid=os.getpid(), detail="SIGHUP")
            try:
                await self.reload(event)
            except InvalidPolicyError as error:
                event.outcome = error.code
            audit(event)

    # --- what the other parts ask ------------------------------------------------------------------------------------

    def facts(self) -> dict[str, str | int]:
        return {"policy_sha256": self.policy.rules.sha256, "policy_generation": self.policy.generation}

    def status(self) -> dict[str, object] | None:
        return {
            "sha256": self.policy.rules.sha256,
            "generation": self.policy.generation,
            "age_seconds": int(time.monotonic() - self._since_s),
            "last_error": self._last_error,
            "budgets_exhausted": self.meters.exhausted,
        }

    def conditions(self) -> Iterator[Condition]:
        if self._last_error:
            yield state("policy_not_reloaded", reason=self._last_error)
        if count := self.meters.scarce:
            yield state("limit_nearly_used", count=f"{count:,}")

    def access(
        self, *, vault: Vault, indexing: Indexing, refusals: Counter[str], limited: Callable[[Event], None]
    ) -> Access:
        return Access(
            vault=vault,
            indexing=indexing,
            policy=self.policy,
            meters=self.meters,
            refusals=refusals,
            limited=limited,
        )

    def chores(self, hangup: asyncio.Event, audit: Callable[[Event], None]) -> list[Callable[[], Awaitable[None]]]:
        return [
            lambda: self._reload_at_hangup(hangup, audit),
            lambda: every(REFRESH_SECONDS, self.meters.refresh),
        ]

    # --- limits ------------------------------------------------------------------------------------------------------

    def _keep_limits(self, content: bytes) -> asyncio.Future[None]:
        """Writes the limits for the next start durably, one write after the other. Raises StorageUnavailableError."""
        return in_worker(self._executor, partial(replace_file, self._directory_fd, SAVED_NAME, content))

    async def save(self) -> None:
        """Keeps what is left of the hourly limits. If the disk refuses, that is as after a crash."""
        try:
            await self._keep_limits(self.meters.save())
        except StorageUnavailableError as error:
            self._log.warning("hourly limits not saved: the next start has a tenth less", why=str(error))
