"""Children of a test that are killed at a chosen call.

Owns: the fork, the calls that are counted, and what a child leaves for its parent. It asserts that a child ended as it
should, and nothing else.
"""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.minikms_auditor.rig import Rig

CALLS: Final = ("open", "write", "pwrite", "rename", "unlink", "rmdir", "mkdir", "ftruncate", "fsync", "fdatasync")


def forked(action: Callable[[], object]) -> int:
    """The pid of a child that runs `action`, and ends without the rest of the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child uses its own only
        pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  the child must not run the parent's tests
            os._exit(1)
        os._exit(0)
    return pid


def killed_before_call(number: int, action: Callable[[], object], *reports: tuple[object, str]) -> bool:
    """Run `action` in a child that is killed before its `number`-th call that changes the disk, or of `reports`, which
    change something elsewhere and count twice: before and after. False: it made fewer.
    """

    def run() -> None:
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(owner: Any, name: str, *, twice: bool) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                if name != "open" or arguments[1] & os.O_CREAT:
                    count()
                result = real(*arguments, **options)
                if twice:
                    count()
                return result

            setattr(owner, name, call)

        for owner, name in reports:
            watch(owner, name, twice=True)
        for name in CALLS:
            watch(os, name, twice=False)
        action()

    status = os.waitpid(forked(run), 0)[1]
    killed = os.WIFSIGNALED(status)
    assert (os.WTERMSIG(status) == signal.SIGKILL) if killed else os.WEXITSTATUS(status) == 0
    return killed


class InFile(list[int]):
    """Positions that a child reported: it appends to a file, which its parent reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def append(self, seq: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{seq}\n")

    def newest(self) -> int:
        return max(map(int, self._path.read_text().split()), default=0)


def a_step(rig: Rig) -> Callable[[], object]:
    """One step of an auditor that starts in a child."""

    def run() -> None:
        rig.begin_in_child()
        rig.steps()

    return run
