"""Run as a program: servers that are killed at a step of their job, one after another, on one directory.

    killed_server.py DIRECTORY SOCKET CHUNK_RECORDS

Each line on stdin starts one, as a fork of this process, which has nothing open: `before N` and `after N` kill it with
SIGKILL before, or after, its Nth step: a write that holds a job's row, or an order to retire or destroy a key. With
`never 0` it ends once its job is done. Each acts as a server with its jobs: a rotation, with writers, editors and
readers at work on the thread; or, with a thread behind the number, a purge of it. On stdout, one JSON line for each
version that was acknowledged, and `{"ended": status}` after each server.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from minikms import api
from minikms.platform.logs import log_to
from progressdb_server.config import Retention, RotationSection
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import purge, rotation
from progressdb_server.jobs.service import KEEP_ALL, Jobs
from progressdb_server.jobs.states import Job
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store.keyspace import JOBS
from progressdb_server.store.model import MessageRange, NewMessage, StoreUnavailableError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.store.crashing_writer import say

THREAD = "t"
SOON = Retention(deleted_after="1s", rotation_backups_after="never")


class Death:
    """Of this process, at the given step."""

    def __init__(self, when: str, at: int) -> None:
        self._when = when
        self._left = at

    @contextmanager
    def at_step(self) -> Iterator[None]:
        self._left -= 1
        if self._when == "before" and not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if self._when == "after" and not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledEngine(RocksEngine):
    """Dies at a write of a job's row."""

    def __init__(self, path: str, death: Death) -> None:
        super().__init__(path)
        self._death = death

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        listed = list(puts)
        of_job = any(key.startswith(JOBS) for key, _ in listed)
        with self._death.at_step() if of_job else nullcontext():
            super().write(listed)


class KilledProvider(RemoteProvider):
    """Dies at an order."""

    death: Death

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        with self.death.at_step():
            return await super().retire_key(key_id, request_id=request_id)

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer:
        with self.death.at_step():
            return await super().destroy_key(key_id, thread_id=thread_id, request_id=request_id)


async def write(store: Conversations) -> None:
    """A new message, then an edit of it, and again; the acknowledged ones are printed."""
    while True:
        try:
            made = await store.messages.create(NewMessage("ann", THREAD, body={"by": os.getpid()}))
            say(made)
            say(await store.messages.update(made.id, author="ann", body="edited", role=None, reply_to=None))
        except StoreUnavailableError:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.005)


async def read(store: Conversations) -> None:
    """Whatever state the rotation is in, every message opens."""
    while True:
        try:
            await store.threads.get(THREAD)
            async for _ in store.reading.messages(THREAD, range_=MessageRange(include_deleted=True)):
                pass
        except StoreUnavailableError:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)


async def serve(directory: str, socket: str, when: str, at: int, thread: str = "") -> None:
    provider = KilledProvider(socket)
    provider.death = Death(when, at)
    store = Conversations(KilledEngine(f"{directory}/db", provider.death), provider)
    jobs = Jobs(store, provider, RotationSection(records_per_second=0), SOON if thread else KEEP_ALL, exclusive=True)
    await jobs.start()
    others = [asyncio.create_task(work(store)) for work in (write, read) if not thread]
    begun = [job for job in await _jobs(jobs) if not thread or (job.kind, job.thread) == ("purge", thread)]
    if begun:
        job = begun[-1]
    else:
        job = await (jobs.add(jobs.purge, thread) if thread else jobs.rotation.rotate(THREAD))
    job = await jobs.wait(job.id)
    for task in others:
        task.cancel()
    outcomes = await asyncio.gather(*others, return_exceptions=True)
    if not all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes):
        raise RuntimeError(f"a worker ended: {outcomes}")
    say({"state": job.state})
    await jobs.close()
    await store.close()
    await provider.close()


async def _jobs(jobs: Jobs) -> list[Job]:
    return [job async for page in jobs.table.pages() for job in page]


def main(directory: str, socket: str, chunk: int) -> None:
    log_to(sys.stderr, "console")
    rotation.CHUNK_RECORDS_MAX = chunk  # type: ignore[misc]  # final in production
    purge.CHUNK_RECORDS = chunk  # type: ignore[misc]  # as above
    rotation.WRITES_AHEAD = 0  # type: ignore[misc]  # or several chunks are one write
    for line in iter(sys.stdin.readline, ""):
        when, at, *thread = line.split()
        pid = os.fork()
        if not pid:
            asyncio.run(serve(directory, socket, when, int(at), *thread))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        say({"ended": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
