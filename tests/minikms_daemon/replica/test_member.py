"""A member between its replicator and its parts, both made up: what a grant may say, and the order of the steps."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec import UNSET

from minikms import api
from minikms.api.errors import (
    AuditUnavailableError,
    ConflictError,
    InvalidRequestError,
    ReplicaForkedError,
    ReplicaRolledBackError,
    StorageUnavailableError,
    TooLargeError,
)
from minikms.audit import Event
from minikms.custody.replica_file import Mark
from minikms_daemon.replica import member as members
from minikms_daemon.replica.member import ReplicaMember
from minikms_daemon.server.settings import UNKNOWN_BUILD

LEASE_NS = api.LEASE_SECONDS * 1_000_000_000


class Directory:
    """A `MemberDirectory` without files. `fails`: what the next call to follow raises."""

    def __init__(self, steps: list[str], mark: Mark) -> None:
        self._steps = steps
        self.mark = mark
        self.scanned, self.behind, self.fills = True, False, False
        self.out: api.ReplicaCommit | None = None
        self.fails: Exception | None = None

    def serve(self, term: int, number: int) -> None:
        if number != self.mark.number:
            raise ConflictError("another number")
        self._steps.append(f"takes changes in {term}")

    def stop_serving(self) -> None:
        self._steps.append("takes no changes")

    async def next_commit(self, seconds: float) -> api.ReplicaCommit | None:
        return self.out

    def confirm(self, number: int) -> None:
        if number != self.mark.number:
            raise ConflictError(f"not {number}")

    async def follow(self, request: api.ReplicaFollowRequest) -> None:
        if self.fails is not None:
            raise self.fails

    def review(self) -> None:
        self._steps.append("reads its files again")

    async def write_mark(self) -> None:
        self._steps.append("mark")


class World:
    """One member, whose clock the test turns. `steps`: what it did, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = LEASE_NS
        monkeypatch.setattr(members, "boot_ns", lambda: self.now_ns)
        self.steps: list[str] = []
        self.unwritable = False
        self.standby = cast(Any, object())
        mark = Mark(member_id="m1", name="a", term=3, number=7, seals=1)
        self.directory = Directory(self.steps, mark)
        self.parts = SimpleNamespace(
            member=self.directory,
            vault=SimpleNamespace(
                keyring=SimpleNamespace(
                    body=SimpleNamespace(
                        keyring_id="kr_1",
                        members=[SimpleNamespace(member_id=f"m{n}", name="abc"[n - 1]) for n in (1, 2, 3)],
                    )
                ),
                destroyed=SimpleNamespace(count=2),
                cache=SimpleNamespace(clear=self._step("keys dropped")),
            ),
            audit=SimpleNamespace(add_written=self._written),
            audit_writable=True,
            served=self.standby,
            epoch_facts=lambda: {"epoch": 4},
            take_over=self._later("epoch"),
            go_on=self._later("goes on"),
            show=self._step("shown"),
            stand_by=lambda spare: self.steps.append("not served"),
        )
        process = SimpleNamespace(
            policy=SimpleNamespace(facts=lambda: {"policy_sha256": "ab"}),
            settings=SimpleNamespace(opening=SimpleNamespace(pin=None), build=UNKNOWN_BUILD),
            on_internal_error=self.steps.append,
        )
        self.member = ReplicaMember(cast(Any, self), cast(Any, process), mark, keyring_id="kr_1", sealed_as=0)
        self.member.opened(cast(Any, self.parts))

    def _step(self, name: str) -> Callable[[], None]:
        return lambda: self.steps.append(name)

    def _later(self, name: str) -> Callable[[], Any]:
        async def act() -> None:
            self.steps.append(name)

        return act

    async def _written(self, event: Event, *, durable: bool) -> None:
        assert durable
        if self.unwritable:
            raise AuditUnavailableError("no line")
        self.steps.append(event.type)

    # --- the host ---

    def seal_for_all(self) -> None:
        self.steps.append("sealed")
        self.member.sealed()

    def open_again(self, keyring: bytes) -> None:
        self.steps.append(f"opens again {keyring!r}")

    def audit(self, event: Event) -> None:
        self.steps.append(f"{event.type} {event.facts['term']}")

    # --- the replicator ---

    async def grant(
        self, term: int = 4, *, number: int = 7, seals: int = 1, asked_ns: int | None = None, wanted: Any = UNSET
    ) -> api.ReplicaNextAnswer:
        asked_ns = self.now_ns if asked_ns is None else asked_ns
        request = api.ReplicaNextRequest(term, number, seals, asked_ns, wanted)
        answer = await self.member.next(request)
        for _ in range(10):
            await asyncio.sleep(0)
        return answer

    async def follow(self, **members: Any) -> api.ReplicaPosition:
        head = {"keyring_id": "kr_1", "term": 3, "member": "", "number": 7, "seals": 1, "wanted": "", "state": ""}
        head |= {name: value for name, value in members.items() if name in head}
        reports = members.get("members", UNSET)
        request = msgspec.structs.replace(api.ASK_POSITION, head=api.ReplicaHead(**cast(Any, head)), members=reports)
        return await self.member.follow(request)


