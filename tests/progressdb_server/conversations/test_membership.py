"""Who may read a thread and write into it."""

import asyncio

import pytest

from progressdb_server.conversations import membership
from progressdb_server.conversations.membership import Act, Rule, Standing
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace
from progressdb_server.store.check import repair
from progressdb_server.store.model import (
    AuthorNotInThreadError,
    Idempotency,
    Message,
    NewMessage,
    NoRoomToRemoveError,
    NotAMemberError,
    StoreError,
    TooManyMembersError,
)
from progressdb_server.store.offline import LocalEntries
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

pytestmark = pytest.mark.usefixtures("both_engines")


def post(store: Conversations, author: str, thread: str, *, signed: bool = True) -> asyncio.Future[Message]:
    return asyncio.ensure_future(
        store.messages.create(NewMessage(author=author, thread=thread, body=author, as_member=signed))
    )


POLICY: list[tuple[Rule, Standing, Act, type[StoreError] | None]] = [
    ("members", Standing.MEMBER, Act.READ, None),
    ("members", Standing.MEMBER, Act.WRITE, None),
    ("members", Standing.OUTSIDER, Act.READ, AuthorNotInThreadError),
    ("members", Standing.OUTSIDER, Act.WRITE, NotAMemberError),
    ("members", Standing.REMOVED, Act.READ, NotAMemberError),
    ("members", Standing.REMOVED, Act.WRITE, NotAMemberError),
    ("open", Standing.MEMBER, Act.READ, None),
    ("open", Standing.MEMBER, Act.WRITE, None),
    ("open", Standing.OUTSIDER, Act.READ, AuthorNotInThreadError),
    ("open", Standing.OUTSIDER, Act.WRITE, None),
    ("open", Standing.REMOVED, Act.READ, NotAMemberError),
    ("open", Standing.REMOVED, Act.WRITE, NotAMemberError),
]


@pytest.mark.parametrize(("rule", "standing", "act", "refusal"), POLICY)
def test_the_policy_is_this_table(rule: Rule, standing: Standing, act: Act, refusal: type[StoreError] | None) -> None:
    if refusal is None:
        membership.check(rule, standing, act)
    else:
        with pytest.raises(refusal):
            membership.check(rule, standing, act)


async def test_a_post_into_another_s_thread_needs_membership_and_stores_nothing() -> None:
    async with opened() as store:
        await post(store, "ann", "t")
        with pytest.raises(NotAMemberError):
            await post(store, "eve", "t")
        with pytest.raises(AuthorNotInThreadError):
            await store.members.check_reader("t", "eve")
        await post(store, "bob", "t", signed=False)  # a backend's message makes its author a member
        await post(store, "bob", "t")
        await store.members.add("t", ["eve"])
        await post(store, "eve", "t")
        assert [m.author for m in await messages_of(store, "t")] == ["ann", "bob", "bob", "eve"]
        assert await store.members.of_thread("t") == ["ann", "bob", "eve"]


async def test_who_never_was_a_member_is_shut_out_by_a_removal_too() -> None:
    """They neither post under the rule of 0.1, nor join by a message of a backend, until they are added."""
    async with opened() as store:
        store.members.rule = "open"
        await post(store, "ann", "t")
        await store.members.remove("t", "bob")
        await post(store, "bob", "t", signed=False)
        with pytest.raises(NotAMemberError):
            await post(store, "bob", "t")
        with pytest.raises(NotAMemberError):
            await store.members.check_reader("t", "bob")
        await store.members.add("t", ["bob"])
        await post(store, "bob", "t")


async def test_a_repair_makes_nobody_a_member_who_was_removed_without_an_entry() -> None:
    engine, provider = MemoryEngine(), SealingProvider()

    async with opened(engine, provider) as store:
        await post(store, "ann", "t")
        await post(store, "bob", "t", signed=False)
    engine.reopen()
    engine.write([(keyspace.writer("t", "bob"), None)])
    engine.sync()
    async with opened(engine, provider) as store:
        await store.members.remove("t", "bob")
    engine.reopen()
    assert (await repair(LocalEntries(engine)))[1] == []
    async with opened(engine, provider) as store:
        assert await store.members.of_thread("t") == ["ann"]
        with pytest.raises(NotAMemberError):
            await post(store, "bob", "t")


