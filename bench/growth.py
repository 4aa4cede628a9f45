"""How the store grows: `python -m bench.growth 10000 100000 …` prints one row for each number of messages, and with
`--save` puts them into docs/benchmarks.md, docs/plots/store.csv and its plots. With `--lists` it prints those of lists.

The store alone, in one process, over RocksDB on this disk, with AES-GCM in the same process in place of the key
service: what changes from row to row is the store's doing. A tenth of the messages go into one long thread, the rest
into threads of a hundred. Each size starts from an empty directory; 10,000,000 messages take some ten minutes and 8
GB.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import uvloop
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import plots
from minikms import api
from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem, EncryptItem, ReencryptItem
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.model import MessageRange, NewMessage, Page
from progressdb_server.store.rocks.engine import RocksEngine

NONCE_BYTES = api.SEAL_BYTES - 16
"""As long as the key service's: the store checks the length of a sealed record."""
WRITERS = 64
THREAD_MESSAGES = 100
BODY_CHARS = 256
TURNS = 30
SIZES = (10_000, 100_000)
THREADS = (1_000, 10_000, 100_000)
LIST_COLUMNS = (
    "threads",
    "list (µs each)",
    "search (µs each)",
    "stored keys (µs each)",
    "longest turn (ms)",
    "page of 50 (ms)",
    "peak MiB",
)
COLUMNS = (
    "messages",
    "threads",
    "appends/s",
    "last 50 (ms)",
    "last 1000 (ms)",
    "get (ms)",
    "512 threads (ms)",
    "open (ms)",
    "bytes each",
    "peak MiB",
)


class OneKeyProvider:
    """One key for all threads: the key service's own growth is measured elsewhere."""

    def __init__(self) -> None:
        self._cipher = AESGCM(AESGCM.generate_key(256))

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer:
        return api.CreateDekAnswer("k_0" + "0" * 25, b"")

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, aad)

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]:
        return [
            await self.encrypt(i.key_id, i.plaintext, aad=i.aad, thread_id=i.thread_id, request_id=None) for i in items
        ]

    async def decrypt_batch(
        self, items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        return [self._cipher.decrypt(i.ciphertext[:NONCE_BYTES], i.ciphertext[NONCE_BYTES:], i.aad) for i in items]

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        return [item.ciphertext for item in items]

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None = None
    ) -> list[KmsRefusedError | None]:
        return [None for _ in items]

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        raise refusal(api.CODE_KEY_NOT_FOUND, "there is one key for all threads")

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        raise refusal(api.CODE_KEY_NOT_FOUND, "there is one key for all threads")

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer:
        raise refusal(api.CODE_KEY_NOT_FOUND, "there is one key for all threads")

    async def list_keys(
        self, *, thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
    ) -> api.KeyListAnswer:
        return api.KeyListAnswer([], None)

    async def status(self) -> api.StatusAnswer:
        return api.StatusAnswer(status="ok")

    async def close(self) -> None:
        return None


async def _median_ms(work: Callable[[], Coroutine[Any, Any, object]]) -> float:
    taken: list[float] = []
    for _ in range(TURNS):
        started = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000


async def _measure(messages: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as directory:
        path = os.path.join(directory, "store")
        store = Conversations(RocksEngine(path), OneKeyProvider())
        body = "x" * BODY_CHARS
        sample: list[str] = []

        async def write(first: int) -> None:
            for number in range(first, messages, WRITERS):
                thread = "long" if number % 10 == 0 else f"t{number // THREAD_MESSAGES}"
                made = await store.messages.create(NewMessage(author=f"u{first}", thread=thread, body=body))
                if number % (messages // TURNS) == 0:
                    sample.append(made.id)

        async def last(count: int) -> None:
            async for _ in store.reading.messages("long", range_=MessageRange(limit=count)):
                pass

        async def threads() -> None:
            left = 512
            async for chunk in store.threads.list_threads(author=None):
                left -= len(chunk)
                if left <= 0:
                    return

        async def one() -> None:
            await store.reading.message(sample[0])
            sample.append(sample.pop(0))

        started = time.perf_counter()
        await asyncio.gather(*[write(first) for first in range(WRITERS)])
        rate = messages / (time.perf_counter() - started)
        last_50, last_1000 = await _median_ms(lambda: last(50)), await _median_ms(lambda: last(1000))
        get, listed = await _median_ms(one), await _median_ms(threads)
        made = (await store.stats())["threads"]
        await store.close()
        started = time.perf_counter()
        RocksEngine(path).close()
        opening = (time.perf_counter() - started) * 1000
        size = sum(entry.stat().st_size for entry in os.scandir(path))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [messages, made, rate, last_50, last_1000, get, listed, opening, size / messages, peak]


async def _measure_lists(threads: int) -> list[float]:
    """Of one author's threads, in processor time; a turn is what another task waits for beside all of them."""
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as directory:
        store = Conversations(RocksEngine(os.path.join(directory, "store")), OneKeyProvider())
        for start in range(0, threads, WRITERS):
            made = range(start, min(threads, start + WRITERS))
            await asyncio.gather(*[store.threads.create(author="ann", title=f"Thread {number}") for number in made])
        longest = 0.0

        async def other() -> None:
            nonlocal longest
            while True:
                began = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - began)

        async def each_us(chunks: AsyncIterator[Sequence[object]], entries: int = threads) -> float:
            began, read = time.thread_time(), 0
            async for chunk in chunks:
                read += len(chunk)
                await asyncio.sleep(0)  # as for the answer of the key service
            return (time.thread_time() - began) / (entries or read) * 1_000_000

        async def page() -> None:
            async for _ in store.threads.list_threads(author="ann", page=Page(50)):
                pass

        beside = asyncio.create_task(other())
        listed = await each_us(store.threads.list_threads(author="ann"))
        searched = await each_us(store.threads.list_threads(author="ann", title="none"))
        keys = await each_us(store.stored_keys(""), 0)
        beside.cancel()
        paged = await _median_ms(page)
        await store.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [threads, listed, searched, keys, longest * 1000, paged, peak]


def main() -> None:
    """Prints the rows as a Markdown table as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth")
    parser.add_argument("sizes", nargs="*", type=int, metavar="MESSAGES", help="numbers of messages")
    parser.add_argument("--lists", action="store_true", help="lists of threads and keys; the numbers are of threads")
    parser.add_argument("--save", action="store_true", help="write the table, the file and the plots of docs")
    asked = parser.parse_args()
    load_before = os.getloadavg()[0]
    columns, sizes, measure = (COLUMNS, SIZES, _measure) if not asked.lists else (LIST_COLUMNS, THREADS, _measure_lists)
    print(plots.head(columns), flush=True)
    rows: list[list[float]] = []
    for size in asked.sizes or sizes:
        rows.append(uvloop.run(measure(size)))
        print(plots.line(rows[-1]), flush=True)
    if asked.save and not asked.lists:
        plots.keep(plots.STORE, COLUMNS, rows, load_before)


if __name__ == "__main__":
    main()
