"""What is read of a damaged RocksDB, and the store that takes its place."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from progressdb_server.jobs.table import parse
from progressdb_server.store import places
from progressdb_server.store.check import Problem, Report, check, repair_offline
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import NewMessage, StoreDamagedError, StoreError
from progressdb_server.store.offline import Lost
from progressdb_server.store.rocks.engine import RocksEngine, RocksReader
from progressdb_server.store.rocks.salvage import DAMAGED, Remains
from tests import needs
from tests.harness.disk_faults import flip
from tests.progressdb_server.store.opened_store import opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

NUMBERED = 3000
THREADS = 60
BODY = "x" * 400


def flipped(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def bad_footer(file: Path) -> None:
    flip(file, file.stat().st_size - 10)


DAMAGES: list[Callable[[Path], None]] = [flipped, cut, bad_footer, Path.unlink]


# --- reading around damage --------------------------------------------------------------------------------------------
def key(number: int) -> bytes:
    return b"k%06d" % number


def filled(path: Path) -> tuple[dict[bytes, bytes], dict[str, dict[bytes, bytes]]]:
    """All entries; and those of each file: every one is in one table, every third newer in another, some in the log."""
    engine = RocksEngine(str(path))
    expected: dict[bytes, bytes] = {}
    files: dict[str, dict[bytes, bytes]] = {}
    for step in (1, 3):
        new = {key(n): b"%d" % step + os.urandom(100) for n in range(0, NUMBERED, step)}
        engine.write(new.items())
        engine.close()
        engine = RocksEngine(str(path))  # opening makes a table of the log
        (name,) = {file.name for file in path.glob("*.sst")} - files.keys()
        files[name] = new
        expected |= new
    new = {key(n): b"7" + os.urandom(100) for n in range(0, NUMBERED, 7)}
    engine.write(new.items())
    engine.sync()
    engine.close()
    return expected | new, files


def walked(path: Path) -> tuple[dict[bytes, bytes], list[Lost]]:
    remains = Remains(str(path))
    entries: dict[bytes, bytes] = {}
    lost: list[Lost] = []
    try:
        for found in remains.walk():
            if isinstance(found, Lost):
                lost.append(found)
            else:
                assert not entries.keys() & dict(found)
                entries.update(found)
    finally:
        remains.close()
    return entries, lost


def test_of_a_sound_store_everything_is_read(tmp_path: Path) -> None:
    expected, _ = filled(tmp_path / "db")
    assert walked(tmp_path / "db") == (expected, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
@pytest.mark.parametrize("number", [0, 1])
def test_all_that_other_files_have_is_read(tmp_path: Path, damage: Callable[[Path], None], number: int) -> None:
    expected, files = filled(tmp_path / "db")
    name = sorted(files)[number]
    damage(tmp_path / "db" / name)
    entries, lost = walked(tmp_path / "db")
    assert [one.file for one in lost] == [name]
    of_others = {key for other in files if other != name for key in files[other]}
    for one, value in expected.items():
        inside = lost[0].lower <= one < lost[0].upper
        if inside and value == files[name].get(one):
            assert (one in entries) == (one in of_others)
        else:
            assert entries[one] == value
    if damage is flipped:  # 16 KiB of a file: and one byte of what it seems to hold is wrong
        assert 0 < len(lost[0].seen) < 300
        wrong = [one for one in lost[0].seen if one not in files[name].items()]
        assert len(wrong) <= 2


def test_in_two_damaged_files_only_what_both_lost_is_lost(tmp_path: Path) -> None:
    expected, files = filled(tmp_path / "db")
    for name in files:
        flipped(tmp_path / "db" / name)
    entries, lost = walked(tmp_path / "db")
    assert {one.file for one in lost} == set(files)
    seen = {one: value for part in lost for one, value in part.seen}
    older = [one for one in expected.keys() - entries.keys() if seen[one] != expected[one]]
    assert len(older) <= 4, "the newest version of each is seen last, but where a byte is wrong"
    assert len(entries) > NUMBERED - 200


def test_a_damaged_log_is_named_and_read_around(tmp_path: Path) -> None:
    expected, _ = filled(tmp_path / "db")
    engine = RocksEngine(str(tmp_path / "db"))
    for number in range(100):
        engine.write([(b"l%03d" % number, os.urandom(300))])
    engine.sync()
    shutil.copytree(tmp_path / "db", tmp_path / "killed")
    engine.close()
    (log,) = (tmp_path / "killed").glob("*.log")
    flipped(log)
    entries, lost = walked(tmp_path / "killed")
    assert entries.items() >= expected.items()
    assert log.name in lost[0].file
    assert 0 < len(entries) - len(expected) < 100  # RocksDB drops the rest of 32 KiB


def test_a_disk_that_fails_to_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "db")
    monkeypatch.setattr(
        "progressdb_server.store.rocks.salvage.why_ended", lambda walk: "IO error: While pread 000009.sst"
    )
    with pytest.raises(EngineUnavailableError):
        walked(tmp_path / "db")


@pytest.mark.parametrize("damage", DAMAGES[1:], ids=lambda damage: str(damage.__name__))
def test_a_reader_does_not_take_an_older_state_for_the_store(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _, files = filled(tmp_path / "db")
    damage(tmp_path / "db" / max(files))
    with pytest.raises(StoreDamagedError, match=max(files)):
        RocksReader(str(tmp_path / "db"))


# --- a damaged store --------------------------------------------------------------------------------------------------
def stored(path: Path, provider: SealingProvider) -> tuple[Path, dict[str, str]]:
    """One table, which has everything. Returns it, and the messages with the thread of each."""

    async def run() -> dict[str, str]:
        async with opened(RocksEngine(str(path)), provider) as store:
            made = [
                await store.messages.create(NewMessage(author="ann", thread=f"t{number}", body=BODY))
                for number in range(THREADS)
                for _ in range(2)
            ]
            return {message.id: message.thread for message in made}

    messages = asyncio.run(run())
    engine = RocksEngine(str(path))
    engine.compact()
    engine.close()
    (table,) = path.glob("*.sst")
    return table, messages


def examined(path: Path, provider: SealingProvider | None) -> Report:
    return asyncio.run(check(str(path), provider, parse))


def repaired(path: Path, provider: SealingProvider | None) -> tuple[list[Problem], list[Problem]]:
    return asyncio.run(repair_offline(str(path), provider, drop=True))


def readable(path: Path, provider: SealingProvider, messages: dict[str, str]) -> set[str]:
    async def run() -> set[str]:
        found: set[str] = set()
        async with opened(RocksEngine(str(path)), provider) as store:
            for message in messages:
                try:
                    if (await store.reading.message(message)).value == BODY:
                        found.add(message)
                except StoreError:
                    pass
            await store.messages.create(NewMessage(author="ann", thread="later", body="y"))
        return found

    return asyncio.run(run())


def of_records(table: Path) -> int:
    """A place in the part of the file that has records of messages."""
    content = table.read_bytes()
    return content.index(b"x" * 30 if BODY.encode() in content else b":msg:", len(content) // 2)


def test_a_check_gives_all_findings_of_a_damaged_store(tmp_path: Path) -> None:
    provider = SealingProvider()
    table, _ = stored(tmp_path / "db", provider)
    engine = RocksEngine(str(tmp_path / "db"))
    engine.write([(b"no:such", b"")])
    engine.close()
    flip(table, of_records(table))
    report = examined(tmp_path / "db", provider)
    assert {finding.kind for finding in report.findings} == {"lost", "unknown"}
    assert report.findings[0].key == table.name
    assert 1 < len(report.findings) < 200
    assert report.opened


@pytest.mark.parametrize("damage", DAMAGES[1:], ids=lambda damage: str(damage.__name__))
def test_a_table_that_can_not_be_opened_is_named_by_a_check(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    table, _ = stored(tmp_path / "db", SealingProvider())
    damage(table)
    assert [finding.key for finding in examined(tmp_path / "db", None).findings][:1] == [table.name]
    with pytest.raises(StoreDamagedError, match=table.name):
        RocksEngine(str(tmp_path / "db"))


def test_nothing_is_dropped_without_the_flag(tmp_path: Path) -> None:
    table, _ = stored(tmp_path / "db", SealingProvider())
    flip(table, of_records(table))
    with pytest.raises(StoreDamagedError):
        asyncio.run(repair_offline(str(tmp_path / "db")))
    assert os.listdir(tmp_path) == ["db"]


def test_a_repair_keeps_each_record_that_its_key_opens(tmp_path: Path) -> None:
    provider = SealingProvider()
    table, messages = stored(tmp_path / "db", provider)
    flip(table, of_records(table))
    dropped, _ = repaired(tmp_path / "db", provider)
    assert dropped[0].key == table.name
    lost = messages.keys() - readable(tmp_path / "db", provider, messages)
    assert len(lost) <= 1
    named = {finding.key for finding in dropped}
    assert all(any(message.removeprefix("msg-") in key for key in named) for message in lost)
    assert [finding for finding in examined(tmp_path / "db", provider).findings if finding.kind != "orphaned"] == []


def test_without_a_key_service_a_repair_names_each_entry_that_it_drops(tmp_path: Path) -> None:
    provider = SealingProvider()
    table, messages = stored(tmp_path / "db", provider)
    flip(table, of_records(table))
    dropped, _ = repaired(tmp_path / "db", None)
    lost = messages.keys() - readable(tmp_path / "db", provider, messages)
    named = {finding.key for finding in dropped}
    assert 1 < len(lost) < len(messages) / 2
    assert all(any(message.removeprefix("msg-") in key for key in named) for message in lost)
    aside = tmp_path / f"db{DAMAGED}1"
    assert examined(aside, None).findings[0].key == table.name


def test_the_damaged_store_is_a_backup_for_which_keys_are_kept(tmp_path: Path) -> None:
    table, _ = stored(tmp_path / "db", SealingProvider())
    flip(table, of_records(table))
    repaired(tmp_path / "db", None)

    async def run() -> list[str]:
        async with opened(RocksEngine(str(tmp_path / "db"))) as store:
            return [known.path async for known in store.backups.registered() if not known.gone]

    assert asyncio.run(run()) == [str(tmp_path / f"db{DAMAGED}1")]


def test_damage_that_leaves_everything_readable_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a log that was cut: what it had can't be known."""
    stored(tmp_path / "db", SealingProvider())
    real = places.alone
    met = StoreDamagedError("000001.log")

    def refuses(place: str) -> NoReturn:
        monkeypatch.setattr(places, "alone", real)
        raise met

    monkeypatch.setattr(places, "open_view", refuses)
    found = Problem("lost", "000001.log", str(met))
    assert examined(tmp_path / "db", None).findings == [found]
    monkeypatch.setattr(places, "alone", refuses)
    assert repaired(tmp_path / "db", None)[0] == [found]


