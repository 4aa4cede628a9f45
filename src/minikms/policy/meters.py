"""The limits in use: how much each principal, grant and proxy has used, and the refusal of more.

Owns: the accounts of all limits, the charge of a request, until when a request counts as concurrent, and what of the
hourly limits is kept for the next start (docs/spec/policy.md). Invariants:
- A request is charged as one request before anything else is done for it: to the proxy that asks, and to the first of
  the caller's grants that has room. Once it is decided, that moves to the grants that decide. So a request that is
  refused, for whatever reason, was charged too.
- A request counts as concurrent until the end of the turn of the event loop in which it is answered, when its audit
  line is written. That never depends on when an object is collected.
- Hourly limits are charged to the grants that decide, for their principal and in all, and to the proxy. All limits of
  a request are checked before any of these is charged.
- An hourly limit is a bucket that fills at its rate and holds an hour's worth; a new one is full.
- What is taken from a bucket is used only while a durable file gives the next start no more than the bucket still
  holds. Where it would give more, `Meters.reserve` first writes one that gives a tenth less than that. So a crash gives
  nothing back, and costs a tenth. An orderly stop saves what is left.
- Names that a file does not spell out share one account once PRINCIPALS_COUNT_MAX others are in use, so that invented
  names take neither memory nor a limit of their own. Accounts belong to a grant by its identity: a reload keeps them.

Everything but the write of the file runs in the event loop's thread, by a clock that nobody sets. `Retry-After` says
when there is room, if nobody else asks; a batch with more items than an hourly limit never has room, and is refused in
another way. It must never tell a caller to wait for room that never comes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Annotated, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import LimitExceededError, StorageUnavailableError, TooManyError, copy_of
from minikms.policy.rules import NO_LIMITS, Grant, GrantLimits, LimitName, Scope

PRINCIPALS_COUNT_MAX: Final = 4096
"""Accounts of principals that no policy file spells out."""
SWEEP_NS: Final = 10_000_000_000
"""A full table is searched for accounts that are as new at most once in this time."""
SECOND_NS: Final = 1_000_000_000
HOUR_NS: Final = 3600 * SECOND_NS
RESERVED_NS: Final = HOUR_NS // 10
"""How much of an hour's worth is reserved at a time."""
REFRESH_SECONDS: Final = 60
"""How often the file is written again for what the buckets have filled since."""
SAVED_NAME: Final = "policy-buckets.json"
SAVED_BYTES_MAX: Final = 16 * 1024 * 1024
"""An account takes at most 2 KiB of it, mostly for a long name. If not all fit, all are saved as empty."""
ALL: Final = "*"
"""The holder of an account that all principals of a grant or a proxy share."""
OTHERS: Final = "+"
"""The holder of the account of principals beyond PRINCIPALS_COUNT_MAX."""
SOON_S: Final = 1
"""`Retry-After` where a request of a second, or the end of another request, makes room."""

T = TypeVar("T")

