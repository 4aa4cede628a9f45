"""Writes from the event loop form groups, and each caller gets the outcome of its own file."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from minikms.api.errors import ConflictError, KmsRefusedError, StorageUnavailableError
from minikms.platform import group_commit
from minikms.platform.files import FileWrite, make_file, open_directory
from minikms.platform.group_commit import GroupCommit

ITEMS_MAX = 16


class Disk:
    """Makes the files of a group: a taken name is an error of its own. It can hold or fail a group."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None

    def make_files(self, directory: int, writes: Sequence[FileWrite]) -> list[KmsRefusedError | None]:
        self.threads.add(threading.get_ident())
        self.groups.append([write.name for write in writes])
        assert self.go.wait(60)
        if self.failure is not None:
            raise self.failure
        outcomes: list[KmsRefusedError | None] = []
        for write in writes:
            try:
                make_file(directory, write.name, write.data, sync=True)
            except FileExistsError:
                outcomes.append(ConflictError("there is a file of this name already"))
            except OSError as error:
                raise StorageUnavailableError("the disk refuses") from error
            else:
                outcomes.append(None)
        return outcomes


@pytest.fixture
def disk() -> Disk:
    return Disk()


class FileGroups:
    """Group commit of new files."""

    def __init__(self, directory: int, disk: Disk, executor: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._disk = disk
        self._executor = executor
        self._commit = GroupCommit(self._write, items_max=ITEMS_MAX)
        self.drain = self._commit.drain
        self.group_ended = self._commit.group_ended

    async def submit(self, name: str, data: bytes) -> None:
        await self._commit.submit(FileWrite(name, data))

    async def _write(self, writes: list[FileWrite]) -> list[KmsRefusedError | None]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._disk.make_files, self._directory, writes)


Grouped = Callable[[], AbstractAsyncContextManager[FileGroups]]


@pytest.fixture
def grouped(tmp_path: Path, disk: Disk) -> Iterator[Grouped]:
    """A group commit in `tmp_path`, drained at the end of the block."""
    directory = open_directory(tmp_path)

    @asynccontextmanager
    async def opened() -> AsyncIterator[FileGroups]:
        with ThreadPoolExecutor(max_workers=1) as executor:
            group = FileGroups(directory, disk, executor)
            yield group
            await group.drain()

    yield opened
    os.close(directory)


async def test_the_writes_of_one_turn_are_one_group(grouped: Grouped, disk: Disk, tmp_path: Path) -> None:
    async with grouped() as group:
        await asyncio.gather(*(group.submit(f"f{number}", b"%d" % number) for number in range(10)))
        assert all((tmp_path / f"f{number}").read_bytes() == b"%d" % number for number in range(10))
    assert disk.groups == [[f"f{number}" for number in range(10)]]
    assert threading.get_ident() not in disk.threads


async def test_what_arrives_while_a_group_is_written_is_the_next_group(grouped: Grouped, disk: Disk) -> None:
    async with grouped() as group:
        disk.go.clear()
        first = asyncio.create_task(group.submit("first", b""))
        while not disk.groups:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(group.submit(name, b"")) for name in ("b", "c")]
        await asyncio.sleep(0)
        others.append(asyncio.create_task(group.submit("d", b"")))
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in (first, *others))
        disk.go.set()
        await asyncio.gather(first, *others)
    assert disk.groups == [["first"], ["b", "c", "d"]]


async def test_the_end_of_a_group_waits_for_no_later_one(grouped: Grouped, disk: Disk) -> None:
    """So a rotation waits for the keys under the older KEK, however many are made under the new one."""
    async with grouped() as group:
        disk.go.clear()
        first = asyncio.create_task(group.submit("first", b""))
        while not disk.groups:
            await asyncio.sleep(0.001)
        ended = asyncio.create_task(group.group_ended())
        later = asyncio.create_task(group.submit("later", b""))
        await asyncio.sleep(0)
        assert not ended.done()
        disk.go.set()
        await ended
        assert first.done() and not later.done()
        await asyncio.gather(first, later)
        await group.group_ended()


async def test_groups_are_bounded(grouped: Grouped, disk: Disk) -> None:
    async with grouped() as group:
        await asyncio.gather(*(group.submit(f"f{number}", b"") for number in range(2 * ITEMS_MAX + 1)))
    assert [len(group) for group in disk.groups] == [ITEMS_MAX, ITEMS_MAX, 1]


async def test_only_the_caller_of_a_taken_name_gets_the_conflict(grouped: Grouped, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"old")
    async with grouped() as group:
        results = await asyncio.gather(
            *(group.submit(name, b"new") for name in ("a", "taken", "b", "b")), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), ConflictError, type(None), ConflictError]
    assert (tmp_path / "taken").read_bytes() == b"old"


async def test_all_callers_of_a_failed_group_get_its_error(
    grouped: Grouped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with grouped() as group:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            results = await asyncio.gather(*(group.submit(f"f{n}", b"x") for n in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [StorageUnavailableError] * 3
        await group.submit("f0", b"again")
    assert [path.name for path in tmp_path.iterdir()] == ["f0"]


async def test_a_defect_cancels_its_callers_and_does_not_stop_the_next_group(grouped: Grouped, disk: Disk) -> None:
    problems: list[object] = []
    async with grouped() as group:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context["exception"]))
        disk.failure = RuntimeError("a defect")
        with pytest.raises(asyncio.CancelledError):
            await group.submit("f", b"")
        disk.failure = None
        await group.submit("g", b"")
    assert [type(problem) for problem in problems] == [RuntimeError], "and it is reported"


async def test_a_caller_cancelled_before_its_group_begins_writes_nothing(
    grouped: Grouped, disk: Disk, tmp_path: Path
) -> None:
    async with grouped() as group:
        disk.go.clear()
        first = asyncio.create_task(group.submit("first", b""))
        while not disk.groups:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(group.submit("second", b""))
        third = asyncio.create_task(group.submit("third", b""))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()  # too late: its file is being written
        disk.go.set()
        await third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "third"]


async def test_no_more_than_a_bounded_number_of_writes_waits(
    grouped: Grouped, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "WAITING_MAX", 2)
    async with grouped() as group:
        results = await asyncio.gather(*(group.submit(f"f{n}", b"") for n in range(4)), return_exceptions=True)
        assert [type(result) for result in results] == [type(None)] * 2 + [StorageUnavailableError] * 2


async def test_drain_returns_when_everything_is_written(grouped: Grouped, disk: Disk, tmp_path: Path) -> None:
    async with grouped() as group:
        tasks = [asyncio.create_task(group.submit(f"f{number}", b"")) for number in range(3)]
        await asyncio.sleep(0)
        await group.drain()
        assert len(list(tmp_path.iterdir())) == 3
        await asyncio.gather(*tasks)
        await group.drain()


async def test_an_error_of_a_whole_group_is_each_callers_own() -> None:
    """An exception object that several callers raise would collect the tracebacks of all."""

    async def refused(items: list[int]) -> list[int | KmsRefusedError]:
        raise ConflictError("an active key") from OSError(5, "the cause")

    group = GroupCommit(refused, items_max=ITEMS_MAX)
    errors = await asyncio.gather(*(group.submit(number) for number in range(3)), return_exceptions=True)
    assert {(type(error), str(error)) for error in errors} == {(ConflictError, "an active key")}
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error, ConflictError) and isinstance(error.__cause__, OSError) for error in errors)
