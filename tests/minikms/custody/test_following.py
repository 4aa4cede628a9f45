"""A member that does not serve: what it takes from the database, and what it refuses."""

import asyncio
import base64
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import (
    ConflictError,
    KeyDestroyedError,
    KmsRefusedError,
    ReplicaForkedError,
    ReplicaRolledBackError,
    StandbyError,
    StorageUnavailableError,
)
from minikms.custody.keyring_file import KeyringFile
from minikms.keys import dek, root_slots
from minikms.keys.keyring import Body, next_epoch
from minikms.keys.unlocked import NeedsRootError
from minikms.platform.clock import now_rfc3339
from tests.harness.disk_faults import failing_os, flip, refuse
from tests.harness.members import OpenedMember, join, make_first, opened_member
from tests.harness.replica_database import ReplicaDatabase, Tables
from tests.harness.vaults import create, key_file
from tests.minikms.keys.keyrings import AT, NEW_ROOT

Requests = list[api.ReplicaFollowRequest]


@dataclass
class Two:
    """`a` serves, `b` follows. `before`: the tables after the first follow of `b`."""

    a: OpenedMember
    b: OpenedMember
    before: Tables

    @property
    def tables(self) -> Tables:
        return self.a.replicator.database.tables

    def parts(self, *, after: int | None = None, files_max: int = 4096) -> Requests:
        """What `b` lacks."""
        number = self.b.directory.mark.number if after is None else after
        return self.tables.parts(number, self.b.vault.destroyed.count, files_max=files_max)

    def same(self) -> bool:
        """Whether both have the same key files, tombstones and keyring, and `b` knows it."""
        content = [written(one.one.directory) for one in (self.a, self.b)]
        return content[0] == content[1] and self.b.directory.mark.number == self.tables.number


def written(directory: Path) -> dict[str, bytes]:
    """What the members have in common."""
    names = [directory / name for name in ("keyring.json", "kms-tombstones")]
    return {path.name: path.read_bytes() for path in [*names, *(directory / "kms-deks").iterdir()] if path.exists()}


@asynccontextmanager
async def two(tmp_path: Path, *, keys: int = 3) -> AsyncIterator[Two]:
    database = ReplicaDatabase()
    await make_first(tmp_path / "a", keys=keys)
    join(tmp_path / "b", tmp_path / "a")
    async with opened_member(tmp_path / "a", database) as a, opened_member(tmp_path / "b", database) as b:
        await a.serve()
        await b.follow()
        both = Two(a, b, database.tables.copy())
        assert both.same()
        yield both


def key_ids(one: OpenedMember) -> list[str]:
    return sorted(path.stem for path in (one.one.directory / "kms-deks").iterdir())


async def changed(both: Two) -> None:
    """Creates, a retirement and a destruction."""
    first, second, *_ = key_ids(both.a)
    await both.a.one.make(5)
    await both.a.vault.retire(first)
    await both.a.vault.retire(second)
    await both.a.vault.destroy(second)


