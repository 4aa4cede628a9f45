"""Limits: how much each principal, grant and proxy uses, and the refusal of more.

Owns: the accounts of all limits, their durable blocks, the charge of a request, and until when a request counts as
concurrent. Invariants:
- A request is charged as one request before anything else is done for it: to the proxy that asks, and to the first of
  the caller's grants that has room. Once it is decided, that moves to the grants that decide. So a request that is
  refused, for whatever reason, was charged too.
- A request counts as concurrent until the end of the turn of the event loop in which it is answered, when its audit
  line is written. That never depends on when an object is collected.
- Hourly limits are charged to the grants that decide, for their principal and in all, and to the proxy. All limits of
  a request are checked before any of these is charged.
- Use of an hourly limit comes out of a block that is on disk (`minikms.policy.budgets`). All requests that wait for a
  block take one write and one sync. A disk that fails refuses them, and nothing else.
- Names that a file does not spell out share one account once PRINCIPALS_COUNT_MAX others are in use, so that invented
  names take neither memory nor a limit of their own. Accounts belong to a grant by its identity: a reload keeps them.

Everything runs in the event loop's thread but the calls of the file. `Retry-After` says when there is room, if nobody
else asks; a batch with more items than an hourly limit never has room, and is refused in another way. It must never
tell a caller to wait for room that never comes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Collection, Iterator, Mapping
from concurrent.futures import Executor
from typing import Final, NamedTuple, Protocol, TypeVar

from minikms.errors import LimitExceededError, MiniKmsError, StorageUnavailableError, TooManyError
from minikms.policy.budgets import (
    FILE_BYTES_MAX,
    HEADER,
    KINDS,
    Blocks,
    Budget,
    Clock,
    Key,
    Kind,
    Opening,
    damaged,
    encode,
    parse,
)
from minikms.policy.rules import NO_LIMITS, Grant, LimitName, Limits, Scope

PRINCIPALS_COUNT_MAX: Final = 4096
"""Accounts of principals that no policy file spells out."""
SWEEP_MS: Final = 10_000
"""A full table is searched for accounts that are as new at most once in this time."""
REWRITE_BYTES_MIN: Final = 1024 * 1024
"""The file is written again once this many bytes, and as many as it had before, were added to it."""
ALL: Final = "*"
"""The holder of an account that all principals of a grant or a proxy share."""
OTHERS: Final = "+"
"""The holder of the account of principals beyond PRINCIPALS_COUNT_MAX."""
SOON_S: Final = 1
"""`Retry-After` where a request of a second, or the end of another request, makes room."""

T = TypeVar("T")

_LIMIT_NAMES: Final[dict[Kind, LimitName]] = {"decrypts": "decrypts_per_hour", "reencrypts": "reencrypts_per_hour"}


class BlockFile(Protocol):
    """The file of the blocks. Its methods block on the disk, and raise StorageUnavailableError."""

    @property
    def appendable(self) -> bool:
        """Whether `append` can write. Otherwise `replace` does."""

    def read(self) -> bytes | None:
        """The content; None if there is no file."""

    def append(self, data: bytes) -> None:
        """Adds `data`, durably."""

    def replace(self, data: bytes) -> None:
        """Makes `data` the content, durably."""

    def close(self) -> None:
        """Idempotent."""


class Cost(NamedTuple):
    """What a request uses of a grant, beside being one request: items of decrypt and decrypt_batch, and of
    reencrypt_batch and check_batch.
    """

    decrypts: int = 0
    reencrypts: int = 0


class Account:
    """What one holder uses of the limits of one grant or proxy."""

    __slots__ = ("budgets", "in_flight", "is_named", "next_us", "who")

    def __init__(self, who: str, *, is_named: bool) -> None:
        self.who = who
        self.is_named = is_named
        self.in_flight = 0
        self.next_us = 0
        self.budgets: dict[Kind, Budget] = {kind: Budget() for kind in KINDS}

    def is_idle(self, now_ms: int) -> bool:
        """Whether it is as a new one."""
        return (
            not self.in_flight
            and self.next_us <= now_ms * 1000
            and all(budget.is_idle(now_ms) for budget in self.budgets.values())
        )


class Charge:
    """What one request has taken of `requests_per_second` and `concurrent`, until `Meters.end_turn`."""

    __slots__ = ("_taken_us",)

    def __init__(self) -> None:
        self._taken_us: dict[Account, int] = {}
        """By account: what was taken of its rate."""

    def __contains__(self, account: Account) -> bool:
        return account in self._taken_us

    def take(self, account: Account, limits: Limits, now_ms: int) -> None:
        """Counts the request in an account, unless it is counted there already."""
        if account in self._taken_us:
            return
        rate = limits.requests_per_second
        taken_us = 0 if rate is None else _interval_us(rate)
        if taken_us:
            account.next_us = max(account.next_us, now_ms * 1000) + taken_us
        account.in_flight += 1
        self._taken_us[account] = taken_us

    def give_back_others(self, accounts: Collection[Account]) -> None:
        """The request counts in no other account than these: it was decided elsewhere."""
        for account in [each for each in self._taken_us if each not in accounts]:
            account.in_flight -= 1
            account.next_us -= self._taken_us.pop(account)

    def release(self) -> None:
        """The request no longer counts as concurrent. Idempotent."""
        accounts, self._taken_us = self._taken_us, {}
        for account in accounts:
            account.in_flight -= 1


class _Item(NamedTuple):
    """One account that a request is charged to."""

    account: Account
    key: tuple[str, str]
    label: str
    limits: Limits
    cost: Cost

    def budgets(self) -> Iterator[tuple[Kind, Budget, int, int]]:
        """Kind, budget, limit, and uses, of each hourly limit that the request uses."""
        budgets, limits, cost = self.account.budgets, self.limits, self.cost
        if limits.decrypts_per_hour is not None and cost.decrypts:
            yield "decrypts", budgets["decrypts"], limits.decrypts_per_hour, cost.decrypts
        if limits.reencrypts_per_hour is not None and cost.reencrypts:
            yield "reencrypts", budgets["reencrypts"], limits.reencrypts_per_hour, cost.reencrypts

    def check_size(self) -> None:
        """Raises TooManyError where the account never has room for the request."""
        for kind, _, limit, uses in self.budgets():
            if uses > limit:
                name = _LIMIT_NAMES[kind]
                raise TooManyError(f"the request has more items than {name} allows in an hour; send smaller batches")

    def exceeded(self, limit: LimitName, wait_s: int) -> LimitExceededError:
        """The refusal of a request for which this account has no room."""
        of_all = self.account.who == ALL
        text = f"the limit {limit} of this {self.label.partition(' ')[0] if of_all else 'principal'} is used up"
        return LimitExceededError(
            f"{text}; try again in {wait_s} s", wait_s, limit=limit, holder=self.label, of_all=of_all
        )


class _Waiting(NamedTuple):
    who: Scope
    costs: Mapping[Grant, Cost]
    entered: Charge
    done: asyncio.Future[Charge]


class Meters:
    """The accounts of a run. `executor`: one thread, in which `file` is used."""

    def __init__(self, clock: Clock, file: BlockFile, executor: Executor) -> None:
        """Reads the file, and at the first start after a boot writes it with the times of this boot's clock. Raises
        StartError if it is damaged, StorageUnavailableError if it can't be read or written.
        """
        self._clock = clock
        self._file = file
        self._executor = executor
        self._accounts: dict[tuple[str, str], Account] = {}
        self._unnamed = 0
        self._swept_ms = clock.boot_ms() - SWEEP_MS
        self._answered: list[Charge] = []
        """Of the requests that are answered in this turn."""
        self._waiting: deque[_Waiting] = deque()
        self._running: asyncio.Task[None] | None = None
        self._appended = self._written = 0
        self._refused: dict[Key, tuple[Budget, int]] = {}
        self._load(file.read())

    @property
    def exhausted(self) -> int:
        """The number of hourly limits that have refused a request and have no room for another use."""
        self._forget_refused(self._clock.boot_ms())
        return len(self._refused)

    def forget_refusals(self) -> None:
        """After a change of the limits: those that still have no room count again at their next refusal."""
        self._refused.clear()

    # --- charging ----------------------------------------------------------------------------------------------------

    def enter(self, scope: Scope | None, grants: Collection[Grant]) -> Charge:
        """Charges one request before it is known which grant decides: to the first of these that has room, and to the
        proxy. It is answered in this turn, unless it is given to `later`. No scope: there are no limits. Raises
        LimitExceededError where none of the grants has room.
        """
        entered = Charge()
        if scope is None:
            return entered
        if len(self._accounts) >= PRINCIPALS_COUNT_MAX:
            self._sweep()  # only here: later on, an account may have been looked up that is not charged yet
        now_ms = self._clock.boot_ms()
        used_up: list[tuple[_Item, LimitName]] = []
        for costs in [{grant: Cost()} for grant in grants] or [{}]:
            items = self._items(scope, costs)
            before = len(used_up)
            used_up += [(item, name) for item in items if (name := _used_up(item, now_ms)) is not None]
            if len(used_up) == before:
                for item in items:
                    entered.take(item.account, item.limits, now_ms)
                self._answered.append(entered)
                return entered
        item, name = used_up[0]
        raise item.exceeded(name, SOON_S)

    def later(self, entered: Charge, answer: Awaitable[T]) -> asyncio.Future[T]:
        """The last request that entered is answered by `answer`, in a later turn. Returns what to await instead of it;
        the charge ends in the turn in which that is done, also where it is cancelled before it began.
        """
        self._answered.pop()
        answering = asyncio.ensure_future(answer)
        answering.add_done_callback(lambda _: self._answered.append(entered))
        return answering

    def end_turn(self) -> None:
        """The answers of this turn leave now: their requests no longer count as concurrent."""
        answered = self._answered
        if answered:
            for charge in answered:
                charge.release()
            answered.clear()

    def charge(self, scope: Scope | None, costs: Mapping[Grant, Cost], entered: Charge) -> Charge | Awaitable[Charge]:
        """Charges what a request uses, once it is decided. The answer is `entered`, moved to the grants that decide.

        costs: of each grant that decided about the request or one of its items. Raises LimitExceededError, and
        TooManyError where there is never room; then `entered` is unchanged. Where a block has to reach the disk first,
        the answer is awaited; then it may also raise StorageUnavailableError.
        """
        if scope is None:
            return entered
        charge = self._try(scope, costs, entered)
        return self._later(scope, costs, entered) if charge is None else charge

    async def drain(self) -> None:
        """Returns when no request waits for the disk."""
        while self._running is not None:
            await asyncio.wait([self._running])

    def close(self) -> None:
        """Closes the file. Everything that was charged is on disk already."""
        self._file.close()

    def _try(self, scope: Scope, costs: Mapping[Grant, Cost], entered: Charge) -> Charge | None:
        """None: a block has to be opened first. Raises LimitExceededError, TooManyError."""
        items = self._items(scope, costs)
        for item in items:
            item.check_size()
        now_ms = self._clock.boot_ms()
        durable = True
        for item in items:
            name = None if item.account in entered else _used_up(item, now_ms)
            if name is not None:
                raise item.exceeded(name, SOON_S)
            durable = self._check_budgets(item, now_ms) and durable
        if not durable:
            return None
        for item in items:
            entered.take(item.account, item.limits, now_ms)
            for _, budget, _, uses in item.budgets():
                budget.take(uses, now_ms)
        entered.give_back_others({item.account for item in items})
        return entered

    def _check_budgets(self, item: _Item, now_ms: int) -> bool:
        """Whether the hourly limits of the account have room for the request now; False: once a block was opened.
        Raises LimitExceededError.
        """
        durable = True
        for kind, budget, limit, uses in item.budgets():
            wait_ms = budget.wait_ms(uses, limit, now_ms)
            if wait_ms:
                self._refused[Key(*item.key, kind)] = (budget, limit)
                raise item.exceeded(_LIMIT_NAMES[kind], -(-wait_ms // 1000))
            if self._refused:
                self._refused.pop(Key(*item.key, kind), None)  # its limit was raised, or use has left the window
            durable = durable and budget.covers(uses, limit, now_ms)
        return durable

    def _items(self, scope: Scope, costs: Mapping[Grant, Cost]) -> list[_Item]:
        items: list[_Item] = []
        decrypts = reencrypts = 0
        for grant, cost in costs.items():
            if grant.limits is not NO_LIMITS:
                account, key = self._account_of(grant, scope.name)
                items.append(_Item(account, key, grant.label, grant.limits, cost))
            if grant.limits_total is not NO_LIMITS:
                key = (grant.identity, ALL)
                items.append(_Item(self._account(key), key, grant.label, grant.limits_total, cost))
            decrypts += cost.decrypts
            reencrypts += cost.reencrypts
        proxy = scope.proxy
        if proxy is not None and proxy.limits_total is not NO_LIMITS:
            key = (proxy.identity, ALL)
            items.append(_Item(self._account(key), key, proxy.label, proxy.limits_total, Cost(decrypts, reencrypts)))
        return items

    # --- accounts ----------------------------------------------------------------------------------------------------

    def _account_of(self, grant: Grant, name: str) -> tuple[Account, tuple[str, str]]:
        """The account of a principal. It gets one of its own only while nothing counts in the shared one, which may
        hold its earlier use.
        """
        key = (grant.identity, name)
        account = self._accounts.get(key)
        if account is not None:
            return account, key
        if name in grant.names:
            return self._account(key, is_named=True), key
        others = (grant.identity, OTHERS)
        shared = self._accounts.get(others)
        in_use = shared is not None and not shared.is_idle(self._clock.boot_ms())
        if in_use or self._unnamed >= PRINCIPALS_COUNT_MAX:
            return self._account(others), others
        return self._account(key, is_named=False), key

    def _account(self, key: tuple[str, str], *, is_named: bool = True) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(key[1], is_named=is_named)
            self._unnamed += not is_named
        return account

    def _sweep(self) -> None:
        """Forgets accounts that are as new, at most once in SWEEP_MS."""
        now_ms = self._clock.boot_ms()
        if now_ms - self._swept_ms < SWEEP_MS:
            return
        self._swept_ms = now_ms
        self._forget_refused(now_ms)
        for key, account in list(self._accounts.items()):
            if account.is_idle(now_ms):
                del self._accounts[key]
                self._unnamed -= not account.is_named

    def _forget_refused(self, now_ms: int) -> None:
        for key, (budget, limit) in list(self._refused.items()):
            if not budget.wait_ms(1, limit, now_ms):
                del self._refused[key]

    # --- blocks ------------------------------------------------------------------------------------------------------

    async def _later(self, scope: Scope, costs: Mapping[Grant, Cost], entered: Charge) -> Charge:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(scope, costs, entered, loop.create_future())
        self._waiting.append(waiting)
        if self._running is None:
            self._running = loop.create_task(self._open_blocks(loop))
        try:
            return await waiting.done
        except asyncio.CancelledError:
            if not waiting.done.cancelled():
                waiting.done.exception()  # nobody else asks for it
            raise
        finally:
            del waiting  # the traceback of its error leads to this frame

    async def _open_blocks(self, loop: asyncio.AbstractEventLoop) -> None:
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group = list(self._waiting)
                self._waiting.clear()
                await self._open_for(group, loop)
        except BaseException:
            # A defect, or the loop is closing. Nobody may wait for ever or be charged without a durable block.
            for waiting in (*group, *self._waiting):
                waiting.done.cancel()
            self._waiting.clear()
            raise
        finally:
            self._running = None

    async def _open_for(self, group: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """One write for all of the group; then each is charged, in the order in which they came."""
        opening = self._openings(group)
        try:
            if opening:
                await self._write({key: block for key, (_, block, _) in opening.items()}, loop)
        except MiniKmsError as error:
            for waiting in group:
                if not waiting.done.done():
                    waiting.done.set_exception(StorageUnavailableError(str(error)))
            return
        finally:
            for budget, _, _ in opening.values():
                budget.reserving = False
        for budget, block, limit in opening.values():
            budget.open(block, limit)
        for waiting in group:
            if waiting.done.done():
                continue
            try:
                charge = self._try(waiting.who, waiting.costs, waiting.entered)
            except MiniKmsError as error:
                waiting.done.set_exception(error)
                continue
            if charge is None:
                self._waiting.append(waiting)
            else:
                waiting.done.set_result(charge)

    def _openings(self, group: list[_Waiting]) -> dict[Key, tuple[Budget, Opening, int]]:
        """The blocks that the group needs, each with its budget and limit."""
        now_ms = self._clock.boot_ms()
        wanted: dict[Key, tuple[Budget, int, int]] = {}
        for waiting in group:
            if waiting.done.done():
                continue
            for item in self._items(waiting.who, waiting.costs):
                for kind, budget, limit, uses in item.budgets():
                    key = Key(*item.key, kind)
                    before = wanted.get(key)
                    wanted[key] = (budget, limit, uses + (0 if before is None else before[2]))
        found: dict[Key, tuple[Budget, Opening, int]] = {}
        for key, (budget, limit, uses) in wanted.items():
            block = None if budget.covers(uses, limit, now_ms) else budget.next_block(uses, limit, now_ms)
            if block is not None:
                budget.reserving = True
                found[key] = (budget, block, limit)
        return found

    async def _write(self, blocks: Mapping[Key, Opening], loop: asyncio.AbstractEventLoop) -> None:
        """Raises StorageUnavailableError; then the next write replaces the file."""
        line = encode({key: (block,) for key, block in blocks.items()}, self._clock)
        if self._file.appendable and self._appended + len(line) <= max(REWRITE_BYTES_MIN, self._written):
            await loop.run_in_executor(self._executor, self._file.append, line)
            self._appended += len(line)
            return
        self._written = await loop.run_in_executor(self._executor, self._replace, self._blocks(), line)
        self._appended = 0

    def _blocks(self) -> dict[Key, Blocks]:
        return {
            Key(*key, kind): budget.blocks()
            for key, account in self._accounts.items()
            for kind, budget in account.budgets.items()
        }

    def _replace(self, state: Mapping[Key, Blocks], line: bytes) -> int:
        """For the executor, because the state may be long: writes all blocks, then the line. Returns the length of the
        file.
        """
        openings = {key: found for key, blocks in state.items() if (found := blocks.openings())}
        content = HEADER + encode(openings, self._clock) + line
        if len(content) > FILE_BYTES_MAX // 2:
            raise StorageUnavailableError("the file of hourly limits would become too long")
        self._file.replace(content)
        return len(content)

    def _load(self, content: bytes | None) -> None:
        if content is None:
            return
        now_ms = self._clock.boot_ms()
        written = parse(content, self._clock)
        for key, openings in written.openings.items():
            account = self._account((key.identity, key.who), is_named=key.who in (ALL, OTHERS))
            try:
                account.budgets[key.kind].replay(openings, now_ms)
            except ValueError:
                raise damaged("does not add up") from None
        self._sweep()
        if not written.is_timed:
            # A wall clock that is set from now on must not change the age of a use.
            self._written = self._replace(self._blocks(), b"")


def _used_up(item: _Item, now_ms: int) -> LimitName | None:
    """The limit of the account that has no room for one more request."""
    account, _, _, limits, _ = item
    rate = limits.requests_per_second
    if rate is not None and account.next_us - now_ms * 1000 > _interval_us(rate) * (rate - 1):
        return "requests_per_second"
    if limits.concurrent is not None and account.in_flight >= limits.concurrent:
        return "concurrent"
    return None


def _interval_us(rate: int) -> int:
    """The microseconds that a request takes of a rate per second, rounded up. The requests of one second may come at
    once.
    """
    return -(-1_000_000 // rate)
