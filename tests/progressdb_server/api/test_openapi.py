"""The OpenAPI document against the table of operations, and each refusal that it names is sent."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from progressdb_server import config
from progressdb_server.api.application import operations
from progressdb_server.api.gate.access import for_users
from progressdb_server.api.gate.errors import (
    AUTHOR_REQUIRED,
    AUTHOR_TOO_LONG,
    INVALID_JSON,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    UNAUTHORIZED,
)
from progressdb_server.api.gate.keys import ADMINS, OPERATORS, KeyTable
from progressdb_server.api.openapi.description import JsonBody, Operation, operations_of
from progressdb_server.api.openapi.document import DescriptionError, document, documented_path, error_texts
from progressdb_server.api.routes import readiness as readiness_routes
from progressdb_server.api.routes.admin import INVALID_PAYLOAD, SignBody
from progressdb_server.api.routes.jobs import JobHandlers
from progressdb_server.api.routes.messages import INVALID_VERSION, REACTION_TOO_LONG, ROLE_TOO_LONG
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.readiness import Readiness
from progressdb_server.api.routes.store_backup import BackupHandlers
from progressdb_server.api.routes.table import Resource
from progressdb_server.api.routes.threads import SLUG_TOO_LONG, TITLE_TOO_LONG
from progressdb_server.api.viewer.audit import AuditorClient
from progressdb_server.api.viewer.routes import Viewer
from progressdb_server.config import RateLimit
from progressdb_server.conversations import membership
from progressdb_server.kms.provider import SEALED
from progressdb_server.metrics import KmsMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import (
    AmbiguousTimeError,
    MessageNotFoundError,
    NoRoomToRemoveError,
    StoreUnavailableError,
    ThreadKeyDestroyedError,
    TooManyReactionsError,
    TooManyVersionsError,
)
from tests.harness import documented
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, Reply, signed

SPECIFICATION = Path(__file__).resolve().parents[3] / "docs" / "spec" / "server-http.md"
BODIES: dict[str, Any] = {
    "POST /v1/_sign": {"userId": "u"},
    "POST /v1/messages": {"body": 1},
    "PUT /v1/messages/{message}": {"body": 1},
    "POST /v1/messages/{message}/reactions": {"id": "alice", "reaction": "+1"},
    "POST /v1/threads": {"title": "T"},
    "POST /v1/threads/{thread}/members": {"members": ["bob"]},
    "PUT /v1/threads/{thread}": {"title": "T"},
    "POST /v1/threads/{thread}/messages": {"body": 1},
    "PUT /v1/threads/{thread}/messages/{message}": {"body": 1},
}


def whole_table() -> tuple[Operation, ...]:
    api = Api()
    jobs: Any = SimpleNamespace(table=None)  # no route is called
    store: Any = SimpleNamespace(engine=None)
    readiness = Readiness(store, jobs, KmsMetrics())
    metrics = ApiMetrics(CollectorRegistry())
    auditor = AuditorClient(config.ViewerSection())
    viewer = Viewer(store, jobs, jobs, readiness, KeyTable(), metrics=metrics, auditor=auditor, look=jobs, secure=False)
    handlers = operations_of(JobHandlers(jobs), BackupHandlers(jobs, Path("/")))
    more = (*readiness_routes.operations(readiness, jobs), *handlers, *viewer.operations())
    return operations(api.store, metrics, more)


def by_name(table: tuple[Operation, ...]) -> dict[str, Operation]:
    """By method and path."""
    return {f"{operation.method} {documented_path(operation)}": operation for operation in table}


OPERATIONS = by_name(whole_table())


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return document(whole_table(), "1")


def test_a_described_property_that_no_handler_reads_is_an_error() -> None:
    body = JsonBody(SignBody, {"user": {}})
    wrong = Operation("POST", "/sign", lambda request: None, body=body)  # type: ignore[arg-type, return-value]  # never called
    with pytest.raises(DescriptionError, match="SignBody"):
        document((wrong,), "1")


def test_only_three_operations_of_admins_also_take_a_backend_key() -> None:
    shared = {"GET /admin/health", "GET /admin/stats", "GET /admin/readiness"}
    roles = {name: operation.roles for name, operation in OPERATIONS.items() if " /admin/" in name}
    assert roles == {name: OPERATORS if name in shared else ADMINS for name in roles}
    assert shared < roles.keys()


def test_every_operation_has_a_name_of_its_own(described: dict[str, Any]) -> None:
    names = [operation["operationId"] for methods in described["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


def test_every_refusal_that_the_specification_names_is_in_the_document() -> None:
    """Sentences in backticks, or what they begin with, that stand beside a status in docs/spec/server-http.md."""
    named = re.findall(r"(40[0-9]|413|429) ((?:`[a-z][^`]+`(?:, )?)+)", " ".join(SPECIFICATION.read_text().split()))
    wanted = {(int(status), text) for status, texts in named for text in re.findall(r"`([^`]+)`", texts)}
    told = {
        (status, text)
        for key, operation in OPERATIONS.items()
        for status, sentences in error_texts(operation).items()
        for sentence in sentences
        for text in (sentence, sentence.partition(": ")[0])
    }
    unrouted = {(404, "not found")}  # of a path that is not there
    assert len(wanted) > 15
    assert wanted - told - unrouted == set()


def test_the_server_gives_out_the_document_and_needs_no_key_for_it() -> None:
    reply = Api()("GET", "/openapi.yaml", key=None)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/yaml")
    parsed = documented.read(reply.body)
    assert parsed["openapi"] == "3.1.0"
    assert set(parsed["paths"]) >= {"/v1/messages", "/healthz", "/docs/"}
    assert b"&id001" not in reply.body


@pytest.mark.parametrize(
    ("accept", "place"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "/viewer/"),
        ("*/*", "/openapi.yaml"),
        ("application/json", "/openapi.yaml"),
        ("", "/openapi.yaml"),
    ],
)
def test_the_root_leads_a_browser_to_the_viewer_and_a_program_here(accept: str, place: str) -> None:
    reply = Api()("GET", "/", key=None, headers={"accept": accept} if accept else {})
    assert (reply.status, reply.headers["location"]) == (303, place)
    assert "accept" in reply.headers["vary"].lower()


# --- each refusal is sent -----------------------------------------------------------------------------------------
class Case(NamedTuple):
    """A request that would be answered well."""

    api: Api
    method: str
    template: str
    target: str
    body: Any
    key: str

    def __call__(self, **changed: Any) -> Reply:
        target = changed.pop("target", self.target)
        query = changed.pop("query", "")
        headers = changed.pop("headers", {"X-User-ID": "alice"})
        sent = {"body": self.body, "key": self.key, "headers": headers, **changed}
        if query:
            target += ("&" if "?" in target else "?") + query
        if self.method in ("GET", "DELETE"):
            sent.pop("body")
        return self.api(self.method, target, **sent)

    def with_body(self, **fields: Any) -> Reply:
        return self(body={**(self.body or {}), **fields})


def case_of(key: str, api: Api | None = None) -> Case:
    api = api or Api()
    method, template = key.split(" ", 1)
    thread = api.thread()
    message = api.message(thread=thread)["id"]
    target = template.format(thread=thread, message=message, identity="alice", key=f"thread:{thread}:meta")
    if key == "GET /v1/messages":
        target += f"?thread={thread}"
    if key == "DELETE /v1/threads/{thread}/members":
        target += "?member=bob"
    return Case(api, method, template, target, BODIES.get(key), BACKEND if template == "/v1/_sign" else ADMIN)


def _unknown(case: Case) -> Reply:
    last = case.template.rpartition("{message}")
    place = case.target
    for part in place.split("/"):
        if last[1] and part.startswith("msg-"):
            place = place.replace(part, "msg-1-000001")
    if place == case.target and not for_users(case.template):
        return case(target=case.template.format(key="nothing"))
    if place == case.target:  # a cursor
        return _store_says(MessageNotFoundError())(case)
    return case(target=place)


def _removed(case: Case) -> Reply:
    """The author of the case's message is removed from its thread, which belongs to somebody else."""
    api = case.api
    thread = api.thread("owner")
    message = api.message("alice", thread)["id"]
    assert api("DELETE", f"/v1/threads/{thread}/members?member=alice").status == 204
    target = case.template.format(thread=thread, message=message, identity="alice")
    if case.template == "/v1/messages":
        target += f"?thread={thread}"
    body = {**case.body, "thread": thread} if case.body else case.body
    return case(target=target, body=body, key=FRONTEND, headers=signed("alice"))


