"""Encrypted fields and blind indexes of Django models: values, owners, what a query may do, and migrations."""

import datetime
import json
import uuid
from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.exceptions import FieldError, ValidationError

from minikms import Client
from minikms_adapters import DestroyedRecordError, NotSearchableError, NotSupportedError, RecordError, WrongPlaceError

settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}, USE_TZ=True)
django.setup()

from django.apps.registry import Apps  # noqa: E402 - after the setup
from django.core import serializers  # noqa: E402 - after the setup
from django.db import connection, models, utils  # noqa: E402 - after the setup
from django.db.migrations.writer import MigrationWriter  # noqa: E402 - after the setup
from django.db.models import Case, Count, F, Max, Value, When  # noqa: E402 - after the setup
from django.db.models.functions import Lower, Trim  # noqa: E402 - after the setup

from minikms_adapters.django import (  # noqa: E402 - after the setup
    BlindIndexField,
    BlindIndexQuerySet,
    EncryptedField,
    Owned,
    destroy_key,
    fill_index,
)
from tests.minikms_adapters.test_records import Counting  # noqa: E402 - after the setup

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


class User(models.Model):
    email = EncryptedField(key=f"email.{RUN}", null=True)
    other = EncryptedField(key=f"email.{RUN}", null=True)
    email_index = BlindIndexField(source="email", key=f"email.{RUN}", unique=True, null=True)
    folded = BlindIndexField(source="other", key=f"email.{RUN}", normalization="casefold", db_index=True, null=True)
    plain = models.TextField(default="")
    objects = BlindIndexQuerySet.as_manager()

    class Meta:
        app_label = "people"


@pytest.fixture(autouse=True)
def tables(kms: Client) -> Iterator[None]:
    settings.MINIKMS_CLIENT = kms
    with connection.schema_editor() as editor:
        for model in (Person, Letter, User):
            editor.create_model(model)
    Person.objects.create(id=1, plain="b", notes="x", other="x", score=1)
    Person.objects.create(id=2, plain="a", notes="y")
    yield
    with connection.schema_editor() as editor:
        for model in (User, Letter, Person):
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


# --- blind indexes ----------------------------------------------------------------------------------------------------

ADA, BOB = "ada@example.org", "bob@example.org"


@pytest.fixture
def counting(kms: Client) -> Counting:
    counting = Counting(kms)
    settings.MINIKMS_CLIENT = counting
    return counting


def ids(**conditions: Any) -> list[int]:
    return list(User.objects.filter(**conditions).order_by("id").values_list("id", flat=True))


def test_rows_are_found_by_equality_with_one_request() -> None:
    User.objects.bulk_create([User(id=1, email=ADA), User(id=2, email=BOB), User(id=3), User(id=4, email="")])
    for search, wanted in {
        ("email_index", ADA): [1],
        ("email_index__exact", ADA.upper()): [],
        ("email_index__in", (ADA, BOB, "nobody", None)): [1, 2],
        ("email_index__in", ()): [],
        ("email_index", ""): [4],
        ("email_index", None): [3],
        ("email_index__isnull", True): [3],
    }.items():
        assert ids(**dict([search])) == wanted, search
    assert [each.id for each in User.objects.exclude(email_index=ADA).order_by("id")] == [2, 3, 4]
    assert User.objects.in_bulk([BOB], field_name="email_index").popitem()[1].id == 2
    assert User.objects.get_or_create(email_index=ADA)[1] is False
    assert len(User.objects.values_list("email_index", flat=True).get(id=1)) == 32


