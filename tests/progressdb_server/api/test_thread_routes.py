"""Threads and the administrators' routes as the contract describes them."""

from typing import Any
from urllib.parse import quote

import pytest

from progressdb_server.api.routes.threads import TITLE_TOO_LONG
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, signed

pytestmark = pytest.mark.usefixtures("both_engines")


def test_a_thread_has_the_fields_of_the_contract_and_no_empty_ones() -> None:
    thread = Api()("POST", "/v1/threads", {"title": "Général Talk!", "author": "alice", "id": "mine", "x": 1}).json
    assert thread["id"].startswith("thread-")
    assert thread == {
        "id": thread["id"],
        "title": "Général Talk!",
        "author": "alice",
        "slug": f"g-n-ral-talk-{thread['id']}",
        "created_ts": thread["created_ts"],
        "updated_ts": thread["updated_ts"],
    }


@pytest.mark.parametrize("sent", [{}, {"title": None}, {"title": ""}])
def test_a_thread_may_be_without_a_title(sent: dict[str, Any]) -> None:
    thread = Api()("POST", "/v1/threads", {"author": "alice", **sent}).json
    assert "title" not in thread
    assert thread["slug"] == f"t-{thread['id']}"


def titles(api: Api, query: str = "", **more: Any) -> list[str]:
    reply = api("GET", f"/v1/threads{query}", **more)
    assert reply.status == 200, reply
    return [thread["title"] for thread in reply.json["threads"]]


def test_an_author_lists_its_own_threads_by_part_of_the_title_or_by_slug() -> None:
    api = Api()
    for author, title in (("alice", "Alpha One"), ("alice", "beta two"), ("bob", "Alpha Three")):
        api.thread(author, title)
    assert titles(api, "?author=alice") == ["Alpha One", "beta two"]
    assert titles(api, "?author=alice&title=ALPHA") == ["Alpha One"]
    assert titles(api, "?author=alice&title=a") == ["Alpha One", "beta two"]
    assert titles(api, "?author=alice&title=a+t") == ["beta two"]
    assert titles(api, "?author=nobody") == []
    slug = api("GET", "/v1/threads?author=alice").json["threads"][1]["slug"]
    assert titles(api, f"?author=alice&slug={slug}") == ["beta two"]
    assert titles(api, f"?author=alice&slug={slug[:-1]}") == []
    assert titles(api, f"?author=bob&slug={slug}") == []
    assert titles(api, key=FRONTEND, headers=signed("bob")) == ["Alpha Three"]


def test_no_threads_is_an_empty_list() -> None:
    assert Api()("GET", "/v1/threads?author=alice").json == {"threads": []}


def test_a_deleted_thread_is_in_no_author_s_list() -> None:
    api = Api()
    thread = api.thread("alice")
    assert api("DELETE", f"/v1/threads/{thread}?author=alice").status == 204
    assert titles(api, "?author=alice") == []


def test_a_thread_is_read_by_its_author_only() -> None:
    api = Api()
    thread = api.thread("alice")
    assert api("GET", f"/v1/threads/{thread}?author=alice").json["id"] == thread
    assert api("GET", f"/v1/threads/{thread}", key=FRONTEND, headers=signed("alice")).status == 200
    for more in ({"headers": {"X-User-ID": "bob"}}, {"key": FRONTEND, "headers": signed("bob")}):
        reply = api("GET", f"/v1/threads/{thread}", **more)
        assert (reply.status, reply.error) == (403, "author does not match")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("thread", ["none", "a:b", "x" * 129, "%00", "..", "a%20b", "é"])
def test_an_unknown_thread_is_a_404(thread: str, method: str) -> None:
    body = {"title": "x"} if method == "PUT" else None
    reply = Api()(method, f"/v1/threads/{thread}?author=alice", body, key=ADMIN)
    assert (reply.status, reply.error) == (404, "thread not found")


def test_a_deleted_thread_is_unknown_to_everybody_but_an_admin() -> None:
    api = Api()
    thread = api.thread("alice")
    api("DELETE", f"/v1/threads/{thread}?author=alice")
    path = f"/v1/threads/{thread}?author=alice"
    for reply in (
        api("GET", path),
        api("GET", path, key=FRONTEND, headers=signed("alice")),
        api("PUT", path, {"title": "x"}),
        api("DELETE", path),
    ):
        assert (reply.status, reply.error) == (404, "thread not found")
    seen = api("GET", path, key=ADMIN).json
    assert seen["deleted"] is True
    assert seen["deleted_ts"] > 0


def test_the_deletion_of_a_thread_is_a_message_in_it() -> None:
    api = Api()
    thread = api.thread("alice")
    api("DELETE", f"/v1/threads/{thread}?author=alice")
    (event,) = api("GET", f"/v1/messages?thread={thread}&include_deleted=true", key=ADMIN).json["messages"]
    assert event["body"] == {"_event": "thread_deleted", "by": "alice"}


def test_a_new_title_makes_a_new_slug_and_nothing_else_changes() -> None:
    api = Api()
    thread = api("POST", "/v1/threads", {"title": "Old", "author": "alice"}).json
    sent = {"title": "New Name", "author": "alice", "id": "x", "slug": "y", "created_ts": 1, "deleted": True}
    renamed = api("PUT", f"/v1/threads/{thread['id']}", sent).json
    assert renamed["updated_ts"] > thread["updated_ts"]
    assert renamed == {
        **thread,
        "title": "New Name",
        "slug": f"new-name-{thread['id']}",
        "updated_ts": renamed["updated_ts"],
    }


