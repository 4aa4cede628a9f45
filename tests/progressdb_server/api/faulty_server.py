"""The `progressdb` command, with faults in it that no disk or clock gives on demand.

Owns: which fault is in force, by the file that FAULT_FILE names, and where each one bites: as deep as the real one
would, below everything whose answer is looked at. Invariant: without the file this is the command as it is, but for a
clock of jobs that ticks faster, and shorter waits for a key service that is away. Run as
`python faulty_server.py <words of the command>`.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from minikms import api
from minikms.api.errors import refusal
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.openapi.description import Handler
from progressdb_server.api.routes.table import Resource
from progressdb_server.cli import main
from progressdb_server.conversations import messages, whole
from progressdb_server.jobs import rotation, runner
from progressdb_server.kms import provider
from progressdb_server.store.backup import Backups
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import BackupOfDatabaseError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness import garbage
from tests.progressdb_server.api.fault_words import (
    CROWDED,
    DATABASE,
    DEFECT,
    DESTROYED,
    DISK,
    FAULT_FILE,
    FULL,
    GARBAGE,
    ROTTEN,
    STUCK,
)

TICK_S: Final = 0.2
KMS_WAIT_S: Final = 1.0
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
    resource: Resource, request: ApiRequest, real: Callable[[Resource, ApiRequest], Handler] = Resource.handler
) -> Handler:
    now = fault()
    if now == DEFECT:
        raise RuntimeError("private text of a defect")
    if now == GARBAGE:
        _PATH.write_text("\n".join([GARBAGE, *garbage.frames()]))
    runner.UNFINISHED_MAX = 0 if now == FULL else 65_536  # type: ignore[misc]  # final in production
    messages.VERSIONS_COUNT_MAX = 1 if now == CROWDED else 10_000  # type: ignore[misc]  # as above
    return real(resource, request)


def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
    async def called(*given: Any, **named: Any) -> Any:
        if fault() == DESTROYED:
            raise refusal(api.CODE_KEY_DESTROYED, "the key was destroyed")
        return await real(*given, **named)

    return called


async def back_up(store: Backups, path: str, real: Callable[..., Any] = Backups.back_up) -> Any:
    if fault() == DATABASE:
        raise BackupOfDatabaseError
    return await real(store, path)


def file_digest(file: Any, name: str, real: Callable[..., Any] = hashlib.file_digest) -> Any:
    """Of the store's files in a backup another one than they have."""
    digest = real(file, name)
    return hashlib.new(name) if fault() == ROTTEN and "checkpoint" not in file.name else digest


for name in ("get", "scan", "keys", "write", "probe", "checkpoint", "reopen"):
    setattr(RocksEngine, name, failing(getattr(RocksEngine, name)))
RocksEngine.sync = sync  # type: ignore[assignment]  # the seam of the fault
for name in ("encrypt", "encrypt_batch"):
    setattr(provider.RemoteProvider, name, refusing(getattr(provider.RemoteProvider, name)))
Resource.handler = handler  # type: ignore[assignment]  # as above
Backups.back_up = back_up  # type: ignore[assignment,method-assign]  # as above
hashlib.file_digest = file_digest  # type: ignore[assignment]  # as above
runner.Kind.first_s = runner.Kind.every_s = TICK_S
whole.CLOCK_S = TICK_S  # type: ignore[misc,assignment]  # final in production
rotation.KEY_WAIT_S = provider.WAIT_S = KMS_WAIT_S  # type: ignore[misc]  # final in production

if __name__ == "__main__":
    garbage.switch_off()
    main()
