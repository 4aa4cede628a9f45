"""Versions of a message: what they cost on disk and in memory, how many there may be, pages, and which do not open."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem
from progressdb_server.api.gate import limits
from progressdb_server.conversations import messages as writing_room
from progressdb_server.conversations import reading as reading_room
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace, record
from progressdb_server.store.check import Checker
from progressdb_server.store.conditions import Write
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import (
    REACTIONS_COUNT_MAX,
    AmbiguousTimeError,
    Message,
    NewMessage,
    RecordUnreadableError,
    TooManyReactionsError,
    TooManyVersionsError,
    json_text,
)
from progressdb_server.store.offline import LocalView
from tests.progressdb_server.jobs.rotating import Place, keys_of_records
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, messages_of, opened, versions_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

pytestmark = pytest.mark.usefixtures("both_engines")

MEGABYTE = "x" * 1_000_000


async def post(store: Conversations, body: Any = "b", author: str = "ann") -> str:
    return (await store.messages.create(NewMessage(author=author, thread="t", body=body, role="tool"))).id


async def edit(store: Conversations, message: str, body: Any) -> Message:
    return await store.messages.update(message, author="ann", body=body, role=None, reply_to=None)


def stored_bytes(engine: MemoryEngine) -> int:
    return sum(len(key) + len(value) for key, value in engine.scan(b"", b"\xff", limit=4000))


def record_keys(engine: MemoryEngine) -> list[bytes]:
    return [key for key, _ in engine.scan(b"thread:t:msg:", b"thread:t:msg;", limit=4000)]


async def findings(engine: MemoryEngine, provider: SealingProvider) -> list[str]:
    return [finding.kind async for finding in Checker(LocalView(engine), provider).run()]


# --- what they cost ---------------------------------------------------------------------------------------------------
async def test_a_change_of_reactions_and_a_tombstone_store_no_body() -> None:
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        message = await post(store, MEGABYTE)
        for number in range(120):
            await store.messages.set_reaction(message, f"user{number % 7}", str(number))
        await store.messages.remove_reaction(message, "user0")
        await store.messages.delete(message, author="ann")
        assert stored_bytes(engine) < 1_100_000
        found = await versions_of(store, message)
        assert len(found) == 123
        assert all((version.value, version.role, version.author) == (MEGABYTE, "tool", "ann") for version in found)
        assert [version.reactions.get("user1") for version in found[:10]] == [None, None, *["1"] * 7, "8"]
        assert (found[-2].deleted, found[-1].deleted) == (False, True)
        assert "user0" in found[-3].reactions
        assert "user0" not in found[-1].reactions
        assert await store.reading.message(message) == found[-1]
        assert await messages_of(store, "t", include_deleted=True) == [found[-1]]
        assert await findings(engine, provider) == []


async def test_an_edit_keeps_reactions_and_a_reaction_keeps_the_edit() -> None:
    async with opened() as store:
        message = await post(store, 0)
        await store.messages.set_reaction(message, "bob", "1")
        await edit(store, message, "new")
        await store.messages.set_reaction(message, "cid", "2")
        found = await versions_of(store, message)
        assert [(version.value, version.reactions) for version in found] == [
            (0, {}),
            (0, {"bob": "1"}),
            ("new", {"bob": "1"}),
            ("new", {"bob": "1", "cid": "2"}),
        ]


async def test_a_change_of_reactions_leaks_neither_identity_nor_reaction() -> None:
    """Both are sealed, as they were when each version held the whole message."""
    engine = MemoryEngine()
    async with opened(engine) as store:
        message = await post(store)
        await store.messages.set_reaction(message, "secret-identity", "secret-reaction")
        raw = engine.get(record_keys(engine)[-1]) or b""
        header, _ = record.unpack_message(raw)
        first = record_keys(engine)[0][-27:].decode()
        assert isinstance(header, record.LaterHeader)
        assert (header.first, header.author, header.deleted, header.content) == (first, "ann", False, first)
        assert not any(b"secret" in key + value for key, value in engine.scan(b"", b"\xff", limit=4000))


async def test_the_versions_come_in_small_pieces_and_a_shared_body_opens_once() -> None:
    class Measured(SealingProvider):
        async def decrypt_batch(
            self, items: Sequence[DecryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            batches.append([len(item.ciphertext) for item in items])
            return await super().decrypt_batch(items, request_id=request_id)

    batches: list[list[int]] = []
    async with opened(provider=Measured()) as store:
        message = await post(store, MEGABYTE)
        for number in range(30):
            await store.messages.set_reaction(message, "bob", str(number))
        await edit(store, message, "y" * 900_000)
        await edit(store, message, "z" * 900_000)
        batches.clear()
        found = await store.reading.versions(message)
        pieces = [len(piece) async for piece in found.chunks]
        assert sum(pieces) == 33
        assert max(pieces) == 1
        assert sum(size > 500_000 for batch in batches for size in batch) == 3
        assert max(sum(batch) for batch in batches) < reading_room.VERSIONS_BYTES_MAX + 1_000_100
        small = await post(store, 1)
        for number in range(300):
            await store.messages.set_reaction(small, "bob", str(number))
        found = await store.reading.versions(small)
        assert [len(piece) async for piece in found.chunks] == [reading_room.LIST_MESSAGES_MAX, 45]


# --- how many ---------------------------------------------------------------------------------------------------------
def test_the_bounds_are_those_of_the_specification() -> None:
    assert (writing_room.VERSIONS_COUNT_MAX, writing_room.VERSIONS_BYTES_MAX) == (10_000, 256 * 1024 * 1024)


async def refused_beyond_the_bound(store: Conversations, message: str) -> None:
    """Nothing is stored; a removed reaction and a tombstone are."""
    before = await versions_of(store, message)
    for _ in range(2):
        with pytest.raises(TooManyVersionsError):
            await edit(store, message, "other")
        with pytest.raises(TooManyVersionsError):
            await store.messages.set_reaction(message, "bob", "again")
    assert await versions_of(store, message) == before
    await store.messages.remove_reaction(message, "bob")
    with pytest.raises(TooManyVersionsError):
        await store.messages.set_reaction(message, "bob", "again")
    await store.messages.remove_reaction(message, "bob")
    await store.messages.delete(message, author="ann")
    found = await versions_of(store, message)
    assert [(version.reactions, version.deleted) for version in found[len(before) :]] == [({}, False), ({}, True)]


async def test_a_message_has_a_bounded_number_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing_room, "VERSIONS_COUNT_MAX", 6)
    async with opened() as store:
        message = await post(store)
        await edit(store, message, 1)
        for number in range(4):
            await store.messages.set_reaction(message, "bob", str(number))
        await refused_beyond_the_bound(store, message)
        assert len(await versions_of(store, message)) == 8


async def test_the_versions_of_a_message_have_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing_room, "VERSIONS_BYTES_MAX", 10_000)
    engine = MemoryEngine()
    async with opened(engine) as store:
        message = await post(store, "x" * 3000)
        await store.messages.set_reaction(message, "bob", "1")
        await edit(store, message, "x" * 3000)
        await edit(store, message, "x" * 3000)
        with pytest.raises(TooManyVersionsError):
            await edit(store, message, "x" * 900)
        while True:
            try:
                await store.messages.set_reaction(message, "bob", "r" * 100)
            except TooManyVersionsError:
                break
        sizes = [len(record.unpack_message(engine.get(key) or b"")[1]) for key in record_keys(engine)]
        assert 9_700 < sum(sizes) <= 10_000
        await store.messages.remove_reaction(message, "bob")
        await store.messages.delete(message, author="ann")


async def test_a_message_has_reactions_of_a_bounded_number_of_identities() -> None:
    async with opened() as store:
        full = {str(number): "+" for number in range(REACTIONS_COUNT_MAX)}
        message = (await store.messages.create(NewMessage(author="ann", body=1, reactions=full))).id
        with pytest.raises(TooManyReactionsError):
            await store.messages.set_reaction(message, "another", "+")
        assert (await store.messages.set_reaction(message, "7", "-")).reactions == {**full, "7": "-"}
        await store.messages.remove_reaction(message, "7")
        await store.messages.set_reaction(message, "another", "+")


# --- pages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [0, 1000], ids=["a clock that stands still", "a clock that ticks"])
@pytest.mark.parametrize("limit", [1, 3, 7, 8, 9])
async def test_pages_show_each_version_once_also_within_one_nanosecond(limit: int, step: int) -> None:
    async with opened(now_ns=TickingClock(step=step)) as store:
        message = await post(store, 0)
        for number in range(7):
            react = store.messages.set_reaction
            await (edit(store, message, number) if number % 2 else react(message, "b", str(number)))
        whole = await versions_of(store, message)
        pages: list[list[Message]] = []
        before: str | None = None
        while before != "":
            page = await store.reading.versions(message, limit=limit, before=before)
            pages.insert(0, [version async for piece in page.chunks for version in piece])
            before = page.older
        assert [version for page in pages for version in page] == whole
        assert [len(page) for page in pages[1:]] == [limit] * (len(pages) - 1)


async def page_before(store: Conversations, message: str, before: str | None, limit: int) -> tuple[list[Any], str]:
    found = await store.reading.versions(message, limit=limit, before=before)
    return [version.value async for piece in found.chunks for version in piece], found.older


async def test_a_time_names_its_version_also_in_an_earlier_era() -> None:
    """A client that takes the `ts` of a page's first version for the next page sees each version once."""
    clock = TickingClock()
    async with opened(now_ns=clock) as store:
        message = await post(store, 0)
        clock.now += 10**18  # some 30 years
        for number in range(1, 5):
            await edit(store, message, number)
        clock.now -= 10**18
        for number in range(5, 9):
            await edit(store, message, number)
        whole = await versions_of(store, message)
        seen: list[Any] = []
        before: str | None = None
        for _ in range(5):
            page, _older = await page_before(store, message, before, 2)
            seen = page + seen
            before = str(next(version.ts for version in whole if version.value == page[0]))
        assert seen == list(range(9))
        for unclear in (whole[4].ts + 1, whole[0].ts - 1):  # of no version: it orders no eras
            with pytest.raises(AmbiguousTimeError):
                await page_before(store, message, str(unclear), 2)


