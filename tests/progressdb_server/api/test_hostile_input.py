"""Hostile input on every endpoint: a clear 4xx, never a 500, nothing stored."""

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.request import json_depth, without_strings
from progressdb_server.http.limits import REQUEST_BYTES_MAX
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, Reply, signature, signed

WITH_BODY = [
    ("POST", "/v1/_sign"),
    ("POST", "/v1/messages"),
    ("PUT", "/v1/messages/{m}"),
    ("POST", "/v1/messages/{m}/reactions"),
    ("POST", "/v1/threads"),
    ("PUT", "/v1/threads/{t}"),
    ("POST", "/v1/threads/{t}/members"),
    ("POST", "/v1/threads/{t}/messages"),
    ("PUT", "/v1/threads/{t}/messages/{m}"),
]
WITHOUT_BODY = [
    ("GET", "/healthz"),
    ("GET", "/v1/messages"),
    ("GET", "/v1/messages/{m}"),
    ("DELETE", "/v1/messages/{m}"),
    ("GET", "/v1/messages/{m}/versions"),
    ("GET", "/v1/messages/{m}/reactions"),
    ("DELETE", "/v1/messages/{m}/reactions/bob"),
    ("GET", "/v1/threads"),
    ("GET", "/v1/threads/{t}"),
    ("DELETE", "/v1/threads/{t}"),
    ("GET", "/v1/threads/{t}/members"),
    ("DELETE", "/v1/threads/{t}/members?member=bob"),
    ("GET", "/v1/threads/{t}/messages"),
    ("GET", "/v1/threads/{t}/messages/{m}"),
    ("DELETE", "/v1/threads/{t}/messages/{m}"),
    ("GET", "/admin/health"),
    ("GET", "/admin/stats"),
    ("GET", "/admin/threads"),
    ("GET", "/admin/keys"),
    ("GET", "/admin/keys/k"),
    ("GET", "/metrics"),
]


class Prepared(Api):
    """An application that holds one message of alice, and knows whether it still holds just that.

    What it refuses leaves it as it was: a test asks it of every route in turn.
    """

    asked = ""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.message("alice")
        self.before = self.state()

    def state(self) -> object:
        return self.store.stored

    def call(self, method: str, path: str, **more: Any) -> Reply:
        target = path.format(t=self.made["thread"], m=self.made["id"])
        self.asked = f"{method} {target[:200]}"
        key = BACKEND if path == "/v1/_sign" else ADMIN
        return self(method, target, **{"key": key, **more})


def assert_refused(api: Prepared, reply: Reply, *statuses: int) -> None:
    assert reply.status in (statuses or range(400, 500)), (api.asked, reply)
    assert len(reply.error) > 0, api.asked
    assert reply.finished, api.asked
    assert api.state() == api.before, api.asked


