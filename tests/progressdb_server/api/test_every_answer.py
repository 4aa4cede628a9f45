"""Every answer that /openapi.yaml describes is got from a live server, and none is got that it does not describe.

The sentence of a refusal identifies it. Of the routes of conversations the in-process application of `test_openapi`
provokes every sentence; here each is provoked on one of them. Every sentence of the routes of jobs, backups and the
viewer is provoked here, and on every route what a failing disk makes of it.
"""

import contextlib
import html
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from progressdb_server.api.gate.errors import INVALID_JSON, UNAUTHORIZED
from progressdb_server.api.openapi.document import document, error_texts
from progressdb_server.api.routes.admin import INVALID_PAYLOAD
from progressdb_server.api.routes.paging import INVALID_LIMIT
from progressdb_server.config import BODY_BYTES_MIN
from progressdb_server.http.limits import HEAD_BYTES_MAX
from progressdb_server.kms.provider import SEALED
from progressdb_server.store.model import BackupOfDatabaseError, ThreadKeyDestroyedError, TooManyVersionsError
from tests.harness import documented
from tests.harness.documented import Pair
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.progressdb_server.api import fault_words, provoking
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND
from tests.progressdb_server.api.provoking import LAUNCHER, NO_JOB, Ask, World
from tests.progressdb_server.api.real_server import Reply, real_server
from tests.progressdb_server.api.test_openapi import OPERATIONS, REFUSALS, SPECIFICATION, whole_table

KEY_SERVICE = "the key service is not available now"
DISK = "the store's disk is not available now"
NOT_TAKEN = "the store's disk did not take the write"
"""The other half of DISK: where nothing is read before."""
SWITCHING = "the job is switching the thread's key: try again in a moment"
STOPPING = "the server is shutting down; the job continues after the next start"
RETRIED_S = 30
READY = "GET /readyz"
"""Says `not ready` when another operation would be refused."""

GOOD: dict[Pair, Callable[[World, str], Reply]] = {
    Pair("POST /admin/rotate_thread_dek", 200): provoking.waited,
    **{Pair(f"POST /admin/jobs/{{job}}/{order}", 200): provoking.steered for order in ("pause", "resume", "cancel")},
    **{
        Pair(f"GET /viewer/{page}", 303): provoking.without_session
        for page in (
            "",
            "threads",
            "threads/{thread}",
            "messages/{message}",
            "keys",
            "jobs",
            "jobs/{job}",
            "audit",
            "status",
        )
    },
    **{Pair(f"GET /v1/{lists}", 304): provoking.held for lists in ("messages", "threads/{thread}/messages")},
}
"""Good answers that are not those of a good request (`World.good`)."""