@pytest.mark.parametrize("turns", range(8))
async def test_of_a_first_post_and_a_removal_side_by_side_one_is_first(turns: int) -> None:
    async with opened() as store:
        store.members.rule = "open"
        await post(store, "ann", "t")
        posting = post(store, "bob", "t")
        for _ in range(turns):
            await asyncio.sleep(0)
        await store.members.remove("t", "bob")
        at_removal = len(await messages_of(store, "t"))
        result = (await asyncio.gather(posting, return_exceptions=True))[0]
        assert at_removal == (2 if isinstance(result, Message) else 1)
        assert len(await messages_of(store, "t")) == at_removal
        with pytest.raises(NotAMemberError):
            await store.members.check_reader("t", "bob")


async def test_a_retried_create_of_a_removed_member_is_refused() -> None:
    async with opened() as store:
        await post(store, "ann", "t")
        await store.members.add("t", ["bob"])
        new = NewMessage(author="bob", thread="t", body=1, as_member=True)
        once = Idempotency("scope", "key")
        made = await store.messages.create(new, idempotency=once)
        assert (await store.messages.create(new, idempotency=once)).id == made.id
        await store.members.remove("t", "bob")
        with pytest.raises(NotAMemberError):
            await store.messages.create(new, idempotency=once)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("turns", range(12))
async def test_of_a_post_and_a_removal_side_by_side_one_is_first(turns: int, known: bool) -> None:
    """A post that was acknowledged is older than the removal: nothing of him is stored after it."""
    async with opened() as store:
        await post(store, "ann", "t")
        await store.members.add("t", ["bob"])
        if known:  # to the cache of the thread
            await post(store, "bob", "t")
        before = len(await messages_of(store, "t"))
        posting = post(store, "bob", "t")
        for _ in range(turns):
            await asyncio.sleep(0)
        await store.members.remove("t", "bob")
        at_removal = [m.id for m in await messages_of(store, "t")]
        result = (await asyncio.gather(posting, return_exceptions=True))[0]
        if isinstance(result, Message):
            assert result.id in at_removal
        else:
            assert isinstance(result, NotAMemberError)
            assert len(at_removal) == before
        assert [m.id for m in await messages_of(store, "t")] == at_removal
        with pytest.raises(NotAMemberError):
            await post(store, "bob", "t")


async def test_membership_is_as_durable_as_the_message_that_made_it() -> None:
    engine, provider = MemoryEngine(), SealingProvider()

    async with opened(engine, provider) as store:
        await post(store, "ann", "t")
        await post(store, "bob", "t", signed=False)
        await store.members.add("t", ["cid", "dan"])
        await store.members.remove("t", "cid")
    async with opened(engine, provider) as store:  # what was not synced is gone
        assert await store.members.of_thread("t") == ["ann", "bob", "dan"]
        with pytest.raises(NotAMemberError):
            await store.members.check_reader("t", "cid")


async def test_a_thread_has_a_greatest_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MEMBERS_COUNT_MAX", 3)
    async with opened() as store:
        with pytest.raises(TooManyMembersError):
            await store.threads.create(author="ann", title="t", members=["b", "c", "d"])
        thread = (await store.threads.create(author="ann", title="t", members=["b", "ann", "b"])).id
        await asyncio.gather(
            *(store.members.add(thread, [name]) for name in ("c", "d")),
            post(store, "e", thread, signed=False),
            return_exceptions=True,
        )
        members = await store.members.of_thread(thread)
        assert len(members) == 3
        await store.members.remove(thread, members[-1])
        with pytest.raises(TooManyMembersError):  # who was removed counts
            await post(store, "f", thread, signed=False)
        with pytest.raises(NoRoomToRemoveError):
            await store.members.remove(thread, "f")
        await store.members.remove(thread, members[-1])  # again
        await store.members.add(thread, members)


async def test_a_repair_makes_no_removed_author_a_member() -> None:
    engine, provider = MemoryEngine(), SealingProvider()

    async with opened(engine, provider) as store:
        await post(store, "ann", "t")
        for name in ("bob", "cid"):
            await post(store, name, "t", signed=False)
        await store.members.remove("t", "bob")
    engine.reopen()
    assert await repair(LocalEntries(engine)) == ([], [])
    engine.write([(keyspace.writer("t", name), b"?") for name in ("ann", "cid")])
    engine.sync()
    assert (await repair(LocalEntries(engine)))[1] == []
    async with opened(engine, provider) as store:
        assert await store.members.of_thread("t") == ["ann"]
