"""One key for a thread, whoever asks first: found while it is active, made once, and never made over a damaged one."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from minikms import api
from minikms.api import ROLES, errors
from minikms.api.errors import StorageUnavailableError
from minikms.audit import Event
from minikms.client import Client
from minikms.custody import journal
from minikms.custody.deks import HeldKeys
from minikms.custody.journal_format import Change
from minikms.platform.files import make_file
from minikms.policy.principal import Principal
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keys import KeyVerbs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import SilentAudit, create, opened_vault
from tests.minikms_daemon.service.asking import new_key, post

ANYONE = Principal(0, 0, "peer_uid:0", ROLES)
THREADS = 40
RACER = """
import json, sys
from minikms import Client
with Client(sys.argv[1]) as kms:
    kms.health()
    print("ready", flush=True)
    sys.stdin.readline()
    found = [kms.get_or_create_dek_for_thread(f"raced-{number}") for number in range(int(sys.argv[2]))]
    print(json.dumps([[answer.key_id, answer.created] for answer in found]), flush=True)
"""


def racer(daemon: LiveDaemon) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RACER, str(daemon.socket), str(THREADS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_race_get_the_same_keys(daemon: LiveDaemon) -> None:
    before = len(daemon.events("create_dek"))
    racers = [racer(daemon) for _ in range(2)]
    for one in racers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in racers:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    first, second = ([tuple(pair) for pair in json.loads(one.communicate()[0])] for one in racers)
    assert [key_id for key_id, _ in first] == [key_id for key_id, _ in second]
    assert all(mine != other for (_, mine), (_, other) in zip(first, second, strict=True)), "made once, by either"
    assert len(daemon.events("create_dek")) - before == THREADS
    assert len(daemon.events("get_or_create_dek")) >= THREADS


async def test_one_process_asking_many_times_at_once_gets_one_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        found = await asyncio.gather(*(one.vault.get_or_create("t", purpose="thread") for _ in range(50)))
        assert len({key_id for key_id, _ in found}) == 1
        assert sum(created for _, created in found) == 1


def test_the_found_key_is_the_newest_active_one_of_the_thread(daemon: LiveDaemon) -> None:
    with Client(daemon.socket) as kms:
        made = kms.get_or_create_dek_for_thread("found")
        assert made.created
        again = kms.get_or_create_dek_for_thread("found", request_id="req-9")
        assert (again.key_id, again.created) == (made.key_id, False)
        assert kms.get_or_create_dek_for_thread("found-too").created, "another thread's key is not its own"
        files = kms.get_or_create_dek_for_thread("found", purpose="data")
        assert files.created, "a key of another purpose is not it"
        assert kms.get_or_create_dek_for_thread("found").key_id == made.key_id
        replaced = kms.create_dek_for_thread("found", replaces=made.key_id).key_id
        assert kms.get_or_create_dek_for_thread("found").key_id == replaced
        time.sleep(0.002)  # the id of the next key is of a later millisecond
        newer = kms.create_dek_for_thread("found").key_id
        assert kms.get_or_create_dek_for_thread("found").key_id == newer
    line = next(line for line in daemon.events("get_or_create_dek") if line.get("request_id") == "req-9")
    assert (line["key_id"], line["thread_id"], line["outcome"]) == (made.key_id, "found", "ok")


def test_a_retired_or_destroyed_key_is_not_found(daemon: LiveDaemon) -> None:
    with Client(daemon.socket) as kms:
        first = kms.get_or_create_dek_for_thread("gone").key_id
        kms.retire_key(first)
        second = kms.get_or_create_dek_for_thread("gone")
        assert second.created
        kms.retire_key(second.key_id)
        kms.destroy_key(second.key_id)
        third = kms.get_or_create_dek_for_thread("gone")
        assert third.created
        assert len({first, second.key_id, third.key_id}) == 3


def test_a_key_is_found_again_after_a_restart(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon, Client(daemon.socket) as kms:
        made = [kms.get_or_create_dek_for_thread(f"t{number}").key_id for number in range(20)]
        daemon.kill()
        daemon.start()
        found = [kms.get_or_create_dek_for_thread(f"t{number}") for number in range(20)]
        assert [answer.key_id for answer in found] == made
        assert not any(answer.created for answer in found)


def test_a_key_that_does_not_open_is_an_error_and_not_replaced(daemon: LiveDaemon) -> None:
    thread = "damaged"
    key_id = new_key(daemon, thread)
    file = daemon.data_dir / "kms-deks" / f"{key_id}.json"
    content = file.read_bytes()
    file.unlink()
    answer = post(daemon, "/get_or_create_dek_for_thread", {"thread_id": thread})
    assert (answer.status, answer.code) == (503, "key_unreadable"), answer
    assert "restore it from a backup" in answer.body["error"]
    file.write_bytes(content.replace(b'"thread_id":"damaged"', b'"thread_id":"another"'))
    answer = post(daemon, "/get_or_create_dek_for_thread", {"thread_id": thread})
    assert answer.code == "key_unreadable", "a file that names another thread does not unwrap"
    file.write_bytes(content)
    answer = post(daemon, "/get_or_create_dek_for_thread", {"thread_id": thread})
    assert answer.body == {"key_id": key_id, "created": False}
    assert daemon.events("get_or_create_dek")[-1]["outcome"] == "ok"


async def test_a_look_up_opens_one_key_however_many_the_thread_has(tmp_path: Path) -> None:
    """Also if all others are newer and of the other purpose, or retired: any caller with the role `create` makes such
    keys.
    """
    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        sought, _ = await one.vault.get_or_create("t", purpose="thread")
        for _ in range(15):
            await create(one.vault, "t", purpose="data")
            retired = await create(one.vault, "t")
            await one.vault.retire(retired.id)
        before = one.vault.cache.hits + one.vault.cache.misses
        assert await one.vault.get_or_create("t", purpose="thread") == (sought, False)
        assert one.vault.cache.hits + one.vault.cache.misses - before == 1


async def test_a_retirement_that_is_not_known_to_be_durable_opens_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be in place after a failed sync. The thread then gets another key, once."""
    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        old, _ = await one.vault.get_or_create("t", purpose="thread")

        async def in_place_only(held: HeldKeys, changes: list[Change], _: str) -> None:
            one.file(*held.key_ids).write_bytes(changes[0].new)
            raise StorageUnavailableError("a directory cannot be synced")

        with monkeypatch.context() as patch:
            patch.setattr(one.vault.journal, "replace", in_place_only)
            with pytest.raises(StorageUnavailableError):
                await one.vault.retire(old)
        found = [await one.vault.get_or_create("t", purpose="thread") for _ in range(2)]
        assert [created for _, created in found] == [True, False]
        assert found[0][0] == found[1][0] != old