async def test_a_time_of_several_versions_is_refused_and_of_none_orders_them() -> None:
    clock = TickingClock()
    async with opened(now_ns=clock) as store:
        message = await post(store, 0)
        clock.step = 0
        for number in (1, 2):
            await edit(store, message, number)
        clock.step = 1000
        await edit(store, message, 3)
        whole = await versions_of(store, message)
        assert whole[1].ts == whole[2].ts
        with pytest.raises(AmbiguousTimeError):
            await page_before(store, message, str(whole[2].ts), 9)
        assert await page_before(store, message, str(whole[3].ts - 1), 9) == ([0, 1, 2], "")
        assert await page_before(store, message, str(whole[0].ts - 1), 9) == ([], "")


async def test_a_time_is_a_cursor_too_and_a_limit_of_0_shows_nothing() -> None:
    async with opened() as store:
        message = await post(store, 0)
        for number in range(1, 5):
            await edit(store, message, number)
        whole = await versions_of(store, message)

        async def page(limit: int | None, before: str | None) -> tuple[list[Any], str]:
            found = await store.reading.versions(message, limit=limit, before=before)
            return [version.value async for piece in found.chunks for version in piece], found.older

        assert await page(None, str(whole[3].ts)) == ([0, 1, 2], "")
        assert await page(2, str(whole[3].ts)) == ([1, 2], f"{whole[1].ts}-000000")
        assert await page(None, str(whole[0].ts)) == ([], "")
        assert await page(0, None) == ([], "")
        assert await page(2**62, None) == ([0, 1, 2, 3, 4], "")