PROVOKED: dict[str, Callable[[World, str], Reply]] = {
    "the header x-api-key is sent twice": lambda world, operation: world(
        _any(operation)._replace(headers=(("X-API-Key", "a"), ("X-API-Key", "b")))
    ),
    "forbidden": lambda world, operation: world(_any(operation), world.closed),
    "rate limit exceeded (PROGRESSDB_RATE_RPS)": lambda world, operation: world(_any(operation), world.limited),
    UNAUTHORIZED: lambda world, operation: world(_any(operation)._replace(key="unknown")),
    "internal error": provoking.with_fault(fault_words.DEFECT),
    DISK: provoking.with_fault(fault_words.DISK),
    "not ready": provoking.not_ready,
    "request head too large": lambda world, operation: world(
        _any(operation)._replace(headers=(("X-Long", "x" * HEAD_BYTES_MAX),))
    ),
    "request body too large": provoking.too_large,
    "too many bodies are being received: send this one again later": provoking.no_room,
    "a query parameter is given twice": provoking.twice,
    "the query is not UTF-8": provoking.not_utf8,
    INVALID_JSON: provoking.bad_json,
    INVALID_PAYLOAD: provoking.bad_json,
    "invalid request": provoking.bad_json,
    "this Idempotency-Key was used before with another request": provoking.repeated_key,
    TooManyVersionsError.text: provoking.with_fault(fault_words.CROWDED),
    ThreadKeyDestroyedError.text: provoking.of_destroyed_thread_key,
    "prefix too long": provoking.queried("prefix=" + "p" * 1025),
    **dict.fromkeys(("thread not found", "key not found", "job not found"), provoking.unknown),
    "message not found": provoking.unknown_message,
    # members
    "the thread has too many members": provoking.full_thread,
    "the author of a thread can't be removed from it": lambda world, operation: world(
        world.good(operation)._replace(target=f"/v1/threads/{world.thread()}/members?member=alice")
    ),
    # jobs
    "missing thread_id": provoking.with_body(),
    "wait must be true or false": provoking.queried("wait=maybe"),
    "thread_ids holds at most 1024": provoking.with_body(thread_ids=["t"] * 1025),
    INVALID_LIMIT: provoking.queried("limit=-1"),
    "before must be the older of another page": provoking.queried("before=msg-1-000001"),
    "after must be the next of another page": provoking.queried("after=" + "a" * 1025),
    "job-# rotates other threads, or in another way: wait for it, or cancel it": provoking.beside_another_walk,
    "another operation is running on this thread: try again in a moment": provoking.while_restoring,
    "the job job-# is cancelled": provoking.waited_for_cancelled,
    "the job job-# is failed: # records could not be re-encrypted": provoking.waited_for_failed,
    "too many jobs are unfinished: wait for some of them": provoking.refused_for_many,
    "another job works on this thread": provoking.resumed_beside_another,
    "the job's backups were restored: rotate the thread's key again": provoking.resumed_after_restore,
    "a later rotation has given the thread another key": provoking.resumed_after_another,
    "a job on this thread is unfinished": provoking.beside_slow_job,
    "the key of these backups was destroyed": provoking.of_destroyed_key,
    **{
        f"a job that is done can't be {order}": lambda world, operation: world(world.good(operation))
        for order in ("paused", "resumed", "cancelled")
    },
    # backups of the store
    "name must be 1 to 128 letters, digits, dots, underscores or hyphens, no dot first": provoking.with_body(name=".."),
    "a backup of this name exists": provoking.taken_name,
    "another backup is running: wait until it ends": provoking.backup_meanwhile,
    "the backup failed and its files were removed; the log has the reason with the request id": provoking.with_fault(
        fault_words.ROTTEN
    ),
    BackupOfDatabaseError.text: provoking.with_fault(fault_words.DATABASE),
    "no backup of this name is registered": provoking.unknown,
    "the backup still exists: delete it and all its copies first": provoking.backup_still_there,
    # the viewer
    "the search text is too long": provoking.queried("q=" + "q" * 1025 + "&key=" + "k" * 1025),
    "a time is written as 2026-03-14T09:30, in UTC": provoking.queried("from=yesterday"),
    "a line has a number of at most 18 digits": provoking.queried("before=last"),
    "give before or after, not both": provoking.queried("before=a&after=b"),
    "the form has an unknown field": provoking.changed_form(other="field"),
    "This is not an admin key.": provoking.changed_form(key=BACKEND),
    "The login form has expired. Log in again.": provoking.changed_form(csrf="old"),
    "Too many login attempts from this address. Wait a minute, then try again.": provoking.too_many_logins,
    "the form belongs to another session: reload the page": provoking.changed_form(csrf="another's"),
}
TOGETHER = frozenset({KEY_SERVICE, SEALED, SWITCHING, STOPPING})
"""Provoked for all operations at once, by taking the key service away and by sealing it: see `Living`; and by stopping
the server."""


def _any(operation: str) -> Ask:
    """Of a server that refuses whatever it is."""
    method, path = operation.split(" ", 1)
    names = {"thread": "t", "message": "m", "identity": "i", "key": "k", "job": NO_JOB, "name": "n"}
    return Ask(method, path.format(**names), key=BACKEND if path == "/v1/_sign" else ADMIN)


def shape(sentence: str) -> str:
    """Without the numbers in it."""
    return re.sub(r"(?<=job-)[\da-f-]+|(?<=: )\d+(?= records)", "#", sentence)


def said_of(operation: str) -> dict[int, tuple[str, ...]]:
    return error_texts(OPERATIONS[operation])


DOCUMENT = document(whole_table(), "1")
PAIRS = sorted(documented.pairs(DOCUMENT))
TOLD = {
    (operation, status, sentence)
    for operation in OPERATIONS
    for status, sentences in said_of(operation).items()
    for sentence in sentences
}
ONE_OF_EACH = set({told[2]: told for told in sorted(TOLD & REFUSALS)}.values())
SENTENCES = sorted(
    told
    for told in (TOLD - REFUSALS) | ONE_OF_EACH | {told for told in TOLD if told[2] == DISK}
    if shape(told[2]) in PROVOKED
)
AT_ONCE = {told for told in TOLD if told[2] in TOGETHER}