def _full(case: Case) -> Reply:
    thread = case.api.thread()
    memory = case.api.store.memory
    assert memory is not None
    for number in range(membership.MEMBERS_COUNT_MAX):
        memory.put(keyspace.writer(thread, f"u{number}"), keyspace.MEMBER)
    if "{thread}" in case.template:
        member = "?member=one+more" if case.method == "DELETE" else ""
        return case(target=case.template.format(thread=thread) + member, headers={"X-User-ID": "one more"})
    return case(body={**case.body, "thread": thread}, headers={"X-User-ID": "one more"})


def _no_room(case: Case) -> Reply:
    return case(refused=True)


def _of_deleted_thread(case: Case) -> Reply:
    thread = case.api.thread()
    case.api("DELETE", f"/v1/threads/{thread}?author=alice")
    if "{thread}" in case.template:
        return case(target=case.template.format(thread=thread))
    if case.method == "GET":
        return case(target=f"{case.template}?thread={thread}", key=BACKEND)
    return case.with_body(thread=thread)


def _limited(case: Case) -> Reply:
    limited = case_of(f"{case.method} {case.template}", Api(rate_limit=RateLimit(rps=0.001, burst=40)))
    for _ in range(60):
        limited()
    return limited()


def _store_says(error: Exception, *, but: str = "") -> Callable[[Case], Reply]:
    """Every method of the store raises it, but for the one of this name."""

    def told(case: Case) -> Reply:
        case.api.store.fail(error, but=but)
        return case()

    return told


