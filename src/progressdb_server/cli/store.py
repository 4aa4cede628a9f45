"""`progressdb store`: the tables of a store in PostgreSQL, and copies of whole stores.

Owns: the commands and their flags. They run as the role that owns the tables, which no message server needs. The tables
are those of store/tables.py, the steps of a copy those of store/copying.py.
"""

from __future__ import annotations

import asyncio
import json as encoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from progressdb_server.cli.flags import CommandError, ConfigFile, Json, load_config
from progressdb_server.store import copying, directory, offline
from progressdb_server.store.model import FormatError, StoreLockedError

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
) -> int:
    """Make the tables in an empty database."""
    try:
        asyncio.run(directory.of_database("tables").init(_url(url, config), role))
    except FormatError as error:
        raise CommandError(str(error), missing=True) from None
    print(encoder.dumps({"made": True}) if json else "the store is made")
    return 0


@app.command(name="upgrade")
def upgrade(*, url: Url = None, config: ConfigFile = None, json: Json = False) -> int:
    """Bring the tables to this version. Servers of an earlier version write nothing from then on."""
    try:
        before, after = asyncio.run(directory.of_database("tables").upgrade(_url(url, config)))
    except FormatError as error:
        raise CommandError(str(error), missing=True) from None
    said = f"the store has schema {after}" + ("" if after == before else f", and had {before}")
    print(encoder.dumps({"schema": after, "before": before}) if json else said)
    return 0


@app.command(name="copy")
def copy(
    *,
    source: Annotated[str, Parameter(name="--from", help="The store: postgresql://… or the directory of its server.")],
    target: Annotated[str, Parameter(name="--to", help="postgresql://… with tables of `init`, or a new directory.")],
    json: Json = False,
) -> int:
    """Copy a whole store into an empty one, and compare both. No server may run on either.

    The same call continues a copy that was interrupted. Exit status: 0 copied, 1 not copied, 2 there is no store, the
    target holds another one, or a server runs.
    """
    old, new = (place if offline.is_url(place) else str(Path(place).absolute() / "store") for place in (source, target))
    try:
        with _progress(bar=not json) as progress:
            done = asyncio.run(copying.copy(old, new, progress))
    except StoreLockedError as error:
        raise CommandError(f"{error}: stop it, then run the command again", missing=True) from None
    except FormatError as error:
        raise CommandError(str(error), missing=True) from None
    except copying.CopyError as error:
        raise CommandError(str(error)) from None
    page = {"entries": done.entries, "digest": done.digest, "written": done.changed,
            "threads": done.counted.threads, "messages": done.counted.messages}  # fmt: skip
    if json:
        print(encoder.dumps(page, indent=2))
    else:
        print(f"{done.counted.threads:,} threads, {done.counted.messages:,} stored versions of messages")
        print(f"{done.entries:,} entries are the same on both sides: {done.digest}")
    return 0


@contextmanager
def _progress(*, bar: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (bar and console.is_terminal), transient=True) as shown:
        task = shown.add_task("Copying", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _url(url: str | None, config: ConfigFile) -> str:
    """Raises CommandError."""
    found = url or load_config(config=config, with_data=False).config.store.url
    if not found:
        raise CommandError("no database is named: use --url, PROGRESSDB_STORE_URL or store.url", missing=True)
    return found
