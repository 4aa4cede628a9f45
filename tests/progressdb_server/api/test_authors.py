"""User signatures, and the author that a request acts for."""

from typing import Any

import pytest

from progressdb_server.api.gate.errors import (
    AUTHOR_REQUIRED,
    AUTHOR_TOO_LONG,
    INVALID_JSON,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    UNAUTHORIZED,
)
from progressdb_server.api.routes.admin import INVALID_PAYLOAD
from progressdb_server.config import ApiKeys
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, OTHER_BACKEND, Api, signature, signed


# --- signatures -------------------------------------------------------------------------------------------------
def test_a_backend_gets_a_signature_under_its_own_key() -> None:
    for key in (BACKEND, OTHER_BACKEND):
        reply = Api()("POST", "/v1/_sign", {"userId": "alice"}, key=key)
        assert reply.json == {"userId": "alice", "signature": signature("alice", key)}


def test_a_signed_user_is_the_author() -> None:
    api = Api()
    made = api("POST", "/v1/_sign", {"userId": "ålice@example.org"}).json
    headers = {"X-User-ID": made["userId"], "X-User-Signature": made["signature"]}
    message = api("POST", "/v1/messages", {"body": 1}, key=FRONTEND, headers=headers).json
    assert message["author"] == "ålice@example.org"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"userId":""}',
        b'{"userId":1}',
        b'{"userId":null}',
        b'{"userid":"x"}',
        b'{"userId":"a\\u0000b"}',
        b'{"userId":"' + b"x" * 129 + b'"}',
        b'{"userId":"\xff"}',
        b"{",
    ],
)
def test_an_invalid_user_id_is_not_signed(raw: bytes) -> None:
    reply = Api()("POST", "/v1/_sign", raw=raw)
    assert (reply.status, reply.error) == (400, INVALID_PAYLOAD)


@pytest.mark.parametrize("key", [BACKEND, ADMIN, FRONTEND])
@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"X-User-ID": "alice", "X-User-Signature": signature("mallory")}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": signature("alice").upper()}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": signature("alice")[:-1]}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": signature("alice", ADMIN)}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": signature("alice", FRONTEND)}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": signature("alice", "replaced-key")}, INVALID_SIGNATURE),
        ({"X-User-ID": "Alice", "X-User-Signature": signature("alice")}, INVALID_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": "ü"}, INVALID_SIGNATURE),
        ({"X-User-Signature": signature("alice")}, MISSING_SIGNATURE),
        ({"X-User-ID": "", "X-User-Signature": signature("")}, MISSING_SIGNATURE),
        ({"X-User-ID": "alice", "X-User-Signature": ""}, MISSING_SIGNATURE),
    ],
)
@pytest.mark.parametrize("path", ["/v1/threads", "/v1/messages/m"])
def test_a_signature_is_verified_for_every_role(path: str, headers: dict[str, str], error: str, key: str) -> None:
    reply = Api()("GET", path, key=key, headers=headers)
    assert (reply.status, reply.error) == (401, error)


def test_a_signature_under_any_backend_key_is_valid() -> None:
    for key in (BACKEND, OTHER_BACKEND):
        assert Api()("GET", "/v1/threads", key=FRONTEND, headers=signed("alice", key)).status == 200


def test_no_signature_is_valid_without_a_backend_key() -> None:
    api = Api(api_keys=ApiKeys(frontend=(FRONTEND,), allow_unauth=True))
    for forged in (signature("alice", ""), signature("alice", FRONTEND)):
        headers = {"X-User-ID": "alice", "X-User-Signature": forged}
        assert api("GET", "/v1/threads", key=FRONTEND, headers=headers).error == INVALID_SIGNATURE
        assert api("GET", "/v1/threads", key=None, headers=headers).error == INVALID_SIGNATURE


# --- the author of a call ---------------------------------------------------------------------------------------
AUTHOR_PRECEDENCE: list[Any] = [
    # body, header, query → the expected author
    ("b", "h", "q", "b"),
    ("", "h", "q", "h"),
    (None, "h", "q", "h"),
    (None, None, "q", "q"),
    ("b", None, None, "b"),
    (None, "", "q", "q"),
]


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
@pytest.mark.parametrize(("body", "header", "query", "author"), AUTHOR_PRECEDENCE)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads", "/v1/threads/t1/messages"])
def test_an_unsigned_author_comes_from_body_then_header_then_query(
    path: str, body: str | None, header: str | None, query: str | None, author: str, key: str
) -> None:
    target = path if query is None else f"{path}?author={query}"
    headers = {} if header is None else {"X-User-ID": header}
    reply = Api()("POST", target, {"author": body, "body": "x", "title": "x"}, key=key, headers=headers)
    assert reply.json["author"] == author