def texts(world: World) -> list[str]:
    return [condition.text for condition in world.member.conditions()]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


TAKEN = ["takes changes in 4", "epoch", "replica_serves", "shown", "goes on"]
ENDED = ["not served", "takes no changes", "replica_stands_by 4"]


async def test_a_take_over_serves_last(world: World) -> None:
    answer = await world.grant()
    assert (answer.position.mode, answer.release) == ("taking_over", False)
    assert world.steps == TAKEN
    assert world.member.serves and world.member.answer().lease_seconds == api.LEASE_SECONDS


async def test_the_end_of_the_lease_ends_the_service_first(world: World) -> None:
    await world.grant()
    world.now_ns += LEASE_NS
    del world.steps[:]
    assert world.member.lapse() is world.standby
    await world.member.settled()
    assert world.steps == [*ENDED, "mark"]
    answer = await world.grant()
    assert answer.release and answer.position.mode == "following", "not again in this term"
    assert not (await world.grant(5)).release and world.member.serves


@pytest.mark.parametrize("ends", ["wanted", "term", "number", "late", "behind"])
async def test_a_grant_that_does_not_fit_ends_the_service(world: World, ends: str) -> None:
    await world.grant()
    del world.steps[:]
    if ends == "wanted":
        answer = await world.grant(wanted="m2")
    elif ends == "number":
        answer = await world.grant(number=9)
    elif ends == "term":
        answer = await world.grant(3)
    elif ends == "late":
        world.now_ns += LEASE_NS
        answer = await world.grant()
    else:
        world.directory.behind = True
        answer = await world.grant()
    assert world.steps[:3] == ENDED
    assert answer.release and answer.commit is None and not world.member.serves


async def test_no_lease_begins_in_the_future_or_before_the_last_answer(world: World) -> None:
    for asked_ns in (world.now_ns + 1, 2**63 - 1, 2**63):
        with pytest.raises((ConflictError, InvalidRequestError)):
            await world.grant(asked_ns=asked_ns)
    assert world.steps == []
    await world.grant()
    world.now_ns += LEASE_NS // 2
    await world.grant()
    with pytest.raises(ConflictError):
        await world.grant(asked_ns=world.now_ns - 1)
    until_ns = world.member.lease.until_ns
    await world.grant(asked_ns=world.now_ns)
    assert world.member.lease.until_ns == until_ns, "a repetition grants nothing more"


async def test_a_grant_from_before_a_lease_serves_nothing(world: World) -> None:
    answer = await world.grant(asked_ns=world.now_ns - LEASE_NS)
    assert world.steps == [] and not answer.release


@pytest.mark.parametrize("term", [3, 2, 0])
async def test_no_term_that_the_mark_has_seen_is_taken(world: World, term: int) -> None:
    answer = await world.grant(term)
    assert answer.release and world.steps == []


async def test_who_lacks_changes_follows_first(world: World) -> None:
    answer = await world.grant(number=8)
    assert (answer.position.mode, answer.release, world.steps) == ("following", False, [])


@pytest.mark.parametrize("lacks", ["line", "sum", "change"])
async def test_who_can_not_take_over_releases_the_head(world: World, lacks: str) -> None:
    world.parts.audit_writable = lacks != "line"
    world.directory.scanned = lacks != "sum"
    world.directory.behind = lacks == "change"
    answer = await world.grant()
    assert answer.release and not answer.position.ready and world.steps == []


