"""Columns of SQLAlchemy whose values are encrypted.

Owns: the type `Encrypted`, with one key for the column or one for each owner of a row, and the events that make
batches: what a statement sends is encrypted just before the driver gets it, and what a result holds is decrypted when
it was fetched. Invariants: a value is bound to schema, table, column and owner; a parameter that was not encrypted is
an object that no driver takes; `sql_guard` decides what a statement may do with the column; no error of SQLAlchemy
shows a parameter of an engine that has such columns. It must never return what it can't open.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement, Connection, Engine, LargeBinary, Text, event, inspect
from sqlalchemy.dialects.mysql import LONGBLOB
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.engine.interfaces import Dialect, ExecuteStyle
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.sql import operators
from sqlalchemy.types import JSON, TypeDecorator, TypeEngine, to_instance
from sqlalchemy.util import await_only

from minikms.client.verbs import AsyncRunner
from minikms_adapters.errors import NotSearchableError, NotSupportedError, WrongPlaceError
from minikms_adapters.records import (
    ColumnValues,
    KmsClient,
    Owned,
    Receipt,
    RecordSealer,
    StepRunner,
    Steps,
    T,
    column_thread,
)
from minikms_adapters.sql_guard import Opaque, check_column

__all__ = ["Encrypted", "Owned", "adestroy_key", "destroy_key", "reencrypt", "render_item"]

REENCRYPT_ROWS: Final = 500
"""Rows that `reencrypt` reads at a time."""
MYSQL: Final = ("mysql", "mariadb")

_hiding: weakref.WeakSet[Dialect] = weakref.WeakSet()
"""Dialects with encrypted columns."""


class Encrypted(Opaque):
    """A column that the database holds encrypted, as bytes.

    Either `key` names the key of all its values, or `key_of` the attribute of the mapped class that names the owner.
    `of` is the type of the values, such as `Date` or `Enum(Color)`; with `key_of` it is text.
    `kms` is a `minikms.Client`, or with an asyncio engine a `minikms.AsyncClient`.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(
        self,
        kms: KmsClient,
        *,
        key: str | None = None,
        key_of: str | None = None,
        of: TypeEngine[Any] | type[TypeEngine[Any]] = Text,
    ) -> None:
        super().__init__()
        self.kms = kms
        self.key = key
        self.key_of = key_of
        self.of = to_instance(of)
        kind = object if isinstance(self.of, JSON) else self.of.python_type
        self.values = ColumnValues.of("sqlalchemy", "sql", kind, key, key_of)
        self.sealer = RecordSealer()
        self._runner = StepRunner(kms)

    class Comparator(TypeDecorator.Comparator[Any]):
        """The guard refuses what passes here. SQLAlchemy itself compares columns in its dictionaries."""

        def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
            equality = op in (operators.eq, operators.ne) and (other[0] is None or isinstance(other[0], ColumnElement))
            if equality or op in (operators.is_, operators.is_not):
                return super().operate(op, *other, **kwargs)
            raise NotSearchableError("an encrypted column can only be compared with NULL")

        reverse_operate = operate

    comparator_factory = Comparator
    opens = True
    """Whether values of a result are decrypted."""

    @property
    def python_type(self) -> type[Any]:
        return self.of.python_type

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        _hiding.add(dialect)
        # MySQL's BLOB ends at 64 KiB.
        return dialect.type_descriptor(LONGBLOB() if dialect.name in MYSQL else LargeBinary())

    def _set_parent(self, parent: Any, outer: bool = False, **kwargs: Any) -> None:
        """SQLAlchemy says here which column has the type."""
        super()._set_parent(parent, outer=outer, **kwargs)
        if not isinstance(parent, Column) or parent.type is not self or self._variant_mapping:
            raise NotSupportedError("an encrypted type is the whole type of a column, without variants")
        parent._on_table_attach(self._set_table)

    def _set_table(self, column: Column[Any], table: Any) -> None:
        """Gives the column a type of its own, so that several columns can be made with one."""
        check_column(column)
        own = self.copy()
        own.place = (*([table.schema] if table.schema else []), table.name, column.name)
        column.type = own

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Checks nothing: a statement that fails later shows this object only."""
        return lambda value: None if value is None else _Pending(self, value)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        raise NotSupportedError("an encrypted value can't be part of a statement's text")

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        return self._result

    def _result(self, value: Any) -> Any:
        """Most values were opened with their result; a streamed one is opened here, alone."""
        if value is None:
            return None
        if not isinstance(value, _Stored):
            value = _Stored(self, value)
            _open([value])
        return value.value

    # --- values ---

    def sealed(self, values: Sequence[tuple[Encrypted, Any]]) -> list[bytes]:
        """What the database gets for values of columns of this class and client."""
        encoded = [kind.values.encode(kind.names, value) for kind, value in values]
        records = self.run(self.sealer.seal([(place, plaintext) for _, place, plaintext in encoded]))
        return [prefix + record for (prefix, _, _), record in zip(encoded, records, strict=True)]

    def run(self, steps: Steps[T]) -> T:
        """With an asyncio client only where SQLAlchemy runs in the greenlet of an asyncio engine."""
        if isinstance(self.kms, AsyncRunner):
            result: T = await_only(self._runner.run_async(steps))
            return result
        return self._runner.run(steps)

    @property
    def names(self) -> tuple[str, ...]:
        if self.place is None:
            raise NotSupportedError("an encrypted type belongs to the column of a table")
        return self.place

    def move(self, stored: Sequence[Any]) -> list[bytes | None]:
        """The stored values that are under a replaced key, under the current one; None for the others."""
        located = [self.values.locate(self.names, value) for value in stored]
        moved = self.run(self.sealer.move(located))
        return [
            None if record is None else bytes(value)[: len(value) - len(before)] + record
            for value, (_, before), record in zip(stored, located, moved, strict=True)
        ]


def destroy_key(kms: KmsClient, *, key: str | None = None, owner: object = None) -> list[Receipt]:
    """Destroys the key of a column, or of an owner; what it encrypted can't be read any more. Gives the receipts."""
    return StepRunner(kms).run(RecordSealer().destroy(column_thread("sql", key, owner)))


