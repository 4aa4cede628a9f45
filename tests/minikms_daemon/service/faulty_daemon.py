"""The `minikms` command, with faults in it that no disk or machine gives on demand.

Owns: which fault is in force, by the file that FAULT_FILE names, and where each one bites: below the verb whose answer
is looked at. With ROLELESS in the environment, whoever is not an administrator has no role at all, without a policy
file. Invariant: without either this is the command as it is, except that root keys may be replaced at any pace.

Run by `tests.harness.scripts.interpreter_words`, before `-m minikms …`.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, Final

from minikms.api import ROLES
from minikms.api.errors import ArenaFullError
from minikms.keys import root_slots
from minikms.memory.arena import SecretArena
from minikms.platform import files
from minikms.policy import policy
from minikms_daemon import rotation
from minikms_daemon.server.application import KeyApplication
from tests.harness import garbage, in_process

FAULT_FILE: Final = "FAULT_FILE"
ROLELESS: Final = "ROLELESS"
DISK: Final = "nothing but the audit log can be written"
ARENA: Final = "every slot of the arena is taken"
DEFECT: Final = "every verb has a defect"
STUCK: Final = "a rotation of the KEK does not come forward"
HELD: Final = "no request is answered"
GARBAGE: Final = "the answer is the frames in reference cycles"
"""Their places, a line each (`tests.harness.garbage`). The daemon runs without the collector."""


def fault() -> str:
    try:
        return Path(os.environ[FAULT_FILE]).read_text()
    except FileNotFoundError:
        return ""


class Disk:
    """`os`, as custody sees it."""

    def __getattr__(self, name: str) -> Any:
        if name in ("fsync", "pwrite", "fdatasync", "write") and fault() == DISK:
            raise OSError(5, "Input/output error")
        return getattr(os, name)


def install() -> None:
    vars(files)["os"] = Disk()  # the seam of the fault
    vars(root_slots)["REMOVALS_HOUR_MAX"] = 10_000
    allocate, run, handle = SecretArena.allocate, rotation.KekRotation.run, KeyApplication.handle

    def allocated(arena: SecretArena) -> Any:
        if fault() == ARENA:
            raise ArenaFullError("all slots of the key arena are in use")
        return allocate(arena)

    async def ran(of: rotation.KekRotation) -> None:
        while fault() == STUCK:
            await asyncio.sleep(0.01)
        await run(of)

    async def held() -> bytes:
        while fault() == HELD:
            await asyncio.sleep(0.5)
        return b"{}"

    def handled(application: KeyApplication, *given: Any) -> Any:
        if fault() == HELD:
            return held()
        if fault() == GARBAGE:
            return "\n".join(garbage.frames()).encode()
        if fault() == DEFECT:
            raise RuntimeError("private text of a defect")
        return handle(application, *given)

    SecretArena.allocate = allocated  # type: ignore[assignment]  # the seam of the fault, as the next ones
    rotation.KekRotation.run = ran  # type: ignore[assignment]  # as above
    KeyApplication.handle = handled  # type: ignore[assignment]  # as above
    if ROLELESS in os.environ:
        policy.ADMIN_ONLY = ROLES  # type: ignore[misc]  # final in production


if __name__ == "__main__":
    from minikms.cli import main

    install()
    in_process.install()
    sys.argv = ["minikms", *sys.argv[3:]]  # -m minikms, for which this stands
    garbage.switch_off()
    main()
