"""Encrypted columns: batches, places, types, owners, keys that are replaced, and what Alembic and SQLModel see."""

import asyncio
import copy
import enum
import pickle
import sqlite3
import traceback
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, MetaData, Table, create_engine, insert, literal_column, select, text, update
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, mapped_column
from sqlalchemy.schema import CreateTable

from minikms import AsyncClient, Client
from minikms_adapters import DestroyedRecordError, NotSearchableError, NotSupportedError, RecordError, WrongPlaceError
from minikms_adapters.sqlalchemy import Encrypted, Owned, adestroy_key, destroy_key, reencrypt, render_item
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_adapters.test_records import Counting

TYPED = "allergic to penicillin"


class Models:
    """Mapped classes over one client, with keys of their own."""

    def __init__(self, kms: Any) -> None:
        self.key = f"customers.{uuid.uuid4()}"

        class Base(DeclarativeBase):
            pass

        class Customer(Base):
            __tablename__ = "customers"
            id: Mapped[int] = mapped_column(primary_key=True)
            owner: Mapped[str] = mapped_column(default="ada")
            notes: Mapped[str | None] = mapped_column(Encrypted(kms, key=self.key))
            address: Mapped[str | None] = mapped_column(Encrypted(kms, key=self.key))

        class Letter(Base):
            __tablename__ = "letters"
            id: Mapped[int] = mapped_column(primary_key=True)
            owner: Mapped[str]
            text: Mapped[str | None] = mapped_column(Encrypted(kms, key_of="owner"))

        class Stamp(Base):
            __tablename__ = "stamps"
            id: Mapped[int] = mapped_column(primary_key=True)
            at: Mapped[datetime]
            notes: Mapped[str] = mapped_column(Encrypted(kms, key=self.key))

        self.base, self.Customer, self.Letter, self.Stamp = Base, Customer, Letter, Stamp


@pytest.fixture
def counting(kms: Client) -> Counting:
    return Counting(kms)