class Living:
    """The servers, and what they have answered to what can only be provoked for all operations together."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.together: dict[tuple[str, str], Reply] = {}

    def take_the_key_service_away(self) -> None:
        """Every operation is asked meanwhile, at once, for each waits for some seconds."""
        world = self.world
        asks = {operation: world.good(operation) for operation in OPERATIONS}
        thread = world.thread()
        world.kms.kill()
        with ThreadPoolExecutor(len(asks) + 1) as at_once:
            begun = at_once.submit(world.begun, thread)
            answered = {operation: at_once.submit(world, ask) for operation, ask in asks.items()}
            for operation, reply in answered.items():
                self.together[operation, KEY_SERVICE] = reply.result()
            job = begun.result()
            for order in ("pause", "cancel"):
                self.together[f"POST /admin/jobs/{{job}}/{order}", SWITCHING] = world.order(job, order)
        world.kms.start()
        wait_until(world.well)
        world.ended(job)

    def seal_the_key_service(self) -> None:
        world = self.world
        asks = {
            operation: world.good(operation) for operation in OPERATIONS if SEALED in said_of(operation).get(503, ())
        }
        with world.kms.client() as kms:
            kms.seal()
            for operation, ask in asks.items():
                self.together[operation, SEALED] = world(ask)
            kms.unseal()
        wait_until(world.well)


@contextlib.contextmanager
def world_at(at: Path) -> Iterator[World]:
    for name in ("kms", "server", "closed", "limited"):
        (at / name).mkdir()
    with LiveDaemon(at / "kms") as kms:
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        faulty = {**variables, fault_words.FAULT_FILE: str(at / "fault"), "PROGRESSDB_BODY_BYTES": str(BODY_BYTES_MIN)}
        few_addresses = {**variables, "PROGRESSDB_IP_WHITELIST": "10.0.0.0/8"}
        few = {**variables, "PROGRESSDB_RATE_RPS": "0.0003", "PROGRESSDB_RATE_BURST": "1"}
        with (
            real_server(at / "server", program=LAUNCHER, environment=faulty) as server,
            real_server(at / "closed", environment=few_addresses) as closed,
            real_server(at / "limited", environment=few) as limited,
        ):
            world = World(at, server, closed, limited, kms)
            for ask in (_any("GET /admin/stats"), _any("POST /v1/_sign"), _any("GET /docs/")):
                world(ask, limited)  # the one request that each key and the address have
            yield world


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    with world_at(tmp_path_factory.mktemp("every")) as world:
        made = Living(world)
        made.take_the_key_service_away()
        made.seal_the_key_service()
        yield made
        assert world.kept_frames() == []


def sentence_of(reply: Reply) -> str:
    """Of a refusal, which the viewer shows on a page."""
    if reply.headers["content-type"] == "application/json":
        return str(reply.json["error"])
    found = re.search(r'<p role="alert" class="bad">(.*?)</p>', reply.body.decode(), re.DOTALL)
    assert found is not None, reply.body.decode()
    return html.unescape(found[1]).strip()


def check(operation: str, reply: Reply) -> None:
    documented.check(DOCUMENT, operation, reply.status, reply.headers, reply.body)


def test_the_server_gives_out_the_document_that_is_walked_here(living: Living) -> None:
    served = documented.read(living.world(Ask("GET", "/openapi.yaml", key=None)).body)
    assert sorted(documented.pairs(served)) == PAIRS
    assert served["paths"] == json.loads(json.dumps(DOCUMENT["paths"]))


def test_every_pair_of_operation_and_status_is_provoked() -> None:
    """Here or in process."""
    provoked = {Pair(operation, status) for operation, status, _ in (*SENTENCES, *AT_ONCE, *(TOLD & REFUSALS))}
    good = {pair for pair in PAIRS if pair.status < 400}
    assert set(PAIRS) - provoked - good == set()


def test_every_sentence_is_provoked_here_or_in_process() -> None:
    """No entry of either list is unused."""
    assert TOLD - set(SENTENCES) - AT_ONCE - REFUSALS == set()
    assert {shape(sentence) for _, _, sentence in SENTENCES} == set(PROVOKED)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.status < 400], ids=lambda pair: f"{pair}")
def test_every_good_answer_appears(living: Living, pair: Pair) -> None:
    world, provoke = living.world, GOOD.get(pair)
    reply = provoke(world, pair.operation) if provoke else world(world.good(pair.operation))
    assert reply.status == pair.status, reply
    check(pair.operation, reply)


@pytest.mark.parametrize(("operation", "status", "sentence"), SENTENCES)
def test_every_refusal_appears(living: Living, operation: str, status: int, sentence: str) -> None:
    reply = PROVOKED[shape(sentence)](living.world, operation)
    wanted = {shape(sentence), NOT_TAKEN} if sentence == DISK else {shape(sentence)}
    assert reply.status == status
    assert shape(sentence_of(reply)) in wanted
    check(operation, reply)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_needs_the_key_service_is_refused_without_it_and_nobody_else(living: Living, operation: str) -> None:
    reply = living.together[operation, KEY_SERVICE]
    check(operation, reply)
    if KEY_SERVICE in said_of(operation).get(503, ()):
        assert (reply.status, sentence_of(reply)) == (503, KEY_SERVICE)
    else:
        assert reply.status != 503 or operation == READY, reply


@pytest.mark.parametrize(
    "operation", [operation for operation in OPERATIONS if SEALED in said_of(operation).get(503, ())]
)
def test_who_needs_the_key_service_is_refused_while_it_is_sealed(living: Living, operation: str) -> None:
    reply = living.together[operation, SEALED]
    check(operation, reply)
    assert (reply.status, sentence_of(reply)) == (503, SEALED)


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if DISK not in said_of(operation).get(503, ()) and operation != READY],
)
def test_who_is_not_said_to_need_the_disk_answers_without_it(living: Living, operation: str) -> None:
    reply = PROVOKED[DISK](living.world, operation)
    assert reply.status < 400, reply
    check(operation, reply)


def test_the_metrics_are_there_while_the_disk_fails_under_a_job_at_work(living: Living) -> None:
    """They tell of the failure; a gauge that can't be read must not take the others with it."""
    world, unread = living.world, b"\nprogressdb_store_backup_timestamp_seconds NaN\n"
    with world.slow_job():
        with world.fault(fault_words.DISK):
            wait_until(lambda: unread in world(Ask("GET", "/metrics")).body)
            reply = world(Ask("GET", "/metrics"))
        wait_until(world.well)
    assert reply.status == 200, reply.body
    assert b"progressdb_store_failures_total" in reply.body
    wait_until(lambda: unread not in world(Ask("GET", "/metrics")).body)
    assert b"\nprogressdb_jobs_records_left " in reply.body and b"\nprogressdb_jobs_records_left NaN" not in reply.body


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_another_method_than_the_described_ones_is_a_405_that_names_these(living: Living, path: str) -> None:
    described = {method.upper() for method in DOCUMENT["paths"][path]}
    answered = described | ({"HEAD"} if path.startswith("/viewer") and "GET" in described else set())
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - answered:
        reply = living.world(_any(f"{method} {path}"))
        assert (reply.status, reply.headers["allow"]) == (405, ", ".join(sorted(described))), (method, reply)


