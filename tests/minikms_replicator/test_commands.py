"""The commands of the replicator, on a PostgreSQL and without a daemon; what its configuration may say."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from minikms.api.errors import StartError
from minikms_replicator.config import parse_config
from tests.harness import forked
from tests.minikms_replicator.rig import ROLE, fresh

CONFIG = 'version = 1\nsocket = "s"\n[database]\nurl = "{url}"\n'


def ran(*words: object, status: int = 0) -> str:
    done = forked.run("minikms_replicator", *words)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


@pytest.fixture
def config(database: str, tmp_path: Path) -> Path:
    """Of tables that no member has filled."""
    path = tmp_path / "replicator.toml"
    path.write_text(CONFIG.format(url=asyncio.run(fresh(database))) + "single_node = true\n")
    return path


def test_status_says_that_nobody_serves(config: Path) -> None:
    page: Any = json.loads(ran("status", "--config", config, "--json", status=1))
    assert (page["member"], page["filled"], page["members"]) == ("", False, [])
    assert "nobody has the head in term 0" in ran("status", "--config", config, status=1)


def test_doctor_names_what_is_missing(config: Path) -> None:
    problems = json.loads(ran("doctor", "--config", config, "--json", status=1))["problems"]
    assert [problem.partition(":")[0] for problem in problems] == [
        "fsync or full_page_writes is off",
        "no member has filled the tables, or they were emptied",
        "the daemon",
    ]
    config.write_text(config.read_text().replace("single_node = true\n", ""))
    assert "WRONG: synchronous_standby_names is empty there" in ran("doctor", "--config", config, status=1)


def test_tables_are_made_once_and_emptied_on_request(database: str, config: Path) -> None:
    assert "already" in ran("init", "--url", database, "--role", ROLE, status=2)
    assert "confirm with --yes" in ran("reset", "--url", database, status=2)
    assert ran("reset", "--url", database, "--yes") == "the tables are empty\n"
    assert "has term 1" not in ran("status", "--config", config, status=1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("TRUNCATE kms_head, kms_file, kms_tombstone, kms_member", "no member has filled the tables"),
        ("DELETE FROM kms_head", "no member has filled the tables"),
        ("TRUNCATE kms_schema, kms_head", "kms_schema is empty: run minikms-replicator reset"),
        ("UPDATE kms_head SET keyring = 'k', member = 'm5'", "no member serves: m5 has the head and does not report"),
        ("UPDATE kms_head SET keyring = 'k', member = E'no\\nbody'", "no member serves: no"),
    ],
)
def test_damaged_tables_are_named_and_reset(database: str, config: Path, damage: str, said: str) -> None:
    async def rows(*statements: str) -> list[Any]:
        connection = await asyncpg.connect(database)
        try:
            return [await connection.fetch(statement) for statement in statements]
        finally:
            await connection.close()

    asyncio.run(rows("UPDATE kms_head SET term = 7, seals = 2", damage))
    for command in ("status", "doctor"):
        assert said in ran(command, "--config", config, status=2 if "kms_schema" in said and command == "status" else 1)
    ran("reset", "--url", database, "--yes")
    head, schema = asyncio.run(rows("SELECT term, member, keyring FROM kms_head", "SELECT number FROM kms_schema"))
    assert head[0]["keyring"] == b"" and head[0]["member"] and schema[0]["number"] == 1
    assert "nobody" not in ran("status", "--config", config, status=1), "its lease may last"


def test_a_database_that_is_away_may_be_there_later(tmp_path: Path) -> None:
    path = tmp_path / "replicator.toml"
    path.write_text(CONFIG.format(url=f"postgresql://x@/x?host={tmp_path}"))
    assert "the database: " in ran("status", "--config", path, status=1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CONFIG.format(url="postgresql://a:secret@db/x?sslmode=verify-full"), "database.url must not hold a password"),
        (CONFIG.format(url="postgresql://db/x"), "database.url must have sslmode=verify-full"),
        (CONFIG.format(url="postgresql:///x?host=/run") + "port = 5432\n", "unknown field `port`"),
        (CONFIG.format(url="postgresql:///x?host=/run").replace('"s"', '""'), "socket is a path of 1 to 107 bytes"),
        ('metrics = "0.0.0.0:1"\n' + CONFIG.format(url="postgresql:///x?host=/run"), "address of this host"),
        ("server_uids = []\n" + CONFIG.format(url="postgresql:///x?host=/run"), "server_uids must name a user"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused(text: str, why: str) -> None:
    with pytest.raises(StartError, match=why) as refused:
        parse_config(text.encode(), "replicator.toml")
    assert "secret" not in str(refused.value)
