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
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from minikms import api
from minikms.api import Condition
from minikms.api.errors import ConflictError, InvalidPolicyError, StartError
from minikms.audit import Event
from minikms.conditions import state
from minikms.custody.vault import Permit, permitted
from minikms.platform.logs import Log
from minikms.platform.trusted_file import ROOT_UID, directory_read, read_trusted
from minikms.policy.file_policy import FilePolicy
from minikms.policy.meters import Meters
from minikms.policy.policy import Policy
from minikms.policy.rules import POLICY_BYTES_MAX, PolicyFileError, Rules, parse_policy

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

    def read(self) -> Rules:
        """Blocks on the disk. Raises StartError; PolicyFileError where the content is the reason."""
        trusted = (ROOT_UID, os.geteuid())
        return parse_policy(read_trusted(self.path, trusted, what=_WHAT, bytes_max=POLICY_BYTES_MAX))


class PolicyInForce:
    """What the parts of a process share: the policy, and under a policy file the use of its limits.

    Made in the loop's thread. `executor` reads the file.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        file: PolicyFile | None,
        meters: Meters | None,
        executor: Executor,
        log: Log,
    ) -> None:
        self.policy = policy
        self.meters = meters
        self._file = file
        self._executor = executor
        self._log = log
        self._since_s = time.monotonic()
        self._last_error = ""
        self._one_reload = asyncio.Lock()

    async def reload(self, event: Event, permit: Permit = permitted) -> api.PolicyAnswer:
        """Reads the file, and takes it into force if it is valid. Adds to the event of the audit log which policy is in
        force then. `permit` is asked after the wait for another reload. Raises InvalidPolicyError, and ConflictError
        without a policy file.
        """
        policy, file = self.policy, self._file
        if file is None or not isinstance(policy, FilePolicy):
            raise ConflictError("the key service was started without --policy, so there is no policy file to read")
        async with self._one_reload:
            permit()
            try:
                rules = await asyncio.get_running_loop().run_in_executor(self._executor, file.read)
                policy.replace(rules)
            except StartError as error:
                self._last_error = str(error)
                self._log.error("policy not reloaded", why=str(error), generation=policy.generation)
                event.facts = event.facts | self.facts()
                why = str(error) if isinstance(error, PolicyFileError) else _NOT_READ
                raise InvalidPolicyError(f"the policy before it stays in force: {why}") from None
            if self.meters is not None:
                self.meters.forget_refusals()
            self._last_error, self._since_s = "", time.monotonic()
            event.facts = event.facts | self.facts()
            self._log.info("policy reloaded", sha256=rules.sha256, generation=policy.generation)
            return api.PolicyAnswer(rules.sha256, policy.generation)

    def facts(self) -> dict[str, str | int]:
        """For the audit log: the policy in force; empty without a policy file."""
        rules = self.policy.rules
        return {} if rules is None else {"policy_sha256": rules.sha256, "policy_generation": self.policy.generation}

    def status(self) -> dict[str, object] | None:
        """For `/status`; None without a policy file."""
        rules, meters = self.policy.rules, self.meters
        if rules is None or meters is None:
            return None
        return {
            "sha256": rules.sha256,
            "generation": self.policy.generation,
            "age_seconds": int(time.monotonic() - self._since_s),
            "last_error": self._last_error,
            "budgets_exhausted": meters.exhausted,
        }

    def conditions(self) -> Iterator[Condition]:
        if self._last_error:
            yield state("policy_not_reloaded", reason=self._last_error)
