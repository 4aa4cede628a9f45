"""Nothing that a user typed is in the store's files, in whatever form, before or after compaction, nor in its log
output."""

import asyncio
import base64
import hashlib
import os
import zlib
from pathlib import Path

import pytest

from progressdb_server.store.model import Idempotency, NewMessage, StoreUnavailableError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.store.opened_store import disk, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

PLANTED = {
    "a body": "xyzzy-body-7f3a",
    "a nested body": "xyzzy-nested-81bc",
    "a role": "xyzzy-role-90aa",
    "a reply reference": "xyzzy-reply-4c1e",
    "a reaction": "xyzzy-reaction-55d0",
    "an identity that reacted": "xyzzy-identity-0b7c",
    "a title": "xyzzy-title-21fe",
    "a changed title": "xyzzy-newtitle-3d9b",
    "an edited body": "xyzzy-edited-aa12",
    "a deleted body": "xyzzy-deleted-c03f",
    "a body in a deleted thread": "xyzzy-gone-19e8",
    "a body whose write failed": "xyzzy-refused-d71b",
    "an idempotency key": "xyzzy-idem-6e44",
}


def traces(secret: str) -> list[bytes]:
    """The text itself, the ways it is likely to be written, and its unkeyed digests."""
    raw = secret.encode()
    found = [
        raw,
        raw[::-1],
        raw.hex().encode(),
        secret.encode("utf-16-le"),
        raw[4:],
        secret.replace("-", "%2D").encode(),
    ]
    found += [base64.b64encode(b"\0" * pad + raw)[4:-4] for pad in range(3)]
    for name in ("md5", "sha1", "sha256", "sha512", "blake2b", "sha3_256"):
        digest = hashlib.new(name, raw, usedforsecurity=False).digest()
        found += [digest[:16], digest[:16].hex().encode(), base64.b64encode(digest)[:20]]
    return [*found, zlib.compress(raw)[2:-4]]


async def plant(path: str, provider: SealingProvider) -> None:
    async with opened(RocksEngine(path), provider) as store:
        thread = await store.threads.create(author="ann", title=PLANTED["a title"])
        await store.threads.update(thread.id, author="ann", title=PLANTED["a changed title"])
        new = NewMessage(
            author="ann",
            thread=thread.id,
            role=PLANTED["a role"],
            body=[PLANTED["a body"], {PLANTED["a nested body"]: PLANTED["a nested body"]}],
            reply_to=PLANTED["a reply reference"],
        )
        one = await store.messages.create(new, idempotency=Idempotency("scope", PLANTED["an idempotency key"]))
        await store.messages.create(new, idempotency=Idempotency("scope", PLANTED["an idempotency key"]))
        await store.messages.set_reaction(one.id, PLANTED["an identity that reacted"], PLANTED["a reaction"])
        await store.messages.update(one.id, author="ann", body=PLANTED["an edited body"], role=None, reply_to=None)
        two = await store.messages.create(NewMessage(author="ann", thread=thread.id, body=PLANTED["a deleted body"]))
        await store.messages.delete(two.id, author="ann")
        removed = NewMessage(author="ann", thread="removed", body=PLANTED["a body in a deleted thread"])
        await store.messages.create(removed)
        await store.threads.delete("removed", author="ann", by="ann")
        provider.down = True
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(NewMessage(author="ann", body=PLANTED["a body whose write failed"]))
        provider.down = False
        # In the write-ahead log first, then in tables, then compacted.
        look_through(path, "while it runs")
        engine = disk(store)
        assert isinstance(engine, RocksEngine)
        await asyncio.to_thread(engine.compact)
        look_through(path, "compacted")
        assert (await store.threads.get(thread.id)).title == PLANTED["a changed title"]


def look_through(path: str, when: str) -> None:
    sizes = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                content = Path(directory, name).read_bytes()
            except FileNotFoundError:  # the engine has removed it meanwhile
                continue
            sizes += len(content)
            for what, secret in PLANTED.items():
                for trace in traces(secret):
                    assert trace not in content, f"{what} is in {name} {when}"
    assert sizes > 5000


def test_nothing_that_was_typed_is_on_the_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "db")
    asyncio.run(plant(path, SealingProvider()))
    look_through(path, "after closing")
    said = "".join(capfd.readouterr())
    for secret in PLANTED.values():
        assert secret not in said


def test_the_search_would_find_it() -> None:
    """The traces are those of the text: a store that kept any of them would fail the test above."""
    secret = PLANTED["a body"]
    for form in (
        secret.encode(),
        base64.b64encode(b"{" + secret.encode() + b"}"),
        hashlib.sha256(secret.encode()).digest(),
        secret.encode().hex().encode(),
    ):
        assert any(trace in form for trace in traces(secret))
