"""The real client, unmodified, against real processes: every method that it has, and its `request` for the rest."""

from collections.abc import Iterator

import pytest

from progressdb_server.api.gate.errors import INVALID_SIGNATURE, MISSING_SIGNATURE, UNAUTHORIZED
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, signature
from tests.progressdb_server.api.real_server import RealServer
from tests.progressdb_server.api.sdk import TEST_S_MAX, ApiError, Sdk

pytestmark = pytest.mark.timeout(TEST_S_MAX)


@pytest.fixture(scope="module")
def sdk(server: RealServer) -> Iterator[Sdk]:
    client = Sdk(f"http://127.0.0.1:{server.port}")
    yield client
    client.close()


def refusal(status: int, sentence: str) -> pytest.RaisesExc[ApiError]:
    return pytest.raises(ApiError, match=rf"{status}.*{sentence}")


def test_a_backend_signs_users_and_sees_health_and_counts(sdk: Sdk) -> None:
    backend = sdk(BACKEND)
    assert backend.sign_user("user-1") == {"userId": "user-1", "signature": signature("user-1")}
    assert backend.admin_health() == {"status": "ok", "service": "progressdb"}
    before = backend.admin_stats()
    thread = backend.create_thread({"title": "Counted"}, author="stats")
    backend.create_message({"thread": thread["id"], "body": {"text": "hi"}}, author="stats")
    assert backend.admin_stats() == {"threads": before["threads"] + 1, "messages": before["messages"] + 1}


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_threads_are_created_listed_read_renamed_and_deleted(sdk: Sdk, key: str) -> None:
    client, author = sdk(key), f"service-{key}"
    general = client.create_thread({"title": "General", "metadata": {"x": 1}}, author=author)
    other = client.create_thread({"title": "Other"}, author=author)
    assert [one["id"] for one in client.list_threads(author)["threads"]] == [general["id"], other["id"]]
    assert client.list_threads(author, title="gener")["threads"] == [general]
    assert client.list_threads(author, slug=other["slug"])["threads"] == [other]
    assert client.get_thread(general["id"], author=author) == general
    renamed = client.update_thread(general["id"], {"title": "Renamed"}, author=author)
    assert (renamed["title"], renamed["slug"]) == ("Renamed", f"renamed-{general['id']}")
    with refusal(403, "author does not match"):
        client.get_thread(general["id"], author="somebody else")
    assert client.delete_thread(general["id"], author=author) is None
    assert client.list_threads(author)["threads"] == [other]
    with refusal(403, "thread deleted"):
        client.create_message({"thread": general["id"], "body": 1}, author=author)
    if key == BACKEND:
        with refusal(404, "thread not found"):
            client.get_thread(general["id"], author=author)
    else:
        assert client.get_thread(general["id"], author=author)["deleted"] is True


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_messages_are_created_listed_read_edited_and_deleted(sdk: Sdk, key: str) -> None:
    client = sdk(key)
    thread = client.create_thread({"title": "Talk"}, author="alice")["id"]
    made = [client.create_message({"thread": thread, "body": {"n": n}}, author="alice") for n in range(3)]
    assert client.list_messages(thread=thread) == {"thread": thread, "messages": made}
    assert client.list_messages(thread=thread, limit=2)["messages"] == made[1:]
    assert client.get_message(made[0]["id"], author="alice") == made[0]
    edited = client.update_message(made[0]["id"], {"body": {"n": "edited"}}, author="alice")
    assert client.list_messages(thread=thread)["messages"] == [edited, *made[1:]]
    with refusal(403, "author does not match"):
        client.update_message(made[0]["id"], {"body": 1}, author="bob")
    assert client.delete_message(made[1]["id"], author="alice") is None
    assert client.list_messages(thread=thread)["messages"] == [edited, made[2]]
    assert client.get_message(made[1]["id"], author="alice")["deleted"] is True
    with refusal(404, "message not found"):
        client.get_message("msg-1-1", author="alice")
    with refusal(400, "missing thread query parameter"):
        client.list_messages()


def test_a_message_without_a_thread_makes_one(sdk: Sdk) -> None:
    message = sdk(BACKEND).create_message({"body": "first words"}, author="newcomer")
    (thread,) = sdk(BACKEND).list_threads("newcomer")["threads"]
    assert (thread["id"], thread["author"]) == (message["thread"], "newcomer")
    assert thread["title"].startswith("New Thread #")