async def adestroy_key(kms: KmsClient, *, key: str | None = None, owner: object = None) -> list[Receipt]:
    """The same, with either client."""
    return await StepRunner(kms).run_async(RecordSealer().destroy(column_thread("sql", key, owner)))


def reencrypt(connection: Connection, column: Any) -> int:
    """Encrypts the values that are under a replaced key under the current one, and gives their number. The plaintext
    does not leave the key service. A value whose key was destroyed stays. With an asyncio engine:
    `await connection.run_sync(reencrypt, Customer.notes)`.
    """
    column = column.__clause_element__() if hasattr(column, "__clause_element__") else column
    kind: Encrypted = column.type
    keys = [sa.column(each.name, each.type) for each in column.table.primary_key]
    stored = sa.column(column.name, LargeBinary())
    table = sa.table(column.table.name, *keys, stored, schema=column.table.schema)
    page = sa.select(*keys, stored).select_from(table).where(stored.is_not(None)).order_by(*keys).limit(REENCRYPT_ROWS)
    count = 0
    rows = connection.execute(page).all()
    while rows:
        for row, moved in zip(rows, kind.move([row[-1] for row in rows]), strict=True):
            if moved is not None:
                same = [each == value for each, value in zip((*keys, stored), row, strict=True)]
                count += connection.execute(sa.update(table).where(*same).values({stored: moved})).rowcount
        rows = connection.execute(page.where(sa.tuple_(*keys) > sa.tuple_(*rows[-1][:-1]))).all()
    return count


def render_item(kind: str, item: object, context: Any) -> str | bool:
    """For the `render_item` of Alembic's `context.configure`: migrations get an ordinary binary column."""
    if kind != "type" or not isinstance(item, Encrypted):
        return False
    if context.dialect is None or context.dialect.name not in MYSQL:
        return "sa.LargeBinary()"
    context.imports.add("from sqlalchemy.dialects import mysql")
    return "mysql.LONGBLOB()"


@dataclass(slots=True, eq=False, repr=False)
class _Pending:
    """A parameter that has to be encrypted. No driver knows how to send it."""

    kind: Encrypted
    value: Any
    sealed: bytes | None = None

    def __repr__(self) -> str:
        return "<a value to encrypt>"


@dataclass(slots=True, eq=False, repr=False)
class _Stored:
    """A value of a result. `_open` replaces the record by what it holds."""

    kind: Encrypted
    value: Any


V = TypeVar("V", _Pending, _Stored)