@pytest.fixture
def models(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> Models:
    return Models(counting)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "customers.sqlite"


@pytest.fixture
def engine(file: Path, models: Models) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{file}")
    models.base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def change(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(statement)


def test_a_statement_and_a_result_are_one_batch_each(
    engine: Engine, models: Models, counting: Counting, file: Path
) -> None:
    with Session(engine) as session:
        session.add_all(models.Customer(notes=f"{TYPED} {number}", address=None) for number in range(50))
        session.commit()
    assert counting.calls == ["get_or_create_dek_for_thread", "encrypt_batch"]
    counting.calls.clear()
    with Session(engine) as session:
        made = session.scalars(
            insert(models.Customer).returning(models.Customer), [{"notes": "r", "address": "r"}] * 500
        )
        assert [(each.notes, each.address) for each in made] == [("r", "r")] * 500
        assert counting.calls == ["encrypt_batch", "decrypt_batch"]
    counting.calls.clear()
    with Session(engine) as session:
        found = session.scalars(select(models.Customer).order_by(models.Customer.id)).all()
        assert [each.notes for each in found] == [f"{TYPED} {number}" for number in range(50)]
        assert found[0].address is None
        assert counting.calls == ["decrypt_batch"]
        found[3].notes = "changed"
        session.commit()
        assert session.execute(select(models.Customer.notes).where(models.Customer.id == 4)).scalar_one() == "changed"
    assert TYPED.encode() not in file.read_bytes()


def test_core_statements_streams_and_returning_work_too(engine: Engine, models: Models, file: Path) -> None:
    table = models.Customer.__table__
    with engine.begin() as connection:
        rows = [{"owner": "ada", "notes": str(number), "address": "Λ"} for number in range(3)]
        connection.execute(insert(table), rows)  # type: ignore[arg-type]  # a Table
        returned = connection.execute(update(models.Customer).values(notes="new").returning(models.Customer.notes))
        assert returned.scalars().all() == ["new"] * 3
        streamed = connection.execution_options(stream_results=True).execute(select(table.c.address, table.c.id))
        assert [tuple(row) for row in streamed.yield_per(1)] == [("Λ", 1), ("Λ", 2), ("Λ", 3)]
    assert "Λ".encode() not in file.read_bytes()


def test_a_value_of_another_column_or_in_plaintext_is_an_error(engine: Engine, models: Models, file: Path) -> None:
    with Session(engine) as session:
        session.add(models.Customer(notes="one", address="two"))
        session.commit()
    change(file, "UPDATE customers SET notes = address")
    with Session(engine) as session, pytest.raises(WrongPlaceError, match=r"customers\.notes"):
        session.scalars(select(models.Customer)).all()
    for forged in ("'text'", "x'00'", "17"):
        change(file, f"UPDATE customers SET notes = {forged}")
        with Session(engine) as session, pytest.raises(RecordError, match=r"customers\.notes"):
            session.scalars(select(models.Customer)).all()


def test_a_destroyed_key_is_an_error_with_the_column(engine: Engine, models: Models, kms: Client) -> None:
    with Session(engine) as session:
        session.add(models.Customer(notes="one"))
        session.commit()
    assert [receipt.state for receipt in destroy_key(kms, key=models.key)] == ["destroyed"]
    with Session(engine) as session, pytest.raises(DestroyedRecordError, match=r"customers\.notes"):
        session.scalars(select(models.Customer)).all()


def test_an_encrypted_column_is_compared_with_null_only(engine: Engine, models: Models) -> None:
    column = models.Customer.notes
    for search in (lambda: column == "x", lambda: column.like("x%"), lambda: column.in_(["x"]), column.desc):
        with pytest.raises(NotSearchableError):
            search()
    with Session(engine) as session:
        session.add_all([models.Customer(notes="x"), models.Customer(address="y")])
        session.commit()
        assert session.scalars(select(models.Customer.address).where(column.is_(None))).all() == ["y"]
        assert session.scalars(select(models.Customer.notes).where(column != None)).all() == ["x"]  # noqa: E711 - an SQL expression
        with pytest.raises(TypeError, match="is a str"):
            session.execute(update(models.Customer).values(notes=7))


def test_a_row_has_the_key_of_its_owner(engine: Engine, models: Models, kms: Client, file: Path) -> None:
    ada, bob = f"ada-{uuid.uuid4()}", f"bob-{uuid.uuid4()}"
    with Session(engine) as session:
        session.add_all(models.Letter(owner=owner, text=f"of {owner}") for owner in (ada, bob))
        session.commit()
    with Session(engine) as session:
        letters = session.scalars(select(models.Letter).order_by(models.Letter.id)).all()
        assert [letter.text for letter in letters] == [f"of {ada}", f"of {bob}"]
        letters[1].text = "changed"
        session.commit()
    destroy_key(kms, owner=ada)
    with Session(engine) as session:
        assert session.get_one(models.Letter, 2).text == "changed"
        with pytest.raises(DestroyedRecordError, match=ada):
            session.get(models.Letter, 1)


def test_a_row_that_changes_its_owner_is_encrypted_anew(engine: Engine, models: Models, kms: Client) -> None:
    ada, bob = f"ada-{uuid.uuid4()}", f"bob-{uuid.uuid4()}"
    with Session(engine) as session:
        session.add(models.Letter(owner=ada, text="dear reader"))
        session.commit()
        session.get_one(models.Letter, 1).owner = bob
        session.commit()
    destroy_key(kms, owner=ada)
    with Session(engine) as session:
        assert session.get_one(models.Letter, 1).text == "dear reader"


def test_a_text_of_another_owner_is_an_error(engine: Engine, models: Models, file: Path) -> None:
    with Session(engine) as session:
        session.add_all(models.Letter(owner=owner, text=f"of {owner}") for owner in ("ada", "bob"))
        session.commit()
    change(file, "UPDATE letters SET text = (SELECT text FROM letters WHERE id = 2) WHERE id = 1")
    with Session(engine) as session, pytest.raises(WrongPlaceError, match="owner ada"):
        session.get(models.Letter, 1)


def test_without_a_session_the_owner_is_given_with_the_text(engine: Engine, models: Models) -> None:
    with engine.begin() as connection:
        with pytest.raises(NotSupportedError, match="Owned"):
            connection.execute(insert(models.Letter).values(owner="ada", text="hello"))
        connection.execute(insert(models.Letter).values(owner="ada", text=Owned("hello", "ada")))
        assert connection.execute(select(models.Letter.text)).scalar_one() == "hello"
    with Session(engine) as session:
        assert session.get_one(models.Letter, 1).text == "hello"


def test_alembic_sees_an_ordinary_column(engine: Engine, models: Models) -> None:
    with engine.connect() as connection:
        same = MigrationContext.configure(connection, opts={"compare_type": True})
        assert produce_migrations(same, models.base.metadata).upgrade_ops.is_empty()  # type: ignore[union-attr]  # there are some
    empty = create_engine("sqlite://")
    with empty.connect() as connection:
        context = MigrationContext.configure(connection)
        operations = produce_migrations(context, models.base.metadata).upgrade_ops
        code = render_python_code(operations, render_item=render_item)  # type: ignore[arg-type]  # there are some
    empty.dispose()
    assert "sa.Column('notes', sa.LargeBinary(), nullable=True)" in code
    assert "minikms" not in code


def test_an_asyncio_engine_uses_an_asyncio_client(daemon: LiveDaemon, file: Path) -> None:
    async def use() -> list[str | None]:
        async with AsyncClient(daemon.socket) as kms:
            models = Models(kms)
            engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
            async with engine.begin() as connection:
                await connection.run_sync(models.base.metadata.create_all)
            async with AsyncSession(engine) as session:
                session.add_all([models.Customer(notes=TYPED), models.Letter(owner="ada", text="hello")])
                await session.commit()
            async with AsyncSession(engine) as session:
                customer, letter = await session.get_one(models.Customer, 1), await session.get_one(models.Letter, 1)
                found = [customer.notes, letter.text]
            await engine.dispose()
            return found

    assert asyncio.run(use()) == [TYPED, "hello"]


def test_a_statement_without_types_gets_the_stored_bytes(engine: Engine, models: Models) -> None:
    with engine.begin() as connection:
        connection.execute(insert(models.Customer).values(notes="x"))
        raw: Any
        [raw] = connection.execute(select(literal_column("notes")).select_from(models.Customer)).scalars()
    assert raw.startswith(b"mKr1")


def test_columns_of_one_type_have_places_of_their_own(kms: Client, file: Path) -> None:
    kind = Encrypted(kms, key=f"shared.{uuid.uuid4()}")

    class Base(DeclarativeBase):
        type_annotation_map: ClassVar[dict[Any, Any]] = {bytes: kind}

    class First(Base):
        __tablename__ = "first"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[str] = mapped_column(kind)
        b: Mapped[str] = mapped_column(kind)

    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(First(a="of a", b="of b"))
        session.commit()

    class Second(Base):
        __tablename__ = "second"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[bytes]

    with Session(engine) as session:
        assert [(each.a, each.b) for each in session.scalars(select(First))] == [("of a", "of b")]
    change(file, "UPDATE first SET a = b, b = a")
    with Session(engine) as session, pytest.raises(WrongPlaceError, match=r"first\.a"):
        session.scalars(select(First)).all()
    engine.dispose()


def test_the_schema_belongs_to_the_place_of_a_value(kms: Client) -> None:
    def column(name: str, table: str, schema: str | None) -> Encrypted:
        kind: Any = Table(table, MetaData(), Column(name, Encrypted(kms, key="k")), schema=schema).c[name].type
        assert isinstance(kind, Encrypted)
        return kind

    assert column("n", "cust", None).names == ("cust", "n")  # as 0.2.0 wrote it
    assert column("n", "cust", "t1").names == ("t1", "cust", "n")
    assert column("b.c", "a", None).names != column("c", "a.b", None).names
    copied: Any = Table("cust", MetaData(), Column("n", Encrypted(kms, key="k"))).to_metadata(MetaData(), schema="t2")
    assert copied.c.n.type.place == ("t2", "cust", "n")


def test_a_changed_owner_does_not_hide_a_text_that_was_swapped(engine: Engine, models: Models, file: Path) -> None:
    with Session(engine) as session:
        letters = [models.Letter(owner=owner, text=f"of {owner}") for owner in ("ada", "bob")]
        session.add_all(letters)
        session.commit()
        change(file, "UPDATE letters SET text = (SELECT text FROM letters WHERE id = 2) WHERE id = 1")
        with pytest.raises(WrongPlaceError, match="owner ada"):
            letters[0].owner = "carl"
            session.commit()
        session.rollback()
    with Session(engine, autoflush=False) as session:
        [letter] = session.scalars(
            select(models.Letter).where(models.Letter.id == 1).options(defer(models.Letter.text))
        )
        letter.owner = "carl"
        with pytest.raises(WrongPlaceError, match="owner ada"):
            _ = letter.text
        with pytest.raises(WrongPlaceError, match="owner ada"):
            session.commit()


def test_an_error_of_sqlalchemy_shows_no_plaintext(engine: Engine, models: Models) -> None:
    failing: list[Any] = [
        lambda session: session.execute(insert(models.Stamp), [{"notes": TYPED, "at": "no date"}]),
        lambda session: session.execute(insert(models.Stamp), [{"notes": TYPED, "id": 1}, {"notes": TYPED}]),
        lambda session: session.execute(insert(models.Stamp).values(id=1, notes=TYPED, at=datetime.now())),
        lambda session: (session.add(models.Stamp(notes=TYPED, at="no date")), session.flush()),
    ]
    with Session(engine) as session:
        failing[2](session)
        session.commit()
    for fail in failing:
        with Session(engine) as session, pytest.raises(StatementError) as failed:
            fail(session)
        assert TYPED not in "".join(traceback.format_exception(failed.value))


def test_columns_of_a_text_statement_are_found_by_name(engine: Engine, models: Models) -> None:
    with Session(engine) as session:
        session.add(models.Customer(id=1, notes="one", address="two"))
        session.commit()
        swapped = text("SELECT address, notes, owner, id FROM customers")
        [customer] = session.scalars(select(models.Customer).from_statement(swapped))
        assert (customer.notes, customer.address) == ("one", "two")
        typed = swapped.columns(notes=models.Customer.notes.type, address=models.Customer.address.type)
        assert [(row.notes, row.address) for row in session.execute(typed)] == [("one", "two")]


def test_an_owned_text_can_be_copied_and_pickled() -> None:
    for copied in (pickle.loads(pickle.dumps(Owned("x", 7))), copy.deepcopy(Owned("x", 7)), copy.copy(Owned("x", 7))):
        assert (copied, copied.owner, type(copied)) == ("x", "7", Owned)


class Colour(enum.Enum):
    RED = "#f00"


VALUES: list[tuple[Any, Any]] = [
    (sa.Integer, -(10**30)),
    (sa.Boolean, False),
    (sa.Float, 0.1),
    (sa.Numeric, Decimal("1.10")),
    (sa.Uuid, uuid.UUID(int=7)),
    (sa.Date, date(2026, 2, 28)),
    (sa.DateTime(timezone=True), datetime(2026, 2, 28, 1, 2, 3, 4, tzinfo=UTC)),
    (sa.Time, time(1, 2)),
    (sa.LargeBinary, b"\x00\xff"),
    (sa.JSON, {"a": [1, None, "\ud83d"]}),
    (sa.Enum(Colour), Colour.RED),
    (sa.Text, "\ud83d"),
]


def test_a_column_holds_values_of_its_type_only(kms: Client, file: Path) -> None:
    def made(kinds: list[Any]) -> Table:
        encrypted: list[Any] = [
            Column(f"c{at}", Encrypted(kms, of=kind, key="values")) for at, kind in enumerate(kinds)
        ]
        return Table("t", MetaData(), Column("id", sa.Integer, primary_key=True), *encrypted)

    table = made([kind for kind, _ in VALUES])
    engine = create_engine(f"sqlite:///{file}")
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table).values({f"c{at}": value for at, (_, value) in enumerate(VALUES)}))
        [found] = connection.execute(select(*list(table.c)[1:]))
        assert list(found) == [value for _, value in VALUES]
        assert [type(each) for each in found] == [type(value) for _, value in VALUES]
    wrong = ["1", 1, "1", 1.5, "x", datetime(2026, 1, 1), date(2026, 1, 1), "x", "x", {1}, "RED", b"x"]
    for at, value in enumerate(wrong):
        with engine.begin() as connection, pytest.raises(TypeError):
            connection.execute(insert(table).values({f"c{at}": value}))
    other = made([sa.Integer if at else sa.Date for at in range(len(VALUES))])
    with engine.begin() as connection:
        for at in range(len(VALUES)):
            if at not in {0, 1}:
                with pytest.raises(RecordError):
                    connection.execute(select(other.c[f"c{at}"])).all()
    engine.dispose()
    with pytest.raises(NotSupportedError):
        Encrypted(kms, of=sa.Date, key_of="id")
    with pytest.raises(NotSupportedError):
        Encrypted(kms, of=sa.Interval, key="k")


