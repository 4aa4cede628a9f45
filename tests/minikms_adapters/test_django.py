"""Encrypted fields of Django models: values, owners, what a query may do, and migrations."""

import datetime
import uuid
from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.exceptions import FieldError

from minikms import Client
from minikms_adapters import DestroyedRecordError, NotSearchableError, NotSupportedError, RecordError, WrongPlaceError

settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}, USE_TZ=True)
django.setup()

from django.db import connection, models, utils  # noqa: E402 - after the setup
from django.db.migrations.writer import MigrationWriter  # noqa: E402 - after the setup
from django.db.models import Case, Count, F, Max, Value, When  # noqa: E402 - after the setup
from django.db.models.functions import Lower, Trim  # noqa: E402 - after the setup

from minikms_adapters.django import EncryptedField, Owned, destroy_key  # noqa: E402 - after the setup

SECRET = "allergic to penicillin"
RUN = uuid.uuid4().hex


class Person(models.Model):
    plain = models.TextField(default="")
    notes = EncryptedField(key=f"notes.{RUN}", null=True)
    other = EncryptedField(key=f"notes.{RUN}", null=True)
    born = EncryptedField(models.DateField(), key="born", null=True)
    score = EncryptedField(models.IntegerField(), key="score", null=True)
    data = EncryptedField(models.JSONField(), key="data", null=True)

    class Meta:
        app_label = "people"


class Letter(models.Model):
    person = models.ForeignKey(Person, models.CASCADE)
    owner = models.TextField()
    text = EncryptedField(key_of="owner")

    class Meta:
        app_label = "people"


@pytest.fixture(autouse=True)
def tables(kms: Client) -> Iterator[None]:
    settings.MINIKMS_CLIENT = kms
    with connection.schema_editor() as editor:
        for model in (Person, Letter):
            editor.create_model(model)
    Person.objects.create(id=1, plain="b", notes="x", other="x", score=1)
    Person.objects.create(id=2, plain="a", notes="y")
    yield
    with connection.schema_editor() as editor:
        for model in (Letter, Person):
            editor.delete_model(model)


def raw(column: str = "notes", row: int = 1) -> bytes:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {column} FROM people_person WHERE id = {row}")
        return bytes(cursor.fetchone()[0])