def _failing(case: Case) -> Reply:
    """With a defect that nobody has foreseen."""

    def broken(*given: object) -> None:
        raise RuntimeError("private text")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resource, "handler", broken)
        return case()


def _other_user(case: Case) -> Reply:
    if "reactions" in case.template:
        return _reacts_as_itself(case)
    return case(headers=signed("mallory"), key=FRONTEND)


def _reacts_as_itself(case: Case, **changed: Any) -> Reply:
    body = {**case.body, "id": "mallory"} if case.body else None
    target = case.target.replace("/alice", "/mallory")
    return case(target=target, body=body, headers=signed("mallory"), key=FRONTEND, **changed)


def _repeated(case: Case) -> Reply:
    case(headers={"X-User-ID": "alice", "Idempotency-Key": "k"})
    other = {**case.body, "title": "other", "body": "other"}
    return case(headers={"X-User-ID": "alice", "Idempotency-Key": "k"}, body=other)


def _refused_address(case: Case) -> Reply:
    api = Api(ip_whitelist=("10.0.0.0/8",))
    return api(case.method, case.target, None, key=case.key)


PROVOKED: dict[str, Callable[[Case], Reply]] = {
    "the header x-api-key is sent twice": lambda case: case(headers=[("X-API-Key", "a"), ("X-API-Key", "b")]),
    "forbidden": _refused_address,
    "rate limit exceeded (PROGRESSDB_RATE_RPS)": _limited,
    "internal error": _failing,
    UNAUTHORIZED: lambda case: case(key="unknown"),
    MISSING_SIGNATURE: lambda case: case(key=FRONTEND, headers={}),
    INVALID_SIGNATURE: lambda case: case(headers={"X-User-ID": "alice", "X-User-Signature": "0"}),
    "the key service is not available now": _store_says(StoreUnavailableError("the key service is not available now")),
    SEALED: _store_says(StoreUnavailableError(SEALED)),
    "the store's disk is not available now": _store_says(EngineUnavailableError()),
    INVALID_JSON: lambda case: case(raw=b"{"),
    INVALID_PAYLOAD: lambda case: case(raw=b"{"),
    "request body too large": lambda case: case(raw=b" " * 1_200_000),
    "a query parameter is given twice": lambda case: case(query="x=1&x=1"),
    "the query is not UTF-8": lambda case: case(query="x=%ff"),
    AUTHOR_TOO_LONG: lambda case: (
        case(target=case.target.replace("/alice", "/" + "a" * 129))
        if "identity" in case.template
        else case(headers={}, query="author=" + "a" * 129)
    ),
    "author holds a control character": lambda case: case(headers={}, query="author=%01"),
    "author mismatch between signature and query param": lambda case: (
        _reacts_as_itself(case, query="author=alice")
        if "reactions" in case.template
        else case(headers=signed("mallory"), query="author=alice")
    ),
    "author mismatch between signature and body author": lambda case: case.api(
        case.method, case.target, {**case.body, "author": "alice"}, headers=signed("mallory")
    ),
    "author mismatch between signature and reaction id": lambda case: (
        case(headers=signed("mallory"), key=FRONTEND)
        if "reactions" in case.template
        else case(headers=signed("mallory"), key=FRONTEND, body={**case.body, "reactions": {"alice": "+1"}})
    ),
    AUTHOR_REQUIRED: lambda case: case(headers={}),
    "body is required": lambda case: case.with_body(body=None),
    ROLE_TOO_LONG: lambda case: case.with_body(role="r" * 129),
    "reply_to is not a message id": lambda case: case.with_body(reply_to="a/b"),
    "too many reactions": lambda case: (
        _store_says(TooManyReactionsError(), but="message")(case)
        if "reactions" in case.template
        else case.with_body(reactions={str(n): "+" for n in range(1025)})
    ),
    "the Idempotency-Key must be 1 to 255 visible ASCII characters": lambda case: case(
        headers={"X-User-ID": "alice", "Idempotency-Key": "k" * 256}
    ),
    "thread must be 1 to 128 letters, digits, dots, underscores or hyphens, and not . or ..": lambda case: (
        case(target="/v1/messages?thread=a:b") if case.method == "GET" else case.with_body(thread="a:b")
    ),
    "thread deleted": _of_deleted_thread,
    "this Idempotency-Key was used before with another request": _repeated,
    "missing thread query parameter": lambda case: case(target="/v1/messages"),
    "limit must be a whole number that is not negative": lambda case: case(query="limit=-1"),
    "before must be the older of another page": lambda case: case(query="before=msg-1-000001"),
    "after must be the next of another page": lambda case: case(query=f"after={'x' * 1025}"),
    "before must be a message id": lambda case: case(query="before=%20"),
    AmbiguousTimeError.text: _store_says(AmbiguousTimeError(), but="latest_version"),
    INVALID_VERSION: lambda case: case(query="before=msg-1-000001"),
    TooManyVersionsError.text: _store_says(TooManyVersionsError(), but="message"),
    "include_deleted must be true or false": lambda case: case(query="include_deleted=maybe"),
    "author not found in any message in this thread": _other_user,
    "author is not a member of this thread": _removed,
    "the thread has too many members": _full,
    NoRoomToRemoveError.text: _full,
    ThreadKeyDestroyedError.text: _store_says(ThreadKeyDestroyedError(), but="message"),
    "the author of a thread can't be removed from it": lambda case: case(
        target=case.target.replace("member=bob", "member=alice")
    ),
    "members must be a list of at most 1024 names, none of them empty": lambda case: case.with_body(members=[""]),
    "missing member query parameter": lambda case: case(target=case.target.partition("?")[0]),
    "too many bodies are being received: send this one again later": _no_room,
    "author does not match": lambda case: case(
        headers=signed("mallory"), key=FRONTEND if case.template.endswith("/members") else ADMIN
    ),
    "message not found": _unknown,
    "thread not found": lambda case: (
        _of_deleted_thread(case)
        if case.template == "/v1/messages"
        else case(
            target=case.template.format(thread="not:an:id" if case.method == "POST" else "nothing"), query="member=bob"
        )
    ),
    "missing id or reaction": lambda case: case.with_body(reaction=""),
    REACTION_TOO_LONG: lambda case: (
        case.with_body(reaction="r" * 257)
        if "reactions" in case.template
        else case.with_body(reactions={"alice": "r" * 257})
    ),
    "title is required": lambda case: case(body={}),
    TITLE_TOO_LONG: lambda case: (
        case(query="title=" + "t" * 4097) if case.method == "GET" else case.with_body(title="t" * 4097)
    ),
    SLUG_TOO_LONG: lambda case: case(query="slug=" + "s" * 5000),
    "prefix too long": lambda case: case(query="prefix=" + "p" * 1025),
    "key not found": _unknown,
}
REFUSALS = {
    (key, status, sentence)
    for key, operation in by_name(Api().application.operations).items()
    for status, sentences in error_texts(operation).items()
    for sentence in dict.fromkeys(sentences)
    if key.split(" ", 1)[1] not in ("/", "/docs", "/docs/", "/docs/style.css", "/openapi.yaml")
    and status != 431  # of the connection: test_every_answer.py provokes it
}


@pytest.mark.parametrize("sentence", PROVOKED)
def test_every_documented_refusal_appears(sentence: str) -> None:
    """Of every operation that documents it."""
    documented_ones = [(key, status) for key, status, said in sorted(REFUSALS) if said == sentence]
    assert documented_ones, "none documents it"
    for key, status in documented_ones:
        reply = PROVOKED[sentence](case_of(key))
        assert (reply.status, reply.error) == (status, sentence), key


def test_every_documented_refusal_can_be_provoked() -> None:
    assert {sentence for _, _, sentence in REFUSALS} <= set(PROVOKED)
