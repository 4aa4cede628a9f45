"""Keys that no thread names are retired, and no other key is."""

import asyncio
import http.client
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from minikms import Client
from progressdb_server.config import Config, Kms, Storage
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import orphans as orphans_room
from progressdb_server.jobs.orphans import SHARED, OrphanedKeys
from progressdb_server.store.model import NewMessage, Page
from tests.harness import forked
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

LATER_S = 1_900_000_000.0
"""Long after every key of the provider in memory."""
AT_ONCE = (
    "-c",
    "from progressdb_server.jobs.orphans import OrphanedKeys; OrphanedKeys.__init__.__kwdefaults__['age_s'] = 1.0; "
    "from progressdb_server.cli import main; main()",
)
"""The command, with an age after which keys of earlier runs are judged that a test can wait for."""


@asynccontextmanager
async def orphaned(
    *, busy: str = "", now_s: float = LATER_S, exclusive: bool = True
) -> AsyncIterator[tuple[Conversations, SealingProvider, OrphanedKeys]]:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider) as store:
        yield (
            store,
            provider,
            OrphanedKeys(store, provider, lambda thread: thread == busy, exclusive=exclusive, now_s=lambda: now_s),
        )


async def orphan(provider: SealingProvider, thread: str) -> str:
    return (await provider.create_dek_for_thread(thread)).key_id


