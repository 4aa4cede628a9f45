"""Messages as the contract describes them, route by route."""

from typing import Any

import pytest

from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, signed
from tests.progressdb_server.api.tested_store import START_NS

pytestmark = pytest.mark.usefixtures("both_engines")


# --- create -----------------------------------------------------------------------------------------------------
def test_a_message_has_the_fields_of_the_contract_and_no_empty_ones() -> None:
    api = Api()
    thread = api.thread()
    message = api("POST", "/v1/messages", {"thread": thread, "author": "alice", "body": {"text": "hi"}}).json
    assert message.pop("id").startswith("msg-")
    assert message.pop("ts") > START_NS
    assert message == {"thread": thread, "author": "alice", "role": "user", "body": {"text": "hi"}}


def test_a_clients_id_time_deletion_and_unknown_fields_are_ignored() -> None:
    sent = {"id": "msg-1-1", "ts": 7, "deleted": True, "colour": "red", "author": "alice", "body": "x", "slug": []}
    message = Api()("POST", "/v1/messages", sent).json
    assert message["id"] != "msg-1-1"
    assert message["ts"] > START_NS
    assert "deleted" not in message
    assert "colour" not in message


def test_role_reply_and_reactions_are_kept() -> None:
    sent = {"author": "a", "role": "assistant", "body": 1, "reply_to": "msg-1-1", "reactions": {"bob": "+1"}}
    message = Api()("POST", "/v1/messages", sent).json
    assert (message["role"], message["reply_to"], message["reactions"]) == ("assistant", "msg-1-1", {"bob": "+1"})


def test_null_counts_as_absent() -> None:
    sent = {"thread": None, "author": None, "role": None, "reply_to": None, "reactions": None, "body": "x"}
    message = Api()("POST", "/v1/messages", sent, headers={"X-User-ID": "alice"}).json
    assert (message["author"], message["role"]) == ("alice", "user")


@pytest.mark.parametrize("body", ["", 0, False, [], {}, "x", 1.5, {"a": [1, None, {"b": "c"}]}, 2**63, -1])
def test_any_json_but_null_is_a_body_and_comes_back_as_it_was(body: object) -> None:
    message = Api()("POST", "/v1/messages", {"author": "a", "body": body}).json
    assert message["body"] == body
    assert type(message["body"]) is type(body)


@pytest.mark.parametrize("sent", [{"author": "a"}, {"author": "a", "body": None}])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads/t/messages"])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_body_is_required(path: str, sent: dict[str, Any]) -> None:
    api = Api()
    reply = api("POST", path, sent)
    assert (reply.status, reply.error) == (400, "body is required")
    assert api.store.empty


def test_without_a_thread_one_is_made_for_the_message_s_author() -> None:
    api = Api()
    first, second = api.message("alice"), api.message("bob")
    thread = api("GET", f"/v1/threads/{first['thread']}?author=alice").json
    assert (thread["author"], thread["title"]) == ("alice", "New Thread #1")
    assert api("GET", f"/v1/threads/{second['thread']}?author=bob").json["title"] == "New Thread #2"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads/made-up/messages"])
def test_a_named_thread_that_is_unknown_is_made_under_its_name(path: str) -> None:
    api = Api()
    message = api("POST", path, {"thread": "made-up", "author": "alice", "body": 1}).json
    assert message["thread"] == "made-up"
    assert api("GET", "/v1/threads/made-up?author=alice").json["author"] == "alice"


def test_within_a_thread_the_path_names_the_thread_whatever_the_body_says() -> None:
    api = Api()
    message = api("POST", "/v1/threads/right/messages", {"thread": "wrong", "author": "a", "body": 1}).json
    assert message["thread"] == "right"
    assert "wrong" not in api.store.stored_threads


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads/{t}/messages"])
def test_a_deleted_thread_takes_no_message(path: str) -> None:
    api = Api()
    thread = api.thread()
    api("DELETE", f"/v1/threads/{thread}?author=alice")
    reply = api("POST", path.format(t=thread), {"thread": thread, "author": "alice", "body": 1})
    assert (reply.status, reply.error) == (403, "thread deleted")


# --- read, list -------------------------------------------------------------------------------------------------
def listed(api: Api, query: str, **more: Any) -> list[Any]:
    reply = api("GET", f"/v1/messages?{query}", **more)
    assert reply.status == 200, reply
    return [message["body"] for message in reply.json["messages"]]


def filled(count: int = 10) -> tuple[Api, str, list[str]]:
    api = Api()
    thread = api.thread()
    return api, thread, [str(api.message("alice", thread, number)["id"]) for number in range(count)]