# --- batches ----------------------------------------------------------------------------------------------------------


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _encrypt_parameters(  # noqa: PLR0917 - the arguments are SQLAlchemy's
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """All values of a statement with one batch, also where the database gets row after row."""
    rows = list(_each(parameters))
    if any(each.sealed is None for each in rows):
        _seal({id(each): each for each in (*rows, *_each(context.parameters))}.values())
    return statement, _replaced(parameters) if rows else parameters


def _seal(pending: Iterable[_Pending]) -> None:
    for kind, group in _by_client(pending):
        for each, sealed in zip(group, kind.sealed([(each.kind, each.value) for each in group]), strict=True):
            each.sealed = sealed


def _open(stored: Iterable[_Stored]) -> None:
    for kind, group in _by_client(stored):
        located = [each.kind.values.locate(each.kind.names, each.value) for each in group]
        plaintexts = kind.run(kind.sealer.open(located))
        for each, (place, _), plaintext in zip(group, located, plaintexts, strict=True):
            each.value = each.kind.values.decode(place, plaintext)


def _by_client(values: Iterable[V]) -> Iterator[tuple[Encrypted, list[V]]]:
    """The values of each client and class of types, and a type that has them."""
    groups: dict[tuple[int, type], list[V]] = {}
    for value in values:
        groups.setdefault((id(value.kind.kms), type(value.kind)), []).append(value)
    return ((group[0].kind, group) for group in groups.values())


def _each(parameters: Any) -> Iterator[_Pending]:
    if isinstance(parameters, _Pending):
        yield parameters
    elif isinstance(parameters, (list, tuple)):
        for each in parameters:
            yield from _each(each)
    elif isinstance(parameters, dict):
        yield from (each for each in parameters.values() if isinstance(each, _Pending))


def _replaced(parameters: Any) -> Any:
    if isinstance(parameters, _Pending):
        return parameters.sealed
    if isinstance(parameters, (list, tuple)):
        return type(parameters)([_replaced(each) for each in parameters])
    if isinstance(parameters, dict):
        return {name: _replaced(each) for name, each in parameters.items()}
    return parameters


@event.listens_for(Engine, "after_cursor_execute")
def _decrypt_result(  # noqa: PLR0917 - the arguments are SQLAlchemy's
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    """All values of a result with one batch. A result that is streamed is left to `_result`."""
    kinds = _kinds(context, cursor)
    if not kinds or context._is_server_side:
        return
    if context.execute_style is ExecuteStyle.INSERTMANYVALUES:
        opened = _opened(type(context).fetchall_for_returning(context, cursor), kinds)
        context.fetchall_for_returning = lambda cursor: opened
    elif not executemany:
        rows = _opened(cursor.fetchall(), kinds)
        context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, cursor.description, rows)


def _kinds(context: Any, cursor: Any) -> dict[int, Encrypted]:
    """The encrypted columns of a result, by their positions."""
    compiled: Any = getattr(context, "compiled", None)
    columns = getattr(compiled, "_result_columns", None) or ()
    named = {each.keyname: each.type for each in columns if getattr(each.type, "opens", False)}
    if not named or not cursor.description:
        return {}
    if compiled._ordered_columns or compiled._textual_ordered_columns:
        return {index: each.type for index, each in enumerate(columns) if getattr(each.type, "opens", False)}
    names = [each[0] for each in cursor.description]
    return {index: named[name] for index, name in enumerate(names) if name in named}


def _opened(rows: Sequence[Any], kinds: dict[int, Encrypted]) -> list[tuple[Any, ...]]:
    lists = [list(row) for row in rows]
    stored: list[_Stored] = []
    for index, kind in kinds.items():
        for row in lists:
            if row[index] is not None:
                row[index] = each = _Stored(kind, row[index])
                stored.append(each)
    _open(stored)
    return [tuple(row) for row in lists]


@event.listens_for(Engine, "handle_error")
def _hide_parameters(context: Any) -> None:
    if context.dialect in _hiding and context.sqlalchemy_exception is not None:
        context.sqlalchemy_exception.hide_parameters = True


# --- owners -----------------------------------------------------------------------------------------------------------


def _owned_attributes(mapper: Mapper[Any]) -> list[tuple[str, str]]:
    """The attributes whose key is that of an owner, each with the attribute that names the owner."""
    columns = [(each.key, each.columns[0].type) for each in mapper.column_attrs]
    return [(key, kind.key_of) for key, kind in columns if isinstance(kind, Encrypted) and kind.key_of is not None]


@event.listens_for(Mapper, "mapper_configured")
def _load_owner_before_a_change(mapper: Mapper[Any], owning: type[Any]) -> None:
    """So that the owner in the database is known when a row changes its owner."""
    for _, key_of in _owned_attributes(mapper):
        event.listen(getattr(owning, key_of), "set", lambda *_: None, active_history=True)


@event.listens_for(Mapper, "before_insert")
@event.listens_for(Mapper, "before_update")
def _name_owner(mapper: Mapper[Any], connection: object, target: Any) -> None:
    """Gives each value that is written the owner of its row, and writes it anew when the owner changed."""
    for name, key_of in _owned_attributes(mapper):
        state = inspect(target)
        moved = state.persistent and state.attrs[key_of].history.has_changes()
        text = getattr(target, name) if moved else target.__dict__.get(name)
        if not isinstance(text, str):
            continue
        owner = getattr(target, key_of)
        if owner is None:
            raise NotSupportedError(f"{name} can't be encrypted: the row has no {key_of}")
        if moved and name not in state.committed_state:
            _check(target, must_know=True)
        target.__dict__[name] = Owned(text, owner)
        if moved:
            flag_modified(target, name)


@event.listens_for(Mapper, "load")
@event.listens_for(Mapper, "refresh")
def _check(target: Any, *_: object, must_know: bool = False) -> None:
    """Checks that each loaded text is of the row's owner in the database, as far as that one is loaded."""
    mapper, state = inspect(type(target)), inspect(target)
    for name, key_of in _owned_attributes(mapper):
        text = target.__dict__.get(name)
        if not isinstance(text, Owned) or name in state.committed_state:
            continue
        owner = target.__dict__.get(key_of)
        if key_of in state.committed_state:
            [owner] = state.attrs[key_of].history.deleted or [None]
        if must_know if owner is None else text.owner != str(owner):
            raise WrongPlaceError(f"{mapper.local_table.name}.{name} of owner {owner}")