def test_a_column_of_mysql_holds_more_than_64_kib(kms: Client) -> None:
    made = Table("t", MetaData(), Column("notes", Encrypted(kms, key="k")))
    assert "notes LONGBLOB" in str(CreateTable(made).compile(dialect=mysql.dialect()))
    context = SimpleNamespace(dialect=mysql.dialect(), imports=set())
    assert render_item("type", made.c.notes.type, context) == "mysql.LONGBLOB()"
    assert context.imports == {"from sqlalchemy.dialects import mysql"}


def test_values_move_to_the_key_that_replaced_theirs(engine: Engine, models: Models, kms: Client, file: Path) -> None:
    ada, bob = f"ada-{uuid.uuid4()}", f"bob-{uuid.uuid4()}"
    with Session(engine) as session:
        session.add_all([models.Customer(notes=f"{at}", address="kept") for at in range(1100)])
        session.add_all([models.Customer(), *(models.Letter(owner=owner, text="dear") for owner in (ada, bob))])
        session.commit()
    with engine.begin() as connection:
        assert reencrypt(connection, models.Customer.notes) == 0
    old = [kms.list_keys(thread_id=thread).keys[0].key_id for thread in (f"sql.{models.key}", f"sql-owner.{ada}")]
    for key_id, thread in zip(old, (f"sql.{models.key}", f"sql-owner.{ada}"), strict=True):
        kms.create_dek_for_thread(thread, replaces=key_id, purpose="data")
    destroy_key(kms, owner=bob)
    with engine.begin() as connection:
        assert reencrypt(connection, models.Customer.notes) == 1100
        assert reencrypt(connection, models.Customer.__table__.c.address) == 1100
        assert reencrypt(connection, models.Letter.text) == 1
    for key_id in old:
        kms.destroy_key(key_id)
    with Session(engine) as session:
        customers = session.scalars(select(models.Customer).order_by(models.Customer.id)).all()
        assert [each.notes for each in customers] == [*(f"{at}" for at in range(1100)), None]
        assert session.get_one(models.Letter, 1).text == "dear"
        with pytest.raises(DestroyedRecordError):
            session.get(models.Letter, 2)
    change(file, "UPDATE letters SET text = 'plain' WHERE id = 1")
    with engine.begin() as connection, pytest.raises(RecordError):
        reencrypt(connection, models.Letter.text)