async def test_only_keys_that_no_thread_names_are_retired() -> None:
    """Of unknown threads, and second keys of known ones. The threads go on."""
    async with orphaned() as (store, provider, orphans):
        for number in range(5):
            await store.messages.create(NewMessage(author="ada", thread=f"t{number}", body=1))
        expected = {await orphan(provider, thread) for thread in ("unknown", "t1", "t1", "t3")}
        assert {key.key_id async for page in orphans.find() for key in page} == expected
        assert await orphans.retire() == (4, 0, "")
        assert provider.retired == expected
        assert await orphans.retire() == (0, 0, "")
        for number in range(5):
            await store.messages.create(NewMessage(author="ada", thread=f"t{number}", body=2))


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_pages_have_each_orphan_once_and_look_at_a_bounded_number_of_keys(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The key service gives two keys at a time."""
    monkeypatch.setattr(orphans_room, "FOUND_PAGES_MAX", 2)
    monkeypatch.setattr(orphans_room, "PAGE_PAUSE_S", 0)
    async with orphaned() as (store, provider, orphans):
        expected = [await orphan(provider, f"u{number}") for number in range(3)]
        for number in range(9):
            await store.messages.create(NewMessage(author="ada", thread=f"t{number}", body=1))
        expected += [await orphan(provider, f"u{number}") for number in range(3)]
        found: list[str] = []
        page = Page(limit)
        while True:
            provider.calls.clear()
            part = [key.key_id async for keys in orphans.find(page) for key in keys]
            assert len(part) <= limit
            assert provider.calls["list_keys"] <= 2
            found += part
            if not page.following:
                break
            page = Page(limit, page.following)
        assert found == expected


async def test_each_thread_whose_key_the_key_service_lacks_is_in_one_page() -> None:
    async with orphaned() as (store, provider, orphans):
        for number in range(5):
            await store.messages.create(NewMessage(author="ada", thread=f"t{number}", body=1))
        [lost, destroyed] = [await store.rekeying.key_of_thread(thread) or "" for thread in ("t1", "t3")]
        del provider.keys[lost]
        provider.retired.add(destroyed)
        await provider.destroy_key(destroyed)
        page, found = Page(2), [("", "")]
        while page.limit:
            found += [one for part in [part async for part in orphans.lost(page)] for one in part]
            page = Page(2 if page.following else 0, page.following)
        assert found[1:] == [("t1", lost)]


async def test_a_shared_key_service_is_left_alone_and_the_answer_says_why() -> None:
    async with orphaned(exclusive=False) as (_, provider, orphans):
        await orphan(provider, "another-servers")
        assert await orphans.retire() == (0, 1, SHARED)
        assert provider.retired == set()


@pytest.mark.parametrize(
    ("kms", "exclusive"),
    [
        (Kms(), True),
        (Kms(socket="/run/s"), False),
        (Kms(data_dir="/d"), False),
        (Kms(socket="/run/s", exclusive=True), True),
        (Kms(exclusive=False), False),
    ],
)
def test_a_key_service_that_is_configured_counts_as_shared(kms: Kms, exclusive: bool) -> None:
    assert Config(storage=Storage(db_path="db"), kms=kms).kms_is_exclusive is exclusive


async def test_a_young_key_and_one_of_a_thread_with_a_job_stay() -> None:
    for kept in (orphaned(busy="rotating"), orphaned(now_s=0.0)):
        async with kept as (_, provider, orphans):
            await orphan(provider, "rotating")
            assert await orphans.retire() == (0, 0, "")


async def test_the_key_of_a_create_in_flight_stays() -> None:
    """Its commit hangs for longer than any key is young."""
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        await store.messages.create(NewMessage(author="ada", thread="other", body=1))
        orphans = OrphanedKeys(store, provider, lambda thread: False, exclusive=True, now_s=lambda: LATER_S)
        held = asyncio.Event()
        answer = provider.encrypt_batch

        async def slow(items: Any) -> Any:
            await held.wait()
            return await answer(items)

        provider.encrypt_batch = slow  # type: ignore[method-assign]  # the seam of the test
        creating = asyncio.create_task(store.messages.create(NewMessage(author="ada", thread="slow", body=1)))
        while len(provider.keys) < 2:
            await asyncio.sleep(0.001)
        assert await orphans.retire() == (0, 0, "")
        held.set()
        await creating
        await store.messages.create(NewMessage(author="ada", thread="slow", body=2))
        assert await orphans.retire() == (0, 0, "")


async def test_while_a_failed_write_is_in_doubt_no_key_is_retired() -> None:
    engine, provider = MemoryEngine(), SealingProvider()
    engine.survives = True
    async with opened(engine, provider) as store:
        engine.fail_sync, engine.fail_reopen = True, 1
        orphans = OrphanedKeys(store, provider, lambda thread: False, exclusive=True, now_s=lambda: LATER_S)
        with pytest.raises(Exception, match="did not take the write"):
            await store.messages.create(NewMessage(author="ada", thread="t", body=1))
        assert await orphans.retire() == (0, 0, "")
        while not store.writer.available:
            await asyncio.sleep(0.02)
        assert await orphans.retire() == (0, 0, "")  # it is the thread's
        await store.messages.create(NewMessage(author="ada", thread="t", body=2))


async def test_at_a_start_a_key_that_is_newer_than_the_store_stays() -> None:
    """The store may be an older copy, whose newer threads it does not know. A post of this run makes it no newer."""
    provider = SealingProvider()
    now_ns = [1_600_000_000_000_000_000]
    async with opened(MemoryEngine(), provider, now_ns=lambda: now_ns[0]) as store:
        await store.messages.create(NewMessage(author="ada", thread="t", body=1))
        await orphan(provider, "newer")
        orphans = OrphanedKeys(store, provider, lambda thread: False, exclusive=True, now_s=lambda: LATER_S)
        now_ns[0] = int(LATER_S) * 1_000_000_000
        await store.messages.create(NewMessage(author="ada", thread="t", body=2))
        await orphans.begin()
        assert provider.retired == set()
        assert (await orphans.retire()).retired == 1


# --- real processes ---------------------------------------------------------------------------------------------------
def active_keys(server: RealServer) -> dict[str, str]:
    """Key → thread."""
    with Client(server.db / "run" / "minikms.sock", wait_s=10) as kms:
        return {key.key_id: key.thread_id for key in kms.list_keys(state="active", limit=512).keys}


def named_keys(server: RealServer) -> set[str]:
    listed = server("GET", "/admin/keys?prefix=kms:map:thread:", key=ADMIN).json["keys"]
    return {server("GET", f"/admin/keys/{key}", key=ADMIN).body.decode() for key in listed}


def doctor(server: RealServer, *words: str) -> tuple[int, str]:
    environment = {"PROGRESSDB_API_ADMIN_KEYS": ADMIN, "PROGRESSDB_DB_PATH": str(server.db)}
    done = forked.run(
        "progressdb_server", "doctor", *words, "--url", f"http://127.0.0.1:{server.port}", env=environment
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def test_orphans_of_a_killed_server_are_retired_at_a_start_or_by_doctor(tmp_path: Path) -> None:
    with real_server(tmp_path, program=AT_ONCE) as server:
        stop = threading.Event()

        def create() -> None:
            for _ in range(60):  # all together fewer keys than a list may have
                try:
                    server("POST", "/v1/threads", {"title": "x", "author": "ada"})
                except (OSError, http.client.HTTPException):
                    return
                if stop.wait(0.1):
                    return

        creating = [threading.Thread(target=create) for _ in range(8)]
        for thread in creating:
            thread.start()
        with Client(server.db / "run" / "minikms.sock") as kms:
            left = {kms.create_dek_for_thread(f"thread-{number}").key_id for number in range(3)}
        time.sleep(2.5)  # so that the newest record is newer than these keys, whose times have seconds
        assert server("POST", "/v1/threads", {"title": "x", "author": "ada"}).status == 200
        server.kill()
        stop.set()
        for thread in creating:
            thread.join()
    with real_server(tmp_path, program=AT_ONCE) as server:
        wait_until(lambda: not left & active_keys(server).keys())
        time.sleep(1.5)
        exit_status, said = doctor(server, "--repair")
        assert exit_status == 0, said
        assert "nothing is wrong" in said
        assert set(active_keys(server)) == named_keys(server)
        with Client(server.db / "run" / "minikms.sock") as kms:
            late = kms.create_dek_for_thread("late").key_id
        time.sleep(2.5)
        exit_status, said = doctor(server)
        assert (exit_status, late in said, "--repair" in said) == (1, True, True)
        assert late in active_keys(server)
        assert doctor(server, "--repair")[0] == 0
        assert late not in active_keys(server)
        assert [event for event in server.log if event["event"] == "orphaned_key_retired"]
        made = server("POST", "/v1/threads", {"title": "x", "author": "ada"})
        assert made.status == 200
        key_id = server("GET", f"/admin/keys/kms:map:thread:{made.json['id']}", key=ADMIN).body.decode()
        [file] = server.db.rglob(f"kms-deks/{key_id}*")
        file.unlink()
        exit_status, said = doctor(server)
        assert (exit_status, f"lost key: {key_id} of thread {made.json['id']}" in said) == (1, True), said
        assert "nothing is wrong" not in said
