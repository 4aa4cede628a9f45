"""`progressdb check`: examines the store, also beside a running server, and repairs its indexes on request.

Owns: the choice of a view of the store and of a key service, and the page. Invariants: without `--repair` nothing is
written; a repair needs exclusive use of the store. The rules of a sound store are in store/check.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

from cyclopts import Parameter

from minikms.api.errors import KmsError, KmsUnavailableError
from minikms.client import Client
from minikms.commands.output import counted, print_result
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, EXIT_MISSING, CommandError
from progressdb_server.cli.flags import Json, StoreFlags
from progressdb_server.config import Config
from progressdb_server.jobs.table import parse
from progressdb_server.kms.provider import Provider, RemoteProvider
from progressdb_server.store.check import AS_THE_SERVER, Problem, Report, repair_offline
from progressdb_server.store.check import check as check_store
from progressdb_server.store.model import StoreDamagedError, StoreLockedError

WAYS_OUT: Final = (
    "restore a backup, or stop the server and give --repair --drop-damaged: see `The store is damaged` in the runbook"
)


def check(
    *,
    repair: Annotated[
        bool,
        Parameter(
            help="Rebuild indexes and counters; delete damaged entries of retries. The server must be stopped.",
            show_default=False,
        ),
    ] = False,
    drop_damaged: Annotated[
        bool,
        Parameter(
            help="With --repair, if files of the store are damaged: make a store of what can be read.",
            show_default=False,
        ),
    ] = False,
    flags: StoreFlags = StoreFlags(),
    json: Json = False,
) -> int:
    """Examine the whole store, also while the server runs, and have the key service decrypt every record.

    The damaged store that --drop-damaged replaces is set aside beside the new one, and registered as a backup. Exit
    status: 0 nothing is wrong, 1 something is wrong, 2 there is no store, or no record could be decrypted.
    """
    config = flags.load_for_store()
    path = config.store.url or str(config.store_dir)
    if drop_damaged and not repair:
        raise CommandError("--drop-damaged is for a repair: give --repair, too")
    dropped: list[Problem] = []
    fixed: list[Problem] = []
    try:
        if repair:
            dropped, fixed = asyncio.run(_repair(config, path, drop=drop_damaged))
        problems, counts, opened = asyncio.run(examine(config, path))
    except StoreLockedError:
        raise CommandError("the server has the store open: stop it for a repair, or check without --repair") from None
    except StoreDamagedError as error:
        raise CommandError(f"{error}. {WAYS_OUT}", EXIT_FAILED) from None
    except KmsError as error:
        raise CommandError(f"the records could not be decrypted: {error}") from None
    page = {
        "records_opened": opened,
        "counts": counts,
        "dropped": [_as_json(finding) for finding in dropped],
        "repaired": [_as_json(finding) for finding in fixed],
        "findings": [_as_json(finding) for finding in problems],
    }
    print_result(page, _lines(dropped, fixed, problems, counts, opened=opened), json=json)
    if problems:
        return EXIT_FAILED
    return EXIT_GOOD if opened else EXIT_MISSING


def _has_key_service(config: Config) -> bool:
    """Whether one may answer. Raises CommandError if this user may not ask it: then no record would be opened, and
    nothing of that could be called right."""
    try:
        with Client(**config.kms_client, wait_s=0) as kms:
            kms.health()
    except KmsUnavailableError as error:
        if isinstance(error.__cause__, PermissionError):
            raise CommandError(
                f"permission denied: this user may not use the key service at {config.kms_socket}, so no record can be "
                f"opened; {AS_THE_SERVER}"
            ) from None
        return False
    except (KmsError, ValueError):
        return True  # what it answers is the report's
    return True


@asynccontextmanager
async def _key_service(config: Config) -> AsyncIterator[Provider | None]:
    if not _has_key_service(config):
        yield None
        return
    async with RemoteProvider(**config.kms_client) as provider:
        yield provider


async def examine(config: Config, path: str) -> Report:
    """The report of the store at the path or URL. Raises FormatError, StoreUnavailableError, CommandError for a user
    who may not use the key service.
    """
    async with _key_service(config) as provider:
        return await check_store(path, provider, parse)


async def _repair(config: Config, path: str, *, drop: bool) -> tuple[list[Problem], list[Problem]]:
    async with _key_service(config) as provider:
        return await repair_offline(path, provider, drop=drop)


def _as_json(finding: Problem) -> dict[str, object]:
    return {"kind": finding.kind, "key": finding.key, "detail": finding.detail, "repairable": bool(finding.fix)}


def _lines(
    dropped: list[Problem], fixed: list[Problem], problems: list[Problem], counts: dict[str, int], *, opened: bool
) -> Iterator[str]:
    for finding in dropped:
        yield f"dropped: {finding.key}: {finding.detail}"
    for finding in fixed:
        yield f"repaired: {finding.kind}: {finding.key}: {finding.detail}"
    for finding in problems:
        way_out = "; progressdb check --repair mends it" if finding.fix else ""
        yield f"{finding.kind}: {finding.key}: {finding.detail}{way_out}"
    if any(finding.kind == "lost" for finding in problems):
        yield WAYS_OUT
    versions = counted(counts.get("messages", 0), "stored version")
    yield f"{counted(counts.get('threads', 0), 'thread')}, {versions} of messages"
    if not opened:
        yield "no key service answered, so no record was decrypted: start it, and check again"
    if problems:
        yield f"{len(problems)} finding(s)"
    elif opened:
        yield "all is right"