def test_the_index_follows_its_source_on_each_way_to_write(counting: Counting) -> None:
    User.objects.create(id=1, email="one")
    User.objects.bulk_create([User(id=at, email=f"bulk {at}", other="O") for at in range(2, 30)])
    assert ids(email_index="bulk 7") == [7] and len(ids(folded="o")) == 28
    user = User.objects.get(id=1)
    user.email = "saved"
    user.save()
    assert (ids(email_index="saved"), ids(email_index="one")) == ([1], [])
    assert User.objects.filter(id=1).update(email="updated", plain="x") == 1
    assert ids(email_index="updated") == [1]
    users = list(User.objects.filter(id__lt=5).order_by("id"))
    for user in users:
        user.email = None if user.id == 4 else f"again {user.id}"
    counting.calls.clear()
    User.objects.bulk_update(users, ["email"])
    assert counting.calls.count("mac") == 1
    assert [ids(email_index=f"again {at}") for at in range(1, 5)] == [[1], [2], [3], []]
    assert ids(email_index=None) == [4]
    counting.calls.clear()
    User.objects.bulk_create([User(id=at, email=f"more {at}") for at in range(30, 60)])
    list(User.objects.filter(email_index__in=[f"more {at}" for at in range(99)]))
    assert counting.calls.count("mac") == 2
    User.objects.update_or_create(email_index="more 30", defaults={"email": "changed"})
    assert ids(email_index="changed") == [30]
    with pytest.raises(utils.IntegrityError) as raised:
        User.objects.create(email="changed")
    assert "changed" not in str(raised.value)


def test_what_would_leave_the_index_behind_is_refused() -> None:
    user = User.objects.create(id=1, email=ADA)
    for expression in (Value(BOB), Trim(Value(BOB)), F("plain"), F("other"), Case(When(id=1, then=Value(BOB)))):
        with pytest.raises((NotSupportedError, NotSearchableError)):
            User.objects.update(email=expression)
        if not isinstance(expression, Case):  # whose texts become MACs
            with pytest.raises((NotSupportedError, NotSearchableError)):
                User.objects.update(email_index=expression)
    user.email = BOB
    with pytest.raises(NotSupportedError, match="email_index"):
        user.save(update_fields=["email"])
    user.save(update_fields=["email", "email_index"])
    for wrong in (b"0" * 32, 5):
        with pytest.raises((TypeError, NotSearchableError)):
            User.objects.update(email_index=wrong)
    assert ids(email_index=BOB) == [1]


USES: dict[str, Any] = {
    "iexact": lambda: User.objects.filter(email_index__iexact=ADA),
    "startswith": lambda: User.objects.filter(email_index__startswith="a"),
    "greater": lambda: User.objects.filter(email_index__gt=ADA),
    "range": lambda: User.objects.filter(email_index__range=(ADA, BOB)),
    "bytes": lambda: User.objects.filter(email_index=b"0" * 32),
    "column": lambda: User.objects.filter(email_index=F("plain")),
    "value": lambda: User.objects.filter(email_index=Value(ADA)),
    "value in": lambda: User.objects.filter(email_index__in=[Value(ADA)]),
    "subquery": lambda: User.objects.filter(email_index__in=User.objects.values("plain")),
    "transform": lambda: User.objects.filter(email_index__length=32),
    "order": lambda: User.objects.order_by("email_index"),
    "lower": lambda: User.objects.annotate(low=Lower("email_index")),
    "max": lambda: User.objects.aggregate(Max("email_index")),
    "distinct": lambda: User.objects.values("email_index").distinct(),
    "group": lambda: User.objects.values("email_index").annotate(Count("id")),
    "update": lambda: [User.objects.update(plain=F("email_index"))],
}


@pytest.mark.parametrize("form", USES)
def test_another_use_of_an_index_is_refused(form: str) -> None:
    with pytest.raises((NotSearchableError, FieldError, utils.OperationalError), match=r"blind|encrypted|mixed types"):
        list(USES[form]())


def test_equal_texts_are_those_of_the_normalization() -> None:
    User.objects.bulk_create(
        [
            User(id=at, email=text, other=text)
            for at, text in enumerate((" Zoë ", "Zoe\u0308", "ΖΟË", "STRASSE", "Straße"))
        ]
    )
    assert ids(folded="zoë") == [0, 1]  # the third begins with Greek letters: twins stay apart
    assert ids(folded="strasse") == [3, 4]
    assert ids(email_index="Zoë") == []
    wrong: Any = "lower"
    with pytest.raises(NotSupportedError, match="nfc, casefold"):
        BlindIndexField(source="email", key="k", normalization=wrong)


