"""What the members of a run and their database did, as events of `models/Trace.tla`, and TLC's judgement of them.

Owns: the record that triggers make of each commit, and the events. Times are of this machine's clock; the model counts
units of UNIT_S since the first commit.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg

from minikms_replicator.deciding import WAIT_NS
from minikms_replicator.tables import LEASE_NS
from tests.harness.model_checker import violated

UNIT_S: Final = 0.5
LEASE: Final = int(LEASE_NS / 1e9 / UNIT_S) + 1
WAIT: Final = int(WAIT_NS / 1e9 / UNIT_S) - 2
"""In units: a lease may be longer by one, and a wait shorter by two, than whole units show."""
ANSWERS: Final = ("replica_serves", "create_dek", "encrypt", "decrypt", "retire_key", "destroy_key", "rotate_kek_begin")
RECORD: Final = """
CREATE TABLE commits (place bigserial, at timestamptz, term bigint, member text, number bigint);
CREATE TABLE files (key_id text, number bigint);
CREATE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    INSERT INTO commits (at, term, member, number) VALUES (clock_timestamp(), NEW.term, NEW.member, NEW.number);
    RETURN NEW; END $$;
CREATE FUNCTION note_file() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    INSERT INTO files VALUES (NEW.key_id, NEW.number); RETURN NEW; END $$;
CREATE TRIGGER note_commit AFTER UPDATE ON kms_head FOR EACH ROW WHEN (NEW.renewals > OLD.renewals)
    EXECUTE FUNCTION note_commit();
CREATE TRIGGER note_file AFTER INSERT ON kms_file FOR EACH ROW EXECUTE FUNCTION note_file();
"""


class Event(NamedTuple):
    """`now`: in seconds. `what`: serve, renew, change, release, leave, return or answer, as in Trace.tla."""

    now: float
    what: str
    by: str
    term: int = 0
    number: int = 0


def recorded(owner: str, logs: Sequence[Path], others: Sequence[Event] = ()) -> list[Event]:
    """The events of a run whose database has executed RECORD, in order, with `others`. `logs`: the audit logs of the
    members."""
    commits, numbers = asyncio.run(_read(owner))
    events = [*others, *_of_commits(commits)]
    for log in logs:
        events += _of_log(log, numbers)
    return sorted(events, key=lambda event: event.now)


async def _read(owner: str) -> tuple[list[Any], dict[str, int]]:
    connection = await asyncpg.connect(owner)
    try:
        at = "extract(epoch FROM at)::float8"
        commits = await connection.fetch(f"SELECT {at}, term, member, number FROM commits ORDER BY place")
        files = await connection.fetch("SELECT key_id, min(number) FROM files GROUP BY key_id")
        return list(map(tuple, commits)), dict(map(tuple, files))
    finally:
        await connection.close()


def _of_commits(commits: Sequence[tuple[float, int, str, int]]) -> Iterator[Event]:
    last = Event(0, "", "")
    for now, term, member, number in commits:
        what = "serve" if term > last.term else "change" if number > last.number else "renew" if member else "release"
        last = Event(now, what, member or last.by, term, number)
        yield last


def _of_log(log: Path, numbers: dict[str, int]) -> Iterator[Event]:
    """The answers of a member, each with the change that made its key if it made one."""
    term, member = 0, ""
    for line in log.read_text().splitlines():
        event = json.loads(line)["event"]
        if event["type"] == "replica_serves":
            term, member = event["facts"]["term"], event["facts"]["member"]
        if term and event["type"] in ANSWERS and event["outcome"] == "ok":
            number = numbers[event["key_id"]] if event["type"] == "create_dek" else 0
            yield Event(event["ts"] / 1e9, "answer", member, term, number)


def is_explained(place: Path, events: Sequence[Event]) -> bool:
    """Whether a behaviour of the model has these events, and keeps its invariants. `place`: an empty directory."""
    units = [event._replace(now=int((event.now - events[0].now) / UNIT_S)) for event in events]
    rows = (", ".join(f"{name} |-> {json.dumps(value)}" for name, value in event._asdict().items()) for event in units)
    listed = ",\n".join(f"[{row}]" for row in rows)
    (place / "Recorded.tla").write_text(f"---- MODULE Recorded ----\nEXTENDS Sequences\nEvents == <<{listed}>>\n====\n")
    constants = dict.fromkeys(("LostMax", "RollbackMax", "StopMax"), "0")
    constants |= dict.fromkeys(("MutantAnswer", "MutantTerm", "MutantUnverified", "MutantWait"), "FALSE")
    constants |= {"Slow": "1", "Fast": "1", "Lease": f"{LEASE}", "Wait": f"{WAIT}", "TimeMax": f"{units[-1].now}"}
    for bound, member in (("TermMax", "term"), ("ChangesMax", "number")):
        constants[bound] = str(max(getattr(event, member) for event in events))
    constants |= {
        "AwayMax": str(len(events)),
        "Members": f"{{{', '.join({json.dumps(event.by) for event in events})}}}",
    }
    head = "SPECIFICATION TraceSpec\nINVARIANTS OneServes Durable Kept Unfinished\nCONSTANTS\n  Kinds <- Numbers\n"
    (place / "Trace.cfg").write_text(head + "".join(f"  {name} = {value}\n" for name, value in constants.items()))
    return violated(place, "Trace") == "Unfinished"