def run(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def test_values_of_each_type_are_ciphertext_in_the_database() -> None:
    day = datetime.date(2026, 2, 28)
    Person.objects.filter(id=1).update(notes=SECRET, born=day, score=-7, data={"a": [1]})
    person = Person.objects.annotate(rows=Count("plain")).get(id=1)
    assert (person.notes, person.born, person.score, person.data) == (SECRET, day, -7, {"a": [1]})
    assert all(raw(column).startswith(b"mKr1") for column in ("notes", "born", "score", "data"))
    assert list(Person.objects.order_by("id").values_list("notes", flat=True)) == [SECRET, "y"]
    assert len(Person.objects.values("notes").order_by("?")) == 2
    assert Person.objects.get(notes__isnull=False, score=None).id == 2
    assert Person.objects.filter(notes=None).count() == 0
    people = list(Person.objects.order_by("id"))
    people[0].notes, people[1].notes = "one", None
    Person.objects.bulk_update(people, ["notes"])
    Person.objects.bulk_create([Person(id=3, notes="three")])
    assert [each.notes for each in Person.objects.order_by("id")[:3]] == ["one", None, "three"]
    assert Person.objects.defer("notes").get(id=1).notes == "one"
    both = Person.objects.filter(id=1).values("notes").union(Person.objects.filter(id=3).values("notes"), all=True)
    assert [row["notes"] for row in both] == ["one", "three"]


SEARCHES: dict[str, Any] = {
    "exact": lambda: Person.objects.filter(notes="x"),
    "in": lambda: Person.objects.filter(notes__in=["x"]),
    "contains": lambda: Person.objects.filter(notes__contains="x"),
    "transform": lambda: Person.objects.filter(born__year=2026),
    "order": lambda: Person.objects.order_by("notes"),
    "order_expression": lambda: Person.objects.order_by(F("notes").desc()),
    "order_selected": lambda: Person.objects.values("notes").order_by("-notes"),
    "order_selected_expression": lambda: Person.objects.values_list("notes").order_by(F("notes").asc()),
    "order_alias": lambda: Person.objects.annotate(named=F("notes")).order_by("named"),
    "order_extra": lambda: Person.objects.values("notes").extra(order_by=["notes"]),
    "order_union_all": lambda: (notes := Person.objects.values("notes")).union(notes, all=True).order_by("notes"),
    "distinct_on_alias": lambda: Person.objects.values(named=F("notes")).distinct("named"),
    "lower": lambda: Person.objects.annotate(low=Lower("notes")),
    "max": lambda: Person.objects.aggregate(Max("notes")),
    "column": lambda: Person.objects.filter(plain=F("notes")),
    "columns": lambda: Person.objects.filter(notes=F("other")),
    "distinct": lambda: Person.objects.values("notes").distinct(),
    "union": lambda: Person.objects.values("notes").union(Person.objects.values("notes")),
    "group": lambda: Person.objects.values("notes").annotate(Count("id")),
    "subquery": lambda: Person.objects.filter(plain__in=Person.objects.values("notes")),
    "case": lambda: Person.objects.annotate(c=Case(When(id=1, then=Value("lit")), default=F("notes"))),
    "update_plain": lambda: [Person.objects.update(plain=F("notes"))],
}


@pytest.mark.parametrize("form", SEARCHES)
def test_a_query_does_not_compare_or_order_ciphertext(form: str) -> None:
    with pytest.raises((NotSearchableError, FieldError, utils.OperationalError), match=r"encrypted|mixed types"):
        list(SEARCHES[form]())


@pytest.mark.parametrize(
    "expression",
    [
        Value(SECRET),
        Trim(Value(SECRET)),
        F("plain"),
        F("notes"),
        Case(When(id=1, then=Value(SECRET)), default=Value(None)),
        Value(SECRET, output_field=models.TextField()),
    ],
)
def test_an_expression_is_not_written(expression: Any) -> None:
    with pytest.raises((NotSupportedError, NotSearchableError)):
        Person.objects.update(notes=expression)
    if not isinstance(expression, (Case, F)):  # Django itself refuses these
        with pytest.raises(NotSupportedError):
            Person.objects.create(id=9, notes=expression)
    assert [each.notes for each in Person.objects.order_by("id")] == ["x", "y"]


def test_an_altered_value_is_an_error_with_the_column() -> None:
    for forged in ("score", "'plain'", "x'00'"):
        run(f"UPDATE people_person SET notes = {forged} WHERE id = 1")
        with pytest.raises(RecordError, match=r"people_person\.notes"):
            Person.objects.get(id=1)
    Person.objects.filter(id=1).update(notes="x")
    destroy_key(key=f"notes.{RUN}")
    with pytest.raises(DestroyedRecordError):
        Person.objects.get(id=1)


def test_a_text_has_the_key_of_the_owner_of_its_row() -> None:
    ada, bob = uuid.uuid4().hex, uuid.uuid4().hex
    for owner in (ada, bob):
        Letter.objects.create(person_id=1, owner=owner, text=f"of {owner}")
    assert Letter.objects.get(owner=ada).text == f"of {ada}"
    letter = Letter.objects.get(owner=bob)
    letter.owner, letter.text = ada, "moved"
    letter.save()
    assert Letter.objects.get(id=2).text == "moved"
    Letter.objects.filter(id=2).update(owner=bob, text=Owned("again", bob))
    with pytest.raises(NotSupportedError, match="Owned"):
        Letter.objects.update(text="whose")
    run("UPDATE people_letter SET text = (SELECT text FROM people_letter WHERE id = 2) WHERE id = 1")
    swapped = Letter.objects.get(id=1)
    with pytest.raises(WrongPlaceError, match=ada):
        _ = swapped.text
    swapped.owner = "carl"
    with pytest.raises(WrongPlaceError):
        swapped.save()
    destroy_key(owner=bob)
    with pytest.raises(DestroyedRecordError):
        Letter.objects.get(id=2)


def test_a_field_that_the_database_would_compare_is_refused() -> None:
    for option in ({"unique": True}, {"primary_key": True}, {"db_index": True}, {"db_default": "x"}):
        with pytest.raises(NotSupportedError):
            EncryptedField(key="k", **option)
    for wrong in ({}, {"key": "k", "key_of": "owner"}):
        with pytest.raises(TypeError):
            EncryptedField(**wrong)
    with pytest.raises(NotSupportedError):
        EncryptedField(models.DateField(), key_of="owner")

    class Wrong(models.Model):
        notes = EncryptedField(key="k")

        class Meta:
            app_label = "people"
            constraints = (models.UniqueConstraint(fields=["notes"], name="u"),)

    assert [error.id for error in Wrong.check()] == ["minikms.E001"]
    assert Person.check() == []


def test_a_migration_and_a_form_know_the_field() -> None:
    text, _ = MigrationWriter.serialize(Person.born.field)
    assert "EncryptedField(" in text
    assert "of=models.DateField()" in text
    assert Person.born.field.clone().deconstruct()[3]["key"] == "born"
    form = Person.born.field.formfield()
    assert form.clean("2026-02-28") == datetime.date(2026, 2, 28)
