"""`progressdb store`: the tables of a store in PostgreSQL, and copies of whole stores.

Owns: the commands and their flags. They run as the role that owns the tables, which no message server needs. The tables
are those of store/postgres/tables.py, the steps of a copy those of store/copying.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from minikms.commands.output import counted, print_result, progress_bar
from minikms.commands.usage import EXIT_FAILED, CommandError
from progressdb_server.cli.flags import ConfigFile, Json, StoreFlags
from progressdb_server.store import copying, places
from progressdb_server.store.model import StoreLockedError

app = App(name="store", help="Make or upgrade the tables of a store in PostgreSQL, or copy a store.", version_flags=[])

Url = Annotated[
    str | None,
    Parameter(help="postgresql://… of the role that owns the tables, without a password [PROGRESSDB_STORE_URL]."),
]


@app.command(name="init")
def init(
    *,
    url: Url = None,
    role: Annotated[
        str, Parameter(help="The role of the message servers, which may not change the tables.", show_default=False)
    ] = "",
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Make the tables in an empty database."""
    store_url = _url(url, config)
    asyncio.run(places.module_of(store_url, "tables").init(store_url, role))
    print_result({"made": True}, "the store is made", json=json)


@app.command(name="upgrade")
def upgrade(*, url: Url = None, config: ConfigFile = None, json: Json = False) -> None:
    """Bring the tables to this version. Servers of an earlier version write nothing from then on."""
    store_url = _url(url, config)
    before, after = asyncio.run(places.module_of(store_url, "tables").upgrade(store_url))
    text = f"the store has schema {after}" + ("" if after == before else f", and had {before}")
    print_result({"schema": after, "before": before}, text, json=json)


@app.command(name="copy")
def copy(
    *,
    source: Annotated[str, Parameter(name="--from", help="The store: postgresql://… or the directory of its server.")],
    target: Annotated[str, Parameter(name="--to", help="postgresql://… with tables of `init`, or a new directory.")],
    json: Json = False,
) -> None:
    """Copy a whole store into an empty one, and compare both. No server may run on either.

    The same call continues a copy that was interrupted. Exit status: 0 copied, 1 not copied, 2 there is no store, the
    target holds another one, or a server runs.
    """
    old, new = (place if places.is_url(place) else str(Path(place).absolute() / "store") for place in (source, target))
    try:
        with progress_bar("Copying", visible=not json) as progress:
            done = asyncio.run(copying.copy(old, new, progress))
    except StoreLockedError as error:
        raise CommandError(f"{error}: stop it, then run the command again") from None
    except copying.CopyError as error:
        raise CommandError(str(error), EXIT_FAILED) from None
    page = {"entries": done.entries, "digest": done.digest, "written": done.changed,
            "threads": done.counted.threads, "messages": done.counted.messages}  # fmt: skip
    lines = (
        f"{counted(done.counted.threads, 'thread')}, {counted(done.counted.messages, 'stored version')} of messages",
        f"{done.entries:,} entries are the same on both sides: {done.digest}",
    )
    print_result(page, lines, json=json)


def _url(url: str | None, config: ConfigFile) -> str:
    store_url = url or StoreFlags(config=config).load(with_data=False).config.store.url
    if not store_url:
        raise CommandError("no database is named: use --url, PROGRESSDB_STORE_URL or store.url")
    return store_url