async def test_versions_that_are_written_during_a_list_are_not_in_it() -> None:
    async with opened() as store:
        message = await post(store, 0)
        found = await store.reading.versions(message)
        await edit(store, message, 1)
        assert [version.value async for piece in found.chunks for version in piece] == [0]


# --- what was moved or altered ----------------------------------------------------------------------------------------
Damage = Callable[[MemoryEngine, list[bytes]], tuple[bytes, bytes | None]]


def changed_header(engine: MemoryEngine, key: bytes, **fields: Any) -> bytes:
    header, sealed = record.unpack_message(engine.get(key) or b"")
    return record.pack(msgspec.structs.replace(header, **fields), sealed)


DAMAGES: dict[str, tuple[str, Damage]] = {
    "the content is gone": ("record_missing", lambda e, keys: (keys[0], None)),
    "the content is another message's": ("decryption_failed", lambda e, keys: (keys[0], e.get(keys[2]))),
    "the header names another message's content": (
        "record_malformed",
        lambda e, keys: (keys[1], changed_header(e, keys[1], content=keys[2][-27:].decode())),
    ),
    "the header names no content": (
        "record_malformed",
        lambda e, keys: (keys[1], changed_header(e, keys[1], content="")),
    ),
    "the header names its own version": (
        "record_malformed",
        lambda e, keys: (keys[1], changed_header(e, keys[1], content=keys[1][-27:].decode())),
    ),
    "the header names something that is no stamp": (
        "record_malformed",
        lambda e, keys: (keys[1], changed_header(e, keys[1], content=":é/..")),
    ),
    "the form byte is that of a first version": (
        "record_malformed",
        lambda e, keys: (keys[1], b"\x01" + (e.get(keys[1]) or b"")[1:]),
    ),
    "an unknown form byte": ("record_malformed", lambda e, keys: (keys[1], b"\x03" + (e.get(keys[1]) or b"")[1:])),
}


