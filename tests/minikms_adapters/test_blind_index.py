"""Blind indexes: what finds a row, what the database sees, and which statements are refused."""

import asyncio
import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, create_engine, func, insert, literal, literal_column, select, update
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column
from sqlalchemy.schema import CreateTable

from minikms import AsyncClient, Client
from minikms.client import MacItem
from minikms_adapters import NotSearchableError, NotSupportedError
from minikms_adapters.blind_index import BlindIndex
from minikms_adapters.sqlalchemy import Encrypted, destroy_key
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_adapters.test_records import Counting

ADA, BOB = "ada@example.org", "bob@example.org"


def user_of(kms: Any, key: str) -> Any:
    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str | None] = mapped_column(Encrypted(kms, key=key))
        email_index: Mapped[Any] = mapped_column(BlindIndex(kms, key=key, source="email"), unique=True, nullable=True)
        name_index: Mapped[Any] = mapped_column(BlindIndex(kms, key=key), index=True, nullable=True)

    return User


@pytest.fixture
def key() -> str:
    return f"users.{uuid.uuid4()}"


@pytest.fixture
def counting(kms: Client) -> Counting:
    return Counting(kms)


@pytest.fixture
def user(counting: Counting, key: str) -> Any:
    return user_of(counting, key)


@pytest.fixture
def engine(tmp_path: Path, user: Any) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'users.sqlite'}")
    user.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([user(email=ADA, name_index=ADA), user(email=BOB, name_index="x"), user(name_index="x")])
        session.commit()
    yield engine
    engine.dispose()


def test_rows_are_found_by_equality_in_one_batch(engine: Engine, user: Any, counting: Counting) -> None:
    counting.calls.clear()
    other = aliased(user)
    for condition, ids in {
        user.email_index == ADA: [1],
        user.email_index != ADA: [2],
        user.email_index.in_([ADA, BOB, "nobody"]): [1, 2],
        user.email_index.not_in([ADA]): [2],
        user.email_index.in_([]): [],
        user.email_index.is_(None): [3],
        user.email_index == sa.bindparam("given"): [1],
        user.name_index == ADA.upper(): [],
        sa.exists().where(other.name_index == user.name_index, other.id != user.id): [2, 3],
    }.items():
        with Session(engine) as session:
            found = session.scalars(select(user.id).where(condition).order_by(user.id), {"given": ADA})
            assert found.all() == ids, condition
    assert counting.calls == ["get_or_create_dek_for_thread", "mac"] * 6


def test_the_index_follows_the_encrypted_value_and_is_unique(engine: Engine, user: Any) -> None:
    with Session(engine) as session:
        found = session.scalars(select(user).where(user.email_index == ADA)).one()
        assert (found.email, len(found.email_index)) == (ADA, 32)
        found.email = "new@example.org"
        session.commit()
        assert session.scalars(select(user.id).where(user.email_index == "new@example.org")).one() == 1
        assert session.scalars(select(user.id).where(user.email_index == ADA)).all() == []
        session.add(user(email=BOB))
        with pytest.raises(IntegrityError) as raised:
            session.commit()
        assert BOB not in str(raised.value)


def test_the_database_sees_macs_that_differ_between_columns(engine: Engine, user: Any, tmp_path: Path) -> None:
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT email_index, name_index FROM users")).all()
    (first, second), (_, third), (none, fourth) = rows
    assert none is None and third == fourth
    assert len({first, second, third}) == 3 and {len(each) for each in (first, second, third)} == {32}
    assert b"example.org" not in (tmp_path / "users.sqlite").read_bytes()


def test_a_mac_is_bound_to_table_column_and_normalization(kms: Client, key: str) -> None:
    """By docs/spec/adapters.md; without a normalisation it is that of earlier versions."""

    def texts(*parts: str) -> bytes:
        return b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)

    def column(normalization: Any, *names: str) -> tuple[bytes, ...]:
        *schema, table, name = names
        index = BlindIndex(kms, key=key, normalization=normalization)
        kind: Any = sa.Table(table, sa.MetaData(), sa.Column(name, index), schema="".join(schema) or None).c[name].type
        return tuple(kind.sealed([(kind, text) for text in (" Zoe\u0308 ", "zoë", "")]))

    key_id = kms.get_or_create_dek_for_thread(f"sql.{key}", purpose="mac").key_id

    def expected(framework: str, names: tuple[str, ...], *values: str) -> tuple[bytes, ...]:
        aad = b"minikms-adapters 1\0" + hashlib.sha256(texts(f"sql.{key}", framework, *names)).digest()
        return tuple(kms.mac(key_id, [MacItem(plaintext=value.encode(), aad=aad) for value in values]))

    seen: set[bytes] = set()
    for names in (("users", "email"), ("users", "mail"), ("people", "email"), ("casefold 1", "users", "email")):
        for normalization, framework, values in (
            ("", "sqlalchemy", (" Zoe\u0308 ", "zoë", "")),
            ("nfc", "sqlalchemy nfc 1", ("Zoë", "zoë", "")),
            ("casefold", "sqlalchemy casefold 1", ("zoë", "zoë", "")),
        ):
            macs = column(normalization, *names)
            assert macs == expected(framework, names, *values)
            assert not seen & set(macs)
            seen |= set(macs)


