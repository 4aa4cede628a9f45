"""Columns of SQLAlchemy whose values are encrypted.

Owns: the type `Encrypted`, with one key for the column or one for each owner of a row, and the events that make
batches: what a statement sends is encrypted just before the driver gets it, and what a result holds is decrypted when
it was fetched. Invariants: a value is bound to table, column and owner; a parameter that was not encrypted is an object
that no driver takes; a value can't be compared, ordered or searched in the database. It must never return what it can't
open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Engine, LargeBinary, event, inspect
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator
from sqlalchemy.util import await_only

from minikms.client.verbs import AsyncRunner
from minikms_adapters.errors import NotSearchableError, NotSupportedError, PlaintextRecordError, WrongPlaceError
from minikms_adapters.records import KmsClient, Place, Receipt, Runner, Sealer, Steps, T, thread_name

OWNER_BYTES_MAX: Final = 1024
OWNED_MAGIC: Final = b"mKo1"
"""Begins a value with an owner: then the length of the owner's text (2 bytes), the text, and the record."""


class Owned(str):
    """A text with the owner of its row. A session makes it from the row; other statements must be given one."""

    __slots__ = ("owner",)

    def __new__(cls, text: str, owner: object) -> Owned:
        value = super().__new__(cls, text)
        value.owner = str(owner)
        return value

    owner: str


class Encrypted(TypeDecorator[str]):
    """A column of text that the database holds encrypted, as bytes.

    Either `key` names the key of all its values, or `key_of` the attribute of the mapped class that names the owner.
    `kms` is a `minikms.Client`, or with an asyncio engine a `minikms.AsyncClient`.

        notes: Mapped[str] = mapped_column(Encrypted(kms, key="customers.notes"))
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, kms: KmsClient, *, key: str | None = None, key_of: str | None = None) -> None:
        if (key is None) == (key_of is None):
            raise TypeError("give either key or key_of")
        super().__init__()
        self.kms = kms
        self.key = key
        self.key_of = key_of
        self._column: Column[Any] | None = None
        self._sealer = Sealer()
        self._runner = Runner(kms)

    class Comparator(TypeDecorator.Comparator[str]):
        """Only NULL can be asked for. SQLAlchemy itself compares columns in its dictionaries."""

        def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
            equality = op in (operators.eq, operators.ne) and (other[0] is None or isinstance(other[0], ColumnElement))
            if equality or op in (operators.is_, operators.is_not):
                return super().operate(op, *other, **kwargs)
            raise NotSearchableError("an encrypted column can only be compared with NULL")

        def reverse_operate(self, op: Any, other: Any, **kwargs: Any) -> Any:
            raise NotSearchableError("an encrypted column can only be compared with NULL")

    comparator_factory = Comparator

    @property
    def python_type(self) -> type[str]:
        return str

    def _set_parent(self, parent: Any, outer: bool = False, **kwargs: Any) -> None:
        """SQLAlchemy says here which column the type belongs to."""
        super()._set_parent(parent, outer=outer, **kwargs)
        if isinstance(parent, Column):
            self._column = parent

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        return self._pending

    def _pending(self, value: Any) -> Any:
        """Checks nothing: SQLAlchemy shows the parameters in an error that is raised here."""
        return None if value is None else _Pending(self, value)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        raise NotSupportedError("an encrypted value can't be part of a statement's text")

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        return self._result

    def _result(self, value: Any) -> Any:
        """Most values were opened with their result; a streamed one is opened here, alone."""
        if value is None:
            return None
        if isinstance(value, _Opened):
            return value.text
        return self.run(self.open([value]))[0]

    # --- steps ---

    def run(self, steps: Steps[T]) -> T:
        """With an asyncio client only where SQLAlchemy runs in the greenlet of an asyncio engine."""
        if isinstance(self.kms, AsyncRunner):
            found: T = await_only(self._runner.run_async(steps))
            return found
        return self._runner.run(steps)

    def seal(self, texts: list[str]) -> Steps[list[bytes]]:
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("the value of an encrypted column is a str")
        if self.key_of is not None and not all(isinstance(text, Owned) for text in texts):
            raise NotSupportedError("outside of a session's flush, give the value as Owned(text, owner)")
        values = [(self._place(text), text.encode("utf-8", "surrogatepass")) for text in texts]
        records = yield from self._sealer.seal(values)
        prefixes = [b"" if self.key_of is None else _owner_prefix(text) for text in texts]
        return [prefix + record for prefix, record in zip(prefixes, records, strict=True)]

    def open(self, values: list[Any]) -> Steps[list[str]]:
        named = [_split(bytes(value)) if isinstance(value, (bytes, memoryview)) else (None, value) for value in values]
        if any((owner is None) != (self.key_of is None) for owner, _ in named):
            raise PlaintextRecordError(self._name)
        texts = yield from self._sealer.open([(self._place_of(owner), record) for owner, record in named])
        decoded = [text.decode("utf-8", "surrogatepass") for text in texts]
        return [text if owner is None else Owned(text, owner) for text, (owner, _) in zip(decoded, named, strict=True)]

    def _place(self, text: str) -> Place:
        return self._place_of(text.owner if isinstance(text, Owned) and self.key_of is not None else None)

    def _place_of(self, owner: str | None) -> Place:
        thread = thread_name("sql", str(self.key)) if owner is None else thread_name("sql-owner", owner)
        record = self._name if owner is None else f"{self._name} of owner {owner}"
        return Place(thread, ("sqlalchemy", *self._name.split(".", 1), *(() if owner is None else (owner,))), record)

    @property
    def _name(self) -> str:
        if self._column is None or self._column.table is None:
            raise NotSupportedError("an encrypted type belongs to the column of a table")
        return f"{self._column.table.name}.{self._column.name}"


def destroy_key(kms: KmsClient, *, key: str | None = None, owner: object = None) -> list[Receipt]:
    """Destroys the key of a column, or of an owner; what it encrypted can't be read any more. Gives the receipts."""
    if (key is None) == (owner is None):
        raise TypeError("give either key or owner")
    thread = thread_name("sql", key) if key is not None else thread_name("sql-owner", str(owner))
    return Runner(kms).run(Sealer().destroy(thread))


