"""`ETag`, `If-None-Match` and 304 for the lists of a thread, as RFC 9110 says."""

from typing import Any

import pytest

from progressdb_server.api.gate.head import names_tag
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, Reply, signed
from tests.progressdb_server.api.real_server import RealServer

ALICE = {"X-User-ID": "alice"}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (b'W/"abc"', True),
        (b'"abc"', True),
        (b"*", True),
        (b" * ", True),
        (b'"x", W/"abc" , "y"', True),
        (b'W/"abcd"', False),
        (b'"x,abc,y"', False),
        (b"abc", False),
        (b'W/abc"', False),
        (b'"*"', False),
        (b'"', False),
        (b"", False),
        (b'"' * 30_000, False),
    ],
)
def test_the_comparison_of_tags_is_weak(value: bytes, named: bool) -> None:
    assert names_tag(value, b"abc") is named


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def thread(api: Api) -> str:
    thread = api.thread()
    for n in range(3):
        api.message("alice", thread, f"hello {n}")
    return thread


def paths(thread: str) -> list[str]:
    return [f"/v1/messages?thread={thread}", f"/v1/threads/{thread}/messages"]


def again(api: Api, path: str, first: Reply, **more: Any) -> Reply:
    """The same request with the `ETag` that `first` had."""
    headers = {**ALICE, **more.pop("headers", {}), "If-None-Match": first.headers["etag"]}
    return api("GET", path, headers=headers, **more)


@pytest.mark.parametrize("path", [0, 1])
def test_an_unchanged_list_is_a_304_without_a_body(api: Api, thread: str, path: int) -> None:
    target = paths(thread)[path]
    first = api("GET", target, headers=ALICE)
    assert first.headers["etag"].startswith('W/"')
    second = again(api, target, first)
    assert (second.status, second.body) == (304, b"")
    assert "content-type" not in second.headers
    for name in ("etag", "cache-control"):
        assert second.headers[name] == first.headers[name]
    assert "x-request-id" in second.headers


@pytest.mark.parametrize("path", [0, 1])
def test_a_changed_list_is_sent_with_another_tag(api: Api, thread: str, path: int) -> None:
    target = paths(thread)[path]
    first = api("GET", target, headers=ALICE)
    api.message("alice", thread, "news")
    second = again(api, target, first)
    assert (second.status, len(second.json["messages"])) == (200, 4)
    assert second.headers["etag"] != first.headers["etag"]


def test_no_cache_may_share_a_list_or_use_it_without_asking(api: Api, thread: str) -> None:
    assert api("GET", paths(thread)[0]).headers["cache-control"] == "private, no-cache"


def test_the_tag_of_another_page_counts_for_nothing(api: Api, thread: str) -> None:
    first = api("GET", f"{paths(thread)[0]}&limit=2")
    second = again(api, paths(thread)[0], first)
    assert (second.status, len(second.json["messages"])) == (200, 3)


def test_a_removed_member_gets_no_304(api: Api, thread: str) -> None:
    api("POST", f"/v1/threads/{thread}/members", {"members": ["bob"]}, headers=ALICE)
    bob = signed("bob")
    first = api("GET", paths(thread)[0], key=FRONTEND, headers=bob)
    assert again(api, paths(thread)[0], first, key=FRONTEND, headers=bob).status == 304
    api("DELETE", f"/v1/threads/{thread}/members?member=bob", headers=ALICE)
    for path in paths(thread):
        assert again(api, path, first, key=FRONTEND, headers=bob).status == 403


def test_a_deleted_thread_is_a_404_and_never_a_304(api: Api, thread: str) -> None:
    first = api("GET", paths(thread)[0], headers=ALICE)
    api("DELETE", f"/v1/threads/{thread}", headers=ALICE)
    for path in paths(thread):
        assert again(api, path, first, key=BACKEND).status == 404
    assert again(api, paths(thread)[0], first, key=ADMIN).status == 200


def test_an_unknown_key_or_a_bad_query_comes_before_the_comparison(api: Api, thread: str) -> None:
    first = api("GET", paths(thread)[0])
    assert again(api, paths(thread)[0], first, key="unknown").status == 401
    assert again(api, f"{paths(thread)[0]}&limit=x", first).status == 400


def test_the_header_sent_twice_counts_as_not_sent(api: Api, thread: str) -> None:
    etag = api("GET", paths(thread)[0]).headers["etag"]
    assert api("GET", paths(thread)[0], headers=[("If-None-Match", etag), ("If-None-Match", etag)]).status == 200


def test_the_whole_server_sends_a_304_until_the_thread_changes(server: RealServer) -> None:
    made = server("POST", "/v1/messages", {"author": "alice", "body": "hello"}).json
    target = f"/v1/messages?thread={made['thread']}"

    def conditional(etag: str) -> Any:
        return server("GET", target, headers={"If-None-Match": etag})

    first = server("GET", target)
    wait_until(lambda: conditional(first.headers["etag"]).status == 304)  # the key service has read its files
    server("POST", f"/v1/messages/{made['id']}/reactions", {"id": "bob", "reaction": "+1"})
    second = conditional(first.headers["etag"])
    assert (second.status, second.json["messages"][0]["reactions"]) == (200, {"bob": "+1"})
    assert conditional(second.headers["etag"]).status == 304