async def test_a_create_that_is_refused_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()

        async def full(_: object) -> None:
            raise StorageUnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(one.vault.journal, "create", full)
            with pytest.raises(StorageUnavailableError):
                await one.vault.get_or_create("t", purpose="thread")
        assert (await one.vault.get_or_create("t", purpose="thread"))[1]


async def test_a_new_key_is_not_found_before_it_has_replaced_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A create that can't retire the old key removes the new one: nobody may have got it meanwhile."""
    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        old, _ = await one.vault.get_or_create("t", purpose="thread")
        retiring, may_fail = asyncio.Event(), asyncio.Event()

        async def refused(*_: object) -> None:
            retiring.set()
            await may_fail.wait()
            raise StorageUnavailableError("the disk is full")

        monkeypatch.setattr(one.vault.journal, "replace", refused)
        creating = asyncio.create_task(create(one.vault, "t", replaces=old))
        await retiring.wait()
        finding = asyncio.create_task(one.vault.get_or_create("t", purpose="thread"))
        await asyncio.sleep(0)
        may_fail.set()
        with pytest.raises(StorageUnavailableError):
            await creating
        assert await finding == (old, False)


async def test_the_line_of_a_create_is_written_before_another_gets_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the disk is slow to make its file."""
    going_on = threading.Event()
    lines: list[str] = []

    def slowly(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        going_on.wait(60)
        make_file(directory, name, data, sync=sync)

    class Kept(SilentAudit):
        async def add_written(self, event: Event, *, durable: bool) -> None:
            lines.append(event.type)

    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        await one.make(1, "another")  # reserves wraps
        monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)
        monkeypatch.setattr(journal, "make_file", slowly)
        table = VerbTable(Kept())
        KeyVerbs(one.vault, table, one.indexing)

        async def ask() -> None:
            answer = table[api.GET_OR_CREATE_DEK](ANYONE, api.GetOrCreateDekRequest("t"), "")
            assert isinstance(answer, Awaitable)
            await answer

        asking = [asyncio.create_task(ask()) for _ in range(2)]
        while len(one.vault.index) < 2:
            await asyncio.sleep(0)
        for _ in range(20):  # the steps in which the other one would be answered
            await asyncio.sleep(0)
        going_on.set()
        await asyncio.gather(*asking)
    assert lines == ["create_dek", "get_or_create_dek"]


async def test_nothing_is_created_before_all_key_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minikms.custody.vault.INDEX_WAIT_SECONDS_MAX", 0.01)

    async with opened_vault(tmp_path / "d") as one:
        table = VerbTable(SilentAudit())
        verbs = KeyVerbs(one.vault, table, one.indexing)
        request = api.GetOrCreateDekRequest("t")
        event = Event(type="get_or_create_dek", actor="peer_uid:0")
        with pytest.raises(StorageUnavailableError, match="try again later"):
            await verbs.get_or_create_dek_for_thread(one.vault, request, event)
        assert len(one.vault.index) == 0
        await one.indexing.run()
        assert (await verbs.get_or_create_dek_for_thread(one.vault, request, event)).created
        assert event.type == "create_dek"


def test_bad_requests_are_refused_and_name_no_thread(daemon: LiveDaemon) -> None:
    for body in ({"thread_id": "a b"}, {"thread_id": ""}, {"thread_id": "t", "purpose": "root"}, {}):
        answer = post(daemon, "/get_or_create_dek_for_thread", body)
        assert (answer.status, answer.code) == (400, "invalid_request")
    with Client(daemon.socket) as kms, pytest.raises(errors.InvalidRequestError):
        kms.get_or_create_dek_for_thread("ü")
