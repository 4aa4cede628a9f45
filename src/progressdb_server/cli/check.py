"""`progressdb check`: examines the store, also beside a running server, and repairs its indexes on request.

Owns: the choice of a view of the store and of a key service, and the page. Invariants: without `--repair` nothing is
written; a repair needs exclusive use of the store. The rules of a sound store are in store/check.py.
"""

from __future__ import annotations

import asyncio
import json as encoder
import os
from typing import Annotated

from cyclopts import Parameter

from progressdb_server.cli.flags import CommandError, ConfigFile, Db, Json, load_config
from progressdb_server.config import Config
from progressdb_server.kms.provider import Provider, ProviderError
from progressdb_server.kms.remote import RemoteProvider
from progressdb_server.store import form
from progressdb_server.store.check import Checker, Finding
from progressdb_server.store.check import repair as repair_store
from progressdb_server.store.engine import EngineLockedError, EngineUnavailableError
from progressdb_server.store.rocks import RocksEngine, RocksReader


def check(
    *,
    repair: Annotated[
        bool,
        Parameter(
            help="Rebuild indexes and counters from the records. The server must be stopped.",
            negative=(),
            show_default=False,
        ),
    ] = False,
    db: Db = None,
    config: ConfigFile = None,
    json: Json = False,
) -> int:
    """Walk the whole store, also beside the running server, which is then asked to open every record.

    Exit status: 0 all is right, 1 something is not, 2 there is no store.
    """
    chosen = load_config(db=db, config=config).config
    if not os.path.isfile(chosen.store_dir / "CURRENT"):
        raise CommandError(f"{chosen.store_dir} holds no store", missing=True)
    try:
        fixed = _repair(chosen) if repair else []
        reader = RocksReader(str(chosen.store_dir))
    except form.FormatError as error:
        raise CommandError(str(error), missing=True) from None
    except EngineLockedError:
        raise CommandError(
            "the server has the store open: stop it for a repair, or check without --repair", missing=True
        ) from None
    except EngineUnavailableError as error:
        raise CommandError(str(error), missing=True) from None
    try:
        form.check(reader)
        found, counts, opened = asyncio.run(_examine(chosen, reader))
    except form.FormatError as error:
        raise CommandError(str(error), missing=True) from None
    finally:
        reader.close()
    if json:
        page = {
            "records_opened": opened,
            "counts": counts,
            "repaired": [_as_json(finding) for finding in fixed],
            "findings": [_as_json(finding) for finding in found],
        }
        print(encoder.dumps(page, indent=2))
    else:
        _print(fixed, found, counts, opened=opened)
    return 1 if found else 0


def _repair(config: Config) -> list[Finding]:
    engine = RocksEngine(str(config.store_dir))
    try:
        form.check(engine)
        fixed, _ = asyncio.run(repair_store(engine))
        return fixed
    finally:
        engine.close()


async def _examine(config: Config, reader: RocksReader) -> tuple[list[Finding], dict[str, int], bool]:
    """The findings, the counts, and whether a key service was there to decrypt the records."""
    provider = await _answering(_provider(config))
    try:
        checker = Checker(reader, provider)
        found = [finding async for finding in checker.run()]
        return found, dict(checker.counts), provider is not None
    finally:
        if provider is not None:
            await provider.close()


def _provider(config: Config) -> Provider | None:
    if config.kms.provider == "local" or not os.path.exists(config.kms_socket):
        return None
    return RemoteProvider(config.kms_socket, server_uids=config.kms.server_uids or None)


async def _answering(provider: Provider | None) -> Provider | None:
    """The provider, if its key service answers."""
    if provider is None:
        return None
    try:
        await provider.status()
    except ProviderError:
        await provider.close()
        return None
    return provider


def _as_json(finding: Finding) -> dict[str, object]:
    return {"kind": finding.kind, "key": finding.key, "detail": finding.detail, "repairable": bool(finding.fix)}


def _print(fixed: list[Finding], found: list[Finding], counts: dict[str, int], *, opened: bool) -> None:
    for finding in fixed:
        print(f"repaired: {finding.kind}: {finding.key}: {finding.detail}")
    for finding in found:
        way_out = "; progressdb check --repair mends it" if finding.fix else ""
        print(f"{finding.kind}: {finding.key}: {finding.detail}{way_out}")
    print(f"{counts.get('threads', 0):,} threads, {counts.get('messages', 0):,} stored versions of messages")
    if not opened:
        print("no key service answered: the records were not opened; start the server to have them checked too")
    print(f"{len(found)} finding(s)" if found else "all is right")
