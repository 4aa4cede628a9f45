"""Live servers, and how each documented answer of the API is got from them.

Owns: a good request for every operation, and a provocation for every sentence of a refusal that is not `test_openapi`'s
alone. Invariants: whatever is asked is asked over TCP of the real command; faults that no machine gives on demand are
in the server's own process (`faulty_server`), below everything whose answer is looked at. A provocation leaves the
servers able to answer the next one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from progressdb_server.api.gate.limits import NAMED_MEMBERS_COUNT_MAX
from progressdb_server.conversations.membership import MEMBERS_COUNT_MAX
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.progressdb_server.api import fault_words
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND
from tests.progressdb_server.api.real_server import RealServer, Reply
from tests.progressdb_server.api.viewer_client import ViewerClient

LAUNCHER = ("-m", "tests.progressdb_server.api.faulty_server")
NO_JOB = "job-00000000000000000001-00000000"
SLOW_RECORDS = 40
"""Of a job at a record a second: it is at work for far longer than any provocation takes."""


class Ask(NamedTuple):
    """A request. `body` is sent as JSON, `raw` as it is, `form` as a browser sends it."""

    method: str
    target: str
    body: Any = None
    raw: bytes | None = None
    form: dict[str, str] | None = None
    key: str | None = ADMIN
    headers: tuple[tuple[str, str], ...] = ()
    source: str = "127.0.0.1"

    def query(self, text: str) -> Ask:
        return self._replace(target=f"{self.target}{'&' if '?' in self.target else '?'}{text}")


class World:
    """The servers, and what a request needs to name."""

    def __init__(self, directory: Path, server: RealServer, closed: RealServer, limited: RealServer, kms: LiveDaemon):
        """`closed` admits no address of this machine, `limited` one request in an hour."""
        self.server, self.closed, self.limited, self.kms = server, closed, limited, kms
        self._fault = directory / "fault"
        self.backups = server.db / "backups"
        self._names = iter(range(1_000_000))
        self._cookie = self.login().cookies["progressdb_viewer"]

    # --- asking ---------------------------------------------------------------------------------------------------
    def __call__(self, ask: Ask, server: RealServer | None = None) -> Reply:
        connection = http.client.HTTPConnection(
            "127.0.0.1", (server or self.server).port, timeout=60, source_address=(ask.source, 0)
        )
        raw = ask.raw
        headers = list(ask.headers)
        if ask.form is not None:
            raw = urlencode(ask.form).encode()
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
        elif ask.body is not None:
            raw = json.dumps(ask.body).encode()
        if ask.key is not None:
            headers.append(("X-API-Key", ask.key))
        if raw is not None:
            headers.append(("Content-Length", str(len(raw))))
        with contextlib.closing(connection):
            connection.putrequest(ask.method, ask.target)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(raw)
            answered = connection.getresponse()
            return Reply(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())

    @contextlib.contextmanager
    def fault(self, word: str) -> Iterator[None]:
        self._fault.write_text(word)
        try:
            yield
        finally:
            self._fault.unlink()

    def kept_frames(self) -> list[str]:
        """Places of frames that outlived the requests so far and that only the collector would free."""
        with self.fault(fault_words.GARBAGE):
            self(Ask("GET", "/admin/stats"))
            return self._fault.read_text().split("\n")[1:]

    def well(self) -> bool:
        """Whether writes work, and the server no longer keeps the answer of a probe that says otherwise."""
        made = self(Ask("POST", "/v1/threads?author=alice", {"title": "T"}))
        return (made.status, self(Ask("GET", "/readyz")).status) == (200, 200)

    def name(self) -> str:
        return f"n{next(self._names)}"

    # --- what there is --------------------------------------------------------------------------------------------
    def thread(self, messages: int = 1) -> str:
        made = self(Ask("POST", "/v1/threads?author=alice", {"title": "T"}))
        thread = str(made.json["id"])
        for n in range(messages):
            self.message(thread, n)
        return thread

    def message(self, thread: str, body: object = 1) -> str:
        return str(self(Ask("POST", "/v1/messages?author=alice", {"thread": thread, "body": body})).json["id"])

    def job(self, job: str) -> Any:
        return self(Ask("GET", f"/admin/jobs/{job}")).json

    def begun(self, thread: str, **how: Any) -> str:
        return str(self(Ask("POST", "/admin/rotate_thread_dek", {"thread_id": thread, **how})).json["job_id"])

    def ended(self, job: str) -> str:
        """Returns when the job's end is durable, and its thread free; its status may tell the end earlier."""
        self(Ask("GET", f"/admin/jobs/{job}/events"))
        return job

    def done_job(self) -> str:
        return self.ended(self.begun(self.thread(), records_per_second=0))

    def until_another_waits(self) -> None:
        """Returns when the server has a request of another thread too."""
        wait_until(lambda: b"requests_in_flight 2.0" in self(Ask("GET", "/metrics")).body)

    def order(self, job: str, order: str) -> Reply:
        return self(Ask("POST", f"/admin/jobs/{job}/{order}"))

    @contextlib.contextmanager
    def slow_job(self) -> Iterator[str]:
        """A job at work."""
        job = self.begun(self.thread(SLOW_RECORDS), records_per_second=1)
        try:
            yield job
        finally:
            if self.job(job)["status"] not in ("done", "failed", "cancelled"):
                assert self.order(job, "cancel").status == 200

    def failed_job(self) -> tuple[str, Reply]:
        """One whose records' key is gone: it was destroyed behind the server's back, before the job's turn came. With
        what one who had waited for it was told."""
        with self.slow_job() as one, self.slow_job() as two, ThreadPoolExecutor(1) as other:
            body = {"thread_id": self.thread(), "records_per_second": 0}
            job = str(self(Ask("POST", "/admin/rotate_thread_dek", body)).json["job_id"])
            waiting = other.submit(self, Ask("POST", "/admin/rotate_thread_dek?wait=true", body))
            self.until_another_waits()
            with self.kms.client() as client:
                client.destroy_key(self.job(job)["old_key"])
            self.order(one, "cancel")
            self.order(two, "cancel")
            return self.ended(job), waiting.result()

    def login(self) -> ViewerClient:
        client = ViewerClient(self.server.port, source=self.address())
        assert client.login(ADMIN).status == 303
        return client

    def address(self) -> str:
        """Of this machine, another one each time: the server bounds the login attempts from one."""
        return f"127.0.1.{1 + next(self._names) % 250}"

    # --- good requests --------------------------------------------------------------------------------------------
    def good(self, operation: str) -> Ask:
        """A request that is answered well; what it names was made for it."""
        method, path = operation.split(" ", 1)
        if "{job}" in path and not path.startswith("/viewer"):
            return Ask(method, path.format(job=self.done_job()))  # steering one that is at work: see `steered`
        if path == "/admin/store_backups/{name}":
            return Ask(method, path.format(name=self._deleted_backup()))
        if path.startswith("/viewer"):
            return self._good_page(method, path)
        special = {
            "POST /v1/_sign": Ask(method, path, {"userId": "u"}, key=BACKEND),
            "POST /admin/rotate_deks": Ask(method, path, {"thread_ids": [self.thread()]}),
            "POST /admin/store_backup": Ask(method, path, {"name": self.name()}),
        }
        if operation in special:
            return special[operation]
        thread = self.thread()
        if operation == "POST /admin/rotate_thread_dek":
            return Ask(method, path, {"thread_id": thread})
        names = {"thread": thread, "message": self.message(thread), "identity": "alice", "key": f"thread:{thread}:meta"}
        ask = Ask(method, path.format(**names), _BODIES.get(operation))
        if path.startswith("/v1/"):
            ask = ask.query("author=alice")
        if operation == "DELETE /v1/threads/{thread}/members":
            return ask.query("member=bob")
        return ask.query(f"thread={thread}") if operation == "GET /v1/messages" else ask

    def _good_page(self, method: str, path: str) -> Ask:
        if path == "/viewer/login" and method == "POST":
            return self.login_form()
        if path == "/viewer/logout":
            client = self.login()
            client("/viewer/")
            cookie = f"progressdb_viewer={client.cookies['progressdb_viewer']}"
            return Ask(method, path, form={"csrf": client.csrf}, key=None, headers=(("Cookie", cookie),))
        thread = self.thread()
        job = self.done_job() if "{job}" in path else ""
        target = path.format(thread=thread, message=self.message(thread), job=job)
        return Ask(method, target, key=None, headers=(("Cookie", f"progressdb_viewer={self._cookie}"),))

    def login_form(self, **fields: str) -> Ask:
        client = ViewerClient(self.server.port)
        client("/viewer/login")
        form = {"csrf": client.csrf, "key": ADMIN, **fields}
        cookie = f"progressdb_login={client.cookies['progressdb_login']}"
        headers = (("Cookie", cookie),)
        return Ask("POST", "/viewer/login", form=form, key=None, headers=headers, source=self.address())

    def _deleted_backup(self) -> str:
        name = self.name()
        assert self(Ask("POST", "/admin/store_backup", {"name": name})).status == 200
        shutil.rmtree(self.backups / name)
        return name


