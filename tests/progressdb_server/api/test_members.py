"""The members of a thread, over HTTP."""

from typing import Any

import pytest

from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, Reply, signed

pytestmark = pytest.mark.usefixtures("both_engines")

NOT_A_MEMBER = (403, "author is not a member of this thread")
NOT_FOUND_IN_IT = (403, "author not found in any message in this thread")


def as_user(api: Api, user: str, method: str, target: str, body: object = None, key: str = FRONTEND) -> Reply:
    return api(method, target, body, key=key, headers=signed(user))


def refusal(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.error


POSTS = ("/v1/messages", "/v1/threads/{t}/messages")


@pytest.mark.parametrize("path", POSTS)
def test_a_signed_user_posts_only_into_threads_that_it_is_a_member_of(path: str) -> None:
    api = Api()
    thread = api.thread("ann")
    target, body = path.format(t=thread), {"thread": thread, "body": 1}
    assert refusal(as_user(api, "eve", "POST", target, body)) == NOT_A_MEMBER
    assert refusal(as_user(api, "eve", "GET", f"/v1/messages?thread={thread}")) == NOT_FOUND_IN_IT
    assert api.store.stored_versions == {}
    assert as_user(api, "ann", "POST", target, body).status == 200
    added = as_user(api, "ann", "POST", f"/v1/threads/{thread}/members", {"members": ["ben"]})
    assert added.json == {"thread": thread, "members": ["ann", "ben"]}
    assert as_user(api, "ben", "POST", target, body).status == 200
    assert len(as_user(api, "ben", "GET", f"/v1/messages?thread={thread}").json["messages"]) == 2


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("key", [BACKEND, ADMIN])
@pytest.mark.parametrize("headers", [{"X-User-ID": "ben"}, signed("ben")])
def test_a_message_of_a_backend_makes_its_author_a_member(path: str, key: str, headers: dict[str, str]) -> None:
    api = Api()
    thread = api.thread("ann")
    assert api("POST", path.format(t=thread), {"thread": thread, "body": 1}, key=key, headers=headers).status == 200
    assert as_user(api, "ben", "GET", f"/v1/messages?thread={thread}").status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads/mine/messages"])
def test_a_named_thread_that_is_new_belongs_to_its_first_author(path: str) -> None:
    api = Api()
    assert as_user(api, "ann", "POST", path, {"thread": "mine", "body": 1}).status == 200
    assert as_user(api, "ann", "GET", "/v1/threads/mine/members").json["members"] == ["ann"]
    assert refusal(as_user(api, "eve", "POST", path, {"thread": "mine", "body": 1})) == NOT_A_MEMBER


EVERY_ROUTE: list[tuple[str, str, Any]] = [
    ("GET", "/v1/messages?thread={t}", None),
    ("POST", "/v1/messages", {"body": 1}),
    ("GET", "/v1/messages/{m}", None),
    ("PUT", "/v1/messages/{m}", {"body": 1}),
    ("DELETE", "/v1/messages/{m}", None),
    ("GET", "/v1/messages/{m}/versions", None),
    ("GET", "/v1/messages/{m}/reactions", None),
    ("POST", "/v1/messages/{m}/reactions", {"id": "ben", "reaction": "+"}),
    ("DELETE", "/v1/messages/{m}/reactions/ben", None),
    ("GET", "/v1/threads/{t}/messages", None),
    ("POST", "/v1/threads/{t}/messages", {"body": 1}),
    ("GET", "/v1/threads/{t}/messages/{m}", None),
    ("PUT", "/v1/threads/{t}/messages/{m}", {"body": 1}),
    ("DELETE", "/v1/threads/{t}/messages/{m}", None),
]


@pytest.mark.parametrize(("method", "path", "body"), EVERY_ROUTE)
def test_a_removed_member_is_refused_on_every_route_until_added_again(method: str, path: str, body: Any) -> None:
    api = Api()
    thread = api.thread("ann")
    message = api.message("ben", thread)["id"]
    target = path.format(t=thread, m=message)
    body = {**body, "thread": thread} if body else None
    members = f"/v1/threads/{thread}/members"
    assert as_user(api, "ann", "DELETE", f"{members}?member=ben").status == 204
    assert as_user(api, "ann", "DELETE", f"{members}?member=ben").status == 204
    before = api.store.stored
    assert refusal(as_user(api, "ben", method, target, body)) == NOT_A_MEMBER
    assert api.store.stored == before
    api("POST", members, {"members": ["ben"]})
    assert as_user(api, "ben", method, target, body).status < 300


def test_only_the_author_a_backend_and_an_admin_see_and_change_members() -> None:
    api = Api()
    thread = api.thread("ann")
    path = f"/v1/threads/{thread}/members"
    api("POST", path, {"members": ["ben"]})
    for user in ("ben", "eve"):
        for method, target, body in (
            ("GET", path, None),
            ("POST", path, {"members": [user]}),
            ("DELETE", f"{path}?member=ben", None),
        ):
            assert refusal(as_user(api, user, method, target, body)) == (403, "author does not match")
    for key in (BACKEND, ADMIN):
        assert api("GET", path, key=key).json["members"] == ["ann", "ben"]
        assert as_user(api, "eve", "GET", path, key=key).status == 200
        assert api("DELETE", f"{path}?member=ben", key=key).status == 204
        assert api("POST", path, {"members": ["ben"]}, key=key).status == 200
    assert refusal(api("DELETE", f"{path}?member=ann")) == (409, "the author of a thread can't be removed from it")
    api("DELETE", f"/v1/threads/{thread}?author=ann")
    for missing in (path, "/v1/threads/none/members"):
        assert refusal(api("GET", missing)) == (404, "thread not found")


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_a_backend_names_the_members_of_a_new_thread(key: str) -> None:
    api = Api()
    thread = api("POST", "/v1/threads", {"title": "T", "author": "ann", "members": ["ben", "cid"]}, key=key).json["id"]
    assert api("GET", f"/v1/threads/{thread}/members").json["members"] == ["ann", "ben", "cid"]
    assert as_user(api, "ben", "POST", f"/v1/threads/{thread}/messages", {"body": 1}).status == 200


BAD_MEMBERS: list[Any] = ["ben", [1], [""], ["x" * 129], ["a\nb"], ["m"] * 1025, {"a": 1}]


@pytest.mark.parametrize("members", [["ben"], *BAD_MEMBERS])
def test_members_of_a_new_thread_from_a_front_end_are_ignored_as_in_0_1(members: Any) -> None:
    api = Api()
    made = as_user(api, "ann", "POST", "/v1/threads", {"title": "T", "members": members})
    assert made.status == 200
    assert as_user(api, "ann", "GET", f"/v1/threads/{made.json['id']}/members").json["members"] == ["ann"]


@pytest.mark.parametrize("members", BAD_MEMBERS)
@pytest.mark.one_engine("refused before the store is asked")
def test_malformed_members_are_refused_and_nothing_is_made(members: Any) -> None:
    api = Api()
    assert api("POST", "/v1/threads", {"title": "T", "author": "ann", "members": members}).status == 400
    assert api.store.empty
    thread = api.thread("ann")
    assert api("POST", f"/v1/threads/{thread}/members", {"members": members}).status == 400
    for query in ("", "?member=", "?member=" + "x" * 129, "?member=a%0Ab", "?member=a&member=b"):
        assert api("DELETE", f"/v1/threads/{thread}/members{query}").status == 400


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_a_backend_reacts_as_any_identity_beside_a_signature_too(key: str) -> None:
    """The JavaScript SDK sends its default user's signature with every call."""
    api = Api()
    path = f"/v1/messages/{api.message('ann')['id']}/reactions"
    assert api("POST", path, {"id": "ann", "reaction": "-1"}).json["reactions"] == {"ann": "-1"}
    reacted = as_user(api, "default", "POST", path, {"id": "somebody", "reaction": "+1"}, key=key)
    assert (reacted.status, reacted.json["reactions"]) == (200, {"somebody": "+1"})
    assert "body" not in reacted.json, "a signed user reads a message as a member only"
    read = as_user(api, "ann", "POST", path, {"id": "somebody", "reaction": "+1"}, key=key).json
    assert "body" in read and read["reactions"] == {"ann": "-1", "somebody": "+1"}
    assert as_user(api, "default", "DELETE", f"{path}/somebody", key=key).status == 204
    with_reactions = {"body": 1, "reactions": {"somebody": "+1"}}
    assert as_user(api, "default", "POST", "/v1/messages", with_reactions, key=key).status == 200


def test_a_front_end_reacts_as_its_signed_user_only() -> None:
    api = Api()
    path = f"/v1/messages/{api.message('ann')['id']}/reactions"
    other = as_user(api, "ann", "POST", path, {"id": "ben", "reaction": "+1"})
    assert refusal(other) == (403, "author mismatch between signature and reaction id")
    assert refusal(as_user(api, "ben", "POST", path, {"id": "ben", "reaction": "+1"})) == NOT_FOUND_IN_IT