async def test_without_its_line_nothing_is_served(world: World) -> None:
    world.unwritable = True
    await world.grant()
    assert world.steps[:2] == ["takes changes in 4", "epoch"]
    assert "shown" not in world.steps and "takes no changes" in world.steps
    assert (await world.grant()).release


async def test_a_lease_that_ends_in_the_take_over_serves_nothing(world: World) -> None:
    async def slow() -> None:
        world.now_ns += LEASE_NS

    world.parts.take_over = slow
    await world.grant()
    assert "shown" not in world.steps and not world.member.serves


async def test_another_member_in_the_head_ends_the_service(world: World) -> None:
    await world.grant()
    position = await world.follow(term=5, member="m2")
    assert position.mode == "following" and not world.member.serves


async def test_a_seal_of_another_member_seals_and_is_obeyed_once(world: World) -> None:
    await world.grant()
    answer = await world.grant(seals=2)
    assert world.steps.count("sealed") == 1
    assert (answer.position.mode, answer.position.seals, answer.release) == ("sealed", 2, True)
    await world.follow(seals=2)
    assert world.steps.count("sealed") == 1


async def test_a_sealed_host_keeps_the_head_until_the_others_can_know(world: World) -> None:
    await world.grant()
    world.member.seals.ask()
    world.member.sealed()
    answer = await world.grant()
    assert (answer.position.mode, answer.position.seals, answer.release) == ("sealed", 2, False)
    assert (await world.grant(seals=2)).release
    assert "sealed" not in world.steps


async def test_a_refusal_is_raised_once_and_shown_then(world: World) -> None:
    world.directory.fails = ReplicaForkedError("two histories")
    with pytest.raises(ReplicaForkedError):
        await world.follow()
    position = await world.follow()
    assert (position.mode, position.report.why, position.ready) == ("refused", "replica_forked: two histories", False)
    assert (await world.grant()).release
    world.directory.fails = ReplicaRolledBackError("older")
    with pytest.raises(ReplicaRolledBackError):
        await world.follow()
    world.directory.fails = None
    assert (await world.follow()).mode == "following"


@pytest.mark.parametrize("error", [InvalidRequestError("no key id"), TooLargeError("a file is too large")])
async def test_what_no_member_has_made_is_refused_as_a_fork(world: World, error: Exception) -> None:
    """A row of the database with another form; nothing else leaves a host behind without a reason."""
    world.directory.fails = error
    with pytest.raises(ReplicaForkedError, match="what no member has made: "):
        await world.follow()
    assert (await world.follow()).mode == "refused"


async def test_what_keeps_a_host_from_following_is_shown_until_it_has(world: World) -> None:
    world.directory.fails = StorageUnavailableError("a file cannot be written")
    with pytest.raises(StorageUnavailableError):
        await world.follow()
    assert world.member.answer().why == "storage_unavailable: a file cannot be written"
    world.directory.fails = None
    assert (await world.follow()).report.why == ""


async def test_a_replicator_that_reads_nothing_in_the_database_is_shown(world: World) -> None:
    await world.follow()
    for seconds, why in ((9, ""), (1, "has read nothing in the database for 10 s")):
        world.now_ns += seconds * 10**9
        position = await world.member.follow(api.ASK_POSITION)
        assert why in position.report.why and bool(position.report.why) is bool(why)


def report_of(member_id: str, term: int, number: int) -> api.MemberReport:
    return api.MemberReport(member_id, "forged", "refused", number, term, "1", "ab", "", "", 0.1)


@pytest.mark.parametrize(
    ("reports", "later"),
    [
        ([report_of("m2", 3, 7), report_of("m3", 2, 900)], ""),
        ([report_of("m2", 3, 8)], "change 8 of term 3, which the host b reports"),
        ([report_of("m2", 3, 9), report_of("m3", 4, 2)], "change 2 of term 4, which the host c reports"),
        ([report_of("m9", 2**62, 2**62)], ""),  # the keyring has no such host
    ],
)
async def test_a_host_takes_over_nothing_that_another_one_has_more_of(
    world: World, reports: list[api.MemberReport], later: str
) -> None:
    """The host has all that the database has: change 7 of term 3."""
    position = await world.follow(members=reports)
    assert (position.ready, later in position.report.why) == (not later, True)
    assert (await world.grant()).release is bool(later)
    assert world.member.serves is not bool(later)
    if later:
        assert any("does not take over" in text for text in texts(world))
        assert (await world.follow(number=12, members=reports)).report.why == "", "it has to follow first"
        world.directory.fills = True
        assert (await world.follow(members=reports)).ready, "an operator has decided that it fills the database"