def test_a_list_names_its_thread_and_an_unknown_thread_s_is_empty() -> None:
    assert Api()("GET", "/v1/messages?thread=none").json == {"thread": "none", "messages": []}


def test_a_list_is_in_order_of_creation_and_an_edit_moves_nothing() -> None:
    api, thread, ids = filled(7)
    api("PUT", f"/v1/messages/{ids[2]}", {"author": "alice", "body": "edited"})
    assert listed(api, f"thread={thread}") == [0, 1, "edited", 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("limit", "bodies"),
    [("0", []), ("1", [9]), ("3", [7, 8, 9]), ("10", [*range(10)]), ("11", [*range(10)]), ("9" * 40, [*range(10)])],
)
def test_a_limit_keeps_the_most_recent(limit: str, bodies: list[int]) -> None:
    api, thread, _ = filled()
    assert listed(api, f"thread={thread}&limit={limit}") == bodies
    assert listed(api, f"thread={thread}&limit=00{limit}") == bodies


@pytest.mark.parametrize("limit", ["-1", "+1", "1.0", "x", "", "%20", "1_0", "0x10", "1e3", "%D9%A3", "%C2%B2"])
@pytest.mark.parametrize("path", ["/v1/messages?thread={t}&", "/v1/threads/{t}/messages?author=alice&"])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_limit_that_is_negative_or_no_number_is_refused(path: str, limit: str) -> None:
    api, thread, _ = filled(1)
    reply = api("GET", path.format(t=thread) + f"limit={limit}")
    assert (reply.status, reply.error) == (400, "limit must be a whole number that is not negative")


def test_before_and_after_are_message_ids_and_exclusive() -> None:
    api, thread, ids = filled()
    assert listed(api, f"thread={thread}&before={ids[3]}") == [0, 1, 2]
    assert listed(api, f"thread={thread}&after={ids[7]}") == [8, 9]
    assert listed(api, f"thread={thread}&before={ids[8]}&after={ids[5]}") == [6, 7]
    assert listed(api, f"thread={thread}&before={ids[8]}&limit=2") == [6, 7]


def test_paging_backwards_reads_every_message_once() -> None:
    api, thread, _ = filled(11)
    seen: list[int] = []
    before = ""
    while page := api("GET", f"/v1/messages?thread={thread}&limit=4{before}").json["messages"]:
        seen = [message["body"] for message in page] + seen
        before = f"&before={page[0]['id']}"
    assert seen == [*range(11)]


@pytest.mark.parametrize("query", ["before=", "after=a:b", "before=%00", "after=a%2Fb", "include_deleted=maybe"])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_malformed_cursor_or_switch_is_refused(query: str) -> None:
    api, thread, _ = filled(1)
    assert api("GET", f"/v1/messages?thread={thread}&{query}").status == 400


def test_deleted_messages_are_listed_only_when_asked_for() -> None:
    api, thread, ids = filled(3)
    api("DELETE", f"/v1/messages/{ids[1]}?author=alice")
    assert listed(api, f"thread={thread}") == [0, 2]
    assert listed(api, f"thread={thread}&include_deleted=false") == [0, 2]
    for word in ("true", "1"):
        assert listed(api, f"thread={thread}&include_deleted={word}") == [0, 1, 2]
        within = api("GET", f"/v1/threads/{thread}/messages?author=alice&include_deleted={word}").json["messages"]
        assert [message.get("deleted", False) for message in within] == [False, True, False]


@pytest.mark.parametrize("query", ["", "?thread="])
def test_a_list_needs_a_thread(query: str) -> None:
    reply = Api()("GET", f"/v1/messages{query}")
    assert (reply.status, reply.error) == (400, "missing thread query parameter")


def test_a_signed_user_lists_only_threads_that_it_owns_or_has_written_in() -> None:
    api = Api()
    thread = api.thread("alice")
    path = f"/v1/messages?thread={thread}"
    assert api("GET", path, key=FRONTEND, headers=signed("alice")).status == 200  # its own, though empty
    refused = api("GET", path, key=FRONTEND, headers=signed("bob"))
    assert (refused.status, refused.error) == (403, "author not found in any message in this thread")
    assert api("GET", path, key=BACKEND, headers=signed("bob")).status == 403
    assert api("GET", path, key=BACKEND, headers={"X-User-ID": "bob"}).status == 200
    api.message("bob", thread)
    assert api("GET", path, key=FRONTEND, headers=signed("bob")).status == 200