NEED_AUTHOR = [
    ("POST", "/v1/messages"),
    ("PUT", "/v1/messages/{m}"),
    ("DELETE", "/v1/messages/{m}"),
    ("POST", "/v1/threads"),
    ("GET", "/v1/threads"),
    ("GET", "/v1/threads/{t}"),
    ("PUT", "/v1/threads/{t}"),
    ("DELETE", "/v1/threads/{t}"),
    ("POST", "/v1/threads/{t}/messages"),
    ("GET", "/v1/threads/{t}/messages"),
    ("GET", "/v1/threads/{t}/messages/{m}"),
    ("PUT", "/v1/threads/{t}/messages/{m}"),
    ("DELETE", "/v1/threads/{t}/messages/{m}"),
]
NEED_NO_AUTHOR = [
    ("GET", "/v1/messages?thread={t}"),
    ("GET", "/v1/messages/{m}"),
    ("GET", "/v1/messages/{m}/versions"),
    ("GET", "/v1/messages/{m}/reactions"),
]
ANY_BODY = {"body": "x", "title": "x"}


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
@pytest.mark.parametrize(("method", "path"), NEED_AUTHOR)
def test_a_backend_must_name_an_author_on_these_routes(method: str, path: str, key: str) -> None:
    api = Api()
    message = api.message()
    target = path.format(t=message["thread"], m=message["id"])
    body = None if method in ("GET", "DELETE") else ANY_BODY
    reply = api(method, target, body, key=key)
    assert (reply.status, reply.error) == (400, AUTHOR_REQUIRED)


@pytest.mark.parametrize(("method", "path"), NEED_NO_AUTHOR)
def test_a_backend_needs_no_author_on_these_routes(method: str, path: str) -> None:
    api = Api()
    message = api.message()
    assert api(method, path.format(t=message["thread"], m=message["id"])).status == 200


@pytest.mark.parametrize("key", [BACKEND, ADMIN, FRONTEND])
@pytest.mark.parametrize(("method", "path"), NEED_AUTHOR + NEED_NO_AUTHOR)
def test_an_author_in_the_query_must_not_contradict_the_signature(method: str, path: str, key: str) -> None:
    api = Api()
    message = api.message()
    target = path.format(t=message["thread"], m=message["id"])
    target += ("&" if "?" in target else "?") + "author=bob"
    body = None if method in ("GET", "DELETE") else ANY_BODY
    reply = api(method, target, body, key=key, headers=signed("alice"))
    assert (reply.status, reply.error) == (403, "author mismatch between signature and query param")
    assert api(method, target.replace("bob", "alice"), body, key=key, headers=signed("alice")).status < 300


@pytest.mark.parametrize("key", [BACKEND, ADMIN, FRONTEND])
@pytest.mark.parametrize(("method", "path"), [case for case in NEED_AUTHOR if case[0] in ("POST", "PUT")])
def test_an_author_in_the_body_must_not_contradict_the_signature(method: str, path: str, key: str) -> None:
    api = Api()
    message = api.message()
    target = path.format(t=message["thread"], m=message["id"])
    reply = api(method, target, {**ANY_BODY, "author": "bob"}, key=key, headers=signed("alice"))
    assert (reply.status, reply.error) == (403, "author mismatch between signature and body author")
    assert api(method, target, {**ANY_BODY, "author": "alice"}, key=key, headers=signed("alice")).status == 200


@pytest.mark.parametrize(
    ("author", "error"),
    [
        ("x" * 129, AUTHOR_TOO_LONG),
        ("é" * 65, AUTHOR_TOO_LONG),
        ("a\x00b", "author holds a control character"),
        ("a\nb", "author holds a control character"),
        ("a\x7fb", "author holds a control character"),
    ],
)
def test_an_invalid_author_is_refused(author: str, error: str) -> None:
    for path in ("/v1/messages", "/v1/threads"):
        api = Api()
        reply = api("POST", path, {"author": author, **ANY_BODY})
        assert (reply.status, reply.error) == (400, error)
        assert api.store.empty


@pytest.mark.parametrize("author", ["x" * 128, "é" * 64, "a:b", "a/b", "alice@example.org", "a b", "日本"])
def test_any_other_author_is_accepted(author: str) -> None:
    assert Api()("POST", "/v1/messages", {"author": author, **ANY_BODY}).json["author"] == author


def test_a_signed_user_that_is_too_long_is_refused_too() -> None:
    reply = Api()("GET", "/v1/threads", key=FRONTEND, headers=signed("x" * 129))
    assert (reply.status, reply.error) == (400, AUTHOR_TOO_LONG)


def test_a_sentence_begins_with_the_text_of_progressdb_0_1() -> None:
    """An SDK may match on it."""
    texts = {
        UNAUTHORIZED: "unauthorized",
        MISSING_SIGNATURE: "missing signature headers",
        INVALID_SIGNATURE: "invalid signature",
        INVALID_JSON: "invalid json",
        INVALID_PAYLOAD: "invalid payload",
        AUTHOR_REQUIRED: "author required for backend requests",
        AUTHOR_TOO_LONG: "author too long",
    }
    assert all(sentence.startswith(f"{text}: ") for sentence, text in texts.items())
    assert "X-User-ID" in AUTHOR_REQUIRED and "X-API-Key" in UNAUTHORIZED
