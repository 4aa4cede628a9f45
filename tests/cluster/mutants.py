"""Versions of the cluster that break a rule, which the checker must find. The product has no switch for any of it.

Owns: each change of the source, as a text that is replaced in a copy of it, and the faults that show it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tests.cluster.machines import Variant

SOURCE: Final = Path(__file__).parents[2] / "src"
WRITER: Final = "progressdb_server/store/postgres/writer.py"
FOLLOWING: Final = "minikms/custody/following.py"
KEY_TABLES: Final = "minikms_replicator/tables.py"


class Mutant(NamedTuple):
    variant: Variant
    changes: tuple[tuple[str, str, str], ...]
    """Module, text, what is in its place."""
    arguments: tuple[str, ...]
    """Of `python -m tests.cluster`."""
    found: str
    """A part of a violation that it causes."""


MUTANTS: Final[Mapping[str, Mutant]] = {
    "asynchronous": Mutant(
        Variant(synchronous_mode="off", single_node=True),
        (),
        ("--faults", "unreplicated_host_killed"),
        "was acknowledged at",
    ),
    "fence-outside": Mutant(
        Variant(),
        (
            (WRITER, "(SELECT 1 FROM store_schema WHERE number = {SCHEMA} FOR SHARE),", "(SELECT 1),"),
            (WRITER, "SELECT 1 FROM store_schema WHERE number = {SCHEMA} FOR SHARE", "SELECT 1"),
            (
                WRITER,
                "        if usual is not None:\n            self._committing = True\n",
                '        if not await connection.fetch(f"SELECT 1 FROM store_schema WHERE number = {SCHEMA}"):\n'
                '            raise NotWrittenError("the database was upgraded")\n'
                "        if usual is not None:\n            self._committing = True\n",
            ),
        ),
        ("--upgrade",),
        "written after the upgrade of the tables",
    ),
    "membership-cached": Mutant(
        Variant(),
        (
            (
                "progressdb_server/store/postgres/reads.py",
                "        return rows[0][0] if rows else None\n",
                "        value = rows[0][0] if rows else None\n"
                '        if key.startswith(b"index:writer:"):\n'
                '            self.__dict__.setdefault("cached", {}).setdefault(key, value)\n'
                '            return self.__dict__["cached"][key]\n'
                "        return value\n",
            ),
        ),
        ("--faults", "quiet"),
        "was removed at",
    ),
    "warnings-hidden": Mutant(
        Variant(),
        (("minikms/processes/postgresql.py", '"client_min_messages": "warning"', '"client_min_messages": "error"'),),
        ("--faults", "unreplicated_waits_cancelled"),
        "was acknowledged at",
    ),
    "retry-reads": Mutant(
        Variant(),
        (
            (
                "progressdb_server/store/idempotency.py",
                "await self._writer.commit(Write((), (ticket.condition,)))",
                "pass",
            ),
            ("progressdb_server/store/idempotency.py", "                await self._writer.settled()\n", ""),
        ),
        ("--faults", "unreplicated_waits_ended"),
        "was acknowledged at",
    ),
    "key-hosts-asynchronous": Mutant(
        Variant(synchronous_mode="off", single_node=True),
        (),
        ("--key-hosts", "--faults", "unreplicated_host_killed"),
        "was acknowledged at",
    ),
    "lease-from-the-answer": Mutant(
        Variant(),
        ((KEY_TABLES, "return RenewedLease._make((*row, asked_ns))", "return RenewedLease._make((*row, boot_ns()))"),),
        ("--key-hosts", "--faults", ",".join(["replicator_stopped"] * 3)),
        " answered at ",
    ),
    "term-unchecked": Mutant(
        Variant(),
        (
            (
                KEY_TABLES,
                "WHERE term = $1 AND member = $2 AND number = ANY($3::bigint[])",
                "WHERE $1::bigint > 0 AND $2::text <> '' AND $3::bigint[] <> '{{}}'",
            ),
            (
                KEY_TABLES,
                "WHERE term = $1 AND member = $2 AND number = $3",
                "WHERE $1::bigint > 0 AND $2::text <> '' AND $3::bigint >= 0",
            ),
        ),
        ("--key-hosts", "--faults", "key_host_stopped,replicator_stopped"),
        " answered at ",
    ),
    "answer-before-the-commit": Mutant(
        Variant(),
        (
            (
                "minikms/custody/member.py",
                "        self.require_serving()\n        async with self._committed(written):\n            yield\n",
                "        self.require_serving()\n\n"
                "        async def later() -> None:\n"
                "            async with self._committed(written):\n"
                "                pass\n\n"
                '        self.__dict__.setdefault("later", []).append(asyncio.ensure_future(later()))\n'
                "        yield\n",
            ),
        ),
        ("--key-hosts", "--faults", "key_host_alone"),
        "was acknowledged at",
    ),
    "unverified": Mutant(
        Variant(),
        (
            (FOLLOWING, "            if entries != state.entries:\n", "            if False:\n"),
            (
                FOLLOWING,
                "        if (state.number, state.epoch) != (head.number, body.epoch) or",
                "        if False and",
            ),
            (FOLLOWING, "dek.parse(old, key_id).version > record.version", "False"),
        ),
        ("--key-hosts", "--faults", "database_forged"),
        "was retired at",
    ),
}


def variant(name: str, copy: Path) -> Variant:
    """With a copy of the source that has the mutant's changes."""
    mutant = MUTANTS[name]
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for module, text, replaced in mutant.changes:
        path = copy / module
        content = path.read_text()
        assert content.count(text) == 1, f"{module} was changed: {text!r}"
        path.write_text(content.replace(text, replaced))
    return mutant.variant._replace(source=copy if mutant.changes else None)