Kind = Literal["decrypts", "reencrypts"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_LIMIT_NAMES: Final[dict[Kind, LimitName]] = {"decrypts": "decrypts_per_hour", "reencrypts": "reencrypts_per_hour"}


class Bucket:
    """How much of one hourly limit is left to one holder. It fills at the rate of the limit and holds an hour's worth.

    empty_ns: the time at which it was empty, or would have been. So it holds the same part of a limit that is changed.
    """

    __slots__ = ("empty_ns",)

    def __init__(self, empty_ns: int) -> None:
        self.empty_ns = empty_ns

    def filled_ns(self, now_ns: int) -> int:
        """For how long it has filled since it was empty, at most HOUR_NS."""
        return min(HOUR_NS, now_ns - self.empty_ns)

    def wait_ns(self, uses: int, limit: int, now_ns: int) -> int:
        """Nanoseconds until it holds `uses`, at most `limit`, if nobody else takes any; 0: now."""
        return max(0, self._after(uses, limit, now_ns) - now_ns)

    def take(self, uses: int, limit: int, now_ns: int) -> None:
        """Charges uses for which there is nothing to wait."""
        self.empty_ns = self._after(uses, limit, now_ns)

    def _after(self, uses: int, limit: int, now_ns: int) -> int:
        return max(self.empty_ns, now_ns - HOUR_NS) - (-uses * HOUR_NS // limit)  # rounded up


class BucketKey(NamedTuple):
    """Which bucket: of which grant or proxy, of whom, and of what. `who`: a principal's name, ALL or OTHERS."""

    identity: str
    who: str
    kind: Kind


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """`others_ns`, and the last member of each bucket: what the next start gives it, as the time for which it has
    filled since it was empty, at most HOUR_NS. `others_ns` is that of every bucket that is not listed.
    """

    version: Literal[1]
    others_ns: Annotated[int, msgspec.Meta(ge=0, le=HOUR_NS)]
    buckets: list[tuple[str, str, Kind, Annotated[int, msgspec.Meta(ge=0, le=HOUR_NS)]]]


class _Kept(NamedTuple):
    """What a file gives to the next start: as `_Saved`."""

    others_ns: int
    buckets: dict[BucketKey, int]

    def of(self, key: BucketKey) -> int:
        return self.buckets.get(key, self.others_ns)

    def or_more(self, other: _Kept) -> _Kept:
        """For each bucket the larger of both."""
        keys = self.buckets.keys() | other.buckets.keys()
        return _Kept(max(self.others_ns, other.others_ns), {key: max(self.of(key), other.of(key)) for key in keys})

    def encode(self) -> bytes:
        return msgspec.json.encode(_Saved(1, self.others_ns, [(*key, ns) for key, ns in self.buckets.items()]))


class Cost(NamedTuple):
    """What a request uses of a grant, beside being one request: items of verbs, by their `charged_as`."""

    decrypts: int = 0
    reencrypts: int = 0


Taken = dict[BucketKey, Bucket]
"""The buckets from which a request takes."""


class Account:
    """What one holder uses of the limits of one grant or proxy."""

    __slots__ = ("buckets", "in_flight", "is_named", "next_ns", "who")

    def __init__(self, who: str, *, is_named: bool, empty_ns: int) -> None:
        self.who = who
        self.is_named = is_named
        self.in_flight = 0
        self.next_ns = 0
        self.buckets: dict[Kind, Bucket] = {kind: Bucket(empty_ns) for kind in KINDS}


class Charge:
    """The share of one request in `requests_per_second` and `concurrent`, until `Meters.end_turn`."""

    __slots__ = ("_taken_ns",)

    def __init__(self) -> None:
        self._taken_ns: dict[Account, int] = {}
        """The time charged to the rate of each account."""

    def __contains__(self, account: Account) -> bool:
        return account in self._taken_ns

    def take(self, account: Account, limits: GrantLimits, now_ns: int) -> None:
        """Counts the request in an account, unless it is counted there already."""
        if account in self._taken_ns:
            return
        rate = limits.requests_per_second
        taken_ns = 0 if rate is None else _interval_ns(rate)
        if taken_ns:
            account.next_ns = max(account.next_ns, now_ns) + taken_ns
        account.in_flight += 1
        self._taken_ns[account] = taken_ns

    def give_back_others(self, accounts: Collection[Account]) -> None:
        """The request counts in no other account than these: it was decided elsewhere."""
        for account in [each for each in self._taken_ns if each not in accounts]:
            account.in_flight -= 1
            account.next_ns -= self._taken_ns.pop(account)

    def release(self) -> None:
        """The request no longer counts as concurrent. Idempotent."""
        accounts, self._taken_ns = self._taken_ns, {}
        for account in accounts:
            account.in_flight -= 1


class _Item(NamedTuple):
    """One account that a request is charged to."""

    account: Account
    key: tuple[str, str]
    label: str
    limits: GrantLimits
    cost: Cost

    def hourly(self) -> Iterator[tuple[Kind, Bucket, int, int]]:
        """Kind, bucket, limit, and uses, of each hourly limit that the request uses."""
        buckets, limits, cost = self.account.buckets, self.limits, self.cost
        if limits.decrypts_per_hour is not None and cost.decrypts:
            yield "decrypts", buckets["decrypts"], limits.decrypts_per_hour, cost.decrypts
        if limits.reencrypts_per_hour is not None and cost.reencrypts:
            yield "reencrypts", buckets["reencrypts"], limits.reencrypts_per_hour, cost.reencrypts

    def check_size(self) -> None:
        """Checks that the account can ever have room for the request. Raises TooManyError."""
        for kind, _, limit, uses in self.hourly():
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


class Meters:
    """The accounts of a run. `saved`: what `keep` or `save` got in the run before; None: nothing, since there was none.
    One that can't be read is as one of empty buckets. `keep` makes the file of the next start durable, and raises
    StorageUnavailableError. `now_ns`: a clock that nobody sets.
    """

    def __init__(
        self,
        saved: bytes | None = None,
        *,
        keep: Callable[[bytes], Awaitable[None]],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._now_ns = now_ns
        self._keep = keep
        self._accounts: dict[tuple[str, str], Account] = {}
        self._unnamed = 0
        self._swept_ns = now_ns()
        self._empty_ns = self._swept_ns - HOUR_NS
        """When the buckets of an account that is not known were empty."""
        self._kept = _Kept(HOUR_NS + 1, {})
        """The most that the file may give. At first, with the file of another run, more than any used bucket holds."""
        self._keeping: asyncio.Future[StorageUnavailableError | None] | None = None
        self._answered: list[Charge] = []
        """The charges of the requests that are answered in this turn."""
        self._refused: dict[BucketKey, tuple[Bucket, int, int]] = {}
        """Bucket, limit, and uses, of the last refusal of each."""
        if saved is not None:
            self._load(saved)

    @property
    def exhausted(self) -> int:
        """The number of hourly limits that have refused a request and have no room for it yet."""
        self._forget_refused(self._now_ns())
        return len(self._refused)

    @property
    def scarce(self) -> int:
        """The number of hourly limits of which less than a tenth is left, and that are not exhausted."""
        self._forget_refused(now_ns := self._now_ns())
        refused = {bucket for bucket, *_ in self._refused.values()}
        buckets = (bucket for one in self._accounts.values() for bucket in one.buckets.values())
        return sum(bucket.filled_ns(now_ns) < RESERVED_NS and bucket not in refused for bucket in buckets)

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
        now_ns = self._now_ns()
        used_up: list[tuple[_Item, LimitName]] = []
        for costs in [{grant: Cost()} for grant in grants] or [{}]:
            items = self._items(scope, costs)
            before = len(used_up)
            used_up += [(item, name) for item in items if (name := _used_up(item, now_ns)) is not None]
            if len(used_up) == before:
                for item in items:
                    entered.take(item.account, item.limits, now_ns)
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

    def charge(self, scope: Scope | None, costs: Mapping[Grant, Cost], entered: Charge) -> Taken:
        """Charges what a request uses, once it is decided, and moves `entered` to the grants that decide. Unless the
        result is empty, it may be used only after `reserve`.

        costs: of each grant that decided about the request or one of its items. Raises LimitExceededError, and
        TooManyError where there is never room; then `entered` is unchanged.
        """
        if scope is None:
            return {}
        items = self._items(scope, costs)
        for item in items:
            item.check_size()
        now_ns = self._now_ns()
        for item in items:
            name = None if item.account in entered else _used_up(item, now_ns)
            if name is not None:
                raise item.exceeded(name, SOON_S)
            self._check_hourly(item, now_ns)
        charges: Taken = {}
        for item in items:
            entered.take(item.account, item.limits, now_ns)
            for kind, bucket, limit, uses in item.hourly():
                bucket.take(uses, limit, now_ns)
                charges[BucketKey(*item.key, kind)] = bucket
        entered.give_back_others({item.account for item in items})
        return charges if self._is_beyond(charges) else {}

    # --- the file ----------------------------------------------------------------------------------------------------

    async def reserve(self, charges: Taken) -> None:
        """Returns when a durable file gives no more than these buckets hold. One write serves all who wait for it.
        Raises StorageUnavailableError.
        """
        while self._is_beyond(charges):
            if self._keeping is None:
                self._keeping = asyncio.ensure_future(self._keep_reserved())
            error = await asyncio.shield(self._keeping)
            if error is not None:
                raise copy_of(error)

    def refresh(self) -> None:
        """Writes the file again for what has filled since. Call it every REFRESH_SECONDS. The next use tells of an
        error.
        """
        if self._keeping is None and self._kept != self._left(RESERVED_NS):
            self._keeping = asyncio.ensure_future(self._keep_reserved())

    def _is_beyond(self, charges: Taken) -> bool:
        """Whether the file may give more than one of these buckets holds."""
        now_ns = self._now_ns()
        return any(bucket.filled_ns(now_ns) < self._kept.of(key) for key, bucket in charges.items())

    async def _keep_reserved(self) -> StorageUnavailableError | None:
        saved = self._left(RESERVED_NS)
        content = saved.encode()
        if len(content) > SAVED_BYTES_MAX:
            saved = _Kept(0, {})
            content = saved.encode()
        self._kept = self._kept.or_more(saved)  # it may be on the disk before this knows, or after an error
        try:
            await self._keep(content)
        except StorageUnavailableError as error:
            return error.with_traceback(None)
        finally:
            self._keeping = None
        self._kept = saved
        return None

    def save(self) -> bytes:
        """What `__init__` takes over, after the last request of an orderly stop."""
        content = self._left(0).encode()
        return content if len(content) <= SAVED_BYTES_MAX else _Kept(0, {}).encode()

    def _left(self, reserved_ns: int) -> _Kept:
        """What each bucket holds, without what is reserved."""
        now_ns = self._now_ns()
        others_ns = max(0, now_ns - self._new_ns(now_ns) - reserved_ns)
        left = {
            BucketKey(*key, kind): max(0, bucket.filled_ns(now_ns) - reserved_ns)
            for key, account in self._accounts.items()
            for kind, bucket in account.buckets.items()
        }
        return _Kept(others_ns, {key: ns for key, ns in left.items() if ns < others_ns})

    def _load(self, saved: bytes) -> None:
        try:
            parsed = msgspec.json.decode(saved, type=_Saved)
        except UNDECODABLE:
            parsed = _Saved(1, 0, [])  # whoever damages it gains nothing
        now_ns = self._now_ns()
        self._empty_ns = now_ns - parsed.others_ns
        for identity, who, kind, filled_ns in parsed.buckets:
            account = self._account((identity, who), is_named=who in (ALL, OTHERS))
            account.buckets[kind].empty_ns = now_ns - filled_ns

    def _new_ns(self, now_ns: int) -> int:
        """When the buckets of a new account were empty."""
        return max(self._empty_ns, now_ns - HOUR_NS)

    def _check_hourly(self, item: _Item, now_ns: int) -> None:
        """Checks that the hourly limits of the account have room for the request. Raises LimitExceededError."""
        for kind, bucket, limit, uses in item.hourly():
            wait_ns = bucket.wait_ns(uses, limit, now_ns)
            if wait_ns:
                self._refused[BucketKey(*item.key, kind)] = (bucket, limit, uses)
                raise item.exceeded(_LIMIT_NAMES[kind], -(-wait_ns // SECOND_NS))

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
        in_use = shared is not None and not self._is_idle(shared, self._now_ns())
        if in_use or self._unnamed >= PRINCIPALS_COUNT_MAX:
            return self._account(others), others
        return self._account(key, is_named=False), key

    def _account(self, key: tuple[str, str], *, is_named: bool = True) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(key[1], is_named=is_named, empty_ns=self._empty_ns)
            self._unnamed += not is_named
        return account

    def _is_idle(self, account: Account, now_ns: int) -> bool:
        """Whether it is as a new one."""
        new_ns = self._new_ns(now_ns)
        return (
            not account.in_flight
            and account.next_ns <= now_ns
            and all(bucket.empty_ns <= new_ns for bucket in account.buckets.values())
        )

    def _sweep(self) -> None:
        """Forgets accounts that are as new, at most once in SWEEP_NS."""
        now_ns = self._now_ns()
        if now_ns - self._swept_ns < SWEEP_NS:
            return
        self._swept_ns = now_ns
        self._forget_refused(now_ns)
        for key, account in list(self._accounts.items()):
            if self._is_idle(account, now_ns):
                del self._accounts[key]
                self._unnamed -= not account.is_named

    def _forget_refused(self, now_ns: int) -> None:
        for key, (bucket, limit, uses) in list(self._refused.items()):
            if not bucket.wait_ns(uses, limit, now_ns):
                del self._refused[key]


def _used_up(item: _Item, now_ns: int) -> LimitName | None:
    """The limit of the account that has no room for one more request."""
    account, _, _, limits, _ = item
    rate = limits.requests_per_second
    if rate is not None and account.next_ns - now_ns > _interval_ns(rate) * (rate - 1):
        return "requests_per_second"
    if limits.concurrent is not None and account.in_flight >= limits.concurrent:
        return "concurrent"
    return None


def _interval_ns(rate: int) -> int:
    """The nanoseconds that a request takes of a rate per second, rounded up. The requests of one second may come at
    once.
    """
    return -(-SECOND_NS // rate)
