"""Places: the URL of a database, or the directory of a store's files; which engine has it, and how it is opened.

Owns: the choice of an engine. Its package has the modules `opening` and `offline`; no other room names it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import Final

from progressdb_server.store.engine import Engine, Reader
from progressdb_server.store.model import FormatError
from progressdb_server.store.offline import Entries, View

DRIVER_MISSING: Final = (
    "a store in PostgreSQL needs its driver: install the wheel of progressdb-minikms with its extra `postgresql`"
)


def is_url(place: str) -> bool:
    """Whether it names a database, and no directory."""
    return "://" in place


def module_of(place: str, name: str) -> ModuleType:
    """A module of the engine's package, loaded only here: a driver is an extra. Raises FormatError without the one of
    PostgreSQL."""
    try:
        return import_module(f"progressdb_server.store.{'postgres' if is_url(place) else 'rocks'}.{name}")
    except ImportError:
        if not is_url(place):
            raise
        raise FormatError(DRIVER_MISSING) from None


def salvage_of(place: str) -> ModuleType | None:
    """What reads around damage in a store at the place (`store.rocks.salvage`); None for a database, which does."""
    return None if is_url(place) else module_of(place, "salvage")


async def open_engine(place: str, *, single_node: bool = False, make: bool = True) -> Engine:
    """Open a store, or unless `make` is false create one in an empty directory. `single_node`: one disk is enough. The
    caller ends it. Raises StoreLockedError, StoreUnavailableError, FormatError."""
    opening = module_of(place, "opening")
    engine: Engine = await opening.open_engine(place, single_node=single_node, make=make)
    return engine


def open_reader(path: str) -> AbstractContextManager[Reader]:
    """Open a snapshot of a store's files to read it, even while a server has the store open. Raises
    StoreUnavailableError, FormatError."""
    reader: AbstractContextManager[Reader] = module_of(path, "opening").open_reader(path)
    return reader


def open_view(place: str) -> AbstractAsyncContextManager[View]:
    """A view of a store that servers may have open. Raises FormatError, StoreUnavailableError."""
    view: AbstractAsyncContextManager[View] = module_of(place, "offline").view(place)
    return view


def alone(place: str) -> AbstractAsyncContextManager[Entries]:
    """The entries of a store that no server has open. Raises StoreLockedError, StoreUnavailableError, FormatError."""
    entries: AbstractAsyncContextManager[Entries] = module_of(place, "offline").alone(place)
    return entries


def open_copy(place: str, source: str) -> AbstractAsyncContextManager[Entries]:
    """The entries of a new store, or of one into which a copy of `source` has begun. It becomes a store at the end.
    Raises StoreLockedError, StoreUnavailableError, FormatError for a place that holds something else."""
    entries: AbstractAsyncContextManager[Entries] = module_of(place, "offline").open_copy(place, source)
    return entries