@pytest.mark.parametrize("key", [BACKEND, ADMIN])
def test_request_reaches_versions_reactions_and_the_routes_of_a_thread(sdk: Sdk, key: str) -> None:
    request = sdk(key).request
    as_alice = {"X-User-ID": "alice"}
    thread = request("POST", "/v1/threads", {"title": "T"}, headers=as_alice)["id"]
    message = request("POST", f"/v1/threads/{thread}/messages", {"body": "one"}, headers=as_alice)
    path = f"/v1/messages/{message['id']}"
    reacted = request("POST", f"{path}/reactions", {"id": "bob", "reaction": "+1"})
    assert reacted["reactions"] == {"bob": "+1"}
    assert request("GET", f"{path}/reactions") == {"id": message["id"], "reactions": [{"id": "bob", "reaction": "+1"}]}
    assert request("DELETE", f"{path}/reactions/bob") is None
    within = f"/v1/threads/{thread}/messages/{message['id']}"
    edited = request("PUT", within, {"body": "two"}, headers=as_alice)
    assert request("GET", within, headers=as_alice) == edited
    versions = request("GET", f"{path}/versions")["versions"]
    assert [version["body"] for version in versions] == ["one", "one", "one", "two"]
    listed = request("GET", f"/v1/threads/{thread}/messages?limit=1", headers=as_alice)
    assert listed == {"thread": thread, "messages": [edited]}
    assert request("DELETE", within, headers=as_alice) is None
    assert request("GET", f"/v1/threads/{thread}/messages", headers=as_alice)["messages"] == []


def test_an_administrator_reads_all_threads_and_stored_values(sdk: Sdk) -> None:
    thread = sdk(BACKEND).create_thread({"title": "Seen by all admins"}, author="alice")
    request = sdk(ADMIN).request
    assert thread in request("GET", "/admin/threads")["threads"]
    keys = request("GET", f"/admin/keys?prefix=thread:{thread['id']}:")["keys"]
    assert f"thread:{thread['id']}:meta" in keys
    assert "Seen by all admins" not in request("GET", f"/admin/keys/thread:{thread['id']}:meta")
    for path in ("/admin/threads", "/admin/keys"):
        with refusal(403, "forbidden"):
            sdk(BACKEND).request("GET", path)


def test_a_signed_front_end_user_talks_with_its_partners_only(sdk: Sdk) -> None:
    signed = {user: {**sdk(BACKEND).sign_user(user)} for user in ("ann", "ben", "eve")}
    headers = {user: {"X-User-ID": user, "X-User-Signature": made["signature"]} for user, made in signed.items()}
    request = sdk(FRONTEND).request
    thread = request("POST", "/v1/threads", {"title": "Ours"}, headers=headers["ann"])
    first = request("POST", "/v1/messages", {"thread": thread["id"], "body": "hi"}, headers=headers["ann"])
    request("POST", f"/v1/threads/{thread['id']}/messages", {"body": "hello"}, headers=headers["ben"])
    for user in ("ann", "ben"):
        listed = request("GET", f"/v1/messages?thread={thread['id']}", headers=headers[user])["messages"]
        assert [(one["author"], one["body"]) for one in listed] == [("ann", "hi"), ("ben", "hello")]
    path = f"/v1/messages/{first['id']}"
    request("POST", f"{path}/reactions", {"id": "ben", "reaction": "+1"}, headers=headers["ben"])
    assert request("GET", path, headers=headers["ann"])["reactions"] == {"ben": "+1"}
    assert len(request("GET", f"{path}/versions", headers=headers["ann"])["versions"]) == 2
    with refusal(403, "author not found in any message in this thread"):
        request("GET", f"/v1/messages?thread={thread['id']}", headers=headers["eve"])
    with refusal(403, "author does not match"):
        request("PUT", path, {"body": "mine"}, headers=headers["eve"])
    with refusal(403, "author mismatch between signature and body author"):
        request("POST", "/v1/messages", {"author": "ann", "body": "x"}, headers=headers["eve"])
    with refusal(401, INVALID_SIGNATURE):
        request("GET", path, headers={**headers["eve"], "X-User-ID": "ann"})
    with refusal(401, MISSING_SIGNATURE):
        request("GET", path)
    with refusal(403, "forbidden"):
        sdk(FRONTEND).admin_health()
    with refusal(403, "forbidden"):
        sdk(FRONTEND).sign_user("ann")


def test_an_unknown_key_is_refused(sdk: Sdk) -> None:
    with refusal(401, UNAUTHORIZED):
        sdk("unknown").admin_health()