_BODIES: dict[str, Any] = {
    "POST /v1/messages": {"body": 1},
    "PUT /v1/messages/{message}": {"body": 1},
    "POST /v1/messages/{message}/reactions": {"id": "alice", "reaction": "+1"},
    "POST /v1/threads": {"title": "T"},
    "POST /v1/threads/{thread}/members": {"members": ["bob"]},
    "PUT /v1/threads/{thread}": {"title": "T"},
    "POST /v1/threads/{thread}/messages": {"body": 1},
    "PUT /v1/threads/{thread}/messages/{message}": {"body": 1},
}


# --- good answers that are not the first ------------------------------------------------------------------------------
def waited(world: World, operation: str) -> Reply:
    return world(world.good(operation).query("wait=true"))


def without_session(world: World, operation: str) -> Reply:
    return world(world.good(operation)._replace(headers=()))


def held(world: World, operation: str) -> Reply:
    """The list that the caller already has."""
    ask = world.good(operation)
    etag = world(ask).headers["etag"]
    return world(ask._replace(headers=(*ask.headers, ("If-None-Match", etag))))


def steered(world: World, operation: str) -> Reply:
    with world.slow_job() as job:
        if operation.endswith("resume"):
            assert world.order(job, "pause").status == 200
        return world(Ask("POST", operation.split(" ", 1)[1].format(job=job)))


