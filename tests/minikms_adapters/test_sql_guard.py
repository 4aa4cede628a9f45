"""What a statement may do with an encrypted column, and which tables are refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Engine, MetaData, Table, func, insert, literal, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from minikms import Client
from minikms_adapters import NotSearchableError, NotSupportedError, sql_guard
from minikms_adapters.sqlalchemy import Encrypted

SECRET = "allergic to penicillin"
REFUSED = (NotSearchableError, NotSupportedError)


class Late:
    """A client that the fixture `engine` names."""

    kms: Client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kms, name)


class Base(DeclarativeBase):
    pass


late: Any = Late()


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    plain: Mapped[str | None]
    notes: Mapped[str | None] = mapped_column(Encrypted(late, key="people.notes"))
    other: Mapped[str | None] = mapped_column(Encrypted(late, key="people.notes"))

    @hybrid_property
    def shown(self) -> Any:
        return func.lower(self.plain)

    @shown.inplace.update_expression
    @classmethod
    def _shown_update(cls, value: Any) -> list[tuple[Any, Any]]:
        return [(cls.notes, func.trim(value))]


class Note(Base):
    __tablename__ = "plain_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    notes: Mapped[str | None]


class More(Base):
    __tablename__ = "more"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "people.sqlite"


@pytest.fixture
def engine(file: Path, kms: Client) -> Iterator[Engine]:
    late.kms = kms
    engine = sa.create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Person(id=1, plain="a", notes="x", other="x"), Person(id=2, plain="b", notes="y")])
        session.commit()
    yield engine
    engine.dispose()


P, notes = Person, Person.__table__.c.notes
named = P.notes.label("named")

SEARCHES: dict[str, Callable[[], Any]] = {
    "order_by": lambda: select(P.id).order_by(P.notes),
    "order_by_label": lambda: select(named).order_by("named"),
    "order_by_label_object": lambda: select(named).order_by(named),
    "order_by_name": lambda: select(P.notes).order_by("notes"),
    "group_by": lambda: select(func.count()).group_by(P.notes),
    "group_by_label": lambda: select(named).group_by("named"),
    "distinct": lambda: select(P.notes).distinct(),
    "distinct_on": lambda: select(P.id).distinct(P.notes),
    "distinct_on_another": lambda: select(P.notes).distinct(P.plain),
    "count_distinct": lambda: select(func.count(P.notes.distinct())),
    "max": lambda: select(func.max(P.notes)),
    "equals_literal": lambda: select(P.id).where(P.notes == literal("x")),
    "literal_equals": lambda: select(P.id).where(literal("x") == P.notes),
    "not_literal": lambda: select(P.id).where(P.notes != literal("x")),
    "equals_bindparam": lambda: select(P.id).where(P.notes == sa.bindparam("b", "x")),
    "is_text": lambda: select(P.id).where(P.notes.is_("x")),
    "tuple_in": lambda: select(P.id).where(sa.tuple_(P.notes, P.id).in_([("x", 1)])),
    "literal_in": lambda: select(P.id).where(literal("x").in_([P.notes])),
    "literal_like": lambda: select(P.id).where(literal("x").like(P.notes)),
    "lower": lambda: select(P.id).where(func.lower(P.notes) == "x"),
    "length": lambda: select(func.length(P.notes)),
    "case": lambda: select(sa.case((P.id == 1, "lit"), else_=P.notes)),
    "nullif": lambda: select(func.nullif(P.notes, "x")),
    "lag": lambda: select(func.lag(P.notes).over(order_by=P.id)),
    "partition_by": lambda: select(func.row_number().over(partition_by=P.notes)),
    "window": lambda: select(func.row_number().over(order_by=P.notes)),
    "and": lambda: select(P.id).where(sa.and_(notes)),
    "columns": lambda: select(P.id).where(P.notes == P.other),
    "cast": lambda: select(sa.cast(P.notes, sa.String)),
    "type_coerce": lambda: select(sa.type_coerce(P.notes, sa.String)),
    "in_select": lambda: select(P.id).where(literal("x").in_(select(P.notes))),
    "scalar_subquery": lambda: select(P.id).where(literal("x") == select(P.notes).limit(1).scalar_subquery()),
    "any": lambda: select(P.id).where(literal("x") == sa.any_(select(P.notes).scalar_subquery())),
    "union": lambda: select(P.notes).union(select(P.notes)),
    "subquery": lambda: select(P.id).where(literal("x") == select(P.notes).subquery().c.notes),
    "alias": lambda: select(aliased(P, name="p2").notes).order_by(aliased(P, name="p2").notes),
    "join": lambda: select(P.id).join(aliased(P, name="p3"), P.notes == aliased(P, name="p3").notes),
    "delete": lambda: sa.delete(P).where(P.notes == literal("x")),
    "returning": lambda: update(P).values(plain="z").returning(func.length(P.notes)),
    "plain_from_encrypted": lambda: update(P).values(plain=P.notes),
    "upsert_where": lambda: (made := sqlite.insert(P).values(id=1)).on_conflict_do_update(
        index_elements=["id"], set_={"plain": "z"}, where=made.excluded.notes != P.notes
    ),
    "upsert_where_column": lambda: (made := sqlite.insert(P).values(id=1)).on_conflict_do_update(
        index_elements=["id"], set_={"notes": made.excluded.notes}, where=made.excluded.notes
    ),
}


@pytest.mark.filterwarnings("ignore:.*DISTINCT ON")  # from SQLAlchemy 2.1 on
@pytest.mark.parametrize("form", SEARCHES)
def test_a_search_or_order_by_an_encrypted_column_is_refused(engine: Engine, form: str) -> None:
    for connect in (Session, Engine.connect):
        with connect(engine) as connection, pytest.raises(REFUSED):
            connection.execute(SEARCHES[form]())


def upsert(**values: Any) -> Any:
    return sqlite.insert(P).values(id=1).on_conflict_do_update(index_elements=["id"], set_=values)


WRITES: dict[str, Callable[[], Any]] = {
    "literal": lambda: update(P).values(notes=literal(SECRET)),
    "literal_core": lambda: sa.update(notes.table).values({notes: literal(SECRET)}),
    "bindparam_value": lambda: update(P).values(notes=sa.bindparam("z", SECRET)),
    "bindparam_type": lambda: update(P).values(notes=sa.bindparam("z", SECRET, type_=sa.String)),
    "bindparam_of_another": lambda: update(P).values(notes=sa.bindparam("z", SECRET, type_=P.other.type)),
    "case": lambda: update(P).values(notes=sa.case((P.id == 1, SECRET), else_=P.notes)),
    "case_plain": lambda: update(P).values(notes=sa.case((P.id == 1, SECRET), else_="")),
    "trim": lambda: update(P).values(notes=func.trim(SECRET)),
    "coalesce": lambda: update(P).values(notes=func.coalesce(SECRET, "")),
    "cast": lambda: update(P).values(notes=sa.cast(SECRET, sa.LargeBinary)),
    "concat": lambda: update(P).values(notes=P.plain + SECRET),
    "plain_column": lambda: update(P).values(notes=P.plain),
    "another_column": lambda: update(P).values(notes=P.other),
    "scalar_subquery": lambda: update(P).values(notes=select(literal(SECRET)).scalar_subquery()),
    "own_subquery": lambda: update(P).values(notes=select(P.notes).limit(1).scalar_subquery()),
    "text": lambda: update(P).values(notes=sa.text(f"'{SECRET}'")),
    "literal_column": lambda: update(P).values(notes=sa.literal_column(f"'{SECRET}'", P.notes.type)),
    "ordered": lambda: update(P).ordered_values((P.notes, literal(SECRET))),
    "hybrid": lambda: update(P).values({P.shown: SECRET}),
    "insert": lambda: insert(P).values(id=3, notes=literal(SECRET)),
    "insert_many": lambda: insert(P).values([{"id": 3, "notes": "x"}, {"id": 4, "notes": literal(SECRET)}]),
    "from_select": lambda: insert(P).from_select(["notes"], select(literal(SECRET))),
    "from_select_label": lambda: insert(P).from_select(["notes"], select(P.plain.label("notes"))),
    "from_union": lambda: insert(P).from_select(["notes"], select(P.notes).union_all(select(P.plain))),
    "upsert": lambda: upsert(notes=literal(SECRET)),
    "upsert_function": lambda: upsert(notes=func.trim(SECRET)),
    "cte": lambda: select(update(P).values(notes=literal(SECRET)).returning(P.id).cte().c.id),
}


@pytest.mark.parametrize("form", WRITES)
def test_an_expression_is_not_written_into_an_encrypted_column(engine: Engine, file: Path, form: str) -> None:
    with engine.begin() as connection, pytest.raises(REFUSED):
        connection.execute(WRITES[form]())
    with Session(engine) as session, pytest.raises(REFUSED):
        session.execute(WRITES[form]())
    assert SECRET.encode() not in file.read_bytes()
    with Session(engine) as session:
        assert session.scalars(select(P.notes).order_by(P.id)).all() == ["x", "y"]


INVALID = (sa.exc.SQLAlchemyError, AttributeError, LookupError)
"""What SQLAlchemy itself raises."""
KEYS: dict[str, Any] = {
    "name": "notes",
    "attribute": P.notes,
    "column": sa.column("notes"),
    "typed column": sa.column("notes", sa.String),
    "column of a table": sa.table("people", sa.column("notes")).c.notes,
    "text": sa.literal_column("notes"),
    "quoted text": sa.literal_column('"notes"'),
    "grouped text": sa.literal_column("notes").self_group(),
    "capitals": "NOTES",
    "column in capitals": sa.column("NOTES"),
    "another model": Note.notes,
    "another table": Note.__table__.c.notes,
    "alias": aliased(P).notes,
    "alias of the table": P.__table__.alias().c.notes,
    "label": Note.notes.label("notes"),
    "expression": sa.type_coerce(sa.column("notes"), sa.String),
    "row": sa.tuple_(sa.column("notes"), sa.column("plain")),
}
VALUES: dict[str, Any] = {
    "text": SECRET,
    "literal": literal(SECRET),
    "function": func.lower(SECRET),
    "column": P.plain,
    "untyped parameter": sa.bindparam("later"),
    "typed parameter": sa.bindparam("later", type_=sa.String),
    "parameter of the column": sa.bindparam("later", type_=notes.type),
}
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda key, value: update(P).values({key: value}),
    "update of a table": lambda key, value: update(notes.table).values({key: value}),
    "update of an alias": lambda key, value: update(aliased(P)).values({key: value}),
    "update in an order": lambda key, value: update(P).ordered_values((key, value)),
    "update from": lambda key, value: update(P).where(P.id == More.id).values({key: value}),
    "update in a CTE": lambda key, value: select(update(P).values({key: value}).returning(P.id).cte().c.id),
    "update beside": lambda key, value: insert(P).values(id=3).add_cte(update(P).values({key: value}).cte("more")),
    "insert": lambda key, value: insert(P).values({key: value, "id": 3}),
    "insert in a CTE": lambda key, value: select(insert(P).values({key: value}).returning(P.id).cte().c.id),
    "first row": lambda key, value: insert(P).values([{key: value, "id": 3}, {key: "x", "id": 4}]),
    "second row": lambda key, value: insert(P).values([{"notes": "x", "id": 3}, {key: value, "id": 4}]),
    "from a SELECT": lambda key, value: insert(P).from_select([key, "id"], select(value, P.id + 2)),
    "upsert": lambda key, value: (
        sqlite.insert(P).values(id=1).on_conflict_do_update(index_elements=["id"], set_={key: value})
    ),
}


@pytest.mark.filterwarnings("ignore:Additional column names", "ignore:.*cartesian product")
@pytest.mark.parametrize("form", FORMS)
def test_no_name_of_the_column_lets_plaintext_reach_the_driver(engine: Engine, form: str) -> None:
    sent: list[str] = []
    accepted: set[tuple[str, str]] = set()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _(*arguments: Any) -> None:
        sent.append(repr(arguments[2:4]))

    connects: tuple[Any, ...] = (Session, Engine.connect)
    for connect in connects:
        for name, key in KEYS.items():
            for kind, value in VALUES.items():
                with connect(engine) as connection:
                    try:
                        connection.execute(FORMS[form](key, value), {"later": SECRET} if "parameter" in kind else {})
                        if connect is Engine.connect:  # a session leaves some of these columns out
                            accepted.add((name, kind))
                    except (*REFUSED, *INVALID):
                        pass
                    assert SECRET not in "".join(sent), (name, kind)
    safe = "parameter of the column"
    if "CTE" not in form and "beside" not in form:  # which SQLite has not
        assert {("name", safe), ("attribute", safe)} <= accepted
    assert {each for each in accepted if each[1] not in {"text", "untyped parameter", safe}} == set()


@pytest.mark.filterwarnings("ignore:Additional column names")
@pytest.mark.parametrize("kind_of_dialect", [postgresql.dialect, mysql.dialect])
def test_no_name_of_the_column_lets_plaintext_reach_another_database(kind_of_dialect: Any, engine: Engine) -> None:
    """The databases are not here; their compilers are."""
    dialect = kind_of_dialect()
    sql_guard.install(dialect)
    forms: dict[str, Callable[[Any, Any], Any]] = {
        **FORMS,
        "upsert": lambda key, value: (
            postgresql.insert(P).values(id=1).on_conflict_do_update(index_elements=["id"], set_={key: value})
            if dialect.name == "postgresql"
            else mysql.insert(P).values(id=1).on_duplicate_key_update({key: value})
        ),
    }
    accepted: set[tuple[str, str]] = set()
    for form, make in forms.items():
        for name, key in KEYS.items():
            for kind, value in VALUES.items():
                try:
                    compiled: Any = make(key, value).compile(dialect=dialect)
                except (*REFUSED, *INVALID):
                    continue
                accepted.add((form, kind))
                assert SECRET not in str(compiled)
                for bound, label in compiled.bind_names.items():
                    sealed = isinstance(bound.type, Encrypted)
                    assert sealed or (bound.value != SECRET and label != "later"), (form, name, kind)
    assert {(form, kind) for form in forms for kind in ("text", "parameter of the column")} - accepted == {
        ("from a SELECT", "text")  # which is no column
    }


def test_bulk_writes_and_synchronised_updates_encrypt(engine: Engine, file: Path) -> None:
    with Session(engine) as session:
        one = session.get_one(P, 1)
        session.bulk_insert_mappings(P.__mapper__, [{"id": 3, "notes": SECRET}, {"id": 4, "notes": SECRET}])
        session.bulk_update_mappings(P.__mapper__, [{"id": 2, "notes": SECRET}])
        session.execute(insert(P), [{"id": 5, "notes": SECRET}, {"id": 6, "notes": SECRET}])
        session.execute(insert(P).returning(P.id), [{"id": 7, "notes": SECRET}, {"id": 8, "notes": SECRET}])
        session.merge(P(id=9, notes=SECRET))
        for how in ("evaluate", "fetch", False):
            session.execute(
                update(P).where(P.id == 1).values(notes=SECRET), execution_options={"synchronize_session": how}
            )
            assert how is False or one.notes == SECRET
            for value in (literal(SECRET), func.lower(SECRET)):
                with pytest.raises(REFUSED):
                    session.execute(
                        update(P).values({sa.column("notes"): value}), execution_options={"synchronize_session": how}
                    )
        session.commit()
        assert session.scalars(select(P.notes)).all() == [SECRET] * 9
    assert SECRET.encode() not in file.read_bytes()


def test_an_upsert_of_mysql_copies_the_same_column_only(engine: Engine) -> None:
    """MySQL is not here; its compiler is."""
    dialect = mysql.dialect()
    sql_guard.install(dialect)
    made = mysql.insert(P).values(id=1, notes="x")
    shown = str(
        made.on_duplicate_key_update(notes=made.inserted.notes, plain=made.inserted.plain).compile(dialect=dialect)
    )
    assert shown.endswith("notes = VALUES(notes)")
    upserts: list[dict[str, Any]] = [
        {"notes": literal(SECRET)},
        {"notes": func.concat(made.inserted.notes, "x")},
        {"notes": made.inserted.other},
        {"plain": made.inserted.notes},
        {"plain": func.length(made.inserted.notes)},
    ]
    for values in upserts:
        with pytest.raises(REFUSED):
            made.on_duplicate_key_update(values).compile(dialect=dialect)


def test_an_expression_in_a_mapped_object_or_parameter_is_not_written(engine: Engine, file: Path) -> None:
    with Session(engine) as session, pytest.raises(REFUSED):
        session.add(Person(id=3, notes=literal(SECRET)))
        session.flush()
    with engine.begin() as connection, pytest.raises(TypeError):
        connection.execute(insert(P), [{"id": 3, "notes": literal(SECRET)}])
    assert SECRET.encode() not in file.read_bytes()


def test_a_statement_compiled_before_the_first_connection_is_refused_too(file: Path, kms: Client) -> None:
    early = sa.create_engine(f"sqlite:///{file}")
    compiled = WRITES["literal"]().compile(early)
    with early.connect() as connection:
        Base.metadata.create_all(connection)
        with pytest.raises((NotSupportedError, sa.exc.ObjectNotExecutableError)):  # the latter from SQLAlchemy 2.1 on
            connection.execute(compiled)
    early.dispose()


def test_what_is_allowed_gives_what_was_stored(engine: Engine) -> None:
    twice = aliased(P)
    inner = select(P.id, P.notes.label("n")).where(P.notes.is_not(None)).subquery()
    with Session(engine) as session:
        rows = session.execute(select(twice.notes, P.notes).join(P, P.id == twice.id).order_by(P.id)).all()
        assert [tuple(row) for row in rows] == [("x", "x"), ("y", "y")]
        assert session.scalars(select(inner.c.n).order_by(inner.c.id)).all() == ["x", "y"]
        assert session.scalars(select(select(P.notes).where(P.id == 2).scalar_subquery())).all() == ["y"]
        assert session.scalars(select(P.notes).union_all(select(P.notes))).all() == ["x", "y"] * 2
        assert session.scalars(select(select(P).where(P.id == 1).exists())).one()
        assert session.query(P).count() == 2
        assert session.scalars(select(sa.case((P.other.is_(None), 0), else_=1)).order_by(P.id)).all() == [1, 0]
        session.execute(update(P).values(notes=sa.bindparam("new", "z", type_=P.notes.type)).where(P.id == 1))
        session.execute(update(P).values(notes=P.notes, other=sa.null(), plain="c"))
        session.execute(insert(P).from_select(["id", "notes"], select(P.id + 10, P.notes)))
        made = sqlite.insert(P).values(id=2, notes="upserted")
        session.execute(made.on_conflict_do_update(index_elements=["id"], set_={"notes": made.excluded.notes}))
        session.execute(upsert(notes="set"))
        assert session.scalars(select(P.notes).order_by(P.id)).all() == ["set", "upserted", "z", "y"]
        session.execute(update(P), [{"id": 1, "notes": "one"}, {"id": 2, "notes": "two"}])
        assert session.scalars(select(P.notes).order_by(P.id).limit(2)).all() == ["one", "two"]


CONSTRAINTS: dict[str, Callable[[Encrypted], list[Any]]] = {
    "unique": lambda kind: [Column("c", kind, unique=True)],
    "index": lambda kind: [Column("c", kind, index=True)],
    "primary_key": lambda kind: [Column("c", kind, primary_key=True)],
    "foreign_key": lambda kind: [Column("c", kind, sa.ForeignKey("people.id"))],
    "unique_constraint": lambda kind: [Column("c", kind), sa.UniqueConstraint("c")],
    "primary_key_constraint": lambda kind: [Column("c", kind), sa.PrimaryKeyConstraint("c")],
    "foreign_key_constraint": lambda kind: [Column("c", kind), sa.ForeignKeyConstraint(["c"], ["people.id"])],
    "index_object": lambda kind: [Column("c", kind), sa.Index("i", "c")],
    "exclude_constraint": lambda kind: [Column("c", kind), postgresql.ExcludeConstraint(("c", "="))],
    "server_default": lambda kind: [Column("c", kind, server_default=SECRET)],
    "server_onupdate": lambda kind: [Column("c", kind, server_onupdate=sa.FetchedValue())],
    "default_expression": lambda kind: [Column("c", kind, default=func.trim(SECRET))],
    "onupdate_expression": lambda kind: [Column("c", kind, onupdate=sa.text("1"))],
    "sequence": lambda kind: [Column("c", kind, sa.Sequence("s"))],
    "computed": lambda kind: [Column("c", kind, sa.Computed("1"))],
    "variant": lambda kind: [Column("c", sa.Text().with_variant(kind, "sqlite"))],
    "own_variant": lambda kind: [Column("c", kind.with_variant(sa.Text(), "sqlite"))],
    "array": lambda kind: [Column("c", sa.ARRAY(kind))],
}


@pytest.mark.parametrize("form", CONSTRAINTS)
def test_a_constraint_or_default_of_an_encrypted_column_is_refused(kms: Client, form: str) -> None:
    with pytest.raises(NotSupportedError):
        Table("t", MetaData(), Column("id", sa.Integer), *CONSTRAINTS[form](Encrypted(kms, key="t.c")))


def test_an_index_on_an_expression_of_an_encrypted_column_is_refused(engine: Engine, kms: Client) -> None:
    made = Table("t", MetaData(), Column("id", sa.Integer), Column("c", Encrypted(kms, key="t.c")))
    with pytest.raises(REFUSED):
        sa.Index("i", func.lower(made.c.c))
        made.create(engine)
    checked = Table("u", MetaData(), Column("c", Encrypted(kms, key="t.c")))
    checked.append_constraint(sa.CheckConstraint(checked.c.c == literal("x")))
    with pytest.raises(REFUSED):
        checked.create(engine)
