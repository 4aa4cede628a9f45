"""Questions about the audit log: what is answered, to whom, within which bounds, and what the auditor logs of it."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.audit_questions import LINES_MAX, NAMED_COUNT_MAX
from minikms.api.errors import KmsUnavailableError
from minikms.audit import blocks, questions
from minikms.audit.log import CHORES_NS
from minikms.audit.record import Event
from minikms_auditor import questions as answering
from minikms_daemon.audit.maintenance import compress_closed
from tests.harness.logged import capture_logs
from tests.minikms.audit.indexed_log import SMALL
from tests.minikms.audit.logmaker import Clock, open_log
from tests.minikms_auditor.asking import Asked, answers, ask, desk_of
from tests.minikms_auditor.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


def write(rig: Rig, *events: Event) -> None:
    log = open_log(rig.log_dir, clock=rig.clock)
    for event in events:
        log.add(event)
    log.commit()
    log.close()


def test_who_read_a_thread_is_answered_newest_first(rig: Rig) -> None:
    """Encryption and decryption are recorded by key, and a batch has the keys of many threads."""
    many = [f"k_{number}" for number in range(40)]
    write(
        rig,
        Event(type="get_or_create_dek", actor="peer_uid:1", thread_id="t9", key_id="k_9", request_id="a"),
        Event(type="encrypt", actor="peer_uid:1", key_id="k_9", request_id="b"),
        Event(type="decrypt", actor="peer_uid:1", key_id="k_9", request_id="c"),
        Event(type="decrypt", actor="peer_uid:2", key_id="k_8", request_id="d"),
        Event(type="decrypt", actor="peer_uid:2", key_id="k_9", outcome="forbidden", request_id="e"),
        Event(type="decrypt_batch", actor="peer_uid:2", key_ids=many, request_ids=[f"r{n}" for n in range(9)]),
    )
    rig.steps()
    reads, every, refused = answers(
        rig,
        {"thread": "t9", "verb": "reads"},
        {"thread": "t9"},
        {"thread": "t9", "verb": "reads", "outcome": "forbidden"},
    )
    assert [(line.actor, line.requests[0]) for line in reads.lines] == [("peer_uid:2", "r0"), ("peer_uid:1", "c")]
    batch = reads.lines[0]
    assert batch.keys[0] == "k_9" and (len(batch.keys), batch.keys_count) == (NAMED_COUNT_MAX, len(many))
    assert (len(batch.requests), batch.requests_count) == (NAMED_COUNT_MAX, 9)
    assert (reads.thread_keys, reads.stopped, reads.before, reads.begins_late) == (["k_9"], "", 0, False)
    assert [line.requests[0] for line in every.lines] == ["r0", "e", "c", "b", "a"]
    assert [line.requests[0] for line in refused.lines] == ["e"]


def test_an_answer_says_which_lines_are_in_the_signed_tree(rig: Rig) -> None:
    rig.write(9)
    status = rig.steps()
    rig.write(9, signed=False)
    (answer,) = answers(rig, {})
    assert 0 < answer.signed_seq == status.position_seq < answer.lines[0].seq
    rig.daemon.durable_mac = bytes(32)
    rig.steps(3)
    assert "not the line" in answers(rig, {})[0].alarm


def test_pages_follow_each_other_to_the_first_line(rig: Rig) -> None:
    rig.write(2 * LINES_MAX)
    rig.steps()
    seqs, before = [], 0
    while True:
        (answer,) = answers(rig, {"before": before})
        seqs += [line.seq for line in answer.lines]
        before = answer.before
        if not before:
            break
    assert seqs == list(range(len(rig.lines()), 0, -1))


def test_an_index_that_was_lost_is_made_again_after_a_question(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says that it misses lines, and how far the index is. The tree goes on."""
    for place in (blocks, questions):
        monkeypatch.setattr(place, "BLOCK_BYTES", 3000)
    rig.clock = Clock(step=CHORES_NS)
    rig.write(900, limits=SMALL)
    compress_closed(str(rig.log_dir))
    rig.steps(20)
    assert answers(rig, {"key": f"k_01jd{5:022}"})[0].stopped == ""
    (rig.state_dir / blocks.BLOCKS_NAME / "1").unlink()
    (answer,) = answers(rig, {"key": f"k_01jd{5:022}"})
    assert (answer.stopped, answer.lines) == ("index", []) and answer.indexed_seq <= answer.durable_seq
    rig.write(5)
    assert rig.steps(20).published_size == len(rig.lines())
    (answer,) = answers(rig, {"key": f"k_01jd{5:022}"})
    assert answer.stopped == "" and len(answer.lines) == 1


def test_only_a_configured_user_is_answered(rig: Rig) -> None:
    rig.write(5)
    rig.steps()

    async def refused() -> None:
        async with desk_of(rig, uids=(os.getuid() + 1,)) as path:
            for _ in range(3):
                with pytest.raises(KmsUnavailableError):
                    await ask(path, {})

    with capture_logs() as logged:
        asyncio.run(refused())
    assert [(line["event"], line["uid"]) for line in logged] == [("peer refused", os.getuid())]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        ({"thread": "t", "colour": 1}, 400),
        ({"thread": "t" * 2000}, 400),
        ({"before": -1}, 400),
        ({"since_ns": 2**63}, 400),
        ({"asker": "k" * 100}, 400),
        ({"thread": "t", "thread_keys": ["k"] * 101}, 400),
        ({"thread_keys": ["k"]}, 400),
        (b" " * 70_000 + b"{}", 413),
        ({"thread": "\x00\n", "actor": '"}', "verb": "\x1b", "before": 2**63 - 1}, 200),
    ],
)
def test_a_question_out_of_bounds_is_refused(rig: Rig, body: object, status: int) -> None:
    rig.write(5)
    rig.steps()

    async def both() -> tuple[Asked, Asked]:
        async with desk_of(rig) as path:
            return await ask(path, body), await ask(path, {}, "/status")

    found, elsewhere = asyncio.run(both())
    assert (found.status, elsewhere.status) == (status, 404), found


def test_a_question_is_logged_with_who_asked_before_its_answer(rig: Rig) -> None:
    rig.write(5)
    rig.steps()
    with capture_logs() as logged:
        answers(rig, {"asker": "admin key 2", "thread": "t", "thread_keys": [f"k_01jd{3:022}"]})
    (line,) = logged
    assert line == {
        "event": "question",
        "log_level": "info",
        "uid": os.getuid(),
        "asker": "admin key 2",
        "thread": "t",
        "thread_keys": 1,
        "lines": 1,
        "stopped": "",
    }


def test_questions_wait_in_a_short_queue_and_each_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "WAITING_MAX", 2)
    monkeypatch.setattr(answering, "SECONDS_MAX", 0.0)
    rig.write(50)
    rig.steps()

    async def many() -> list[Asked]:
        async with desk_of(rig) as path:
            return list(await asyncio.gather(*(ask(path, {"verb": "encrypt"}) for _ in range(10))))

    found = asyncio.run(many())
    assert {one.status for one in found} <= {200, 503}
    assert {one.answer.stopped for one in found if one.status == 200} <= {"time"}


def test_a_log_that_cannot_be_read_is_a_sentence_and_a_line(rig: Rig) -> None:
    rig.write(5)
    rig.steps()

    async def without_a_log() -> Asked:
        async with desk_of(rig) as path:
            rig.log_dir.rename(rig.base / "away")
            return await ask(path, {})

    with capture_logs() as logged:
        found = asyncio.run(without_a_log())
    assert found.status == 503 and b"the audit log can't be read: No such file" in found.body
    assert [line["event"] for line in logged] == ["question failed"]
