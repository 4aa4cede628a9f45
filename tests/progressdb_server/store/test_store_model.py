"""The store against a model of it in a few lines, under random operations, restarts, power failures and key
switches."""

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace
from progressdb_server.store.check import Checker
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import (
    MessageNotFoundError,
    NewMessage,
    NotTheAuthorError,
    OutcomeUnknownError,
    StoreError,
    ThreadDeletedError,
    ThreadNotFoundError,
)
from progressdb_server.store.offline import LocalView
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, messages_of, threads_of, versions_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

T = TypeVar("T")
AUTHORS = st.sampled_from(["ann", "b:b", "%3A"])
NAMES = st.sampled_from(["", "one", "two.2"])
BODIES = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.dictionaries(st.text(max_size=3), st.booleans()))


@dataclasses.dataclass
class ModelThread:
    author: str
    title: str
    writers: set[str]
    deleted: bool = False
    messages: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class ModelMessage:
    thread: str
    author: str
    versions: list[tuple[Any, dict[str, str], bool]]  # body, reactions, deleted


class StoreMachine(RuleBasedStateMachine):
    threads = Bundle("threads")
    messages = Bundle("messages")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = MemoryEngine()
        self.provider = SealingProvider()
        self.clock = TickingClock()
        self.model_threads: dict[str, ModelThread] = {}
        self.model: dict[str, ModelMessage] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def refusal(self, work: Coroutine[Any, Any, object]) -> type[StoreError] | None:
        try:
            self.run(work)
        except StoreError as error:
            return type(error)
        return None

    @initialize()
    def open(self) -> None:
        self.store = Conversations(self.engine, self.provider, now_ns=self.clock)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()

    # --- operations -----------------------------------------------------------------------------------------------
    def _message_made(self, thread: str, author: str, body: Any, message: str) -> None:
        if thread not in self.model_threads:
            title = f"New Thread #{len(self.model_threads) + 1}"
            self.model_threads[thread] = ModelThread(author, title, {author})
        self.model_threads[thread].writers.add(author)
        self.model_threads[thread].messages.append(message)
        self.model[message] = ModelMessage(thread, author, [(body, {}, False)])

    @rule(target=messages, name=NAMES, author=AUTHORS, body=BODIES)
    def create(self, name: str, author: str, body: Any) -> Any:
        new = NewMessage(author=author, thread=name, body=body)
        if name in self.model_threads and self.model_threads[name].deleted:
            assert self.refusal(self.store.messages.create(new)) is ThreadDeletedError
            return multiple()
        made = self.run(self.store.messages.create(new))
        assert not name or made.thread == name
        self._message_made(made.thread, author, body, made.id)
        return made.id

    @rule(target=messages, author=AUTHORS, bodies=st.lists(BODIES, min_size=2, max_size=4), name=NAMES)
    def create_many_at_once(self, author: str, bodies: list[Any], name: str) -> Any:
        if name in self.model_threads and self.model_threads[name].deleted:
            return multiple()

        async def burst() -> list[tuple[str, str, Any]]:
            made = await asyncio.gather(
                *[self.store.messages.create(NewMessage(author=author, thread=name, body=body)) for body in bodies]
            )
            return [(m.id, m.thread, m.value) for m in made]

        made = sorted(self.run(burst()), key=lambda one: one[0])
        # The first of a burst founds the thread, whichever it is; titles count the threads.
        for message, thread, body in made:
            self._message_made(thread, author, body, message)
        if not name:
            for _, thread, _ in made:
                self.model_threads[thread].title = self.run(self.store.threads.get(thread)).title
        return multiple(*[message for message, _, _ in made])

    @rule(target=threads, author=AUTHORS, title=st.text(max_size=8))
    def create_thread(self, author: str, title: str) -> str:
        thread = self.run(self.store.threads.create(author=author, title=title)).id
        self.model_threads[thread] = ModelThread(author, title, {author})
        return thread

    def _change_expected(self, message: str, author: str | None) -> type[StoreError] | None:
        model = self.model[message]
        if author is not None and author != model.author:
            return NotTheAuthorError
        if model.versions[-1][2]:
            return MessageNotFoundError
        return ThreadDeletedError if self.model_threads[model.thread].deleted else None

    @rule(message=messages, author=st.none() | AUTHORS, body=BODIES)
    def edit(self, message: str, author: str | None, body: Any) -> None:
        expected = self._change_expected(message, author)
        work = self.store.messages.update(message, author=author, body=body, role=None, reply_to=None)
        assert self.refusal(work) is expected
        if expected is None:
            _, reactions, _ = self.model[message].versions[-1]
            self.model[message].versions.append((body, reactions, False))

    @rule(message=messages, author=st.none() | AUTHORS)
    def delete(self, message: str, author: str | None) -> None:
        expected = self._change_expected(message, author)
        repeated = expected is MessageNotFoundError
        refusal = self.refusal(self.store.messages.delete(message, author=author))
        assert refusal is (None if repeated else expected)
        if expected is None:
            body, reactions, _ = self.model[message].versions[-1]
            self.model[message].versions.append((body, reactions, True))

    @rule(message=messages, who=AUTHORS, what=st.none() | st.text(min_size=1, max_size=2))
    def react(self, message: str, who: str, what: str | None) -> None:
        expected = self._change_expected(message, None)
        body, reactions, _ = self.model[message].versions[-1]
        if what is None:
            refusal = self.refusal(self.store.messages.remove_reaction(message, who))
            if who not in reactions and expected is ThreadDeletedError:
                expected = None  # nothing to change
            changed = {key: value for key, value in reactions.items() if key != who}
        else:
            refusal = self.refusal(self.store.messages.set_reaction(message, who, what))
            changed = {**reactions, who: what}
        assert refusal is expected
        if expected is None and not (what is None and who not in reactions):
            self.model[message].versions.append((body, changed, False))

    def _thread_expected(self, thread: str, author: str | None) -> type[StoreError] | None:
        model = self.model_threads[thread]
        if model.deleted:
            return ThreadNotFoundError
        return NotTheAuthorError if author not in (None, model.author) else None

    @rule(thread=threads, author=st.none() | AUTHORS, title=st.text(max_size=8))
    def rename(self, thread: str, author: str | None, title: str) -> None:
        expected = self._thread_expected(thread, author)
        assert self.refusal(self.store.threads.update(thread, author=author, title=title)) is expected
        if expected is None:
            self.model_threads[thread].title = title

    def _delete_thread(self, thread: str, author: str | None) -> None:
        expected = self._thread_expected(thread, author)
        assert self.refusal(self.store.threads.delete(thread, author=author, by="ann")) is expected
        if expected is None:
            self.model_threads[thread].deleted = True
            event = self.run(messages_of(self.store, thread, include_deleted=True))[-1]
            assert event.value == {"_event": "thread_deleted", "by": "ann"}
            self.model_threads[thread].messages.append(event.id)
            self.model[event.id] = ModelMessage(thread, "ann", [(event.value, {}, True)])

    @rule(thread=consumes(threads), author=st.none() | AUTHORS)
    def delete_thread(self, thread: str, author: str | None) -> None:
        self._delete_thread(thread, author)

    @rule(message=messages)
    def delete_the_thread_of(self, message: str) -> None:
        if len(self.model_threads) > 3:
            self._delete_thread(self.model[message].thread, None)

    # --- the world around -----------------------------------------------------------------------------------------
    @rule(step_back=st.integers(0, 10**12))
    def restart_after_a_power_failure(self, step_back: int) -> None:
        self.run(self.store.close())
        self.engine.reopen()
        self.clock.now -= step_back
        self.open()

    @rule(survives=st.booleans())
    def the_disk_fails_once(self, survives: bool) -> None:
        self.engine.survives = survives
        self.engine.fail_sync = True
        assert self.refusal(self.store.writer.barrier()) is OutcomeUnknownError

        async def recovered() -> None:
            while not self.store.writer.available:
                await asyncio.sleep(0)

        self.run(recovered())
        self.engine.survives = False

    @rule(message=messages)
    def switch_the_key(self, message: str) -> None:
        thread = self.model[message].thread
        key = keyspace.key_map(thread)

        async def switch() -> None:
            old = self.engine.get(key)
            assert old is not None
            new = (await self.provider.create_dek_for_thread(thread, replaces=old.decode())).key_id
            await self.store.writer.commit(Write([(key, new.encode())], [(key, old)]))

        self.run(switch())

    # --- what must hold -------------------------------------------------------------------------------------------
    @rule(message=messages, limit=st.none() | st.integers(0, 4), include=st.booleans(), before=st.booleans())
    def a_list_is_the_models(self, message: str, limit: int | None, include: bool, before: bool) -> None:
        thread = self.model[message].thread
        cursor = {"before": message} if before else {"after": message}
        ids = self.model_threads[thread].messages
        at = ids.index(message)
        wanted = ids[:at] if before else ids[at + 1 :]
        wanted = [one for one in wanted if include or not self.model[one].versions[-1][2]]
        if limit is not None:
            wanted = wanted[max(0, len(wanted) - limit) :] if limit else []
        found = self.run(messages_of(self.store, thread, limit=limit, include_deleted=include, **cursor))
        assert [m.id for m in found] == wanted

    @rule(message=messages)
    def the_versions_are_the_models(self, message: str) -> None:
        found = self.run(versions_of(self.store, message))
        assert [(m.value, m.reactions, m.deleted) for m in found] == self.model[message].versions
        assert [m.ts for m in found] == sorted(m.ts for m in found)
        assert self.run(self.store.reading.message(message)) == found[-1]

    @invariant()
    def counts_and_threads_are_the_models(self) -> None:
        stored = sum(len(message.versions) for message in self.model.values())
        assert self.run(self.store.stats()) == {"threads": len(self.model_threads), "messages": stored}
        found = self.run(threads_of(self.store, None, include_deleted=True))
        assert {t.id: (t.author, t.title, t.deleted) for t in found} == {
            name: (t.author, t.title, t.deleted) for name, t in self.model_threads.items()
        }
        for name, thread in self.model_threads.items():
            assert set(self.run(self.store.members.of_thread(name))) == thread.writers

    @invariant()
    def the_store_is_sound(self) -> None:
        async def findings() -> list[object]:
            return [finding async for finding in Checker(LocalView(self.engine), self.provider).run()]

        assert self.run(findings()) == []


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
TestStoreAgainstItsModel = StoreMachine.TestCase