def unknown_message(world: World, operation: str) -> Reply:
    """As `unknown`; where the path names no message, a cursor does."""
    if operation == "GET /v1/messages" or ("{thread}" in operation and "{message}" not in operation):
        return world(world.good(operation).query("before=nothing"))
    return unknown(world, operation)


# --- refusals ---------------------------------------------------------------------------------------------------------
def unknown(world: World, operation: str) -> Reply:
    """What the path, the body or the query names is not there."""
    method, path = operation.split(" ", 1)
    if path.startswith("/viewer"):
        named = world.good(operation)._replace(target=path.format(thread="nothing", message="msg-1-000001", job=NO_JOB))
        return world(named.query("q=msg-%2F") if path == "/viewer/threads" else named)
    if operation == "POST /admin/rotate_thread_dek":
        return world(Ask(method, path, {"thread_id": "nothing"}))
    if operation == "POST /admin/rotate_deks":
        return world(Ask(method, path, {"thread_ids": ["nothing"]}))
    if operation == "GET /v1/messages":
        thread = world.thread()
        world(Ask("DELETE", f"/v1/threads/{thread}?author=alice"))
        return world(Ask(method, f"{path}?thread={thread}", key=BACKEND))
    ask = world.good(operation)
    nothing = "not:an:id" if operation == "POST /v1/threads/{thread}/messages" else "nothing"  # others are made
    target = path.format(thread=nothing, message="msg-1-000001", identity="alice", key="n", job=NO_JOB, name="nothing")
    query = "?author=alice" if path.startswith("/v1/") else ""
    if operation == "DELETE /v1/threads/{thread}/members":
        query += "&member=bob"
    return world(ask._replace(target=target + query))


