"""The verbs over real files under a policy, without a daemon.

Owns: the parts of a daemon that a policy concerns, joined in this process, and callers of them. Invariants: the policy
file is parsed as in the daemon; all hourly limits are full. It asserts nothing.
"""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from minikms import api
from minikms.api import Verb
from minikms.audit import Event
from minikms.http import Response
from minikms.policy.file_policy import FilePolicy
from minikms.policy.meters import Meters
from minikms.policy.principal import Principal
from minikms.policy.rules import parse_policy
from minikms_daemon.service.access import Access
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keys import KeyVerbs
from minikms_daemon.service.lifecycle import LifecycleVerbs
from minikms_daemon.service.records import RecordVerbs
from minikms_daemon.service.roots import RootVerbs
from tests.harness.vaults import OpenedVault, opened_vault


async def keep_nothing(_content: bytes) -> None:
    """No disk."""


class KeptAudit:
    """Takes every event, and keeps it."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    async def add_written(self, event: Event, *, durable: bool) -> None:
        self.events.append(event)

    def require_writable(self) -> None:
        pass


class Limited:
    """Made by `limited`."""

    def __init__(self, one: OpenedVault, policy: FilePolicy, meters: Meters) -> None:
        self.one = one
        self.policy = policy
        self.meters = meters
        self.audit = KeptAudit()
        self.limited: list[Event] = []
        self.refusals: Counter[str] = Counter()
        self.access = Access(
            vault=one.vault,
            indexing=one.indexing,
            policy=policy,
            meters=meters,
            refusals=self.refusals,
            limited=self.limited.append,
        )
        self.table = VerbTable(self.audit, self.access)
        RecordVerbs(one.vault, self.table)
        KeyVerbs(one.vault, self.table, one.indexing)
        LifecycleVerbs(vault=one.vault, table=self.table, indexing=one.indexing, reader=one.reader)
        keks = one.kek_verbs(self.table)
        RootVerbs(keks=keks, in_use_slot_id=one.slot.slot_id)

    def who(self, uid: int, on_behalf_of: str | None = None) -> Principal:
        found = self.policy.principal(uid, 1, on_behalf_of)
        if found is None:
            raise AssertionError(f"uid {uid} may not connect")
        return found

    def change(self, policy: str) -> None:
        """Takes another policy into force."""
        self.policy.replace(parse_policy(b"version = 1\n" + policy.encode()))

    def begin(self, who: Principal, verb: Verb[Any, Any], request: api.Request) -> bytes | Awaitable[Any]:
        """The answer, or what to await for it. The request counts until `Meters.end_turn`. Raises KmsRefusedError."""
        answer = self.table[verb](self.table.entered(who, verb), request, "")
        return answer.body if isinstance(answer, Response) else answer

    async def ask(self, who: Principal, verb: Verb[Any, Any], request: api.Request) -> Any:
        """The decoded answer, after which the request does not count any more. Raises KmsRefusedError."""
        entered = self.table.entered(who, verb)
        try:
            answer = self.table[verb](entered, request, "")
            if inspect.isawaitable(answer):
                assert entered.entered is not None
                body = await self.meters.later(entered.entered, answer)
            else:
                body = answer
            return msgspec.json.decode(body.body if isinstance(body, Response) else body)
        finally:
            self.meters.end_turn()

    async def until_waiting(self, who: Principal, verb: Verb[Any, Any], request: api.Request) -> asyncio.Task[Any]:
        """The request, once it waits for something other than the event loop."""
        task = asyncio.ensure_future(self.ask(who, verb, request))
        for _ in range(20):
            await asyncio.sleep(0)
        return task


@asynccontextmanager
async def limited(
    directory: Path,
    policy: str,
    *,
    boot_ms: Callable[[], int] = lambda: 10_000,
    keep: Callable[[bytes], Awaitable[None]] = keep_nothing,
) -> AsyncIterator[Limited]:
    """A start under a policy, with all key files read. `policy`: the content of the file, without its version.
    `boot_ms`: the clock of the limits. Without it the clock stands still, so that no limit has room again. `keep`:
    makes their file durable.
    """
    rules = parse_policy(b"version = 1\n" + policy.encode())
    meters = Meters(keep=keep, now_ns=lambda: boot_ms() * 1_000_000)
    async with opened_vault(directory) as one:
        one.vault.index.keep_threads()
        await one.indexing.run()
        yield Limited(one, FilePolicy(rules), meters)
