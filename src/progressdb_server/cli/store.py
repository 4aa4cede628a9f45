"""`progressdb store`: the tables of a store in PostgreSQL.

Owns: the two commands and their flags. They run as the role that owns the tables, which no message server needs. The
tables are those of store/postgres.py.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from progressdb_server.cli.flags import CommandError, ConfigFile, load_config
from progressdb_server.store import directory
from progressdb_server.store.model import FormatError

app = App(name="store", help="Make or upgrade the tables of a store in PostgreSQL.", version_flags=[])

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
) -> int:
    """Make the tables in an empty database."""
    try:
        asyncio.run(directory.make_shared(_url(url, config), role))
    except FormatError as error:
        raise CommandError(str(error), missing=True) from None
    print("the store is made")
    return 0


@app.command(name="upgrade")
def upgrade(*, url: Url = None, config: ConfigFile = None) -> int:
    """Bring the tables to this version. Servers of an earlier version write nothing from then on."""
    try:
        before, after = asyncio.run(directory.upgrade_shared(_url(url, config)))
    except FormatError as error:
        raise CommandError(str(error), missing=True) from None
    print(f"the store has schema {after}" + ("" if after == before else f", and had {before}"))
    return 0


def _url(url: str | None, config: ConfigFile) -> str:
    """Raises CommandError."""
    found = url or load_config(config=config, with_data=False).config.store.url
    if not found:
        raise CommandError("no database is named: use --url, PROGRESSDB_STORE_URL or store.url", missing=True)
    return found