async def test_a_member_follows_creates_retirements_and_destructions(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        first, second, *_ = key_ids(both.a)
        both.b.vault.opened(first)
        both.b.vault.opened(second)
        await changed(both)
        await both.b.follow()
        assert both.same()
        assert both.b.vault.opened(first).state == "retired"
        with pytest.raises(KeyDestroyedError):
            both.b.vault.opened(second)
        assert both.b.one.keys(key_ids(both.a)) == both.a.one.keys(key_ids(both.a))


async def test_a_member_follows_a_rotation_and_the_end_of_a_kek(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        await both.a.one.begin()
        await both.b.follow()
        await both.a.one.make(1)
        await both.b.follow()
        await both.a.one.rotation.run()
        await both.a.one.pruning.prune(backups=True)
        await both.b.follow()
        assert both.same()
        assert both.b.one.kek_states() == {1: "destroyed", 2: "active"}
        assert both.b.one.keys(key_ids(both.a)) == both.a.one.keys(key_ids(both.a))
        assert both.b.vault.index.by_kek[2] == 4


async def test_keys_whose_files_came_before_their_kek_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the files of a part and the keyring."""
    async with two(tmp_path) as both:
        await both.a.one.begin()
        (made,) = await both.a.one.make(1)
        await both.b.stop()
        with monkeypatch.context() as failing:
            failing.setattr(KeyringFile, "store_now", refuse)
            with pytest.raises(StorageUnavailableError):
                await both.b.follow()
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        shutil.copy2(key_file(tmp_path / "b"), key_file(tmp_path / "c"))
        async with opened_member(tmp_path / "c", both.a.replicator.database) as c:
            running = asyncio.create_task(c.one.indexing.run())
            await c.one.indexing.wait_complete()
            assert c.vault.unreadable.count == 1
            await c.follow()
            assert c.vault.unreadable.count == 0
            assert c.vault.index.entry(made) is not None
            running.cancel()


async def test_a_key_of_a_new_kek_is_followed_in_parts(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        await both.a.one.rotate()
        await both.a.vault.retire(key_ids(both.a)[0])
        await both.a.vault.destroy(key_ids(both.a)[0])
        await both.b.follow(files_max=1)
        assert both.same()
        assert not both.b.one.backups(both.b.vault.unlocked.body.keyring_id)


async def test_a_destroyed_key_leaves_the_rotation_backups_of_a_follower(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        (victim, *_) = key_ids(both.a)
        await both.a.stop()
        await both.b.follow()
        await both.b.serve()
        await both.b.one.rotate()
        assert both.b.one.backups(victim)
        await both.b.stop()
        await both.a.serve()
        await both.a.vault.retire(victim)
        await both.a.vault.destroy(victim)
        await both.b.follow()
        assert not both.b.one.backups(victim)
        assert victim not in key_ids(both.b)


async def test_repeated_and_overlapping_parts_are_harmless(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        overlapping = both.parts()
        await changed(both)
        parts = both.parts(files_max=2)
        for request in [*parts[:2], *parts[:1], *parts, *parts[-1:]]:
            await both.b.directory.follow(request)
        assert both.same()
        await both.b.directory.follow(both.parts(after=0)[0])
        with pytest.raises(ReplicaRolledBackError):
            await both.b.directory.follow(overlapping[0])
        assert both.same()


async def test_parts_in_another_order_end_with_the_same_files(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        await both.a.one.make(5)
        first, second, last = both.parts(files_max=2)
        for request in (second, first, last):
            await both.b.directory.follow(request)
        assert both.same()

        await changed(both)
        *_others, last = both.parts(files_max=2)
        with pytest.raises(ConflictError, match="tombstones after 0 are needed first"):
            await both.b.directory.follow(last)
        await both.b.follow()
        assert both.same()


def of_head(**changes: object) -> Callable[[Two, Requests], Requests]:
    def change(_: Two, requests: Requests) -> Requests:
        for request in requests:
            assert isinstance(request.head, api.ReplicaHead)
            request.head = msgspec.structs.replace(request.head, **changes)
        return requests

    return change


def of_content(change: Callable[[bytes], bytes], *, part: str) -> Callable[[Two, Requests], Requests]:
    def changed(_: Two, requests: Requests) -> Requests:
        (request,) = requests
        head = request.head
        assert isinstance(head, api.ReplicaHead)
        if part == "file":
            request.files[0].content = encode_text(change(base64.b64decode(request.files[0].content)))
        elif part == "tombstones":
            request.tombstones = encode_text(change(base64.b64decode(request.tombstones)))
        else:
            setattr(head, part, encode_text(change(base64.b64decode(getattr(head, part)))))
        return requests

    return changed


def without_a_row(_: Two, requests: Requests) -> Requests:
    del requests[0].files[-1]
    return requests


def with_an_older_file(both: Two, requests: Requests) -> Requests:
    for file in requests[0].files:
        if file.key_id in both.before.files:
            file.content = encode_text(both.before.files[file.key_id][0])
    return requests


def swapped(_: Two, requests: Requests) -> Requests:
    one, other, *_rest = requests[0].files
    one.content, other.content = other.content, one.content
    return requests


def with_an_older(part: str) -> Callable[[Two, Requests], Requests]:
    def change(both: Two, requests: Requests) -> Requests:
        return of_head(**{part: encode_text(getattr(both.before, part))})(both, requests)

    return change


def flipped(data: bytes) -> bytes:
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


LIES = {
    "another keyring": (of_head(keyring_id="kr_0"), ReplicaForkedError),
    "an older number": (of_head(number=1), ReplicaRolledBackError),
    "a later number": (of_head(number=900), ReplicaForkedError),
    "an older term": (of_head(term=0), ReplicaRolledBackError),
    "no state": (of_head(state=""), ReplicaRolledBackError),
    "a forged state": (of_content(flipped, part="state"), ReplicaForkedError),
    "an older state": (with_an_older("state"), ReplicaForkedError),
    "a forged keyring": (of_content(flipped, part="keyring"), ReplicaForkedError),
    "an older keyring": (with_an_older("keyring"), ReplicaForkedError),
    "a forged tombstone": (of_content(flipped, part="tombstones"), ReplicaForkedError),
    "a withheld tombstone": (of_content(lambda _: b"", part="tombstones"), ReplicaForkedError),
    "half a tombstone": (of_content(lambda data: data[:-1], part="tombstones"), ConflictError),
    "a forged file": (of_content(lambda data: data.replace(b'"wrapped":"', b'"wrapped":"AAAA')[:1024], part="file"),
                      ReplicaForkedError),
    "swapped files": (swapped, ReplicaForkedError),
    "an older file": (with_an_older_file, ReplicaForkedError),
    "a withheld file": (without_a_row, ReplicaForkedError),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_a_change_is_refused_and_nothing_changes(tmp_path: Path, lie: str) -> None:
    change, kind = LIES[lie]
    async with two(tmp_path) as both:
        await changed(both)
        before, mark = written(both.b.one.directory), both.b.directory.mark
        with pytest.raises(kind):
            for _ in range(2):  # the first wrong sum asks for all files
                after = both.b.directory.mark.number
                for request in change(both, both.parts(after=after)):
                    await both.b.directory.follow(request)
        assert written(both.b.one.directory) == before
        assert both.b.directory.mark == mark
        assert not both.b.vault.destroyed.count

        await both.b.follow()
        assert both.same()


async def test_an_older_file_in_one_of_several_parts_is_not_written(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        retired = key_ids(both.a)[0]
        await both.a.vault.retire(retired)
        await both.b.follow()
        await both.a.one.make(3)
        first, *_ = both.parts(files_max=2)
        first.files.append(api.ReplicaFile(retired, encode_text(both.before.files[retired][0])))
        with pytest.raises(ReplicaRolledBackError, match="an older file of key"):
            await both.b.directory.follow(first)
        assert both.b.one.on_disk(retired).state == "retired"


async def test_the_file_of_a_destroyed_key_is_never_written(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        victim = key_ids(both.a)[0]
        await both.a.vault.retire(victim)
        await both.a.vault.destroy(victim)
        (request,) = both.parts()
        request.files.append(api.ReplicaFile(victim, encode_text(both.before.files[victim][0])))
        for _ in range(2):
            await both.b.directory.follow(request)
        assert victim not in key_ids(both.b)
        assert both.same()


@pytest.mark.parametrize("damage", ["content", "length", "absent", "not readable"])
async def test_a_damaged_file_is_repaired_from_the_database(tmp_path: Path, damage: str) -> None:
    async with two(tmp_path) as both:
        keys, key_id = both.a.one.keys(key_ids(both.a)), key_ids(both.a)[0]
        database = both.a.replicator.database
        await both.a.stop()
    path = tmp_path / "b" / "kms-deks" / f"{key_id}.json"
    if damage == "content":
        flip(path, path.read_bytes().index(b'"wrapped":"') + 20)
    elif damage == "length":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
        if damage == "not readable":
            path.symlink_to("/nowhere")
    async with opened_member(tmp_path / "b", database) as second:
        await second.follow()
        assert second.one.keys(keys) == keys
        assert second.directory.mark.number == database.tables.number
        await second.serve()


async def test_a_full_disk_of_a_follower_is_no_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first files are in its journal, and read from memory; there is no room for the others."""
    async with two(tmp_path) as both:
        await both.a.one.make(1)
        await both.b.follow()
        await both.a.one.make(3)
        (first,) = both.parts()
        await changed(both)
        (second,) = both.parts()
        with failing_os(monkeypatch, "write"):
            for request in (first, second):
                with pytest.raises(StorageUnavailableError):
                    await both.b.directory.follow(request)
            assert not both.b.directory.scanned
            with pytest.raises(StorageUnavailableError):
                await both.b.directory.scan()
        await both.b.directory.scan()
        await both.b.follow()
        assert both.same()


async def test_a_fork_is_judged_again_after_another_scan(tmp_path: Path) -> None:
    """Somebody has put a file here, then has taken it away; meanwhile another one was damaged."""
    async with two(tmp_path) as both:
        kept, damaged, *_ = key_ids(both.a)
        other = both.b.one.file(dek.make_key_id(1, bytes(10)))
        other.write_bytes(both.b.one.file(kept).read_bytes())
        both.b.directory.review()
        await both.b.directory.scan()
        for _ in range(2):
            with pytest.raises(ReplicaForkedError, match="are not those of its state"):
                await both.b.follow()
        other.unlink()
        flip(both.b.one.file(damaged), 400)
        both.b.directory.review()
        await both.b.directory.scan()
        await both.b.follow()
        assert both.same()


async def test_a_file_that_the_database_never_had_is_a_fork(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        kept = key_ids(both.a)[0]
        content = both.b.one.file(kept).read_bytes()
        database = both.a.replicator.database
        await both.a.stop()
    record = dek.parse(content, kept)
    other = dek.make_key_id(1, bytes(10))
    path = tmp_path / "b" / "kms-deks" / f"{other}.json"
    path.write_bytes(dek.encode(msgspec.structs.replace(record, id=other)))
    async with opened_member(tmp_path / "b", database) as second:
        for _ in range(2):
            with pytest.raises(ReplicaForkedError, match="are not those of its state"):
                await second.follow()
        with pytest.raises(ConflictError):
            second.replicator.take_over()


async def test_a_member_that_lost_the_lease_follows_what_became_of_its_change(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        database = both.a.replicator.database
        database.lose = [True]
        making = asyncio.create_task(create(both.a.vault, "t"))
        while database.lose:
            await asyncio.sleep(0)
        await both.a.stop()
        await asyncio.wait([making])
        await both.b.follow()
        await both.b.serve()
        await both.b.vault.keyring.change(lambda body: next_epoch(body, at=now_rfc3339()))
        await both.a.directory.scan()
        await both.a.follow()
        assert written(both.a.one.directory) == written(both.b.one.directory)
        assert len(key_ids(both.a)) == 4


async def test_a_change_that_was_cut_off_takes_no_key_of_what_is_followed(tmp_path: Path) -> None:
    """Both have the next KEK version; the one that waits for the database zeroes its own when it is refused."""
    async with two(tmp_path) as both:
        replicator = both.a.replicator
        await both.a.halt()
        changing = asyncio.create_task(both.a.one.begin())
        commit = await both.a.directory.next_commit(1)
        assert commit is not None and replicator.database.commit(replicator.term, "m1", commit)
        both.a.directory.stop_serving()
        await both.a.follow()  # in the same step of the loop
        with pytest.raises(KmsRefusedError):
            await changing
        assert both.a.vault.unlocked.kek(2)
        assert both.a.vault.keyring.body.wrapping_kek.version == 2


async def test_a_standby_makes_no_key_for_a_change(tmp_path: Path) -> None:
    """It would have the version of a key that is followed."""
    made: list[Body] = []

    def make(body: Body) -> Body:
        made.append(body)
        return next_epoch(body, at=AT)

    async with two(tmp_path) as both:
        with pytest.raises(StandbyError):
            await both.b.vault.keyring.change(make)
        with pytest.raises(StandbyError):
            async with both.b.vault.keyring.held():
                made.append(both.b.vault.keyring.body)
    assert not made


async def test_a_change_of_another_history_is_a_fork(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        database = both.a.replicator.database
        await create(both.a.vault, "t")  # acknowledged, and then lost by the database
        lost = database.tables.number
        await both.a.stop()
        database.tables = both.before
        await both.b.serve()
        assert database.tables.number == lost
        with pytest.raises(ReplicaForkedError, match=f"change {lost} of the database is of term"):
            await both.a.follow()
        await create(both.b.vault, "t")
        with pytest.raises(ReplicaForkedError):
            await both.a.follow()


async def test_a_keyring_under_a_new_key_is_followed_after_a_start(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        database, unlocked = both.a.replicator.database, both.a.vault.unlocked
        with both.a.one.slot_of(NEW_ROOT) as root:
            await both.a.vault.keyring.change(
                lambda body: root_slots.add_slot(
                    body, unlocked.make_slot(root.view, "file", slot_id="s9", at=AT), at=now_rfc3339()
                )
            )
        await both.b.follow()
        await both.a.one.removal.remove(lambda body: {"s9"})
        await changed(both)
        with pytest.raises(NeedsRootError):
            await both.b.follow()
        for member in (both.b, both.a):
            await member.stop()
    async with opened_member(tmp_path / "b", database, later_keyring=database.tables.keyring) as second:
        await second.follow()
        assert written(tmp_path / "b") == written(tmp_path / "a")
        assert second.vault.unlocked.body.key_version == 2
        await second.serve()


async def test_an_empty_database_is_older_than_what_a_member_has_seen(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        (request,) = both.parts(after=0)
        for change in ({"state": ""}, {"keyring": ""}):
            (request,) = of_head(**change)(both, both.parts(after=0))
            with pytest.raises(ReplicaRolledBackError, match="the database is empty"):
                await both.b.directory.follow(request)
        await both.a.stop()
        both.a.replicator.database.tables = Tables(keyring_id=both.tables.keyring_id)
        both.b.directory.may_begin()
        await both.b.serve()
        assert both.tables.number > both.before.number


async def test_a_member_with_a_part_of_a_change_does_not_serve(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        await changed(both)
        first, *_ = both.parts(files_max=2)
        await both.b.directory.follow(first)
        with pytest.raises(ConflictError, match="has to follow before it serves"):
            both.b.directory.serve(9, both.b.directory.mark.number)


async def test_a_forged_tombstone_in_one_of_several_parts_is_not_written(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        await changed(both)
        first, *_ = of_content(flipped, part="tombstones")(both, both.parts(files_max=2)[:1])
        with pytest.raises(ReplicaForkedError, match="tombstone 1 of the database is not that of a member"):
            await both.b.directory.follow(first)
        assert not both.b.vault.destroyed.count