@pytest.mark.parametrize("name", sorted(DAMAGES))
async def test_a_version_whose_content_was_moved_or_altered_is_noticed(name: str) -> None:
    code, damage = DAMAGES[name]
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        message = await post(store, "mine")
        await store.messages.set_reaction(message, "bob", "1")
        other = await post(store, "other")
        assert await findings(engine, provider) == []
        engine.write([damage(engine, record_keys(engine))])
        assert [found.error for found in await messages_of(store, "t")] == [code, ""]
        assert [found.error for found in await versions_of(store, message)][-1] == code
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(message)
        assert (await store.reading.message(other)).value == "other"
        assert await findings(engine, provider) != []


async def test_an_index_entry_that_names_no_stamp_is_reported_as_damage() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        message = await post(store)
        first = keyspace.parse_message_id(message)
        assert first is not None
        engine.write([(keyspace.order("t") + first.raw, b"x" * 27)])
        for read in (messages_of(store, "t"), store.reading.latest_version(message), store.reading.message(message)):
            with pytest.raises(RecordUnreadableError):
                await read


def test_a_later_version_of_one_form_does_not_open_as_the_other() -> None:
    """The form byte is not sealed. The two sealed arrays have different types in the same places."""
    message = Message("msg-5-000000", "t", "ann", "user", 9, json_text(7), "", reactions={})
    first, own = Stamp(5, 0), Stamp(9, 0)
    key = keyspace.messages("t") + own.raw
    whole = record.message_secret(message, first.text)
    later = record.later_secret(message, first.text, "", record.Before(1, 1))
    headers = (
        record.MessageHeader("k", first.text, "ann", False),
        record.LaterHeader("k", first.text, "ann", False, ""),
    )
    with pytest.raises(record.RecordFormatError, match="form of a first"):
        record.open_message(headers[0], key, "t", first.text, whole)
    assert record.open_message(headers[1], key, "t", first.text, later) == (message, "", (1, 1))
    for header, plaintext in zip(headers, (later, whole), strict=True):
        with pytest.raises(record.RecordFormatError):
            record.open_message(header, key, "t", first.text, plaintext)


# --- keys -------------------------------------------------------------------------------------------------------------
async def test_a_rotation_of_the_threads_key_moves_versions_of_every_form() -> None:
    place = Place()
    seen: list[list[Message]] = []
    async with place.opened() as (store, jobs):
        message = await post(store, "content")
        await store.messages.set_reaction(message, "bob", "1")
        await edit(store, message, "edited")
        await store.messages.set_reaction(message, "bob", "2")
        other = await post(store, "other")
        await store.messages.delete(other, author="ann")
        seen.append(await versions_of(store, message) + await versions_of(store, other))
        old = set((await keys_of_records(store)).values())
        job = await jobs.wait((await jobs.rotation.rotate("t")).id)
        assert (job.state, job.failed) == ("done", 0)
        assert len(old) == 1
        assert old.isdisjoint((await keys_of_records(store)).values())
        place.keys.destroyed |= old
        assert await versions_of(store, message) + await versions_of(store, other) == seen[0]
        await store.messages.set_reaction(message, "bob", "3")
        assert (await store.reading.message(message)).value == "edited"


