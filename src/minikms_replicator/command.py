"""The command `minikms-replicator`.

Owns: its subcommands and flags, and the sentence for each error. Invariants: results go to standard output, everything
else to standard error; only `init` and `reset` need the role that owns the tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

from minikms.commands.usage import (
    EXIT_FAILED,
    EXIT_GOOD,
    Json,
    LogFormat,
    Parameter,
    RequireHardening,
    new_helper,
    run_service,
)

if TYPE_CHECKING:
    from minikms.api import MemberReport
    from minikms_replicator.tables import Head, Tables

T = TypeVar("T")

app = new_helper(
    "minikms-replicator",
    "Joins this host's key service to those of other hosts, through PostgreSQL. Without a command it runs.",
    "Exit status: 0 done, 1 something is wrong or was refused, 2 wrong usage, or something is missing.",
)

CONFIG: Final = Path("/etc/progressdb/replicator.toml")
Config = Annotated[Path, Parameter(name="--config", help="The configuration, a TOML file.")]
Url = Annotated[str, Parameter(help="postgresql://… of the role that owns the tables, without a password.")]


@app.default
def run(
    *, config: Config = CONFIG, log_format: LogFormat = "console", require_hardening: RequireHardening = False
) -> int:
    """Run until SIGTERM."""
    from minikms_replicator import process

    process.run(config, log_format, require_hardening=require_hardening)
    return EXIT_GOOD


@app.command
def init(*, url: Url, role: Annotated[str, Parameter(help="The role of the replicators.")]) -> int:
    """Make the tables in an empty database."""
    from minikms_replicator import tables
    from minikms_replicator.config import check_url

    check_url(url, "--url")
    asyncio.run(tables.init(url, role))
    print("the tables are made")
    return EXIT_GOOD


@app.command
def reset(*, url: Url, yes: Annotated[bool, Parameter(help="Do not ask.", negative=())] = False) -> int:
    """Empty the tables, so that the member with the newest changes can fill them: `minikms replica promote`."""
    from minikms.commands.output import confirm
    from minikms_replicator import tables
    from minikms_replicator.config import check_url

    check_url(url, "--url")
    confirm("Forget all that the tables have of the key service? The files of its hosts stay.", yes=yes)
    asyncio.run(tables.reset(url))
    print("the tables are empty")
    return EXIT_GOOD


@app.command
def fetch(
    *,
    data_dir: Annotated[Path, Parameter(help="The data directory of a host that has just joined.")],
    config: Config = CONFIG,
) -> int:
    """Write the keyring and the key files into the directory, as the daemon's user, before its first start.

    An interrupted run can be repeated.
    """
    from minikms.commands.output import counted
    from minikms_replicator import fetching

    summary = _with_tables(config, lambda tables: fetching.fetch(tables, str(data_dir)))
    print(f"{counted(summary.files, 'key')} and {counted(summary.tombstones, 'tombstone')}, of change {summary.number}")
    return EXIT_GOOD


@app.command
def status(*, config: Config = CONFIG, json: Json = False) -> int:
    """Show which member serves, and what all members have reported. Exit status: 0 one serves, 1 none does."""
    from minikms.commands.output import print_result

    head, members = _with_tables(config, _read)
    page = {
        "keyring_id": head.keyring_id, "member": head.member, "term": head.term, "number": head.number,
        "seals": head.seals, "wanted": head.wanted, "filled": not head.empty, "members": members,
    }  # fmt: skip
    print_result(page, _status_lines(head, members), json=json)
    return EXIT_FAILED if _unserved(head, members) else EXIT_GOOD


@app.command
def evidence(*, config: Config = CONFIG, json: Json = False) -> int:
    """Show how many keys and tombstones the database has; --json names them, for `minikms replica evidence`."""
    from minikms.commands.output import print_result
    from minikms_replicator import fetching

    report = _with_tables(config, fetching.evidence)
    keys = f"{len(report.keys):,} and {len(report.destroyed):,} destroyed"
    print_result(report, f"term {report.term}, change {report.number:,}, keys: {keys}", json=json)
    return EXIT_GOOD


@app.command
def doctor(*, config: Config = CONFIG, json: Json = False) -> int:
    """Check the database, the rights there, the state of all hosts, and the clock; not the contents of the tables:
    `evidence` has them. Exit status: 0 nothing is wrong there, 1 something is.
    """
    from minikms.commands.output import print_result

    problems = _problems(config)
    page = [f"WRONG: {each}" for each in problems] or "nothing is wrong; the contents of the tables were not compared"
    print_result({"problems": problems}, page, json=json)
    return EXIT_FAILED if problems else EXIT_GOOD


def main() -> None:
    """Runs the command line and ends the process."""
    run_service(app)


def _with_tables(config: Path, work: Callable[[Tables], Awaitable[T]]) -> T:
    from minikms_replicator.config import Files
    from minikms_replicator.tables import Tables, start_errors

    database = Files(config).config().database
    tables = Tables(database.url, single_node=database.single_node)

    async def run() -> T:
        try:
            return await work(tables)
        finally:
            tables.close()

    with start_errors():
        return asyncio.run(run())


async def _read(tables: Tables) -> tuple[Head, list[MemberReport]]:
    return await tables.head(), await tables.members()


def _unserved(head: Head, members: list[MemberReport]) -> str:
    """Why no member serves; empty if one does."""
    from minikms.api import MEMBER_SILENT_SECONDS

    if head.empty:
        return "no member has filled the tables, or they were emptied"
    report = next((one for one in members if one.member_id == head.member), None)
    if report is not None and report.seen_seconds <= MEMBER_SILENT_SECONDS:
        return ""
    return f"no member serves: {head.member} has the head and does not report" if head.member else "no member serves"


def _problems(config: Path) -> list[str]:
    """The problems that `doctor` finds. A configuration that can't be read is a StartError."""
    from minikms.api import ASK_POSITION, MEMBER_SILENT_SECONDS
    from minikms.api.errors import ForbiddenError, KmsError, StartError
    from minikms.client import Client
    from minikms.platform import clock
    from minikms_replicator.config import Files

    replication = Files(config).config()
    problems: list[str] = []
    members: list[MemberReport] = []
    try:
        problems += _with_tables(config, lambda tables: tables.examine())
        head, members = _with_tables(config, _read)
        problems += [unserved] if (unserved := _unserved(head, members)) else []
    except StartError as error:
        problems.append(str(error))
    try:
        with Client(replication.socket, server_uids=replication.server_uids) as kms:
            position = kms.replica_follow(ASK_POSITION)
        reports = {each.member_id: each for each in members} | {position.member_id: position.report}
        for host in position.members or (position.member_id,):
            report = reports.get(host)
            if report is None or report.seen_seconds > MEMBER_SILENT_SECONDS:
                problems.append(f"the host {host} does not report")
            elif report.why or report.mode in ("sealed", "refused"):
                problems.append(f"the host {report.name} is {report.mode}: {report.why}")
    except ForbiddenError:
        problems.append("the policy of the daemon grants this user no role `replicate`")
    except KmsError as error:
        problems.append(f"the daemon: {error}")
    if not clock.COUNTS_SUSPENSION:
        problems.append("this system has no CLOCK_BOOTTIME: a host that was suspended would not see its lease end")
    return problems


def _status_lines(head: Head, members: list[MemberReport]) -> Iterator[str]:
    serves = head.member or "nobody"
    yield f"{serves} has the head in term {head.term}, change {head.number}" + ("" if not head.empty else ", empty")
    if unserved := _unserved(head, members):
        yield f"  {unserved}"
    if head.wanted:
        yield f"  {head.wanted} is to take over"
    for member in members:
        why = f": {member.why}" if member.why else ""
        seen = f"{member.mode}, change {member.number}, {member.seen_seconds:.0f} s ago"
        yield f"  {member.member_id}  {member.name}: {seen}{why}"
