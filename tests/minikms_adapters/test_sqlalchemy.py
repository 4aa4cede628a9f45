"""Encrypted columns: batches, what is refused, owners, and what Alembic sees."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, insert, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from minikms import AsyncClient, Client
from minikms_adapters import DestroyedRecordError, NotSearchableError, NotSupportedError, RecordError, WrongPlaceError
from minikms_adapters.sqlalchemy import Encrypted, Owned, destroy_key, render_item
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

        self.base, self.Customer, self.Letter = Base, Customer, Letter


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


def test_a_flush_and_a_result_are_a_batch_for_each_column(
    engine: Engine, models: Models, counting: Counting, file: Path
) -> None:
    with Session(engine) as session:
        session.add_all(models.Customer(notes=f"{TYPED} {number}", address=None) for number in range(50))
        session.commit()
    assert counting.calls == ["get_or_create_dek_for_thread", "encrypt_batch"]
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
