"""Run as a program: servers that are killed at a write of their job, one after another, on one directory.

    killed_server.py DIRECTORY SOCKET CHUNK_RECORDS

Each line on stdin starts one, as a fork of this process, which has nothing open: `before N` and `after N` kill it with
SIGKILL before, or after, its Nth write that holds a job's row; `never` lets it end once its job is done. Each acts as a
server with its jobs, with writers, editors and readers at work on the thread. On stdout, one JSON line for each version
that was acknowledged, and `{"ended": status}` after each server.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterable

import structlog

from progressdb_server.config import Rotation
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import rotation
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import Job
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store.keyspace import JOBS
from progressdb_server.store.model import MessageRange, NewMessage, StoreUnavailableError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.store.crashing_writer import say

THREAD = "t"


class KilledEngine(RocksEngine):
    """Dies at the given write of a job's row."""

    def __init__(self, path: str, when: str, at: int) -> None:
        super().__init__(path)
        self._when = when
        self._left = at

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        listed = list(puts)
        of_job = any(key.startswith(JOBS) for key, _ in listed)
        self._left -= of_job
        if of_job and self._when == "before" and not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(listed)
        if of_job and self._when == "after" and not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


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
            async for _ in store.reading.messages(THREAD, asked=MessageRange(include_deleted=True)):
                pass
        except StoreUnavailableError:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)


async def serve(directory: str, socket: str, when: str, at: int) -> None:
    provider = RemoteProvider(socket)
    store = Conversations(KilledEngine(f"{directory}/db", when, at), provider)
    jobs = Jobs(store, provider, Rotation(records_per_second=0), exclusive=True)
    await jobs.start()
    others = [asyncio.create_task(work(store)) for work in (write, read)]
    job = await jobs.rotation.rotate(THREAD) if not (begun := await _jobs(jobs)) else begun[-1]
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
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    rotation.CHUNK_RECORDS_MAX = chunk  # type: ignore[misc]  # final in production
    rotation.WRITES_AHEAD = 0  # type: ignore[misc]  # or several chunks are one write
    for line in iter(sys.stdin.readline, ""):
        when, at = [*line.split(), "0"][:2]
        pid = os.fork()
        if not pid:
            asyncio.run(serve(directory, socket, when, int(at)))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        say({"ended": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