def fail_with_unreadable_key(provider: SealingProvider, key_id: str) -> None:
    """As the key service refuses the items of a key whose file is damaged."""
    real = provider.decrypt_batch

    async def decrypt_batch(
        items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        unreadable = refusal("key_unreadable", "the key's file is damaged")
        answers = await real(items, request_id=request_id)
        return [unreadable if item.key_id == key_id else answer for item, answer in zip(items, answers, strict=True)]

    provider.decrypt_batch = decrypt_batch  # type: ignore[method-assign]  # the damage


BREAKS: dict[str, Callable[[SealingProvider, str], None]] = {
    "key_destroyed": lambda provider, key_id: provider.destroyed.add(key_id),
    "key_unreadable": fail_with_unreadable_key,
}


@pytest.mark.parametrize("code", sorted(BREAKS))
async def test_every_list_shows_the_code_of_what_does_not_open_and_goes_on(code: str) -> None:
    """Half of the records are under a key that is gone: as after a rotation that failed."""
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        kept = await post(store, "kept")
        lost = await post(store, "lost")
        old = provider.keys_of("t")[0]
        made = await provider.create_dek_for_thread("t", replaces=old)
        await store.writer.commit(Write([(keyspace.key_map("t"), made.key_id.encode())]))
        await edit(store, kept, "edited")
        await store.messages.set_reaction(lost, "bob", "1")
        good = await post(store, "good")
        BREAKS[code](provider, old)
        found = await messages_of(store, "t")
        assert [(one.id, one.value, one.error) for one in found] == [
            (kept, "edited", ""),
            (lost, None, code),
            (good, "good", ""),
        ]
        assert (found[1].author, found[1].reactions, found[1].thread) == ("ann", {}, "t")
        versions = await versions_of(store, kept)
        assert [(one.value, one.error) for one in versions] == [(None, code), ("edited", "")]
        assert [one.error for one in await versions_of(store, lost)] == [code, code]
        assert (await store.reading.latest_version(lost)).error == code
        page, _ = await store.reading.page("t", before="", after="", limit=9, versions_max=9)
        assert [(one.message.error, one.versions) for one in page] == [("", 2), (code, 2), ("", 1)]
        page, _ = await store.reading.version_page(kept, 9)
        assert [one.message.error for one in page] == [code, ""]
        assert page[0].key_id == old


async def test_a_page_of_the_viewer_is_bounded_and_says_that_there_is_more() -> None:
    async with opened() as store:
        message = await post(store, MEGABYTE)
        for number in range(20):
            await store.messages.set_reaction(message, "bob", str(number))
        shown, older = await store.reading.version_page(message, 200)
        assert [version.message.reactions["bob"] for version in shown] == [str(n) for n in range(11, 20)]
        assert older
        for _ in range(11):
            await post(store, MEGABYTE)
        newest, more = await store.reading.page("t", before="", after="", limit=50, versions_max=9)
        assert (len(newest), more) == (9, True)
        before, more = await store.reading.page("t", before=newest[0].message.id, after="", limit=50, versions_max=9)
        assert (before[0].message.id, len(before), more) == (message, 3, False)
        after, more = await store.reading.page("t", before="", after=message, limit=50, versions_max=9)
        assert (len(after), more) == (9, True)
        assert after[0].message.id == before[1].message.id


@pytest.mark.parametrize("text", ["0", "9" * 19, "9" * 20 + "-000001", "1-999999"])
def test_a_version_that_the_api_accepts_is_a_stamp(text: str) -> None:
    assert limits.VERSION_PATTERN.fullmatch(text)
    cursor = keyspace.parse_cursor(text)
    if "-" in text:
        assert isinstance(cursor, Stamp)
        assert keyspace.cursor(cursor) == text
    else:
        assert cursor == int(text)


@pytest.mark.parametrize("text", ["", "9" * 20, "1-1", "1-0000001", "9" * 21 + "-000001"])
def test_the_api_refuses_a_version_that_is_no_stamp(text: str) -> None:
    assert not limits.VERSION_PATTERN.fullmatch(text)
