"""Fields of Django models whose values are encrypted.

Owns: `EncryptedField`, with one key for the field or one for each owner of a row, and what a query may do with it.
Invariants: a value is bound to table, column and owner; what is written is a value, never an SQL expression; the column
may be selected and tested for NULL, and everywhere else its SQL names a function that no database has. It must never
return what it can't open.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import uuid
from collections.abc import Iterator
from typing import Any, Final

from django.conf import settings
from django.core import checks
from django.core.exceptions import FieldError
from django.db.models import BinaryField, Case, F, Field, TextField, Value, When
from django.db.models.expressions import Col
from django.db.models.functions import Cast
from django.db.models.lookups import Exact, IsNull
from django.db.models.query_utils import DeferredAttribute

from minikms_adapters.errors import NotSearchableError, NotSupportedError, WrongPlaceError
from minikms_adapters.records import ColumnValues, Owned, Receipt, RecordSealer, StepRunner, column_thread

__all__ = ["EncryptedField", "Owned", "destroy_key"]

_NOWHERE: Final = "an_encrypted_column_can_only_be_selected"
_KINDS: Final[dict[str, type]] = {
    "BinaryField": bytes,
    "BooleanField": bool,
    "DateField": datetime.date,
    "DateTimeField": datetime.datetime,
    "DecimalField": decimal.Decimal,
    "FloatField": float,
    "JSONField": object,
    "TimeField": datetime.time,
    "UUIDField": uuid.UUID,
}
"""By a field's internal type; names with `Integer` are numbers, others text."""


class _Attribute(DeferredAttribute):
    """Compares the owner of a text with that of its row, whenever the text is read."""

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        value = super().__get__(instance, cls)
        owner = None if instance is None else instance.__dict__.get(self.field.key_of)
        if isinstance(value, Owned) and owner is not None and value.owner != str(owner):
            raise WrongPlaceError(f"{'.'.join(self.field.names)} of owner {owner}")
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.field.attname] = value


