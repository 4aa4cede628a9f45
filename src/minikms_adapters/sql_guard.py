"""Which statements of SQLAlchemy may use an encrypted column, decided when a statement is compiled.

Owns: `Guard`, the part of a compiler that visits encrypted columns and what is assigned to them, its installation in
each dialect that connects, and the checks of a table's constraints. Invariants: an encrypted column stands in a list of
selected columns, before IS NULL, and as the target of an INSERT or UPDATE, nowhere else; a comparable one also beside
`=`, `<>` and IN; what is assigned to it, or compared with it, is a bound value of its own type, NULL, or the same
column. It must never let a statement pass that it does not understand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn

from sqlalchemy import BindParameter, CheckConstraint, Column, Engine, Index, Null, Select, UniqueConstraint, event
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.schema import ColumnCollectionConstraint
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnClause, Label, TextClause
from sqlalchemy.sql.selectable import ScalarSelect, TextualSelect
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeDecorator

from minikms_adapters.errors import NotSearchableError, NotSupportedError

_COMPARISONS = (operators.eq, operators.ne, operators.in_op, operators.not_in_op)


class Opaque(TypeDecorator[Any]):
    """Base of the types whose columns are guarded."""

    __abstract__ = True

    place: tuple[str, ...] | None = None
    """Names of schema, table and column, once the column has a table."""
    comparable = False
    """Whether equal values are equal in the database."""


def is_opaque(element: Any) -> bool:
    return isinstance(getattr(element, "type", None), Opaque)


class Guard(SQLCompiler):
    """Mixed into the compiler of a dialect."""

    _permitted: object = None
    """The element that may be visited now though it is opaque."""
    _compared: tuple[Any, ...] = ()
    """Likewise, both sides of a comparison."""
    _showing: object = None
    """The SELECT inside an expression whose columns may be opaque."""
    _shown = False
    """Whether the columns of the SELECT that is visited now are results, not operands."""
    _assigned: tuple[Any, ...] = ()
    """Columns that the statement assigns to themselves."""

    @contextmanager
    def _with(self, **states: object) -> Iterator[None]:
        before = {name: getattr(self, name) for name in states}
        self.__dict__.update(states)
        try:
            yield
        finally:
            self.__dict__.update(before)

    # --- columns ---

    def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> str:
        if is_opaque(column) and self._permitted is not column and not any(column is each for each in self._compared):
            _refuse()
        return super().visit_column(column, *args, **kwargs)

    def visit_label(self, label: Any, *args: Any, **kwargs: Any) -> Any:
        if is_opaque(label) and kwargs.get("render_label_as_label") is label:  # ORDER BY and GROUP BY its name
            _refuse()
        return super().visit_label(label, *args, **kwargs)

    def visit_binary(self, binary: Any, *args: Any, **kwargs: Any) -> Any:
        tests_null = binary.operator in (operators.is_, operators.is_not) and isinstance(binary.right, Null)
        sides = (binary.left, binary.right)
        compares = binary.operator in _COMPARISONS and is_opaque(sides[0]) and sides[0].type.comparable
        compares = compares and _is_of_same_column(*sides) and isinstance(sides[1], (BindParameter, ColumnClause))
        permitted = binary.left if tests_null else self._permitted
        with self._with(_permitted=permitted, _compared=sides if compares else self._compared):
            return super().visit_binary(binary, *args, **kwargs)

    def visit_unary(self, unary: Any, *args: Any, **kwargs: Any) -> Any:
        if unary.operator is operators.exists:
            with self._with(_showing=getattr(unary.element, "element", None)):
                return super().visit_unary(unary, *args, **kwargs)
        return super().visit_unary(unary, *args, **kwargs)

    def _label_select_column(self, select: Any, column: Any, *args: Any, **kwargs: Any) -> Any:
        """Labels a column of SELECT and, without `select`, of RETURNING."""
        if is_opaque(column) and select is not None and (self._is_distinct(select) or not self._shown):
            _refuse()
        item = column.element if isinstance(column, Label) else column
        showing = item.element if isinstance(item, ScalarSelect) else None
        with self._with(_permitted=item, _showing=showing):
            return super()._label_select_column(select, column, *args, **kwargs)

    def _is_distinct(self, select: Any) -> bool:
        """Whether the selected columns are compared. SQLAlchemy writes DISTINCT where a database has no DISTINCT ON."""
        return select._distinct and not (select._distinct_on and self.dialect.name == "postgresql")

    def visit_select(self, select_stmt: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_opaque, select_stmt._distinct_on)):
            _refuse()
        with self._with(_shown=self._is_shown(select_stmt, kwargs)):
            return super().visit_select(select_stmt, *args, **kwargs)

    def visit_compound_select(self, cs: Any, *args: Any, **kwargs: Any) -> Any:
        compares = getattr(cs.keyword, "value", cs.keyword) != "UNION ALL"
        with self._with(_shown=self._is_shown(cs, kwargs) and not compares):
            return super().visit_compound_select(cs, *args, **kwargs)

    def _is_shown(self, select: Any, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("compound_index") is not None:
            return self._shown
        return not self.stack or kwargs.get("asfrom") or kwargs.get("insert_into") or self._showing is select

    # --- assignments ---

    def visit_insert(self, insert_stmt: Any, *args: Any, **kwargs: Any) -> Any:
        return self._with_assignments(super().visit_insert, insert_stmt, args, kwargs)

    def visit_update(self, update_stmt: Any, *args: Any, **kwargs: Any) -> Any:
        return self._with_assignments(super().visit_update, update_stmt, args, kwargs)

    def _with_assignments(self, visit: Any, statement: Any, args: Any, kwargs: Any) -> Any:
        state = statement._compile_state_factory(statement, self)
        assigned = []
        for target, value, typed in _assignments(state):
            if is_opaque(target) and _check_assigned(target, value, typed):
                assigned.append(value)
        with self._with(_assigned=tuple(assigned)):
            return visit(statement, *args, **kwargs)

    def visit_on_duplicate_key_update(self, on_duplicate: Any, **kwargs: Any) -> Any:
        """MySQL's compiler writes the columns of `inserted` without visiting them."""
        values = [each for each in on_duplicate.update.values() if not any(each is known for known in self._assigned)]
        parts = chain(*(iterate(each) for each in values if hasattr(each, "_compiler_dispatch")))
        if any(is_opaque(each) and isinstance(each, ColumnClause) for each in parts):
            _refuse()
        visit: Any = super()
        return visit.visit_on_duplicate_key_update(on_duplicate, **kwargs)

    def process(self, obj: Any, **kwargs: Any) -> str:
        """What SQLAlchemy calls for each expression that is assigned, and for each result of a textual statement."""
        textual = not self.stack or isinstance(self.stack[-1]["selectable"], TextualSelect)
        indexed = self.statement is None and is_opaque(obj) and obj.type.comparable  # of CREATE INDEX
        if indexed or (textual and kwargs.get("add_to_result_map")) or any(obj is each for each in self._assigned):
            with self._with(_permitted=obj):
                return super().process(obj, **kwargs)
        return super().process(obj, **kwargs)


