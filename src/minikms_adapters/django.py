"""Fields of Django models whose values are encrypted, and fields of MACs by which such a value is found.

Owns: `EncryptedField`, with one key for the field or one for each owner of a row, `BlindIndexField`, and what a query
may do with them. Invariants: a value is bound to table, column and owner; what is written is a value, never an SQL
expression; the column may be selected and tested for NULL, that of an index also for equality with a text, and
everywhere else its SQL names a function that no database has. It must never return what it can't open.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import uuid
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, ClassVar, Final

from django.conf import settings
from django.core import checks
from django.core.exceptions import FieldError
from django.db import DEFAULT_DB_ALIAS, transaction
from django.db.models import BinaryField, Case, F, Field, Lookup, QuerySet, TextField, Value, When
from django.db.models.expressions import Col
from django.db.models.functions import Cast
from django.db.models.lookups import Exact, In, IsNull
from django.db.models.query_utils import DeferredAttribute
from django.db.models.signals import pre_save

from minikms import api
from minikms_adapters.equality import Normalization, index_values, macs
from minikms_adapters.errors import NotSearchableError, NotSupportedError, WrongPlaceError
from minikms_adapters.records import ColumnValues, Owned, Receipt, RecordSealer, StepRunner, column_thread

__all__ = ["BlindIndexField", "BlindIndexQuerySet", "EncryptedField", "Owned", "destroy_key", "fill_index"]

FILL_ROWS: Final = 500
"""Rows that `fill_index` reads at a time."""
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
"""The type for each internal type of a field; names with `Integer` are numbers, others text."""


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


class _Column(Col):
    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, params = super().as_sql(compiler, connection)
        return f"{_NOWHERE}({sql})", params


class _ColumnLookup(Lookup):
    """A lookup that may use the column."""

    def process_lhs(self, compiler: Any, connection: Any, lhs: Any = None) -> Any:
        sql, params = super().process_lhs(compiler, connection, lhs)
        return sql.removeprefix(_NOWHERE), params


class _IsNull(_ColumnLookup, IsNull):
    pass


class _Exact(Exact):
    """Django makes IS NULL of a comparison with None."""

    def get_prep_lookup(self) -> None:
        if self.rhs is not None:
            raise NotSearchableError(EncryptedField.searches)


class _Equals(_ColumnLookup, Exact):
    def get_prep_lookup(self) -> Any:
        _check_texts([self.rhs])
        return self.rhs


class _IsAmong(_ColumnLookup, In):
    rhs: Any

    def get_prep_lookup(self) -> Any:
        self.rhs = [self.rhs] if hasattr(self.rhs, "resolve_expression") else list(self.rhs)
        _check_texts(self.rhs)
        return super().get_prep_lookup()

    def get_db_prep_lookup(self, value: Any, connection: Any) -> Any:
        return "%s", [connection.Database.Binary(mac) for mac in self.lhs.output_field.macs(value)]


class _OpaqueField(BinaryField):
    """A field whose column a query can select, and use in `lookups`. `searches` says which these are."""

    lookups: ClassVar[dict[str, Any]]
    searches: ClassVar[str]

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
        return self.lookups.get(lookup_name) or self.get_transform(lookup_name)

    def get_transform(self, lookup_name: str) -> Any:
        raise NotSearchableError(self.searches)

    @property
    def names(self) -> tuple[str, str]:
        return self.model._meta.db_table, self.column

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        """Prepares a value to be saved, also each value of a `bulk_update`, whose expression is the only one that is
        let through.
        """
        if hasattr(value, "as_sql"):
            if not self._holds_values(value):
                raise NotSupportedError(f"{self.name} is set to a value: the database would hold this in plaintext")
            return value
        return self.get_db_prep_value(value, connection)

    def _holds_values(self, values: Any) -> bool:
        if isinstance(values, Value):
            return values.value is None or values._output_field_or_none is self
        results = _results(values)
        return bool(results) and all(self._holds_values(each) for each in results)


class EncryptedField(_OpaqueField):
    """A field that the database holds encrypted. `of` is the field that the values would have otherwise. Either `key`
    names the key of all values, or `key_of` the attribute of the model that names the owner; then the values are text.
    The setting `MINIKMS_CLIENT` is a `minikms.Client`.
    """

    descriptor_class = _Attribute
    lookups: ClassVar = {"isnull": _IsNull, "exact": _Exact}
    searches = "an encrypted field can only be tested for NULL"

    def __init__(self, of: Field | None = None, *, key: str | None = None, key_of: str | None = None, **options: Any):
        if any(options.get(name) for name in ("unique", "primary_key", "db_index")) or "db_default" in options:
            raise NotSupportedError("an encrypted field can't be unique, a key, indexed or made by the database")
        self.of, self.key, self.key_of = of or TextField(), key, key_of
        internal = self.of.get_internal_type()
        kind = int if "Integer" in internal else _KINDS.get(internal, str)
        self.holds_text = kind is str
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
        errors = [checks.Error("an encrypted field can't be unique, indexed or an order", obj=self, id="minikms.E001")]
        return [*super().check(**kwargs), *(errors if used else [])]

    # --- values ---

    def pre_save(self, model_instance: Any, add: bool) -> Any:
        value = super().pre_save(model_instance, add)
        if self.key_of is None or not isinstance(value, str):
            return value
        owner = getattr(model_instance, self.key_of)
        if owner is None:
            raise NotSupportedError(f"{self.name} can't be encrypted: the row has no {self.key_of}")
        return Owned(value, owner)

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
        options = {"required": not self.blank, "label": self.verbose_name, "help_text": self.help_text}
        return self.of.formfield(**{**options, **kwargs})


def _encrypted_orders(query: Any) -> Iterator[bool]:
    """Django names what is selected by its position or alias in ORDER BY and DISTINCT ON, without its SQL."""
    ordering = query.extra_order_by or query.order_by or (query.get_meta().ordering if query.default_ordering else ())
    for each in (*ordering, *query.distinct_fields):
        by = F(each.lstrip("-")) if isinstance(each, str) else getattr(each, "expression", each)
        with contextlib.suppress(FieldError):  # "?", and what `extra` selects
            yield isinstance(by.resolve_expression(query.clone())._output_field_or_none, _OpaqueField)


# --- equality ---------------------------------------------------------------------------------------------------------


class _Mac(bytes):
    """A MAC, which is no text: it is compared and written as it is."""


def _check_texts(values: Any) -> None:
    if not all(value is None or isinstance(value, (str, _Mac)) for value in values):
        raise NotSearchableError(f"{BlindIndexField.searches}: give texts")


class _Text(Value):
    """The text of a row that is saved, in the place of its MAC. An INSERT asks for the MACs of all its rows at once."""

    def resolve_expression(self, query: Any = None, *args: Any, **kwargs: Any) -> Any:
        field = self.output_field
        known = query.__dict__.setdefault("minikms_macs", {})
        if (field, self.value) not in known:
            texts = list({self.value, *(getattr(row, field.source) for row in getattr(query, "objs", ()))})
            known |= {(field, text): mac for text, mac in zip(texts, field.macs(texts), strict=True)}
        return Value(known[field, self.value], output_field=field)


class BlindIndexField(_OpaqueField):
    """A field of MACs, by which a row is found whose encrypted field `source` holds an equal text. `key` names the key,
    as that of `source`. `normalization` says which texts are equal: `nfc`, `casefold`, or the same characters. The
    model's managers are those of `BlindIndexQuerySet`.
    """

    lookups: ClassVar = {"isnull": _IsNull, "exact": _Equals, "in": _IsAmong}
    searches = "a blind index can only be searched by equality with a text"

    def __init__(self, *, source: str, key: str, normalization: Normalization = "", **options: Any) -> None:
        if options.get("primary_key") or "db_default" in options:
            raise NotSupportedError("a blind index can't be a primary key or made by the database")
        self.source, self.key, self.normalization = source, key, normalization
        self._values = index_values("django", "django", key, normalization)
        super().__init__(**options)

    def deconstruct(self) -> Any:
        name, path, args, options = super().deconstruct()
        own = {"source": self.source, "key": self.key, "normalization": self.normalization}
        return name, path, args, {**options, **own}

    def contribute_to_class(self, cls: Any, name: str, private_only: bool = False) -> None:
        super().contribute_to_class(cls, name, private_only)
        pre_save.connect(self._check_update_fields, sender=cls)

    def _check_update_fields(self, update_fields: Any = None, **_: Any) -> None:
        if update_fields and self.source in update_fields and self.name not in update_fields:
            raise NotSupportedError(f"update_fields has {self.source} without {self.name}, which follows it")

    def check(self, **kwargs: Any) -> list[Any]:
        meta = self.model._meta
        source = {each.name: each for each in meta.local_fields}.get(self.source)
        named = [*meta.unique_together, *(getattr(each, "fields", ()) for each in (*meta.constraints, *meta.indexes))]
        plain = [each for each in meta.managers if not isinstance(each.get_queryset(), BlindIndexQuerySet)]
        problems = super().check(**kwargs)
        if not isinstance(source, EncryptedField) or not source.holds_text:
            problems.append(
                checks.Error("the source of a blind index is an encrypted field of text", obj=self, id="minikms.E002")
            )
        if plain:
            hint = "write: objects = BlindIndexQuerySet.as_manager()"
            problems.append(checks.Error("update() of a manager would not fill the index", hint, self, "minikms.E003"))
        if not self.unique and not self.db_index and not any(self.name in names for names in named):
            problems.append(
                checks.Warning("a search reads the whole table: unique or db_index", obj=self, id="minikms.W001")
            )
        return problems

    def db_type(self, connection: Any) -> Any:
        """MySQL's index needs a length."""
        return f"varbinary({api.MAC_BYTES})" if connection.vendor == "mysql" else super().db_type(connection)

    def macs(self, texts: Sequence[Any]) -> list[_Mac | None]:
        """With one request. None stays None, and a MAC stays a MAC."""
        wanted = {
            text: self._values.encode(self.names, text)[1:] for text in texts if not isinstance(text, (_Mac, NoneType))
        }
        by_text = dict(zip(wanted, StepRunner(settings.MINIKMS_CLIENT).run(macs(list(wanted.values()))), strict=True))
        return [_Mac(by_text[text]) if text in by_text else text for text in texts]

    def prepared(self, value: Any) -> Any:
        """The expression of a `bulk_update` with a MAC in the place of each text. Other values stay."""
        texts = list(_values_of(value)) if isinstance(value, (Case, Cast)) else []
        if not texts or not all(isinstance(each, Value) for each in texts):
            return value
        pairs = zip(texts, self.macs([each.value for each in texts]), strict=True)
        return _with_values(value, {id(each): Value(mac, output_field=self) for each, mac in pairs}, self)

    def pre_save(self, model_instance: Any, add: bool) -> Any:
        return _Text(getattr(model_instance, self.source), output_field=self)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        [mac] = self.macs([value])
        return None if mac is None else connection.Database.Binary(mac)

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return None if value is None else _Mac(value)

    def to_python(self, value: Any) -> Any:
        return value

    def clean(self, value: Any, model_instance: Any) -> Any:
        return getattr(model_instance, self.source)

    def value_to_string(self, obj: Any) -> str:
        """Fixtures hold the text, and a MAC is made of it again."""
        return str(getattr(obj, self.source))


