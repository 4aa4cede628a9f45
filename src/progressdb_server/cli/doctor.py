"""`progressdb doctor`: what the running server finds wrong between its store and its key service.

Owns: the questions, the page and the exit status. `minikms doctor` examines the key service alone: it can't know which
keys the threads of a store name, so only this command finds and retires orphaned keys. `progressdb check` examines the
records. Invariant: nothing is changed without `--repair`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec
from cyclopts import Parameter

from minikms.api.printable import clean
from minikms.commands.output import condition_lines, counted, print_result
from minikms.conditions import NOTICE, by_severity
from progressdb_server.cli.admin_client import AdminClient
from progressdb_server.cli.flags import ConfiguredUrl, Json, StoreFlags
from progressdb_server.cli.status import conditions_of
from progressdb_server.conditions import state
from progressdb_server.config import StoreSection
from progressdb_server.store import places
from progressdb_server.store.model import FormatError, StoreUnavailableError

REPAIR_S_MAX: Final = 3600.0
"""A walk over a million keys takes some minutes."""
SHOWN_MAX: Final = 20
KEYS_ASKED: Final = 1000
"""At a time: the server looks at a bounded number of keys or threads for each answer."""
NOT_SEEN: Final = "GRANT pg_read_all_stats TO this role shows which are connected"


def doctor(
    *,
    repair: Annotated[bool, Parameter(help="Retire the keys that no thread names.", show_default=False)] = False,
    url: ConfiguredUrl = None,
    flags: StoreFlags = StoreFlags(),
    json: Json = False,
) -> int:
    """Ask the running server what is wrong: whether it takes writes, whether its key service works, whether it has met
    damage in the store, which keys of threads the key service does not have, and which active keys no thread names (of
    creates that were refused or interrupted). A database (store.url) is examined first.

    With --repair these keys are retired: they only decrypt from then on. Do not use it on an older copy of the store,
    which does not have the newer threads. Exit status: 0 nothing is wrong now, 1 something is, 2 the server does not
    answer.
    """
    config = flags.load_for_server(url)
    page: dict[str, Any] = {}
    if config.store.url:
        page["database"] = _examined(config.store, progress=not json)
    client = AdminClient.from_config(config, url)
    page["readiness"] = client.call("GET", "/admin/readiness")
    found = conditions_of(page["readiness"])
    unseen = any(one.name == "key_service_unseen" for one in found)
    if not page["readiness"]["key_service"] and not unseen:
        if repair:
            page["repaired"] = client.call("POST", "/admin/orphaned_keys/retire", timeout_s=REPAIR_S_MAX)
        page["orphaned_keys"] = list(_listed(client, "/admin/orphaned_keys"))
        page["lost_keys"] = list(_listed(client, "/admin/lost_keys"))
    for name, member in (("keys_lost", "lost_keys"), ("keys_orphaned", "orphaned_keys")):
        if keys := page.get(member):
            found.append(state(name, count=f"{len(keys):,}"))
    page["conditions"] = by_severity(found)
    wrong = page.get("database", {}).get("problems") or unseen or any(one.severity != NOTICE for one in found)
    print_result(page, _lines(page, good=not wrong), json=json)
    return 1 if wrong else 0


def _listed(client: AdminClient, path: str) -> Iterator[dict[str, str]]:
    after: str | None = ""
    while after is not None:
        answer = client.call("GET", f"{path}?limit={KEYS_ASKED}{after and f'&after={after}'}")
        yield from answer["keys"]
        after = answer.get("next")


def _examined(store: StoreSection, *, progress: bool) -> dict[str, Any]:
    """The page of the database, printed at once: the server may not answer."""
    try:
        tables = places.module_of(store.url, "tables")
        page = dict(msgspec.to_builtins(asyncio.run(tables.examine(store.url, single_node=store.single_node))))
    except StoreUnavailableError as error:
        page = {"problems": [error.explained]}
    except FormatError as error:
        page = {"problems": [str(error)]}
    if progress and "schema" in page:
        standbys = f"synchronous standbys {page['standbys']}" if page["standbys"] else "no synchronous standby"
        if page["standbys"]:
            known = page["connected"] is not None
            standbys += f" ({page['connected']} connected)" if known else f" ({NOT_SEEN})"
        print(f"database: schema {page['schema']}, takes writes, {standbys}, {page['tls'] or 'a Unix socket'}")
    for problem in page["problems"] if progress else ():
        print(f"problem: {clean(problem)}")
    return page


def _lines(page: dict[str, Any], *, good: bool) -> Iterator[str]:
    yield from condition_lines(page["conditions"])
    repaired, orphans, lost = page.get("repaired"), page.get("orphaned_keys", []), page.get("lost_keys", [])
    for key in lost[:SHOWN_MAX]:
        yield f"lost key: {key['key_id']} of thread {key['thread_id']}"
    if len(lost) > SHOWN_MAX:
        yield f"and {len(lost) - SHOWN_MAX:,} more"
    if repaired and repaired["retired"]:
        yield f"retired: {counted(repaired['retired'], 'key')} that no thread names"
    for key in orphans[:SHOWN_MAX]:
        yield f"orphaned key: {key['key_id']} of thread {key['thread_id']}, made {key['created_at']}"
    if len(orphans) > SHOWN_MAX:
        yield f"and {len(orphans) - SHOWN_MAX:,} more"
    if orphans and repaired and repaired["why"]:
        yield f"  do: {repaired['why']}"
    if good:
        yield "nothing is wrong"