def _refuse() -> NoReturn:
    raise NotSearchableError("an encrypted column can only be selected, tested for NULL, inserted and updated")


def _refuse_target(key: object) -> NoReturn:
    raise NotSupportedError(f"{key} names no column of a table with encrypted columns: give the table's own column")


def _assignments(state: Any) -> Iterator[tuple[Any, Any, bool]]:
    """The assigned columns with their values, and whether SQLAlchemy gives an untyped parameter the column's type."""
    statement, others = state.statement, getattr(state, "_extra_froms", ())
    table = statement.table
    if not any(is_opaque(column) for each in (table, *others) for column in each.columns):
        return
    columns = {column.key: column for column in table.columns if column.table not in others}
    for index, row in enumerate(state._multi_parameters or [state._dict_parameters or {}]):
        for key, value in row.items():
            yield _target(key, columns, others), value, index == 0
    names = getattr(statement, "_select_names", None)
    if names:
        selected = statement.select.selected_columns if isinstance(statement.select, Select) else ()
        if len(selected) != len(names):
            raise NotSupportedError("INSERT from this SELECT into a table with encrypted columns is not supported")
        for name, value in zip(names, selected, strict=True):
            yield _target(name, columns, others), value, False
    clause = getattr(statement, "_post_values_clause", None)
    if clause is None or clause.__visit_name__ == "on_conflict_do_nothing":
        return
    updates = getattr(clause, "update_values_to_set", None) or getattr(clause, "update", None)
    if not updates or is_opaque(getattr(clause, "update_whereclause", None)):
        _refuse()
    for name, value in dict(updates).items():
        key = name.__clause_element__() if hasattr(name, "__clause_element__") else name
        if key not in columns if isinstance(key, str) else not table.columns.contains_column(key):
            _refuse_target(key)  # SQLAlchemy would write its name as it is
        yield _target(key, columns, others), value, True


