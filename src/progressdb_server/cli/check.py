"""`progressdb check`: walks the store, also beside a running server, and repairs its indexes when told to.

Owns: which view of the store and which key service a check uses, and the page. Invariants: without `--repair` nothing
is written; a repair needs the store to itself. What is right and wrong is in store/check.py.
"""

from __future__ import annotations

import asyncio
import json
import os

from progressdb_server.config import Config
from progressdb_server.kms.provider import Provider, ProviderError
from progressdb_server.kms.remote import RemoteProvider
from progressdb_server.store import form
from progressdb_server.store.check import Checker, Finding, repair
from progressdb_server.store.engine import EngineLockedError, EngineUnavailableError
from progressdb_server.store.rocks import RocksEngine, RocksReader


class CheckError(Exception):
    """There is nothing that could be checked; the text says why."""


def check(config: Config, *, repairing: bool, as_json: bool) -> int:
    """Prints what was found. 0: all is right, or was repaired, 1: findings are left. Raises CheckError."""
    if not os.path.isfile(config.store_dir / "CURRENT"):
        raise CheckError(f"{config.store_dir} holds no store")
    try:
        fixed = _repaired(config) if repairing else []
        reader = RocksReader(str(config.store_dir))
    except form.FormatError as error:
        raise CheckError(str(error)) from None
    except EngineLockedError:
        raise CheckError("the server has the store open: stop it for a repair, or check without --repair") from None
    except EngineUnavailableError as error:
        raise CheckError(str(error)) from None
    try:
        form.check(reader)
        found, counts, opened = asyncio.run(_walked(config, reader))
    except form.FormatError as error:
        raise CheckError(str(error)) from None
    finally:
        reader.close()
    if as_json:
        told = {
            "records_opened": opened,
            "counts": counts,
            "repaired": [_shown(finding) for finding in fixed],
            "findings": [_shown(finding) for finding in found],
        }
        print(json.dumps(told, indent=2))
    else:
        _print(fixed, found, counts, opened=opened)
    return 1 if found else 0


def _repaired(config: Config) -> list[Finding]:
    engine = RocksEngine(str(config.store_dir))
    try:
        form.check(engine)
        fixed, _ = asyncio.run(repair(engine))
        return fixed
    finally:
        engine.close()


async def _walked(config: Config, reader: RocksReader) -> tuple[list[Finding], dict[str, int], bool]:
    """The findings, what was counted, and whether a key service was there to open the records."""
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
    if provider is None:
        return None
    try:
        await provider.status()
    except ProviderError:
        await provider.close()
        return None
    return provider


def _shown(finding: Finding) -> dict[str, object]:
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