REPAIR = """
import asyncio, sys
from progressdb_server.store.check import repair_offline
asyncio.run(repair_offline(sys.argv[1], drop=True))
"""


def test_a_store_that_is_open_is_not_repaired(tmp_path: Path) -> None:
    table, _ = stored(tmp_path / "db", SealingProvider())
    engine = RocksEngine(str(tmp_path / "db"))
    flip(table, of_records(table))
    done = subprocess.run([sys.executable, "-c", REPAIR, str(tmp_path / "db")], capture_output=True, check=False)
    engine.close()
    assert b"StoreLockedError" in done.stderr
    assert os.listdir(tmp_path) == ["db"]


@pytest.mark.parametrize(
    ("call", "numbers"), [("renameat2", [1]), pytest.param("rename", range(1, 100), marks=pytest.mark.torture)]
)
def test_a_repair_that_was_killed_is_made_again(tmp_path: Path, call: str, numbers: Sequence[int]) -> None:
    strace = needs.program("strace")
    provider = SealingProvider()
    table, messages = stored(tmp_path / "db", provider)
    flip(table, of_records(table))
    damaged = table.read_bytes()
    repair = [sys.executable, "-c", REPAIR, str(tmp_path / "db")]
    for number in numbers:
        fault = ["-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={number}"]
        done = subprocess.run([strace, *fault, *repair], check=False)
        assert damaged in [path.read_bytes() for path in tmp_path.glob(f"*/{table.name}")]
        if not done.returncode:
            break
    else:
        subprocess.run(repair, check=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["db", f"db{DAMAGED}1"]
    assert len(readable(tmp_path / "db", provider, messages)) > len(messages) / 2
