"""The `progressdb` command, with faults in it that no disk or clock gives on demand.

Owns: which fault is in force, by the file that FAULT_FILE names, and where each one bites: as deep as the real one
would, below everything whose answer is looked at. Invariant: without the file this is the command as it is, but for a
clock of jobs that ticks faster. Run as `python faulty_server.py <words of the command>`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from progressdb_server.api.http.request import Request
from progressdb_server.api.routes.table import Handler, Resource
from progressdb_server.cli import main
from progressdb_server.jobs import service
from progressdb_server.store import backup
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.rocks import RocksEngine
from tests.progressdb_server.api.fault_words import DEFECT, DISK, FAULT_FILE, FULL, ROTTEN, STUCK

TICK_S: Final = 0.2
_PATH = Path(os.environ[FAULT_FILE])


def fault() -> str:
    try:
        return _PATH.read_text()
    except FileNotFoundError:
        return ""


def failing(real: Callable[..., Any]) -> Callable[..., Any]:
    def called(*given: Any, **named: Any) -> Any:
        if fault() == DISK:
            raise EngineUnavailableError
        return real(*given, **named)

    return called


def sync(engine: RocksEngine, real: Callable[[RocksEngine], None] = RocksEngine.sync) -> None:
    while fault() == STUCK:
        time.sleep(0.01)
    real(engine)


def handler(
    resource: Resource, request: Request, real: Callable[[Resource, Request], Handler] = Resource.handler
) -> Handler:
    now = fault()
    if now == DEFECT:
        raise RuntimeError("private text of a defect")
    service.UNFINISHED_MAX = 0 if now == FULL else 65_536  # type: ignore[misc]  # final in production
    return real(resource, request)


def digest(path: str, real: Callable[[str], tuple[int, str]] = backup._digest) -> tuple[int, str]:
    size, digest = real(path)
    return size, "0" * 64 if fault() == ROTTEN and "checkpoint" not in path else digest


for name in ("get", "scan", "keys", "write", "checkpoint", "reopen"):
    setattr(RocksEngine, name, failing(getattr(RocksEngine, name)))
RocksEngine.sync = sync  # type: ignore[assignment]  # the seam of the fault
Resource.handler = handler  # type: ignore[assignment]  # as above
backup._digest = digest
service.TICK_S = TICK_S  # type: ignore[misc]  # final in production

if __name__ == "__main__":
    main()
