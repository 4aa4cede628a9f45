"""`progressdb check`: walks the store, also beside a running server, and repairs its indexes with `--repair`.

Owns: which store and which key service a check uses, and the page. Invariants: without `--repair` nothing is written;
no server may have the store open during a repair. What is right and wrong is in store/check.py.
"""

from __future__ import annotations

import asyncio
import json
import os

from progressdb_server.config import Config
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store.check import Finding, Report, repair_offline
from progressdb_server.store.check import check as check_store
from progressdb_server.store.model import FormatError, StoreLockedError, StoreUnavailableError


class CheckError(Exception):
    """The store can't be checked; the text says why."""


def check(config: Config, *, repairing: bool, as_json: bool) -> int:
    """Prints what was found. 0: all is right, or was repaired, 1: findings are left. Raises CheckError."""
    path = str(config.store_dir)
    try:
        fixed = asyncio.run(repair_offline(path)) if repairing else []
        reachable = config.kms.provider != "local" and os.path.exists(config.kms_socket)
        found, counts, opened = asyncio.run(_walked(config, path, with_key_service=reachable))
    except StoreLockedError:
        raise CheckError("the server has the store open: stop it for a repair, or check without --repair") from None
    except (FormatError, StoreUnavailableError) as error:
        raise CheckError(str(error)) from None
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


async def _walked(config: Config, path: str, *, with_key_service: bool) -> Report:
    if not with_key_service:
        return await check_store(path, None)
    async with RemoteProvider(config.kms_socket, server_uids=config.kms.server_uids or None) as provider:
        return await check_store(path, provider)


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