def test_a_second_index_is_filled_by_the_loop_of_the_page(engine: Engine, user: Any) -> None:
    """Also after an end half-way: a commit is a batch."""
    with Session(engine) as session:
        missing = select(user).where(user.name_index.is_(None), user.email.is_not(None)).limit(1)
        session.execute(update(user).values(name_index=None))
        for _ in range(2):
            [each] = session.scalars(missing).all()
            each.name_index = each.email
            session.commit()
            session.expire_all()
        assert session.scalars(missing).all() == []
        assert session.scalars(select(user.email).where(user.name_index == BOB)).all() == [BOB]


def test_other_uses_of_an_index_are_refused(engine: Engine, user: Any) -> None:
    index, lower = user.email_index, func.lower(ADA)
    for make in (
        lambda: index < ADA,
        lambda: index.like("a%"),
        lambda: index == user.name_index,
        lambda: index == user.email,
        lambda: index == literal(ADA),
        lambda: literal(ADA) == index,
        lambda: index == sa.bindparam("given", ADA),
        lambda: index == literal_column(f"'{ADA}'", index.type),
        lambda: index == lower,
        lambda: index.in_(select(index)),
        lambda: index.in_([lower]),
        lambda: func.length(index) == 32,
        lambda: sa.tuple_(index, user.id).in_([(ADA, 1)]),
    ):
        with pytest.raises(NotSearchableError), engine.connect() as connection:
            connection.execute(select(user.id).where(make()))
    refused: list[Any] = [select(user.id).order_by(index), select(user.id).group_by(index), select(index).distinct()]
    for statement in (*refused, update(user).values(email_index=lower), insert(user).values(email_index=lower)):
        with pytest.raises((NotSearchableError, NotSupportedError)), engine.connect() as connection:
            connection.execute(statement)
    with pytest.raises((TypeError, StatementError)), engine.connect() as connection:
        connection.execute(select(user.id).where(index == b"\0" * 32))


def test_a_key_column_can_not_be_an_index(kms: Client, key: str) -> None:
    for more in ((sa.ForeignKey("other.id"),), ()):
        with pytest.raises(NotSupportedError):
            sa.Table("t", sa.MetaData(), sa.Column("c", BlindIndex(kms, key=key), *more, primary_key=not more))


def test_the_column_has_a_length_where_an_index_needs_it(user: Any) -> None:
    dialects: dict[str, Any] = {"VARBINARY(32)": mysql.dialect, "BYTEA": postgresql.dialect}
    for kind, dialect in dialects.items():
        assert f"email_index {kind}" in str(CreateTable(user.__table__).compile(dialect=dialect()))


def test_a_destroyed_key_takes_the_index_with_it(engine: Engine, user: Any, kms: Client, key: str) -> None:
    assert [receipt.state for receipt in destroy_key(kms, key=key)] == ["destroyed"] * 2
    with Session(engine) as session:
        assert session.scalars(select(user.id).where(user.email_index == ADA)).all() == []


def test_an_asyncio_engine_finds_rows_too(daemon: LiveDaemon, tmp_path: Path, key: str) -> None:
    async def use() -> int | None:
        async with AsyncClient(daemon.socket) as kms:
            user = user_of(kms, key)
            engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'users.sqlite'}")
            async with engine.begin() as connection:
                await connection.run_sync(user.metadata.create_all)
            async with AsyncSession(engine) as session:
                session.add(user(email=ADA))
                await session.commit()
                found = (await session.scalars(select(user).where(user.email_index == ADA))).one()
            await engine.dispose()
            return int(found.id)

    assert asyncio.run(use()) == 1
