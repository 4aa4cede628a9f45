"""Every route by every role: hold this table against the contract.

A row is a route with a valid request; its columns say what each caller gets. `200` and `204` are answers, `401` and
`403` refusals. The author of every request is alice, who owns the thread and wrote the message.
"""

from typing import Any

import pytest

from progressdb_server.api.application import operations
from progressdb_server.api.gate.errors import AUTHOR_REQUIRED, MISSING_SIGNATURE, UNAUTHORIZED
from progressdb_server.config import ApiKeys
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, KEYS, Api, signed

CALLERS: dict[str, tuple[str | None, dict[str, str]]] = {
    "no key": (None, {}),
    "unknown": ("unknown-key", {}),
    "backend": (BACKEND, {}),
    "backend for alice": (BACKEND, {"X-User-ID": "alice"}),
    "backend signed": (BACKEND, signed("alice")),
    "admin": (ADMIN, {}),
    "admin for alice": (ADMIN, {"X-User-ID": "alice"}),
    "frontend": (FRONTEND, {}),
    "frontend signed": (FRONTEND, signed("alice")),
    "no key, allowed": (None, {}),
    "no key, allowed, signed": (None, signed("alice")),
}
OK, NO_CONTENT = 200, 204
BODY = {"body": "hello"}

# fmt: off
ROUTES: list[tuple[str, str, Any, tuple[int, ...]]] = [
    # method, path, body                     no   unk  back b+a  b sig adm a+a  fe   fe sig open open sig
    ("GET", "/healthz", None,               (200, 200, 200, 200, 200, 200, 200, 200, 200, 200, 200)),
    ("POST", "/v1/_sign", {"userId": "u"},  (401, 401, 200, 200, 200, 403, 403, 403, 403, 403, 403)),
    ("POST", "/v1/messages", BODY,          (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("GET", "/v1/messages?thread={t}", None, (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("GET", "/v1/threads/{t}/members", None, (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("POST", "/v1/threads/{t}/members", {"members": ["bob"]}, (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("DELETE", "/v1/threads/{t}/members?member=bob", None, (401, 401, 204, 204, 204, 204, 204, 401, 204, 401, 204)),
    ("GET", "/v1/messages/{m}", None,       (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("PUT", "/v1/messages/{m}", BODY,       (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("DELETE", "/v1/messages/{m}", None,    (401, 401, 400, 204, 204, 400, 204, 401, 204, 401, 204)),
    ("GET", "/v1/messages/{m}/versions", None, (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("GET", "/v1/messages/{m}/reactions", None, (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("POST", "/v1/messages/{m}/reactions", {"id": "alice", "reaction": "+1"},
                                            (401, 401, 200, 200, 200, 200, 200, 401, 200, 401, 200)),
    ("DELETE", "/v1/messages/{m}/reactions/alice", None,
                                            (401, 401, 204, 204, 204, 204, 204, 401, 204, 401, 204)),
    ("POST", "/v1/threads", {"title": "T"}, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("GET", "/v1/threads", None,            (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("GET", "/v1/threads/{t}", None,        (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("PUT", "/v1/threads/{t}", {"title": "U"}, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("DELETE", "/v1/threads/{t}", None,     (401, 401, 400, 204, 204, 400, 204, 401, 204, 401, 204)),
    ("POST", "/v1/threads/{t}/messages", BODY, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("GET", "/v1/threads/{t}/messages", None, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("GET", "/v1/threads/{t}/messages/{m}", None, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("PUT", "/v1/threads/{t}/messages/{m}", BODY, (401, 401, 400, 200, 200, 400, 200, 401, 200, 401, 200)),
    ("DELETE", "/v1/threads/{t}/messages/{m}", None,
                                            (401, 401, 400, 204, 204, 400, 204, 401, 204, 401, 204)),
    ("GET", "/admin/health", None,          (401, 401, 200, 200, 200, 200, 200, 403, 403, 403, 403)),
    ("GET", "/admin/stats", None,           (401, 401, 200, 200, 200, 200, 200, 403, 403, 403, 403)),
    ("GET", "/admin/threads", None,         (401, 401, 403, 403, 403, 200, 200, 403, 403, 403, 403)),
    ("GET", "/admin/keys?prefix=thread:", None, (401, 401, 403, 403, 403, 200, 200, 403, 403, 403, 403)),
    ("GET", "/admin/keys/thread:{t}:meta", None, (401, 401, 403, 403, 403, 200, 200, 403, 403, 403, 403)),
    ("GET", "/metrics", None,               (401, 401, 200, 200, 200, 200, 200, 403, 403, 403, 403)),
]
# fmt: on


def api_for(caller: str) -> Api:
    if "allowed" in caller:
        return Api(api_keys=ApiKeys(backend=KEYS.backend, admin=KEYS.admin, allow_unauth=True))
    return Api()


@pytest.mark.parametrize(("method", "path", "body", "statuses"), ROUTES)
def test_who_may_call_what(method: str, path: str, body: object, statuses: tuple[int, ...]) -> None:
    for (caller, (key, headers)), status in zip(CALLERS.items(), statuses, strict=True):
        api = api_for(caller)
        message = api.message("alice", api.thread("alice"))
        reply = api(method, path.format(t=message["thread"], m=message["id"]), body, key=key, headers=headers)
        assert reply.status == status, (caller, reply)
        if status == 204:
            assert (reply.body, "content-type" in reply.headers) == (b"", False), caller
        elif status != 200:
            assert reply.error in {
                UNAUTHORIZED,
                "forbidden",
                MISSING_SIGNATURE,
                AUTHOR_REQUIRED,
            }, caller


def test_the_table_of_this_file_is_the_table_of_the_server() -> None:
    api = Api()
    served = {(operation.method, operation.path) for operation in operations(api.store, api.metrics)}
    documentation = {("GET", path) for path in ("/", "/openapi.yaml", "/docs", "/docs/", "/docs/style.css")}
    names = {"{t}": "{thread}", "{m}": "{message}"}
    tested = set()
    for method, target, _, _ in ROUTES:
        path = target.partition("?")[0].replace("reactions/alice", "reactions/{identity:path}")
        path = path.replace("/admin/keys/thread:{t}:meta", "/admin/keys/{key:path}")
        for short, long in names.items():
            path = path.replace(short, long)
        tested.add((method, path))
    assert tested == served - documentation


def test_an_unknown_route_is_a_404() -> None:
    api = Api()
    for path in (
        "/v1",
        "/v1/",
        "/v1/threads/",
        "/v1/messages/",
        "/v1/messages/m/",
        "/v1/messages/m/versions/1",
        "/v1/messages/m/nothing",
        "/v1/messages//versions",
        "/v1/threads//messages",
        "/v1/threads/t/messages/m/versions",
        "/v1/threads/a/b/messages",
        "/V1/messages",
        "/healthz/x",
        "/admin",
        "/admin/jobs/1",
        "/admin/rotate_thread_dek",
        "//v1/messages",
        "/v1/../admin/keys",
        "/v1%2Fmessages%2Fm%2Fnothing",
        "/admin%2fthreads",
        "/%61dmin/threads",
        "/%6detrics",
        "/v1/threads%2ft/messages",
        "/v1/threads/t/messages%2Fm",
        "/v1/messages/m/%72eactions",
        "/v1/messages/m%2freactions/i",
        "/%2fadmin/threads",
        "/nowhere",
        "/admin/",
        "/docs/x",
        "/healthz/",
        "/openapi.json",
    ):
        for key in BACKEND, ADMIN:
            reply = api("GET", path, key=key)
            assert (reply.status, reply.error) == (404, "not found"), (path, key)