def test_a_copied_or_forged_index_finds_a_row_that_says_so() -> None:
    """A writer of the database copies a MAC to another row; one of another column or key is equal to nothing."""
    User.objects.bulk_create([User(id=1, email=ADA, other=ADA), User(id=2, email=BOB, other=BOB)])
    run("UPDATE people_user SET email_index = x'00' WHERE id = 1")
    run("UPDATE people_user SET email_index = (SELECT folded FROM people_user WHERE id = 1) WHERE id = 2")
    assert ids(email_index=ADA) == []
    run("UPDATE people_user SET folded = (SELECT folded FROM people_user WHERE id = 1)")
    assert {user.other for user in User.objects.filter(folded=ADA)} == {ADA, BOB}
    destroy_key(key=f"email.{RUN}")
    assert ids(folded=ADA) == []


def test_an_interrupted_fill_goes_on_where_it_ended(counting: Counting, kms: Client) -> None:
    User.objects.bulk_create([User(id=at, email=f"u{at}", other=None) for at in range(25)])
    run("UPDATE people_user SET email_index = NULL")

    class Cut(Counting):
        def __getattr__(self, name: str) -> Any:
            if name == "mac" and self.calls.count("mac") == 2:
                raise OSError("the power is cut")
            return super().__getattr__(name)

    settings.MINIKMS_CLIENT = Cut(kms)
    with pytest.raises(OSError, match="power"):
        fill_index(User, "email_index", batch=10)
    assert len(ids(email_index=None)) == 5
    settings.MINIKMS_CLIENT = counting
    counting.calls.clear()
    assert fill_index(User, "email_index", batch=10) == 5
    assert counting.calls.count("mac") == 1 and fill_index(User, "email_index") == 0
    assert ids(email_index__in=["u0", "u24"]) == [0, 24]


def test_a_second_index_takes_the_place_of_the_first_after_a_rotation() -> None:
    """As docs/django.md: add, fill, switch, drop. Each step can be done again."""

    class Rotated(models.Model):
        email = EncryptedField(key=f"rotated.{RUN}")
        old = BlindIndexField(source="email", key=f"rotated.{RUN}", db_index=True)
        new = BlindIndexField(source="email", key=f"rotated.2.{RUN}", db_index=True, null=True)
        objects = BlindIndexQuerySet.as_manager()

        class Meta:
            app_label = "people"
            apps = Apps()

    with connection.schema_editor() as editor:
        editor.create_model(Rotated)
    Rotated.objects.bulk_create([Rotated(id=1, email=ADA), Rotated(id=2, email=BOB)])
    run("UPDATE people_rotated SET new = NULL WHERE id = 1")
    assert fill_index(Rotated, "new") == 1
    assert Rotated.objects.get(old=ADA) == Rotated.objects.get(new=ADA)
    destroy_key(key=f"rotated.{RUN}")  # with the column `old`
    assert Rotated.objects.only("id").get(new=ADA).id == 1
    with connection.schema_editor() as editor:
        editor.delete_model(Rotated)


def test_the_checks_say_what_is_missing() -> None:
    class Half(models.Model):
        email = EncryptedField(models.DateField(), key="k")
        index = BlindIndexField(source="email", key="k")
        lost = BlindIndexField(source="emial", key="k", unique=True)

        class Meta:
            app_label = "people"
            apps = Apps()

    found = sorted((error.obj.name, error.id) for error in Half.check())
    each = [("index", "minikms.E002"), ("index", "minikms.E003"), ("index", "minikms.W001")]
    assert found == [*each, ("lost", "minikms.E002"), ("lost", "minikms.E003")]
    assert User.check() == []
    text, _ = MigrationWriter.serialize(User.folded.field)
    assert "normalization='casefold'" in text and "source='other'" in text and "unique=True" not in text


def test_validation_and_fixtures_know_the_index() -> None:
    User.objects.create(id=1, email=ADA)
    with pytest.raises(ValidationError, match=r"Email index"):
        User(email=ADA).full_clean()
    User(email=BOB, other=BOB, plain="x").full_clean()
    [row] = json.loads(serializers.serialize("json", User.objects.all()))
    User.objects.all().delete()
    User(id=1, **row["fields"]).save_base(raw=True)
    assert (ids(email_index=ADA), ids(folded=None)) == ([1], [1])