DEEP = limits.JSON_DEPTH_MAX + 1
BODIES: dict[str, bytes] = {
    "empty": b"",
    "space": b"  ",
    "no json": b"hello",
    "form": b"author=alice&body=x",
    "cut": b'{"author":"alice","body":"x"',
    "two values": b'{"author":"alice","body":"x"}{}',
    "array": b'[{"author":"alice","body":"x"}]',
    "string": b'"alice"',
    "number": b"7",
    "null": b"null",
    "true": b"true",
    "single quotes": b"{'author':'alice'}",
    "trailing comma": b'{"author":"alice","body":"x",}',
    "NaN": b'{"author":"alice","body":NaN}',
    "infinity": b'{"author":"alice","body":1e999,"title":1e999}',
    "author is a number": b'{"author":7,"body":"x","title":"x","id":7,"userId":7}',
    "author is an object": b'{"author":{"$ne":1},"body":"x","title":"x","id":{},"userId":{}}',
    "author is a list": b'{"author":["alice"],"body":"x","title":"x","id":[],"userId":[]}',
    "others are numbers": b'{"author":"alice","role":1,"title":1,"reaction":1,"id":"x","userId":1,"body":1}',
    "bad UTF-8": b'{"author":"alice","body":"\xff\xfe","title":"\xff"}',
    "bad UTF-8 in a name": b'{"author":"alice","\xff":"x","body":1,"title":"x"}',
    "bad UTF-8 in an unknown field": b'{"author":"alice","body":1,"title":"x","zzz":"\xc3"}',
    "overlong UTF-8": b'{"author":"alice","body":"\xc0\xaf","title":"\xc0\xaf"}',
    "UTF-16": '{"author":"alice","body":"x"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"author":"alice","body":"x","title":"x"}',
    "lone surrogate": b'{"author":"alice","body":"\\ud800","title":"\\ud800","reaction":"\\ud800","userId":"\\udfff"}',
    "NUL byte": b'{"author":"alice\x00","body":"x","title":"x"}',
    "NUL escape": b'{"author":"a\\u0000b","id":"\\u0000","reaction":"x","userId":"\\u0000","body":1,"title":"x"}',
    "control character": b'{"author":"alice","body":"a\x01b","title":"a\x01b"}',
    "deep arrays": b'{"author":"alice","title":"x","body":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"author":"alice","title":"x","body":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "deep in an unknown field": b'{"author":"alice","title":"x","body":1,"zzz":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "very deep": b'{"author":"alice","title":"x","body":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "very deep, unclosed": b"[" * 1_000_000,
    "very deep, unclosed objects": b'{"a":' * 200_000,
    "a number of 5,000 digits": b'{"author":"alice","title":7,"id":7,"userId":7,"body":' + b"9" * 5000 + b"}",
    "too large": b'{"author":"alice","title":"x","body":"' + b"x" * REQUEST_BYTES_MAX + b'"}',
    "ten megabytes": b'{"author":"alice","body":"' + b"x" * 10_000_000 + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_and_nothing_is_stored(name: str) -> None:
    api = Prepared()
    for method, path in WITH_BODY:
        reply = api.call(method, path, raw=BODIES[name], headers={"X-User-ID": "alice"})
        too_large = len(BODIES[name]) > REQUEST_BYTES_MAX
        assert_refused(api, reply, 413 if too_large else 400)


def test_too_large_a_body_is_refused_also_without_a_declared_length() -> None:
    api = Prepared()
    for method, path in WITH_BODY:
        assert_refused(api, api.call(method, path, chunks=[b"x" * 65536] * 40), 413)


def test_too_large_a_declared_length_is_refused_before_the_body() -> None:
    api = Prepared()
    reply = api.call("POST", "/v1/messages", chunks=[b"x", b"y"], headers={"Content-Length": str(10**12)})
    assert_refused(api, reply, 413)
    assert reply.headers["connection"] == "close"


def test_a_client_that_waits_for_100_continue_is_refused_at_once() -> None:
    api = Prepared()
    more = {"Content-Length": str(REQUEST_BYTES_MAX + 1), "Expect": "100-continue"}
    reply = api.call("POST", "/v1/messages", chunks=[b"x", b"y"], headers=more)
    assert_refused(api, reply, 413)


def test_a_message_of_one_mebibyte_is_stored_and_a_larger_one_is_not() -> None:
    api = Api()
    text = "x" * 1024 * 1024
    stored = api("POST", "/v1/messages", {"author": "alice", "body": text})
    assert (stored.status, stored.json["body"]) == (200, text)
    assert api("POST", "/v1/messages", {"author": "a", "body": "x" * REQUEST_BYTES_MAX}).status == 413


def test_a_body_is_measured_as_it_is_stored() -> None:
    """A body can grow when it is encoded again."""
    numbers = b",".join([b"1e15"] * 200_000)
    api = Prepared()
    reply = api.call("POST", "/v1/messages", raw=b'{"author":"alice","body":[' + numbers + b"]}")
    assert_refused(api, reply, 413)


MIB = 1024 * 1024
STALLING: dict[str, tuple[bytes, int]] = {
    "empty arrays": (b"[" + b",".join([b"[]"] * (MIB // 3)) + b"]", 413),
    "empty objects": (b"[" + b",".join([b"{}"] * (MIB // 3)) + b"]", 413),
    "nested arrays": (b"[" + b",".join([b"[" * 60 + b"]" * 60] * (MIB // 121)) + b"]", 413),
    "small numbers": (b"[" + b",".join([b"1"] * (MIB // 2)) + b"]", 413),
    "empty strings": (b"[" + b",".join([b'""'] * (MIB // 3)) + b"]", 413),
    "escaped backslashes": (b"[" + b",".join([rb'"\\"'] * (MIB // 5)) + b"]", 413),
    "names": (b"{" + b",".join(b'"%06x":1' % n for n in range(MIB // 11)) + b"}", 413),
    "long numbers": (b"[" + b",".join([b"9" * 4300] * (MIB // 4301)) + b"]", 400),
    "long fractions": (b"[" + b",".join([b"1." + b"9" * 1000] * (MIB // 1003)) + b"]", 400),
    "one number": (b"1." + b"9" * (MIB - 2), 400),
}


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/messages"), ("PUT", "/v1/threads/{t}")])
@pytest.mark.parametrize("name", STALLING)
def test_a_body_that_would_stall_the_loop_is_refused(name: str, method: str, path: str) -> None:
    raw, status = STALLING[name]
    api = Prepared()
    sent = b'{"author":"alice","title":"x","id":"x","reaction":"x","userId":"x","body":' + raw + b"}"
    assert_refused(api, api.call(method, path, raw=sent), status)


@pytest.mark.parametrize("number", ["1e300", "9.9e307", "1e-320", "2.2250738585072011e-308"])
def test_no_number_costs_much_more_than_another(number: str) -> None:
    """In time of this process's processor. A common way to read some floats takes hundreds of times as long."""
    api = Api()

    def cost_s(text: str) -> float:
        raw = b'{"author": "alice", "body": [' + b",".join([text.encode()] * 20_000) + b"]}"
        found = []
        for _ in range(3):
            begun_s = time.process_time()
            reply = api("POST", "/v1/messages", raw=raw, key=BACKEND)
            found.append(time.process_time() - begun_s)
            assert reply.json["body"] == [float(text)] * 20_000
        return min(found)

    assert cost_s(number) < 10 * cost_s("0.5")


@pytest.mark.parametrize("number", ["1e309", "-1e400", "1" + "0" * 310 + ".0"])
def test_a_number_beyond_every_float_is_refused(number: str) -> None:
    api = Api()
    raw = b'{"author": "alice", "body": [' + number.encode() + b"]}"
    assert api("POST", "/v1/messages", raw=raw, key=BACKEND).status == 400


def test_long_texts_of_any_characters_are_stored() -> None:
    for text in ("[{" * 250_000, "9" * 900_000, '\\"' * 250_000, "," * 900_000, '"' * 400_000, "\n\\" * 250_000):
        stored = Api()("POST", "/v1/messages", {"author": "a", "body": [text, [1, 2], 1e300, 10**319]})
        assert (stored.status, stored.json["body"][0] if stored.status == 200 else "") == (200, text)


def test_many_values_up_to_the_bounds_are_stored() -> None:
    count = limits.JSON_CONTAINERS_COUNT_MAX - 10
    for value, times in (({}, count), ("", limits.JSON_STRINGS_COUNT_MAX - 10), (1, limits.JSON_VALUES_COUNT_MAX - 10)):
        assert Api()("POST", "/v1/messages", {"author": "a", "body": [value] * times}).status == 200


def test_json_of_the_greatest_depth_is_stored() -> None:
    depth = limits.JSON_DEPTH_MAX - 1  # the request itself is one level
    raw = b'{"author":"alice","body":' + b"[" * depth + b"]" * depth + b"}"
    assert Api()("POST", "/v1/messages", raw=raw).status == 200


def test_many_brackets_in_strings_or_side_by_side_are_not_deep() -> None:
    body = {"text": '[[[[{{{{"\\[' * 1000, "list": [[{}]] * 1000}
    assert Api()("POST", "/v1/messages", {"author": "a", "body": body}).json["body"] == body


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@given(JSON_VALUES)
def test_the_depth_of_a_text_is_the_depth_of_its_value(value: object) -> None:
    assert json_depth(without_strings(json.dumps(value).encode())) == _depth(value)
    unescaped = json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    assert json_depth(without_strings(unescaped)) == _depth(value)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_are_an_internal_error(raw: bytes) -> None:
    api = Api()
    for path in ("/v1/messages", "/v1/threads", "/v1/_sign"):
        assert api("POST", path, raw=raw, headers={"X-User-ID": "alice"}).status in (200, 400)


# --- ids in paths, bodies and queries ---------------------------------------------------------------------------
BAD_IDS = [
    "a:b",
    "a%3Ab",
    "%00",
    "a%00b",
    "a%2Fb",
    "..%2f..%2fx",
    "a%20b",
    "é",
    "%C3%A9",
    "%FF",
    "x" * 129,
    "a*",
    "%0A",
]
ID_ROUTES = [case for case in WITH_BODY + WITHOUT_BODY if "{" in case[1]]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_id_that_no_record_can_have_is_a_404(bad: str) -> None:
    api = Prepared()
    body = {"body": 1, "title": "x", "id": "x", "reaction": "y", "members": ["x"]}
    for name, (method, path) in itertools.product(("{t}", "{m}"), ID_ROUTES):
        if name not in path:
            continue
        target = path.replace(name, bad) + "?author=alice"
        reply = api.call(method, target, body=body if (method, path) in WITH_BODY else None)
        if path.endswith("/versions"):
            assert (reply.status, reply.json.get("versions")) in ((200, []), (404, None))
        else:
            assert_refused(api, reply, 404)
    assert api.state() == api.before


@pytest.mark.parametrize("bad", ["a:b", "a/b", "a\x00b", "a b", "é", "x" * 129, "../x", "a\n"])
@pytest.mark.parametrize("field", ["thread", "reply_to"])
def test_an_id_in_a_body_must_be_one(field: str, bad: str) -> None:
    api = Prepared()
    assert_refused(api, api.call("POST", "/v1/messages", body={"author": "a", "body": 1, field: bad}), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "x" * 129},
        {"role": 7},
        {"reactions": {"bob": 7}},
        {"reactions": ["bob"]},
        {"reactions": {"x" * 129: "+1"}},
        {"reactions": {"a\x00": "+1"}},
        {"reactions": {"bob": "x" * 257}},
        {"reactions": {str(number): "+1" for number in range(1025)}},
    ],
)
def test_the_other_fields_of_a_message_have_bounds(fields: dict[str, Any]) -> None:
    api = Prepared()
    assert_refused(api, api.call("POST", "/v1/messages", body={"author": "a", "body": 1, **fields}), 400)


@pytest.mark.parametrize(("identity", "status"), [("x" * 129, 400), ("%00", 400), ("a%0Ab", 404), ("%7F", 400)])
def test_the_identity_of_a_reaction_has_bounds(identity: str, status: int) -> None:
    api = Prepared()
    assert_refused(api, api.call("DELETE", "/v1/messages/{m}/reactions/" + identity), status)


@pytest.mark.parametrize("query", ["thread=%00", "thread=a:b", "thread=a%2Fb", "thread=" + "x" * 129, "thread=%C3%A9"])
def test_a_thread_in_a_query_must_be_an_id(query: str) -> None:
    api = Prepared()
    assert_refused(api, api.call("GET", "/v1/messages?" + query), 400)


@pytest.mark.parametrize("name", ["title", "slug"])
def test_what_threads_are_searched_for_has_a_bound(name: str) -> None:
    api = Prepared()
    assert_refused(api, api.call("GET", f"/v1/threads?author=alice&{name}={'x' * 5000}"), 400)


# --- queries ----------------------------------------------------------------------------------------------------
READ_QUERY = [case for case in WITH_BODY + WITHOUT_BODY if case[1] in (
    "/v1/messages", "/v1/messages/{m}", "/v1/messages/{m}/versions", "/v1/messages/{m}/reactions", "/v1/threads",
    "/v1/threads/{t}", "/v1/threads/{t}/messages", "/v1/threads/{t}/messages/{m}",
)]  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "author=alice&author=alice",
        "author=alice&author=bob",
        "author=alice&%61uthor=bob",
        "author=alice&thread=a&thread=b",
        "author=alice&x=1&x=2",
        "author=%",
        "author=%4",
        "author=%zz",
        "author=%FF",
        "author=%C3",
        "%FF=1&author=alice",
        "author=alice&" + "&".join(f"p{number}=1" for number in range(40)),
    ],
)
def test_a_query_that_is_malformed_or_says_a_thing_twice_is_refused(query: str) -> None:
    api = Prepared()
    for method, path in READ_QUERY:
        body = {"body": 1, "title": "x", "id": "x", "reaction": "y"} if method in ("POST", "PUT") else None
        assert_refused(api, api.call(method, f"{path}?{query}", body=body), 400)


@pytest.mark.parametrize("author", ["%00", "a%0Ab", "x" * 129, "%C3%A9" * 65])
@pytest.mark.parametrize("path", ["/v1/threads", "/v1/threads/{t}", "/v1/threads/{t}/messages"])
def test_an_author_in_a_query_must_be_one_that_can_be_stored(path: str, author: str) -> None:
    api = Prepared()
    assert_refused(api, api.call("GET", f"{path}?author={author}"), 400)


# --- headers ----------------------------------------------------------------------------------------------------
TWICE = {
    "X-API-Key": [("X-API-Key", ADMIN), ("X-API-Key", ADMIN)],
    "two keys": [("X-API-Key", ADMIN), ("X-API-Key", "unknown")],
    "Authorization": [("Authorization", f"Bearer {ADMIN}"), ("authorization", f"Bearer {BACKEND}")],
    "X-User-ID": [("X-API-Key", ADMIN), ("X-User-ID", "alice"), ("X-User-ID", "bob")],
    "X-User-ID after a signed one": [("X-API-Key", ADMIN), *signed("alice").items(), ("X-User-ID", "bob")],
    "X-User-Signature": [("X-API-Key", ADMIN), *signed("alice").items(), ("X-User-Signature", signature("alice"))],
    "Idempotency-Key": [("X-API-Key", ADMIN), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")],
    "X-Identity": [("X-API-Key", ADMIN), ("X-Identity", "a"), ("X-Identity", "b")],
    "Content-Length": [("X-API-Key", ADMIN), ("Content-Length", "1"), ("Content-Length", "2")],
}


BODY = {"body": 1, "title": "x", "id": "x", "reaction": "y", "userId": "u"}


@pytest.mark.parametrize("name", TWICE)
def test_a_header_that_decides_anything_is_refused_when_it_is_sent_twice(name: str) -> None:
    api = Prepared()
    for method, path in WITH_BODY + WITHOUT_BODY:
        body = BODY if (method, path) in WITH_BODY else None
        assert_refused(api, api.call(method, path, key=None, body=body, headers=TWICE[name]), 400)


def test_a_user_id_in_a_header_must_be_utf_8() -> None:
    api = Prepared()
    for method, path in READ_QUERY:
        body = BODY if method in ("POST", "PUT") else None
        reply = api.call(method, path + "?thread=t", body=body, headers={"X-User-ID": "\udcff"})
        assert_refused(api, reply, 400)
        assert reply.error == "the header X-User-ID is not UTF-8"


def test_an_identity_in_a_header_must_be_utf_8() -> None:
    api = Prepared()
    headers = {"X-Identity": "\udcff"}
    assert_refused(api, api.call("POST", "/v1/messages/{m}/reactions", body={"reaction": "+1"}, headers=headers), 400)


# --- signatures -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers",
    [
        {"X-User-ID": "alice", "X-User-Signature": signature("bob")},
        {"X-User-ID": "alice", "X-User-Signature": signature("alice", "a-key-that-was-replaced")},
        {"X-User-ID": "alice", "X-User-Signature": "0" * 64},
        {"X-User-ID": "x" * 100_000, "X-User-Signature": "0" * 64},
        {"X-User-Signature": signature("")},
    ],
)
def test_a_signature_of_another_user_or_a_replaced_key_is_refused(headers: dict[str, str]) -> None:
    """On every route that takes a signature."""
    api = Prepared()
    for method, path in WITH_BODY + WITHOUT_BODY:
        if path != "/healthz":
            body = BODY if (method, path) in WITH_BODY else None
            assert_refused(api, api.call(method, path, body=body, headers=headers), 401)


@pytest.mark.parametrize(("method", "path"), WITH_BODY + WITHOUT_BODY)
def test_another_user_with_a_front_end_key_changes_nothing_of_alice_s(method: str, path: str) -> None:
    api = Prepared()
    body = {"body": 1, "title": "x", "id": "eve", "reaction": "y"} if (method, path) in WITH_BODY else None
    reply = api.call(method, path, key=FRONTEND, body=body, headers=signed("eve"))
    made = json.loads(reply.body or b"{}") if reply.status == 200 else {}
    assert made.get("author", "eve") == "eve", "what is alice's was answered to eve"
    thread, message = api.made["thread"], api.made["id"]
    kept = api("GET", f"/v1/threads/{thread}?author=alice", key=ADMIN).json
    assert (kept["title"], kept.get("deleted", False)) == ("New Thread #1", False)
    assert api.store.stored_versions[message] == 1