@pytest.mark.parametrize(
    "operation", [operation for operation in OPERATIONS if operation.split(" ", 1)[1].startswith("/admin/")]
)
def test_a_backend_key_comes_only_where_the_document_says_so(living: Living, operation: str) -> None:
    method, path = operation.split(" ", 1)
    who = DOCUMENT["paths"][path][method.lower()]["description"]
    reply = living.world(living.world.good(operation)._replace(key=BACKEND))
    assert (reply.status == 403) == ("backend" not in who)
    check(operation, reply)


def test_the_other_refusals_without_the_key_service(living: Living) -> None:
    for (operation, sentence), reply in living.together.items():
        if sentence == SWITCHING:
            assert (reply.status, sentence_of(reply)) == (409, sentence)
            check(operation, reply)


@pytest.mark.parametrize(
    "operation", [name for name, described in OPERATIONS.items() if described.body or described.form]
)
def test_the_bound_of_a_body_is_the_documented_one(living: Living, operation: str) -> None:
    method, path = operation.split(" ", 1)
    said = DOCUMENT["paths"][path][method.lower()]["requestBody"]["description"]
    bytes_max = int(re.findall(r"At most (\d+) bytes", said)[0])
    assert f"{bytes_max:,} bytes" in SPECIFICATION.read_text()
    at_bound = provoking.with_length(living.world, operation, bytes_max)
    assert at_bound.status != 413
    check(operation, at_bound)
    beyond = provoking.with_length(living.world, operation, bytes_max + 1)
    assert (beyond.status, sentence_of(beyond)) == (413, "request body too large")


def test_a_client_that_waits_for_a_job_learns_that_the_server_stops(tmp_path: Path) -> None:
    """With servers of its own, since it stops one: others may come after it in the same process of the tests."""
    with world_at(tmp_path) as world:
        job = world.begun(world.thread(provoking.SLOW_RECORDS), records_per_second=1)
        body = {"thread_id": world.job(job)["thread_id"]}
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(world, Ask("POST", "/admin/rotate_thread_dek?wait=true", body))
            world.until_another_waits()
            assert world.server.stop() == 0
            reply = waiting.result()
    assert (reply.status, sentence_of(reply)) == (503, STOPPING)
    check("POST /admin/rotate_thread_dek", reply)