async def test_a_report_with_numbers_beyond_the_bounds_is_refused(world: World) -> None:
    for report in (report_of("m2", 2**63, 1), report_of("m2", 1, -1)):
        with pytest.raises(InvalidRequestError):
            await world.follow(members=[report])


async def test_a_head_whose_member_is_none_names_nobody(world: World) -> None:
    position = await world.follow(member="nobody\x1b at all")
    assert position.ready and world.member.answer().serving == ""


async def test_requests_of_another_keyring_or_without_bounds_are_refused(world: World) -> None:
    report = world.member.position().report
    await world.follow(keyring_id="")  # the tables are empty
    with pytest.raises(ReplicaForkedError):
        await world.follow(keyring_id="kr_2")
    for request in (
        api.ReplicaNextRequest(4, 7, -1, world.now_ns),
        api.ReplicaNextRequest(4, 7, 2**63, world.now_ns),
        api.ReplicaNextRequest(2**63, 7, 1, world.now_ns),
        api.ReplicaNextRequest(4, 7, 1, world.now_ns, "m2 and more"),
        api.ReplicaNextRequest(4, 7, 1, world.now_ns, members=[msgspec.structs.replace(report, why="x" * 2000)]),
        api.ReplicaNextRequest(4, 7, 1, world.now_ns, members=[report] * (api.MEMBERS_MAX + 1)),
    ):
        with pytest.raises(InvalidRequestError):
            await world.member.next(request)
    files = [api.ReplicaFile("k", "")] * (api.REPLICA_FILES_MAX + 1)
    with pytest.raises(ConflictError):
        await world.member.follow(api.ReplicaFollowRequest(0, files, 0, "", True))


async def test_a_standby_drops_its_opened_keys_after_ten_leases(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WATCH_SECONDS", 0)
    await world.grant()
    watching = asyncio.create_task(world.member.watch())
    for leases, dropped in ((1, False), (9, False), (1, True)):
        world.now_ns += leases * LEASE_NS
        for _ in range(10):
            await asyncio.sleep(0)
        assert ("keys dropped" in world.steps) is dropped
    watching.cancel()


async def test_a_host_that_follows_no_more_reads_its_files_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WATCH_SECONDS", 0)
    watching = asyncio.create_task(world.member.watch())
    world.directory.fails = ReplicaForkedError("two histories")
    with pytest.raises(ReplicaForkedError):
        await world.follow()
    for passed_s, reviewed in ((0, 0), (599, 0), (1, 1), (600, 2)):
        world.now_ns += passed_s * 10**9
        for _ in range(10):
            await asyncio.sleep(0)
        assert world.steps.count("reads its files again") == reviewed
    watching.cancel()


async def test_another_policy_or_pin_file_is_a_warning(world: World) -> None:
    other = api.MemberReport("m2", "b", "following", 7, 3, "1", "cd", "", "", 0.1)
    gone = msgspec.structs.replace(other, member_id="m9", name="removed")
    await world.member.next(api.ReplicaNextRequest(3, 7, 1, world.now_ns, members=[other, gone]))
    listed = {report.name: report.why for report in world.member.answer().members}
    assert listed == {"a": "", "b": "", "c": "it has not reported yet"}
    assert texts(world) == ["b has another policy than this host; make them the same"]
    refused = msgspec.structs.replace(other, mode="refused", policy="ab", why="replica_forked: two histories")
    await world.member.next(api.ReplicaNextRequest(3, 7, 1, world.now_ns, members=[refused]))
    assert texts(world) == ["the host b follows no more: replica_forked: two histories"]
    world.now_ns += LEASE_NS
    assert "no replicator has asked for 10 s" in texts(world)[0]