def render_item(kind: str, item: object, context: object) -> str | bool:
    """For the `render_item` of Alembic's `context.configure`: migrations get an ordinary binary column."""
    return "sa.LargeBinary()" if kind == "type" and isinstance(item, Encrypted) else False


class _Pending:
    """A parameter that has to be encrypted. No driver knows how to send it."""

    def __init__(self, kind: Encrypted, text: str) -> None:
        self.kind = kind
        self.text = text
        self.sealed: bytes | None = None

    def __repr__(self) -> str:
        return "<a value to encrypt>"


class _Opened:
    """A value of a result that was decrypted."""

    def __init__(self, text: str) -> None:
        self.text = text


def _owner_prefix(text: str) -> bytes:
    if not isinstance(text, Owned):
        return b""
    owner = text.owner.encode()
    if len(owner) > OWNER_BYTES_MAX:
        raise NotSupportedError(f"an owner has at most {OWNER_BYTES_MAX} bytes")
    return OWNED_MAGIC + len(owner).to_bytes(2, "big") + owner


def _split(value: bytes) -> tuple[str | None, bytes]:
    if not value.startswith(OWNED_MAGIC):
        return None, value
    start = len(OWNED_MAGIC) + 2
    end = start + int.from_bytes(value[len(OWNED_MAGIC) : start], "big")
    return value[start:end].decode(errors="replace"), value[end:]


# --- batches ----------------------------------------------------------------------------------------------------------


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _encrypt_parameters(  # noqa: PLR0917 - the arguments are SQLAlchemy's
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """All values of a statement, with one batch for each column, also where the database gets row after row."""
    found = list(_each(parameters))
    if any(each.sealed is None for each in found):
        waiting: dict[int, list[_Pending]] = {}
        for each in {id(each): each for each in (*found, *_each(context.parameters))}.values():
            waiting.setdefault(id(each.kind), []).append(each)
        for group in waiting.values():
            kind = group[0].kind
            for each, sealed in zip(group, kind.run(kind.seal([each.text for each in group])), strict=True):
                each.sealed = sealed
    return statement, _replaced(parameters) if found else parameters


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
    """All values of a result, with one batch for each column. A result that is streamed is left to `_result`."""
    columns = getattr(getattr(context, "compiled", None), "_result_columns", None) or ()
    kinds = {index: each.type for index, each in enumerate(columns) if isinstance(each.type, Encrypted)}
    if not kinds or executemany or context._is_server_side or len(cursor.description or ()) != len(columns):
        return
    rows = [list(row) for row in cursor.fetchall()]
    for index, kind in kinds.items():
        stored = [row for row in rows if row[index] is not None]
        for row, text in zip(stored, kind.run(kind.open([row[index] for row in stored])), strict=True):
            row[index] = _Opened(text)
    buffer = [tuple(row) for row in rows]
    context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, cursor.description, buffer)


# --- owners -----------------------------------------------------------------------------------------------------------


def _owned_attributes(mapper: Mapper[Any]) -> list[tuple[str, str]]:
    """The attributes whose key is that of an owner, each with the attribute that names the owner."""
    found = [(each.key, each.columns[0].type) for each in mapper.column_attrs]
    return [(key, kind.key_of) for key, kind in found if isinstance(kind, Encrypted) and kind.key_of is not None]


@event.listens_for(Mapper, "before_insert")
@event.listens_for(Mapper, "before_update")
def _name_owner(mapper: Mapper[Any], connection: object, target: Any) -> None:
    """Gives each value that is written the owner of its row, and writes it anew when the owner changed."""
    for name, key_of in _owned_attributes(mapper):
        state = inspect(target)
        moved = state.persistent and state.attrs[key_of].history.has_changes()
        text = getattr(target, name) if moved else target.__dict__.get(name)
        if text is None:
            continue
        owner = getattr(target, key_of)
        if owner is None:
            raise NotSupportedError(f"{name} can't be encrypted: the row has no {key_of}")
        target.__dict__[name] = Owned(text, owner)
        if moved:
            flag_modified(target, name)


@event.listens_for(Mapper, "load")
def _check_owner(target: Any, context: object) -> None:
    _check(target)


@event.listens_for(Mapper, "refresh")
def _check_owner_again(target: Any, context: object, attributes: object) -> None:
    _check(target)


def _check(target: Any) -> None:
    """That each loaded value is of the row's owner, as far as that one is loaded."""
    mapper = inspect(type(target))
    for name, key_of in _owned_attributes(mapper):
        text, owner = target.__dict__.get(name), target.__dict__.get(key_of)
        if isinstance(text, Owned) and owner is not None and text.owner != str(owner) and not inspect(target).modified:
            raise WrongPlaceError(f"{mapper.local_table.name}.{name} of owner {owner}")