def repeated_key(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    ask = ask._replace(headers=(("Idempotency-Key", world.name()),))
    world(ask)
    return world(ask._replace(body={**ask.body, "title": "other", "body": "other"}))


def too_large(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    if ask.form is not None:
        return world(ask._replace(form={**ask.form, "csrf": "c" * 5000}))
    return world(ask._replace(body=None, raw=b" " * 1_200_000))


def with_length(world: World, operation: str, length: int) -> Reply:
    """A good request whose body has this many bytes. JSON may end in spaces; a form gets a long token."""
    ask = world.good(operation)
    if ask.form is not None:
        padding = length - len(urlencode(ask.form))
        return world(ask._replace(form={**ask.form, "csrf": ask.form["csrf"] + "c" * padding}))
    raw = json.dumps(ask.body).encode()
    return world(ask._replace(body=None, raw=raw + b" " * (length - len(raw))))


def full_thread(world: World, operation: str) -> Reply:
    """`alice` and as many others as there may be."""
    method, path = operation.split(" ", 1)
    thread = world.thread()
    names = [f"member {number}" for number in range(MEMBERS_COUNT_MAX - 1)]
    for start in range(0, len(names), NAMED_MEMBERS_COUNT_MAX):
        some = names[start : start + NAMED_MEMBERS_COUNT_MAX]
        assert world(Ask("POST", f"/v1/threads/{thread}/members", {"members": some})).status == 200
    body = {"members": ["one more"], "thread": thread, "body": 1}
    return world(Ask(method, f"{path.format(thread=thread)}?author=one+more", body))


def no_room(world: World, operation: str) -> Reply:
    """Beside unfinished uploads that have taken the half of the budget which one address may take."""
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\nContent-Length: 1100000\r\n\r\n"
    ask = world.good(operation)._replace(body=None, raw=b" " * 100_000)
    for wait_s in (0.2, 1, 3, 9):
        with contextlib.ExitStack() as uploads:
            for _ in range(8):
                connection = uploads.enter_context(socket.create_connection(("127.0.0.1", world.server.port)))
                connection.sendall(head.encode() + b" " * (1024 * 1024 - 1))
            time.sleep(wait_s)  # until the server has read all of it
            reply = world(ask)
        if reply.status == 503:
            break
    return reply


def bad_json(world: World, operation: str) -> Reply:
    return world(world.good(operation)._replace(body=None, raw=b"{"))


def with_body(**body: Any) -> Callable[[World, str], Reply]:
    return lambda world, operation: world(world.good(operation)._replace(body=body))


def changed_form(**fields: str) -> Callable[[World, str], Reply]:
    def asked(world: World, operation: str) -> Reply:
        ask = world.good(operation)
        assert ask.form is not None
        return world(ask._replace(form={**ask.form, **fields}))

    return asked


def twice(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    if ask.form is not None:
        return world(ask._replace(form=None, raw=b"csrf=a&csrf=b"))
    return world(ask.query("x=1&x=1"))


def not_utf8(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    return world(ask._replace(form=None, raw=b"csrf=%ff")) if ask.form is not None else world(ask.query("x=%ff"))


def queried(text: str) -> Callable[[World, str], Reply]:
    return lambda world, operation: world(world.good(operation).query(text))


def too_many_logins(world: World, operation: str) -> Reply:
    """A slow machine gets more attempts, for the server allows another one after some seconds."""
    ask = world.login_form(key="wrong")._replace(source="127.0.2.1")
    return _asked_until_refused(world, ask, 429)


def with_fault(word: str, **changed: Any) -> Callable[[World, str], Reply]:
    def asked(world: World, operation: str) -> Reply:
        ask = world.good(operation)._replace(**changed)
        with world.fault(word):
            reply = world(ask)
        wait_until(world.well)
        return reply

    return asked


def of_destroyed_thread_key(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    if operation.endswith("/reactions/{identity}"):  # without a reaction there is nothing to write
        set_it = ask._replace(
            method="POST",
            target=ask.target.replace("/alice", ""),
            body=_BODIES["POST /v1/messages/{message}/reactions"],
        )
        assert world(set_it).status == 200
    with world.fault(fault_words.DESTROYED):
        return world(ask)


def not_ready(world: World, operation: str) -> Reply:
    """Asked more than once: the server keeps a good answer of its probes for PROBE_AGE_S."""
    ask = world.good(operation)
    with world.fault(fault_words.DISK):
        reply = _asked_until_refused(world, ask, 503)
    wait_until(world.well)
    return reply


def _asked_until_refused(world: World, ask: Ask, status: int) -> Reply:
    replies: list[Reply] = []

    def refused() -> bool:
        replies.append(world(ask))
        return replies[-1].status == status

    wait_until(refused)
    return replies[-1]


# --- backups of the store ---------------------------------------------------------------------------------------------
def taken_name(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    world(ask)
    return world(ask)


def backup_meanwhile(world: World, operation: str) -> Reply:
    one, two = world.good(operation), world.good(operation)
    with ThreadPoolExecutor(1) as other:
        with world.fault(fault_words.STUCK):
            first = other.submit(world, one)
            wait_until(lambda: one.body["name"] in str(world(Ask("GET", "/admin/store_backups")).body))
            reply = world(two)
        assert first.result().status == 200
    return reply


def backup_still_there(world: World, operation: str) -> Reply:
    name = world.name()
    world(Ask("POST", "/admin/store_backup", {"name": name}))
    return world(Ask("DELETE", f"/admin/store_backups/{name}"))


# --- jobs -------------------------------------------------------------------------------------------------------------
def beside_slow_job(world: World, operation: str) -> Reply:
    with world.slow_job() as job:
        method, path = operation.split(" ", 1)
        return world(Ask(method, path.format(job=job)))


def while_restoring(world: World, operation: str) -> Reply:
    job = world.done_job()
    thread = world.job(job)["thread_id"]
    key, value = ("thread_ids", [thread]) if operation.endswith("rotate_deks") else ("thread_id", thread)
    with ThreadPoolExecutor(1) as other:
        with world.fault(fault_words.STUCK):
            restoring = other.submit(world.order, job, "restore")
            wait_until(lambda: bool(world.job(job)["restored_ns"]))
            reply = world(Ask("POST", operation.split(" ", 1)[1], {key: value}))
        assert restoring.result().status == 200
    return reply


def waited_for_cancelled(world: World, operation: str) -> Reply:
    with world.slow_job() as job, ThreadPoolExecutor(1) as other:
        thread = world.job(job)["thread_id"]
        waiting = other.submit(world, Ask("POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}))
        world.until_another_waits()
        world.order(job, "cancel")
        return waiting.result()


def waited_for_failed(world: World, operation: str) -> Reply:
    return world.failed_job()[1]


def resumed_beside_another(world: World, operation: str) -> Reply:
    job, _ = world.failed_job()
    thread = world.job(job)["thread_id"]
    for n in range(SLOW_RECORDS):
        world.message(thread, n)
    later = world.begun(thread, records_per_second=1)
    reply = world.order(job, "resume")
    world.order(later, "cancel")
    return reply


def resumed_after_another(world: World, operation: str) -> Reply:
    job, _ = world.failed_job()
    world.ended(world.begun(world.job(job)["thread_id"], records_per_second=0))
    return world.order(job, "resume")


def resumed_after_restore(world: World, operation: str) -> Reply:
    job, _ = world.failed_job()
    assert world.order(job, "restore").status == 200
    return world.order(job, "resume")


def of_destroyed_key(world: World, operation: str) -> Reply:
    for known in world(Ask("GET", "/admin/store_backups")).json["backups"]:
        shutil.rmtree(known["path"], ignore_errors=True)  # any of them would keep the key
        world(Ask("DELETE", f"/admin/store_backups/{known['name']}"))
    job = world.ended(world.begun(world.thread(), records_per_second=0, destroy_old_after="1s"))
    wait_until(lambda: bool(world.job(job)["destroyed_ns"]))
    # The destruction, which ends a moment later, still has the thread.
    wait_until(lambda: b"a job on this thread" not in world.order(job, "restore").body)
    return world.order(job, "restore")


def beside_another_walk(world: World, operation: str) -> Reply:
    """It waits for two jobs at work."""
    with world.slow_job(), world.slow_job():
        first, other = (Ask("POST", operation.split(" ", 1)[1], {"older_than": days}) for days in ("90d", "91d"))
        (walk,) = world(first).json["job_ids"]
        reply = world(other)
        world.order(walk, "cancel")
        return reply


def refused_for_many(world: World, operation: str) -> Reply:
    body: dict[str, Any] = {"thread_id": world.thread()}
    if operation.endswith("rotate_deks"):
        body = {"thread_ids": [body["thread_id"]]}
    with world.fault(fault_words.FULL):
        return world(Ask("POST", operation.split(" ", 1)[1], body))
