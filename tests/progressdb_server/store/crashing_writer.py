"""Run as a program: writes a mixed load until it is killed, and says on stdout what was acknowledged.

    crashing_writer.py DIRECTORY WORKERS

One JSON line an acknowledgement: the version that was stored. After a refusal: `{"refused": …}`, and it goes on.
"""

import asyncio
import os
import random
import sys

import msgspec

from minikms.platform.logs import log_to
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.model import Message, MessageRange, NewMessage, StoreUnavailableError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.store.keyfile_provider import KeyFileProvider


def say(what: object) -> None:
    os.write(1, msgspec.json.encode(what) + b"\n")


async def step(store: Conversations, author: str, own: list[Message]) -> Message | None:
    choice = random.random()
    if not own or choice < 0.5:
        thread = random.choice(["", "shared", "shared-2", f"of-{author}"])
        new = NewMessage(author=author, thread=thread, body={"n": random.random(), "pad": "x" * random.randrange(2000)})
        own.append(await store.messages.create(new))
        return own[-1]
    message = random.choice(own)
    if choice < 0.7:
        return await store.messages.update(message.id, author=author, body=random.random(), role=None, reply_to=None)
    if choice < 0.85:
        return await store.messages.set_reaction(message.id, "bob", str(random.random()))
    if choice < 0.9:
        own.remove(message)
        await store.messages.delete(message.id, author=author)
        return await store.reading.message(message.id)
    async for _ in store.reading.messages(message.thread, range_=MessageRange(limit=50, include_deleted=True)):
        pass
    return None


async def work(store: Conversations, author: str) -> None:
    own: list[Message] = []
    while True:
        try:
            stored = await step(store, author, own)
        except StoreUnavailableError as error:
            say({"refused": str(error)})
            await asyncio.sleep(0.01)
            continue
        if stored is not None:
            say(stored)


async def main(directory: str, workers: int) -> None:
    log_to(sys.stderr, "console")
    store = Conversations(RocksEngine(f"{directory}/db"), KeyFileProvider(f"{directory}/keys"))
    say({"ready": os.getpid()})
    await asyncio.gather(*[work(store, f"{os.getpid()}-{worker}") for worker in range(workers)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