def _target(key: Any, columns: dict[str, Any], others: Any) -> Any:
    """The column that SQLAlchemy assigns to: it takes that of the same key, whatever the table of `key` is."""
    key = key.__clause_element__() if hasattr(key, "__clause_element__") else key
    if isinstance(key, str):
        return columns.get(key)
    if not isinstance(key, ColumnClause):
        tables = {column.table for column in columns.values()}
        parts = [each for each in iterate(key) if isinstance(each, (ColumnClause, TextClause))]
        if not parts or any(getattr(each, "table", None) not in tables for each in parts):
            _refuse_target(key)
        return None
    return key if key.table in others else columns.get(key.key)


def _is_of_same_column(target: Any, value: Any) -> bool:
    same = is_opaque(value) and value.type.place == target.type.place is not None
    return same and not getattr(value, "is_literal", False)


def _check_assigned(target: Any, value: Any, typed: bool) -> bool:
    """Whether the value is the column itself. Raises for what would be written in plaintext."""
    value = value.__clause_element__() if hasattr(value, "__clause_element__") else value
    if isinstance(value, Label):
        value = value.element
    same = _is_of_same_column(target, value)
    if not hasattr(value, "_compiler_dispatch") or isinstance(value, Null):
        return False
    if isinstance(value, BindParameter) and (same or (typed and value.type._isnull)):
        return False
    if same and isinstance(value, ColumnClause):
        return True
    raise NotSupportedError(f"{target} can only be set to a value, NULL or itself: the database would hold plaintext")


# --- tables -----------------------------------------------------------------------------------------------------------


def check_column(column: Column[Any]) -> None:
    """Refuses a constraint or a default of an encrypted column that would have no effect, or would write plaintext."""
    kind: Any = column.type
    searched = not kind.comparable and (column.unique or column.index)
    if searched or column.primary_key or column.foreign_keys:
        _refuse_constraint(column)
    defaults = (column.default, column.onupdate)
    if any(each is not None and not (each.is_scalar or each.is_callable) for each in defaults) or any(
        (column.server_default, column.server_onupdate, column.computed, column.identity)
    ):
        raise NotSupportedError(f"{column}: the database can't make an encrypted value; use a default in Python")


@event.listens_for(ColumnCollectionConstraint, "after_parent_attach")
@event.listens_for(Index, "after_parent_attach")
def _check_constraint(constraint: Any, table: Any) -> None:
    """A CheckConstraint is left to the guard: it may test for NULL."""
    for column in () if isinstance(constraint, CheckConstraint) else constraint.columns:
        if is_opaque(column) and not (column.type.comparable and isinstance(constraint, (Index, UniqueConstraint))):
            _refuse_constraint(column)


def _refuse_constraint(column: Column[Any]) -> NoReturn:
    raise NotSupportedError(f"{column}: an encrypted column can't be unique, a key or in an index")


# --- installation -----------------------------------------------------------------------------------------------------


def install(dialect: Dialect) -> None:
    """Each dialect gets its guard when it connects first."""
    compiler = dialect.statement_compiler
    if not issubclass(compiler, Guard):
        dialect.statement_compiler = type(f"Guarded{compiler.__name__}", (Guard, compiler), {})


@event.listens_for(Engine, "engine_connect")
def _install_where_connected(connection: Any) -> None:
    install(connection.dialect)


@event.listens_for(Engine, "before_cursor_execute")
def _check_compiled(  # noqa: PLR0917 - the arguments are SQLAlchemy's
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    """A statement that was compiled without the guard, before the dialect connected, is compiled again with it."""
    compiled = context.compiled if context is not None else None
    if isinstance(compiled, SQLCompiler) and not isinstance(compiled, Guard) and compiled.statement is not None:
        compiled.statement.compile(dialect=context.dialect, column_keys=compiled.column_keys)
