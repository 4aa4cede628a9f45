"""Hourly limits against a model: no 60 minutes see more use than the limit, whatever happens to process and clock."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import deque
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minikms.errors import LimitExceededError, StartError, StorageUnavailableError, TooManyError
from minikms.policy import Charge, Clock, budgets, meters
from minikms.policy.budgets import BLOCK_SHARE, HEADER, WINDOW_MS, Budget, Opening
from tests.minikms.policy.metering import HOUR_MS, Machine

RULES = """
version = 1
[[grant]]
name = "chat"
principals = ["uid:1", "uid:2", "spiffe://prod/*"]
roles = ["decrypt"]
threads = ["*"]
limits = { decrypts_per_hour = 250 }
limits_total = { decrypts_per_hour = 700 }
[[proxy]]
name = "gateway"
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/*"]
limits_total = { decrypts_per_hour = 400 }
"""
EACH, PROXIED = 250, 400

SMALL_RULES = RULES.replace("250", "60").replace("700", "150").replace("400", "90")
SMALL_EACH, SMALL_TOTAL, SMALL_PROXIED = 60, 150, 90
NAMES = ("uid:1", "spiffe://prod/a", "spiffe://prod/b")


class BudgetsAgainstModel(RuleBasedStateMachine):
    """Any sequence of requests, failing disks, crashes, restarts, reboots and changes of the wall clock.

    The model knows the real time of each use. In any 60 minutes before a use, each holder has used no more than its
    limit. A wall clock that runs ahead at a boot is not in the machine: nothing would show it.
    """

    @initialize(share=st.sampled_from([3, 3, BLOCK_SHARE]))
    def begin(self, share: int) -> None:
        """Large blocks make more of what can go wrong with one."""
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(budgets, "BLOCK_SHARE", share)
        self.machine = Machine(SMALL_RULES)
        self.behind_ms = -9 * HOUR_MS
        self.uses: deque[tuple[int, str, int]] = deque()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    def used(self, *, names: tuple[str, ...]) -> int:
        since = self.machine.real_ms - HOUR_MS
        return sum(uses for at, name, uses in self.uses if at > since and name in names)

    @rule(
        requests=st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from([1, 2, 10, 20, 21, 59, 61])), min_size=1, max_size=4
        )
    )
    def ask(self, requests: list[tuple[str, int]]) -> None:
        for (name, uses), found in zip(requests, self.machine.charge(*requests), strict=True):
            if isinstance(found, Charge):
                self.uses.append((self.machine.real_ms, name, uses))
            else:
                never = uses > SMALL_EACH
                assert isinstance(found, TooManyError if never else LimitExceededError), found
                assert isinstance(found, TooManyError) or 1 <= found.retry_after_s <= 3600

    @rule(name=st.sampled_from(NAMES), uses=st.sampled_from([1, 20, 35]), late=st.sampled_from([1, 10, 25]))
    def ask_during_a_write(self, name: str, uses: int, late: int) -> None:
        """Others ask while a block is on its way to the disk, and time passes."""

        def ask_late() -> None:
            self.machine.real_ms += 1_000
            for other in NAMES:
                if self.machine.charge_at_once(other, late):
                    self.uses.append((self.machine.real_ms, other, late))

        self.machine.disk.during = ask_late
        self.ask([(name, uses)])
        self.machine.disk.during = lambda: None

    @rule(name=st.sampled_from(NAMES), uses=st.sampled_from([1, 20, 35]), kept=st.sampled_from([0, 0.5, 1]))
    def ask_with_a_failing_disk(self, name: str, uses: int, kept: float) -> None:
        self.machine.disk.fails, self.machine.disk.kept = 1, kept
        (found,) = self.machine.charge((name, uses))
        self.machine.disk.fails = 0
        if isinstance(found, Charge):
            self.uses.append((self.machine.real_ms, name, uses))

    @rule(ms=st.sampled_from([60_000, HOUR_MS // 3, HOUR_MS // 2, HOUR_MS - 60_000, HOUR_MS - 1]))
    def wait(self, ms: int) -> None:
        self.machine.real_ms += ms

    @rule()
    def restart(self) -> None:
        self.machine.start()

    @rule(name=st.sampled_from(NAMES), uses=st.sampled_from([1, 20, 35]), kept=st.sampled_from([0.3, 1]))
    def crash_in_a_write(self, name: str, uses: int, kept: float) -> None:
        """What was written in part, or as a whole, was not acknowledged."""
        self.ask_with_a_failing_disk(name, uses, kept)
        self.machine.start()

    @rule(ahead_ms=st.sampled_from([0, -HOUR_MS, 2 * HOUR_MS, -9 * HOUR_MS]))
    def set_the_wall_clock(self, ahead_ms: int) -> None:
        self.machine.wall_ahead_ms = ahead_ms

    @rule(back_ms=st.sampled_from([0, 1, HOUR_MS, 9 * HOUR_MS]))
    def reboot(self, back_ms: int) -> None:
        """Behind every wall clock that this machine has shown."""
        self.behind_ms = self.machine.wall_ahead_ms = self.behind_ms - back_ms
        self.machine.reboot()

    @invariant()
    def no_hour_sees_more_than_a_limit(self) -> None:
        if not hasattr(self, "machine"):
            return
        for name in NAMES:
            assert self.used(names=(name,)) <= SMALL_EACH
        assert self.used(names=NAMES) <= SMALL_TOTAL
        assert self.used(names=("spiffe://prod/a", "spiffe://prod/b")) <= SMALL_PROXIED


TestBudgetsAgainstModel = BudgetsAgainstModel.TestCase
TestBudgetsAgainstModel.settings = settings(max_examples=120, stateful_step_count=40)


def test_a_limit_is_used_whole_and_comes_back_after_an_hour() -> None:
    machine = Machine(RULES)
    for _ in range(EACH):
        machine.passes("uid:1")
        machine.real_ms += 1_000
    error = machine.refused("uid:1")
    assert (error.limit, error.holder, error.of_all, error.status) == (
        "decrypts_per_hour",
        "grant 1 (chat)",
        False,
        429,
    )
    machine.passes("uid:2")
    machine.real_ms += (error.retry_after_s - 1) * 1000 - 1000
    machine.refused("uid:1")
    machine.real_ms += 2_000
    machine.passes("uid:1")


def test_the_retry_after_is_long_enough_and_not_longer() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 100)
    machine.real_ms += 600_000
    machine.passes("uid:1", 100)
    assert machine.refused("uid:1", 60).retry_after_s == 3000
    assert machine.refused("uid:1", 200).retry_after_s == 3600


def test_a_restart_brings_no_fresh_budget() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 200)
    machine.real_ms += HOUR_MS // 2
    machine.start()
    assert machine.refused("uid:1", 60).retry_after_s <= 3600
    machine.passes("uid:1", 40)
    machine.real_ms += HOUR_MS // 2
    machine.start()
    machine.refused("uid:1", 250)
    machine.real_ms += HOUR_MS
    machine.passes("uid:1", 250)


def test_use_of_an_open_block_counts_from_its_last_use() -> None:
    """The file has only the time at which the block was opened."""
    machine = Machine(RULES)
    machine.passes("uid:1")
    machine.real_ms += HOUR_MS // 2
    writes = machine.disk.writes
    machine.passes("uid:1")
    assert machine.disk.writes == writes, "of the same block"
    machine.start()
    machine.real_ms += HOUR_MS // 2
    machine.refused("uid:1", 249)
    machine.passes("uid:1", 248)


def test_nothing_comes_out_of_a_block_that_is_being_replaced() -> None:
    """The next block holds what is left in it."""
    machine = Machine(RULES.replace("250", "100000").replace("700", "100000"))
    machine.passes("uid:1")
    at_once: list[Charge | None] = []
    machine.disk.during = lambda: at_once.append(machine.charge_at_once("uid:1", 5))
    machine.passes("uid:1", 1000)
    machine.disk.during = lambda: None
    assert at_once == [None]
    assert machine.charge_at_once("uid:1", 5) is None, "the new block has exactly 1,000"


def test_a_reboot_brings_none_and_the_wall_clock_continues_the_hour() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 200)
    machine.passes("uid:1", 1)  # closes the block of the 200, whose last use is known then
    machine.real_ms += HOUR_MS // 2
    machine.reboot()
    machine.refused("uid:1", 60)
    machine.real_ms += HOUR_MS // 2
    machine.passes("uid:1", 200)


@pytest.mark.parametrize("back_ms", [1, HOUR_MS, 1_000 * HOUR_MS])
def test_a_clock_that_was_set_back_frees_nothing_and_blocks_an_hour(back_ms: int) -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 250)
    machine.wall_ahead_ms = -back_ms
    machine.real_ms += HOUR_MS - 1
    machine.reboot()
    machine.refused("uid:1", 249)
    machine.real_ms += HOUR_MS
    machine.passes("uid:1", 250)


def test_a_wall_clock_set_ahead_frees_nothing_until_a_reboot() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 250)
    machine.wall_ahead_ms = 2 * HOUR_MS
    machine.refused("uid:1")
    machine.start()
    machine.refused("uid:1")


def test_a_wall_clock_set_ahead_after_a_boot_frees_nothing() -> None:
    """The first start after a boot trusts the wall clock. Setting it later must not change the age of a use."""
    machine = Machine(RULES)
    machine.passes("uid:1", 100)
    machine.passes("uid:1", 150)
    machine.reboot()
    for ahead_ms in (2 * HOUR_MS, -9 * HOUR_MS, 9 * HOUR_MS):
        machine.wall_ahead_ms = ahead_ms
        machine.start()
        machine.refused("uid:1")


def test_restarts_after_a_boot_do_not_delay_when_uses_expire() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 100)
    machine.passes("uid:1", 3)  # of the next block, so the one before ended now
    machine.real_ms += HOUR_MS // 2
    machine.passes("uid:1", 147)
    machine.real_ms += HOUR_MS // 4
    machine.reboot()
    for _ in range(3):
        machine.start()
        machine.refused("uid:1")
    machine.real_ms += HOUR_MS // 4
    machine.start()
    machine.passes("uid:1", 100)
    machine.refused("uid:1")


def test_the_first_start_after_a_boot_needs_a_disk_that_writes() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 250)
    machine.disk.fails = 1
    with pytest.raises(StorageUnavailableError):
        machine.reboot()
    before = machine.disk.writes
    machine.start()
    assert machine.disk.writes == before + 1
    machine.start()
    assert machine.disk.writes == before + 1, "later starts of the same boot write nothing"
    machine.refused("uid:1")


def test_names_behind_a_proxy_bring_no_fresh_budget() -> None:
    """A proxy that invents names, or a thief of many identities, gets what the proxy and the grant get in all."""
    machine = Machine(RULES)
    passed = 0
    for number in range(100):
        (found,) = machine.charge((f"spiffe://prod/n{number}", 10))
        passed += isinstance(found, Charge)
    assert passed == PROXIED // 10
    error = machine.refused("spiffe://prod/other", 10)
    assert (error.holder, error.of_all) == ("proxy 1 (gateway)", True)
    machine.passes("uid:1", 10)


def test_a_refused_request_is_charged_to_nobody() -> None:
    machine = Machine(RULES)
    machine.passes("spiffe://prod/a", 250)
    machine.passes("spiffe://prod/b", 100)
    for _ in range(10):
        machine.refused("spiffe://prod/b", 60)  # the proxy has 50 left
    machine.passes("spiffe://prod/b", 50)
    machine.passes("uid:1", 250)


def test_all_who_wait_for_a_block_take_one_write() -> None:
    machine = Machine(RULES)
    before = machine.disk.writes
    found = machine.charge(*[("uid:1", 2)] * 50, *[("uid:2", 3)] * 50)
    assert all(isinstance(one, Charge) for one in found)
    assert machine.disk.writes == before + 1


def test_a_disk_that_refuses_refuses_only_what_needs_a_block() -> None:
    machine = Machine(RULES)
    machine.passes("uid:1")
    machine.disk.fails = 2
    machine.passes("uid:1")  # of the block that is open
    for _ in range(2):
        (found,) = machine.charge(("uid:1", 100))
        assert isinstance(found, StorageUnavailableError)
    machine.passes("uid:1", 100)
    machine.passes("uid:1", 148)
    machine.refused("uid:1")


def test_a_lower_limit_holds_at_once_also_for_the_open_block() -> None:
    machine = Machine(RULES.replace("250", "1000000").replace("700", "1000000"))
    machine.passes("uid:1", 5)
    machine.policy.replace(Machine(RULES.replace("250", "6")).policy.rules)
    machine.passes("uid:1")
    machine.refused("uid:1")


def test_a_request_that_is_cancelled_while_it_waits_is_released() -> None:
    machine = Machine(RULES.replace("decrypts_per_hour = 250", "decrypts_per_hour = 250, concurrent = 1"))

    async def ask() -> None:
        waiting = machine.begin("uid:1", 1)
        assert not isinstance(waiting, Charge)
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await machine.meters.drain()
        machine.meters.end_turn()

    asyncio.run(ask())
    machine.passes("uid:1")


def test_the_clock_of_this_system_knows_its_boot_and_goes_on() -> None:
    clock, again = Clock.of_system(), Clock.of_system()
    assert clock.boot_id == again.boot_id
    assert (clock.boot_id != "") == Path("/proc/sys/kernel/random/boot_id").exists()
    assert 0 < clock.boot_ms() <= again.boot_ms() < clock.wall_ms()


# --- the file -------------------------------------------------------------------------------------------------------


def content(machine: Machine) -> bytes:
    assert machine.disk.content is not None
    return machine.disk.content


def test_the_file_is_written_anew_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "REWRITE_BYTES_MIN", 4096)
    machine = Machine(RULES.replace("250", "100000").replace("700", "100000"))
    longest = 0
    for _ in range(600):
        machine.passes("uid:1", 1000)
        machine.real_ms += HOUR_MS // 90
        longest = max(longest, len(content(machine)))
    assert 4096 < longest < 4 * 4096
    machine.start()
    machine.refused("uid:1", 99_000)


@pytest.mark.parametrize("torn", [b"x", b"\0" * 40, b"12345678 " + b"\0" * 40 + b"}\n", b'12345678 {"boot_id"'])
def test_a_last_line_that_is_not_whole_does_not_count(torn: bytes) -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 250)
    machine.disk.content = content(machine) + torn
    machine.start()
    machine.refused("uid:1")
    machine.passes("uid:2")
    assert torn not in content(machine)


@pytest.mark.parametrize("at", [0, len(HEADER), len(HEADER) + 30])
def test_damage_before_the_last_line_refuses_the_start_with_advice(at: int) -> None:
    machine = Machine(RULES)
    machine.passes("uid:1", 3)
    machine.passes("uid:2", 3)
    damaged = bytearray(content(machine))
    damaged[at] ^= 1
    machine.disk.content = bytes(damaged)
    with pytest.raises(StartError, match=r"policy-budgets\.log .* move the file away"):
        machine.start()


@pytest.mark.parametrize("lines", [1, 2])
def test_any_flipped_bit_in_the_last_line_refuses_the_start(lines: int) -> None:
    """It was acknowledged, so its uses may not be given back."""
    machine = Machine(RULES)
    for number in range(lines):
        machine.passes(f"uid:{number + 1}", 3)
    whole = content(machine)
    for at in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        machine.disk.content = bytes(damaged)
        with pytest.raises(StartError, match=r"policy-budgets\.log .* move the file away"):
            machine.start()


def line(budgets: object, **members: object) -> bytes:
    given = {"boot_id": "boot-1", "wall_offset_ms": 0, "budgets": budgets} | members
    text = json.dumps(given).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize(
    "bad",
    [
        line([["grant:chat", "uid:1", "decrypts", [[5, 6, 0]]]]),
        line([["grant:chat", "uid:1", "decrypts", [[-1, 0, 0]]]]),
        line([["grant:chat", "uid:1", "decrypts", [[10**13, 0, 0]]]]),
        line([["grant:chat", "uid:1", "others", []]]) + line([]),
        line([], more=1) + line([]),
        line(5) + line([]),
        b"\n" + line([]),
    ],
)
def test_a_line_with_a_checksum_that_makes_no_sense_refuses_the_start(bad: bytes) -> None:
    machine = Machine(RULES)
    machine.disk.content = HEADER + bad
    with pytest.raises(StartError):
        machine.start()


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_a_budget_keeps_a_bounded_number_of_blocks() -> None:
    """Whatever sizes the requests have: two neighbours are together more than a block of 1 %."""
    limit = 100_000
    budget, now_ms = Budget(), 0
    made: deque[tuple[int, int]] = deque()
    in_window = 0
    for number in range(30_000):
        uses = (1, 990, 2, 1000, 3)[number % 5]
        now_ms += 300
        while made and made[0][0] + WINDOW_MS <= now_ms:
            in_window -= made.popleft()[1]
        assert in_window <= budget.used(now_ms) <= in_window + 2 * limit // BLOCK_SHARE
        if budget.wait_ms(uses, limit, now_ms):
            now_ms += WINDOW_MS // 10
            continue
        if not budget.covers(uses, limit, now_ms):
            block = budget.next_block(uses, limit, now_ms)
            assert block is not None
            assert budget.used(now_ms) + block.size <= limit
            budget.open(block, limit)
        budget.take(uses, now_ms)
        made.append((now_ms, uses))
        in_window += uses
    assert len(budget.blocks().openings()) <= 2 * BLOCK_SHARE + 3


def test_small_neighbours_become_one_and_keep_their_uses() -> None:
    """Blocks are smaller than 1 % where the limit is nearly used up."""
    limit, budget = 1_000, Budget()
    for at_ms, size in enumerate((4, 5, 3, 9)):
        budget.open(Opening(size, 0, at_ms), limit)
        budget.take(size, at_ms)
    assert [opening.size for opening in budget.blocks().openings()] == [4 + 5, 3, 9]
    assert budget.used(WINDOW_MS) == 21, "the 4 uses leave with the 5 later ones"
    assert budget.used(WINDOW_MS + 1) == 12


def test_what_is_written_of_a_budget_is_what_is_read_of_it() -> None:
    limit, now_ms = 1_000, 0
    budget = Budget()
    written: list[Opening] = []
    for uses in (3, 9, 10, 2, 50, 1, 1, 30):
        now_ms += 60_000
        if not budget.covers(uses, limit, now_ms):
            block = budget.next_block(uses, limit, now_ms)
            assert block is not None
            written.append(block)
            budget.open(block, limit)
        budget.take(uses, now_ms)
    for openings in (written, budget.blocks().openings()):
        again = Budget()
        again.replay(openings, now_ms)
        assert budget.used(now_ms) <= again.used(now_ms) <= budget.used(now_ms) + limit // BLOCK_SHARE
        assert again.is_idle(now_ms + WINDOW_MS)