class BlindIndexQuerySet(QuerySet):
    """A query set whose updates fill the blind indexes of the model."""

    def update(self, **values: Any) -> int:
        for field in self.model._meta.local_fields:
            if isinstance(field, BlindIndexField):
                if field.source in values:
                    values[field.name] = values[field.source]
                if field.name in values:
                    values[field.name] = field.prepared(values[field.name])
        return int(super().update(**values))


def fill_index(model: type[Any], name: str, *, using: str = DEFAULT_DB_ALIAS, batch: int = FILL_ROWS) -> int:
    """Fills a new index of the rows that have a text and no MAC, and gives their number. Each batch is a transaction
    with one request for MACs; when it ended half-way, call it again.
    """
    source, rows = model._meta.get_field(name).source, BlindIndexQuerySet(model, using=using)
    missing = rows.filter(**{f"{name}__isnull": True, f"{source}__isnull": False}).only(source).order_by("pk")
    count = 0
    while True:
        with transaction.atomic(using=using):
            page = list(missing.select_for_update()[:batch])
            for row in page:
                setattr(row, name, getattr(row, source))
            count += rows.bulk_update(page, [name])
        if not page:
            return count


def _results(expression: Any) -> list[Any]:
    parts = expression.get_source_expressions() if isinstance(expression, (Case, Cast)) else []
    return [each.result if isinstance(each, When) else each for each in parts]


def _values_of(expression: Any) -> Iterator[Any]:
    for each in _results(expression) or [expression]:
        if each is expression:
            yield each
        else:
            yield from _values_of(each)


def _with_values(expression: Any, values: dict[int, Any], field: Field) -> Any:
    if id(expression) in values:
        return values[id(expression)]
    copy = expression.copy()
    if isinstance(copy, When):
        copy.result = _with_values(copy.result, values, field)
    else:
        copy.output_field = field
        copy.set_source_expressions([_with_values(each, values, field) for each in copy.get_source_expressions()])
    return copy


def destroy_key(*, key: str | None = None, owner: object = None) -> list[Receipt]:
    """Destroys the key of a field, or of an owner; what it encrypted can't be read any more. Gives the receipts."""
    return StepRunner(settings.MINIKMS_CLIENT).run(RecordSealer().destroy(column_thread("django", key, owner)))
