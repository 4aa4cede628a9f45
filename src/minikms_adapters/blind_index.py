"""A column of SQLAlchemy for searches by equality: it holds a MAC of each value of an encrypted column.

Owns: the type `BlindIndex`, its MACs, and the event that fills it. Invariants: a MAC is bound to schema, table and
column; the key makes nothing but MACs and never leaves the key service; `sql_guard` permits equality with a value of
the column, and nothing else. It must never let a value in plaintext into a statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import VARBINARY, LargeBinary, event, inspect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator, TypeEngine

from minikms import api
from minikms_adapters.equality import Normalization, index_values, macs
from minikms_adapters.errors import NotSearchableError
from minikms_adapters.records import KmsClient
from minikms_adapters.sqlalchemy import MYSQL, Encrypted

_EQUALITY = (operators.eq, operators.ne, operators.in_op, operators.not_in_op, operators.is_, operators.is_not)


class BlindIndex(Encrypted):
    """A column of MACs. `key` names the key, as that of the encrypted column; a session fills it from the attribute
    `source`. `normalization` says which texts are equal: `nfc`, `casefold`, or the same characters. A read value is the
    MAC.

        email_index: Mapped[bytes] = mapped_column(BlindIndex(kms, key="users.email", source="email"), unique=True)
    """

    cache_ok = True
    comparable = True
    opens = False

    def __init__(
        self, kms: KmsClient, *, key: str, source: str | None = None, normalization: Normalization = ""
    ) -> None:
        super().__init__(kms, key=key)
        self.source = source
        self.normalization = normalization
        self.values = index_values("sqlalchemy", "sql", key, normalization)

    class EqualityComparator(Encrypted.Comparator):
        def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
            if op not in _EQUALITY:
                raise NotSearchableError("a blind index can only be searched by equality")
            return TypeDecorator.Comparator.operate(self, op, *other, **kwargs)

    comparator_factory = EqualityComparator

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        super().load_dialect_impl(dialect)
        size = api.MAC_BYTES  # MySQL's index needs it
        return dialect.type_descriptor(VARBINARY(size) if dialect.name in MYSQL else LargeBinary(size))

    def _result(self, value: Any) -> Any:
        return value

    def sealed(self, values: Sequence[tuple[Encrypted, Any]]) -> list[bytes]:
        encoded = [kind.values.encode(kind.names, value) for kind, value in values]
        return self.run(macs([(place, plaintext) for _, place, plaintext in encoded]))


@event.listens_for(Mapper, "before_insert")
@event.listens_for(Mapper, "before_update")
def _fill(mapper: Mapper[Any], connection: object, target: Any) -> None:
    for each in mapper.column_attrs:
        kind = each.columns[0].type
        if isinstance(kind, BlindIndex) and kind.source and inspect(target).attrs[kind.source].history.has_changes():
            setattr(target, each.key, getattr(target, kind.source))