def test_within_a_thread_the_author_must_take_part_signed_or_not() -> None:
    api = Api()
    thread = api.thread("alice")
    path = f"/v1/threads/{thread}/messages"
    assert api("GET", path, headers={"X-User-ID": "alice"}).status == 200
    for more in ({"headers": {"X-User-ID": "bob"}}, {"key": FRONTEND, "headers": signed("bob")}):
        reply = api("GET", path, **more)
        assert (reply.status, reply.error) == (403, "author not found in any message in this thread")
    api.message("bob", thread)
    assert len(api("GET", path, headers={"X-User-ID": "bob"}).json["messages"]) == 1


@pytest.mark.parametrize("more", ["", "&include_deleted=true"])
def test_only_an_admin_lists_the_messages_of_a_deleted_thread(more: str) -> None:
    api = Api()
    thread = api.message("alice", body="private")["thread"]
    api("DELETE", f"/v1/threads/{thread}?author=alice")
    target = f"/v1/messages?thread={thread}{more}"
    for reply in (api("GET", target), api("GET", target, key=FRONTEND, headers=signed("alice"))):
        assert (reply.status, reply.error) == (404, "thread not found")
    other = api("GET", target, key=FRONTEND, headers=signed("mallory"))
    assert other.status == 403  # as for an unknown thread
    assert "private" in [message["body"] for message in api("GET", target, key=ADMIN).json["messages"]]


def test_nobody_but_an_admin_reads_in_a_deleted_thread_by_an_id() -> None:
    api = Api()
    message = api.message("alice", body="private")
    thread = message["thread"]
    api("POST", f"/v1/threads/{thread}/members", {"members": ["bob"]})
    api("DELETE", f"/v1/threads/{thread}?author=alice")
    callers: list[dict[str, Any]] = [{}, *[{"key": FRONTEND, "headers": signed(user)} for user in ("alice", "bob")]]
    for more in callers:
        for path in (f"/v1/messages/{message['id']}", f"/v1/messages/{message['id']}/reactions"):
            reply = api("GET", path, **more)
            assert (reply.status, reply.error) == (404, "message not found")
        in_thread = api("GET", f"/v1/threads/{thread}/messages/{message['id']}?author=alice")
        assert (in_thread.status, in_thread.error) == (404, "message not found")
        assert api("GET", f"/v1/messages/{message['id']}/versions", **more).json["versions"] == []
    for tail in ("", "/versions"):
        assert "private" in str(api("GET", f"/v1/messages/{message['id']}{tail}", key=ADMIN).json)
    assert api("GET", f"/v1/messages/{message['id']}/reactions", key=ADMIN).status == 200


def test_within_an_unknown_or_a_deleted_thread_there_is_no_list() -> None:
    api = Api()
    message = api.message("alice")
    api("DELETE", f"/v1/threads/{message['thread']}?author=alice")
    for thread in ("none", message["thread"]):
        reply = api("GET", f"/v1/threads/{thread}/messages?author=alice")
        assert (reply.status, reply.error) == (404, "thread not found")


ONE_MESSAGE = ["/v1/messages/{m}", "/v1/threads/{t}/messages/{m}"]


@pytest.mark.parametrize("path", ONE_MESSAGE)
def test_a_message_is_read_in_its_latest_version_also_when_it_is_deleted(path: str) -> None:
    api = Api()
    message = api.message("alice", body="first")
    target = path.format(t=message["thread"], m=message["id"]) + "?author=alice"
    assert api("GET", target).json == message
    api("PUT", target, {"body": "second"})
    assert api("GET", target).json["body"] == "second"
    api("DELETE", target)
    tombstone = api("GET", target).json
    assert (tombstone["deleted"], tombstone["body"]) == (True, "second")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/messages/msg-1-1", "/v1/threads/t/messages/msg-1-1", "/v1/messages/a:b"])