class EncryptedField(BinaryField):
    """A field that the database holds encrypted. `of` is the field that the values would have otherwise. Either `key`
    names the key of all values, or `key_of` the attribute of the model that names the owner; then the values are text.
    The setting `MINIKMS_CLIENT` is a `minikms.Client`.
    """

    descriptor_class = _Attribute

    def __init__(self, of: Field | None = None, *, key: str | None = None, key_of: str | None = None, **options: Any):
        if any(options.get(name) for name in ("unique", "primary_key", "db_index")) or "db_default" in options:
            raise NotSupportedError("an encrypted field can't be unique, a key, indexed or made by the database")
        self.of, self.key, self.key_of = of or TextField(), key, key_of
        internal = self.of.get_internal_type()
        kind = int if "Integer" in internal else _KINDS.get(internal, str)
        self._values = ColumnValues.of("django", "django", kind, key, key_of)
        self._sealer = RecordSealer()
        super().__init__(**{"editable": True, **options})

    def deconstruct(self) -> Any:
        name, path, args, options = super().deconstruct()
        return name, path, args, {**options, "of": self.of, "key": self.key, "key_of": self.key_of, "editable": True}

    def check(self, **kwargs: Any) -> list[Any]:
        meta = self.model._meta
        named = [*meta.unique_together, *(getattr(each, "fields", ()) for each in (*meta.constraints, *meta.indexes))]
        used = any(self.name in names for names in named) or self.name in (each.lstrip("-") for each in meta.ordering)
        found = [checks.Error("an encrypted field can't be unique, indexed or an order", obj=self, id="minikms.E001")]
        return [*super().check(**kwargs), *(found if used else [])]

    # --- queries ---

    def get_col(self, alias: Any, output_field: Any = None) -> Any:
        return _Column(alias, self, output_field)

    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        """Only what is selected comes here, as SQL."""
        query = compiler.query
        compared = query.subquery or (query.distinct and not query.distinct_fields) or isinstance(query.group_by, tuple)
        if compared or (query.combinator and not query.combinator_all) or any(_encrypted_orders(query)):
            raise NotSearchableError("an encrypted field can't be compared, so it is not in such a query")
        return sql.removeprefix(_NOWHERE), params

    def get_lookup(self, lookup_name: str) -> Any:
        return {"isnull": _IsNull, "exact": _Exact}.get(lookup_name) or self.get_transform(lookup_name)

    def get_transform(self, lookup_name: str) -> Any:
        raise NotSearchableError("an encrypted field can only be tested for NULL")

    # --- values ---

    @property
    def names(self) -> tuple[str, str]:
        return self.model._meta.db_table, self.column

    def pre_save(self, model_instance: Any, add: bool) -> Any:
        value = super().pre_save(model_instance, add)
        if self.key_of is None or not isinstance(value, str):
            return value
        owner = getattr(model_instance, self.key_of)
        if owner is None:
            raise NotSupportedError(f"{self.name} can't be encrypted: the row has no {self.key_of}")
        return Owned(value, owner)

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        """Also of each value of a `bulk_update`, whose expression is the only one that is let through."""
        if hasattr(value, "as_sql"):
            if not self._holds_values(value):
                raise NotSupportedError(f"{self.name} is set to a value: the database would hold this in plaintext")
            return value
        return self.get_db_prep_value(value, connection)

    def _holds_values(self, found: Any) -> bool:
        if isinstance(found, Value):
            return found.value is None or found._output_field_or_none is self
        parts = found.get_source_expressions() if isinstance(found, (Case, Cast)) else []
        results = [each.result if isinstance(each, When) else each for each in parts]
        return bool(results) and all(self._holds_values(each) for each in results)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        if value is None:
            return None
        prefix, place, plaintext = self._values.encode(self.names, self.of.to_python(value))
        [record] = StepRunner(settings.MINIKMS_CLIENT).run(self._sealer.seal([(place, plaintext)]))
        return connection.Database.Binary(prefix + record)

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        if value is None:
            return None
        place, record = self._values.locate(self.names, value)
        [plaintext] = StepRunner(settings.MINIKMS_CLIENT).run(self._sealer.open([(place, record)]))
        return self._values.decode(place, plaintext)

    def to_python(self, value: Any) -> Any:
        return self.of.to_python(value)

    def run_validators(self, value: Any) -> None:
        self.of.run_validators(value)

    def value_to_string(self, obj: Any) -> str:
        return str(self.value_from_object(obj))

    def formfield(self, **kwargs: Any) -> Any:
        shown = {"required": not self.blank, "label": self.verbose_name, "help_text": self.help_text}
        return self.of.formfield(**{**shown, **kwargs})


def _encrypted_orders(query: Any) -> Iterator[bool]:
    """Django names what is selected by its position or alias in ORDER BY and DISTINCT ON, without its SQL."""
    ordering = query.extra_order_by or query.order_by or (query.get_meta().ordering if query.default_ordering else ())
    for each in (*ordering, *query.distinct_fields):
        by = F(each.lstrip("-")) if isinstance(each, str) else getattr(each, "expression", each)
        with contextlib.suppress(FieldError):  # "?", and what `extra` selects
            yield isinstance(by.resolve_expression(query.clone())._output_field_or_none, EncryptedField)


class _Column(Col):
    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, params = super().as_sql(compiler, connection)
        return f"{_NOWHERE}({sql})", params


class _Exact(Exact):
    """Django makes IS NULL of a comparison with None."""

    def get_prep_lookup(self) -> None:
        if self.rhs is not None:
            raise NotSearchableError("an encrypted field can only be tested for NULL")


class _IsNull(IsNull):
    def process_lhs(self, compiler: Any, connection: Any, lhs: Any = None) -> Any:
        sql, params = super().process_lhs(compiler, connection, lhs)
        return sql.removeprefix(_NOWHERE), params


def destroy_key(*, key: str | None = None, owner: object = None) -> list[Receipt]:
    """Destroys the key of a field, or of an owner; what it encrypted can't be read any more. Gives the receipts."""
    return StepRunner(settings.MINIKMS_CLIENT).run(RecordSealer().destroy(column_thread("django", key, owner)))