def test_a_key_is_destroyed_with_either_client(daemon: LiveDaemon, kms: Client) -> None:
    async def use() -> list[str]:
        async with AsyncClient(daemon.socket) as asynchronous:
            owners = [str(uuid.uuid4()), str(uuid.uuid4())]
            for owner in owners:
                await asynchronous.get_or_create_dek_for_thread(f"sql-owner.{owner}", purpose="data")
            clients: Any = zip((asynchronous, kms), owners, strict=True)
            return [each.state for client, owner in clients for each in await adestroy_key(client, owner=owner)]

    assert asyncio.run(use()) == ["destroyed", "destroyed"]


def test_a_model_of_sqlmodel_is_copied_with_its_owners(kms: Client, file: Path) -> None:
    sqlmodel: Any = needs.library("sqlmodel")
    kind = Encrypted(kms, key=f"heroes.{uuid.uuid4()}")

    class Hero(sqlmodel.SQLModel, table=True):  # type: ignore[misc,call-arg]  # a class that is not known here
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        owner: str
        name: str = sqlmodel.Field(sa_type=kind)
        secret: str = sqlmodel.Field(sa_type=kind)
        letter: str = sqlmodel.Field(sa_type=Encrypted(kms, key_of="owner"))

    engine = create_engine(f"sqlite:///{file}")
    sqlmodel.SQLModel.metadata.create_all(engine)
    with sqlmodel.Session(engine) as session:
        session.add(Hero(owner="ada", name="n", secret="s", letter="l"))
        session.commit()
    with sqlmodel.Session(engine) as session:
        hero = session.exec(sqlmodel.select(Hero)).one()
        assert (hero.name, hero.secret, hero.letter) == ("n", "s", "l")
        assert hero.model_copy(deep=True).letter.owner == "ada"
    engine.dispose()
    assert b"mKr1" in file.read_bytes()