def test_a_rename_needs_a_title() -> None:
    api = Api()
    thread = api.thread("alice")
    for sent in ({"author": "alice"}, {"author": "alice", "title": None}):
        reply = api("PUT", f"/v1/threads/{thread}", sent)
        assert (reply.status, reply.error) == (400, "title is required")


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
@pytest.mark.parametrize(("method", "body"), [("PUT", {"title": "x"}), ("DELETE", None)])
def test_nobody_changes_another_s_thread(method: str, body: object, key: str) -> None:
    api = Api()
    thread = api.thread("alice", "Mine")
    reply = api(method, f"/v1/threads/{thread}?author=bob", body, key=key)
    assert (reply.status, reply.error) == (403, "author does not match")
    assert titles(api, "?author=alice") == ["Mine"]


def test_a_title_has_a_bound() -> None:
    for path in ("/v1/threads", "/v1/threads/t"):
        reply = Api()("POST" if path == "/v1/threads" else "PUT", path, {"author": "a", "title": "é" * 2049})
        assert (reply.status, reply.error) == (400, TITLE_TOO_LONG)


# --- administrators ---------------------------------------------------------------------------------------------
def test_operators_see_health_and_counts_of_stored_versions() -> None:
    api = Api()
    message = api.message("alice")
    api("PUT", f"/v1/messages/{message['id']}", {"author": "alice", "body": 2})
    for key in (BACKEND, ADMIN):
        assert api("GET", "/admin/health", key=key).json == {"status": "ok", "service": "progressdb"}
        assert api("GET", "/admin/stats", key=key).json == {"threads": 1, "messages": 2}


def test_an_admin_sees_everybody_s_threads_deleted_ones_too() -> None:
    api = Api()
    gone = api.thread("alice", "Gone")
    api.thread("bob", "There")
    api("DELETE", f"/v1/threads/{gone}?author=alice")
    listed = api("GET", "/admin/threads", key=ADMIN).json["threads"]
    assert [(thread["title"], thread.get("deleted", False)) for thread in listed] == [("Gone", True), ("There", False)]


def test_an_admin_lists_stored_keys_and_reads_raw_values() -> None:
    api = Api()
    thread = api.thread("alice")
    key = f"thread:{thread}:meta"
    stored = dict(api.store.stored)
    assert sorted(api("GET", "/admin/keys", key=ADMIN).json["keys"]) == sorted(name.decode() for name in stored)
    assert api("GET", f"/admin/keys?prefix={key}", key=ADMIN).json == {"keys": [key]}
    assert api("GET", "/admin/keys?prefix=version:", key=ADMIN).json == {"keys": []}
    raw = api("GET", f"/admin/keys/{key}", key=ADMIN)
    assert (raw.body, raw.headers["content-type"]) == (stored[key.encode()], "application/octet-stream")
    for missing in ("nothing", "a/b", "%00", "x" * 1025):
        reply = api("GET", f"/admin/keys/{missing}", key=ADMIN)
        assert (reply.status, reply.error) == (404, "key not found")
    assert api("GET", f"/admin/keys?prefix={'x' * 1025}", key=ADMIN).status == 400


def test_a_page_of_a_list_names_the_next_one_and_the_last_one_names_none() -> None:
    api = Api()
    made = [api.thread("alice", f"T{number}") for number in range(5)]
    stored = sorted(name.decode() for name in dict(api.store.stored))
    for target, items, following, cursor, wanted in (
        ("/v1/threads?author=alice&", "threads", "older", "before", made),
        ("/admin/threads?", "threads", "older", "before", made),
        ("/admin/keys?", "keys", "next", "after", stored),
    ):
        query, pages = "limit=2", 0
        found: list[str] = []
        while query:
            answer = api("GET", target + query, key=ADMIN).json
            page = [one["id"] if items == "threads" else one for one in answer[items]]
            found, pages = (page + found if following == "older" else found + page), pages + 1
            query = f"limit=2&{cursor}={quote(answer[following])}" if following in answer else ""
        assert (sorted(found) if items == "keys" else found, pages) == (wanted, -(-len(wanted) // 2))
        assert api("GET", f"{target}limit=0", key=ADMIN).json == {items: []}
        assert following not in api("GET", target, key=ADMIN).json


@pytest.mark.one_engine("nothing is stored")
def test_metrics_count_by_route_and_never_by_what_a_client_sent() -> None:
    api = Api()
    api.message("alice")
    for path in ("/v1/messages/secret-id", "/secret-path"):
        api("GET", path)
    api("FROBNICATE", "/v1/messages")
    reply = api("GET", "/metrics")
    text = reply.body.decode()
    assert reply.headers["content-type"].startswith("text/plain")
    assert 'progressdb_http_requests_total{method="POST",route="/v1/messages",status="200"} 1.0' in text
    assert 'progressdb_http_requests_total{method="GET",route="/v1/messages/{message}",status="404"} 1.0' in text
    assert 'progressdb_http_requests_total{method="other",route="other",status="404"} 1.0' in text
    for sent in ("secret", "FROBNICATE"):
        assert sent not in text