def test_an_unknown_message_is_a_404(path: str, method: str) -> None:
    reply = Api()(method, path + "?author=alice", {"body": 1} if method == "PUT" else None)
    assert (reply.status, reply.error) == (404, "message not found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_message_is_not_found_in_another_thread_than_its_own(method: str) -> None:
    api = Api()
    message, other = api.message("alice"), api.message("alice")
    target = f"/v1/threads/{other['thread']}/messages/{message['id']}?author=alice"
    reply = api(method, target, {"body": 1} if method == "PUT" else None)
    assert (reply.status, reply.error) == (404, "message not found")
    assert api.store.stored_versions[message["id"]] == 1


READS = ["/v1/messages/{m}", "/v1/messages/{m}/versions", "/v1/messages/{m}/reactions", "/v1/threads/{t}/messages/{m}"]


@pytest.mark.parametrize("path", READS)
def test_a_signed_user_reads_nothing_of_a_message_in_a_foreign_thread(path: str) -> None:
    api = Api()
    message = api.message("alice")
    target = path.format(t=message["thread"], m=message["id"])
    reply = api("GET", target, key=FRONTEND, headers=signed("bob"))
    assert (reply.status, reply.error) == (403, "author not found in any message in this thread")
    assert api("GET", target, key=FRONTEND, headers=signed("alice")).status == 200


# --- edit, delete, versions -------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ONE_MESSAGE)
def test_an_edit_appends_a_version_and_never_changes_the_thread(path: str) -> None:
    api = Api()
    message = api.message("alice", body="first")
    target = path.format(t=message["thread"], m=message["id"])
    sent = {"author": "alice", "body": "second", "role": "system", "thread": "other", "id": "x", "deleted": True}
    edited = api("PUT", target, sent).json
    assert edited["ts"] > message["ts"]
    assert edited == {**message, "body": "second", "role": "system", "ts": edited["ts"]}
    assert api("GET", f"/v1/messages/{message['id']}/versions").json == {
        "id": message["id"],
        "versions": [message, edited],
    }


def test_an_edit_without_a_role_keeps_the_role() -> None:
    api = Api()
    made = api("POST", "/v1/messages", {"author": "a", "role": "assistant", "body": 1}).json
    assert api("PUT", f"/v1/messages/{made['id']}", {"author": "a", "body": 2}).json["role"] == "assistant"


@pytest.mark.parametrize("path", ONE_MESSAGE)
@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_nobody_edits_another_s_message(key: str, path: str) -> None:
    api = Api()
    message = api.message("alice")
    target = path.format(t=message["thread"], m=message["id"])
    reply = api("PUT", target, {"author": "bob", "body": 1}, key=key)
    assert (reply.status, reply.error) == (403, "author does not match")
    assert api.store.stored_versions[message["id"]] == 1


def test_only_an_admin_deletes_another_s_message() -> None:
    api = Api()
    message = api.message("alice")
    target = f"/v1/messages/{message['id']}"
    for more in ({"headers": {"X-User-ID": "bob"}}, {"key": FRONTEND, "headers": signed("bob")}):
        reply = api("DELETE", target, **more)
        assert (reply.status, reply.error) == (403, "author does not match")
    assert api("DELETE", target, key=ADMIN, headers=signed("bob")).status == 403  # signed: it acts for bob alone
    assert api("DELETE", target, key=ADMIN, headers={"X-User-ID": "bob"}).status == 204


def test_versions_of_an_unknown_message_are_an_empty_list() -> None:
    for name in ("msg-1-1", "a:b"):
        assert Api()("GET", f"/v1/messages/{name}/versions").json == {"id": name, "versions": []}


def test_every_change_is_a_version_with_its_own_time() -> None:
    """The removal of a reaction is a version too."""
    api = Api()
    target = f"/v1/messages/{api.message('alice')['id']}"
    api("POST", f"{target}/reactions", {"id": "bob", "reaction": "+1"})
    api("DELETE", f"{target}/reactions/bob")
    api("PUT", target, {"author": "alice", "body": "edited"})
    api("DELETE", f"{target}?author=alice")
    versions = api("GET", f"{target}/versions").json["versions"]
    assert [version.get("reactions") for version in versions] == [None, {"bob": "+1"}, None, None, None]
    assert [version["body"] for version in versions] == ["hello", "hello", "hello", "edited", "edited"]
    assert [version.get("deleted", False) for version in versions] == [False] * 4 + [True]
    times = [version["ts"] for version in versions]
    assert times == sorted(set(times))


# --- versions ---------------------------------------------------------------------------------------------------
def test_versions_are_paged_backwards_with_what_the_page_before_says() -> None:
    api = Api()
    message = api.message(body=0)["id"]
    target = f"/v1/messages/{message}/versions"
    for number in range(1, 8):
        api("PUT", f"/v1/messages/{message}", {"author": "alice", "body": number})
    whole = api("GET", target).json
    assert (whole["id"], "older" in whole) == (message, False)
    page = api("GET", f"{target}?limit=3").json
    found = page["versions"]
    while "older" in page:
        page = api("GET", f"{target}?limit=3&before={page['older']}").json
        found = page["versions"] + found
    assert found == whole["versions"]
    before = api("GET", f"{target}?before={whole['versions'][2]['ts']}").json
    assert before["versions"] == whole["versions"][:2]
    assert api("GET", f"{target}?limit=0").json == {"id": message, "versions": []}


@pytest.mark.parametrize("query", ["before=", "before=x", "before=1-1", "before=" + "9" * 21, "limit=-1", "limit=x"])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_malformed_page_of_versions_is_refused(query: str) -> None:
    api = Api()
    assert api("GET", f"/v1/messages/{api.message()['id']}/versions?{query}").status == 400
    assert api("GET", f"/v1/messages/msg-1-000001/versions?{query}").status == 400
