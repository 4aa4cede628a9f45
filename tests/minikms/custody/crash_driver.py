"""A process that changes files, to be killed or failed at one of its system calls.

All of it runs in one thread, so that a system call has one number.

Its input is a socket. It sends a byte there and waits for an answer or the end, so that strace can be attached, and
then writes "begin" to stderr. To stdout it writes each promise after the call returned: "told", a name and its content;
or "destroyed" and a key. After an error it writes "refused" and tries once more.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from minikms.api import ReplicaFollowRequest
from minikms.api.errors import ConflictError, KmsRefusedError, StorageUnavailableError
from minikms.custody import following
from minikms.custody.vault import Vault
from minikms.datadir import DataDir, Options, lock_data_dir, open_for_service
from minikms.keys.dek import DekRecord
from minikms.memory import libc
from minikms.memory.arena import SecretArena
from minikms.platform.files import FileWrite, open_directory, remove_file, replace_file, write_files
from minikms.roots.providers import KeyFile
from minikms_daemon import rotation

PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = -1
"""linux/prctl.h"""
T = TypeVar("T")


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def insist(change: Callable[[], object]) -> object:
    try:
        return change()
    except StorageUnavailableError:
        tell("refused")
    return change()


def replace(directory: int) -> None:
    insist(lambda: replace_file(directory, "f0", b"new"))
    tell("told f0 new")


def create(directory: int) -> None:
    insist(lambda: write_files(directory, [FileWrite("g0", b"new")]))
    tell("told g0 new")


def many(directory: int) -> None:
    names = [f"f{number}" for number in range(5)]
    insist(lambda: write_files(directory, [FileWrite(name, b"new") for name in names]))
    for name in names:
        tell(f"told {name} new")


def remove(directory: int) -> None:
    insist(lambda: remove_file(directory, "f0"))
    tell("told f0 -")


class SameThread(Executor):
    """Runs each job at once."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  as an executor does
            done.set_exception(error)
        return done


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[DataDir]:
    place, worker = Path(sys.argv[2]), SameThread()
    with SecretArena(64, force_fallback=True) as arena, insist_on(lambda: lock_data_dir(str(place / "data"))) as lock:
        root = KeyFile(place / "key")
        options = Options(audit_fsync="never", cache_keys_max=8)
        data = insist_on(lambda: open_for_service(lock, root, arena=arena, disk=worker, options=options))
        yield data
        await data.vault.drain()
        with contextlib.suppress(KmsRefusedError):
            data.close()


async def destroy_retired() -> None:
    """A start, then the destruction of the first retired keys, two of them at once."""
    async with served() as data:
        key_ids = (Path(sys.argv[2]) / "victims").read_text().split()

        async def destroy(*chosen: str) -> None:
            await asyncio.gather(*map(data.vault.destroy, chosen))

        for chosen in (key_ids[:2], key_ids[2:3]):
            try:
                await destroy(*chosen)
            except KmsRefusedError:
                tell("refused")
                await destroy(*chosen)
            for key_id in chosen:
                tell(f"destroyed {key_id}")


async def rotate_beside_changes() -> None:
    """A start, then a KEK rotation, and beside it a destruction, a retirement and a creation."""
    async with served() as data:
        vault = data.vault
        rotating = rotation.KekRotation(vault, reader=SameThread(), disk=SameThread())
        victim, retired = (Path(sys.argv[2]) / "victims").read_text().split()
        await changed_once(lambda: rotating.begin(None))
        running = asyncio.create_task(rotating.run())
        await asyncio.sleep(0)
        await asyncio.gather(
            changed_once(lambda: vault.destroy(victim)),
            changed_once(lambda: vault.retire(retired)),
            changed_once(lambda: with_file(vault, "t")),
        )
        await running
        tell(f"destroyed {victim}")
        tell(f"retired {retired}")


async def with_file(vault: Vault, thread_id: str) -> DekRecord:
    """A new key, as the verb makes it. This program runs without `tests.harness`."""
    made = await vault.create_in_log(thread_id)
    await vault.journal.file_written(made.id)
    return made


async def create_and_destroy() -> None:
    """A start, which replays the journal that is there, then creates, and the destruction of one of the new keys."""
    async with served() as data:
        vault = data.vault

        async def create(thread_id: str) -> str:
            made = await changed(lambda: with_file(vault, thread_id))
            tell(f"created {made.id} {bytes(vault.opened(made.id).view).hex()}")
            return made.id

        victim, *_ = await asyncio.gather(*(create(f"n{number}") for number in range(3)))
        await changed(lambda: vault.retire(victim, again=True))
        await changed(lambda: vault.destroy(victim))
        tell(f"destroyed {victim}")


async def follow_parts() -> None:
    """A start of a member, which then takes what the database has; and once more, as after a lost answer."""
    parts = msgspec.json.decode((Path(sys.argv[2]) / "parts").read_bytes(), type=list[ReplicaFollowRequest])
    async with served() as data:
        member = data.member
        if member is None:
            raise SystemExit("the directory is not that of a member")
        for _ in range(2):
            try:
                await member.scan()
                for request in parts:
                    await member.follow(request)
            except StorageUnavailableError:
                tell("refused")
            else:
                tell(f"followed {member.mark.number}")


async def start_and_stop() -> None:
    """A start replays the journal that is there."""
    async with served():
        pass


async def changed(change: Callable[[], Awaitable[T]]) -> T:
    try:
        return await change()
    except StorageUnavailableError:
        tell("refused")
        return await change()


async def changed_once(change: Callable[[], Awaitable[object]]) -> None:
    """A ConflictError means that an earlier run made the change."""
    with contextlib.suppress(ConflictError):
        await changed(change)


def insist_on(make: Callable[[], T]) -> T:
    try:
        return make()
    except (KmsRefusedError, OSError):
        tell("refused")
    return make()


def destroy(_: int) -> None:
    asyncio.run(destroy_retired())


def rewrap(_: int) -> None:
    vars(rotation).update(BATCH_FILES=3, RETRY_SECONDS_MIN=0.01)
    asyncio.run(rotate_beside_changes())


def creates(_: int) -> None:
    asyncio.run(create_and_destroy())


def follow(_: int) -> None:
    vars(following).update(WRITTEN_FILES=2)
    asyncio.run(follow_parts())


def replay(_: int) -> None:
    asyncio.run(start_and_stop())


SCENARIOS = {
    "replace": replace,
    "create": create,
    "many": many,
    "remove": remove,
    "destroy": destroy,
    "rewrap": rewrap,
    "replay": replay,
    "creates": creates,
    "follow": follow,
}

if __name__ == "__main__":
    scenario = SCENARIOS[sys.argv[1]]
    opened = open_directory(sys.argv[2])
    with contextlib.suppress(OSError):  # a kernel without Yama
        libc.prctl("prctl(PR_SET_PTRACER)", PR_SET_PTRACER, PR_SET_PTRACER_ANY)
    os.write(0, b"?")
    os.read(0, 1)
    os.write(2, b"begin\n")
    scenario(opened)
    tell("end")
