"""Reactions to messages, creates that are retried, and what the store's errors become."""

import re
from typing import Any

import pytest

from progressdb_server.api.gate.errors import AUTHOR_TOO_LONG
from progressdb_server.api.gate.keys import KeyTable
from progressdb_server.api.routes.messages import REACTION_TOO_LONG
from progressdb_server.store.model import (
    IdempotencyConflictError,
    InvalidThreadIdError,
    RecordUnreadableError,
    StoreError,
    StoreUnavailableError,
)
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, Api, signed
from tests.progressdb_server.api.http_server import running

pytestmark = pytest.mark.usefixtures("both_engines")


# --- reactions --------------------------------------------------------------------------------------------------
def test_reactions_are_set_listed_and_removed() -> None:
    api = Api()
    message = api.message("alice")
    target = f"/v1/messages/{message['id']}/reactions"
    assert api("GET", target).json == {"id": message["id"], "reactions": []}
    answered = api("POST", target, {"id": "bob", "reaction": "+1"}).json
    assert (answered["id"], answered["reactions"]) == (message["id"], {"bob": "+1"})
    api("POST", target, {"reaction": "♥"}, headers={"X-Identity": "carol"})
    api("POST", target, {"id": "bob", "reaction": "-1"}, headers={"X-Identity": "carol"})
    assert api("GET", target).json["reactions"] == [{"id": "bob", "reaction": "-1"}, {"id": "carol", "reaction": "♥"}]
    assert api("DELETE", f"{target}/bob").status == 204
    assert api("DELETE", f"{target}/bob").status == 204  # also when it is absent
    assert api("GET", target).json["reactions"] == [{"id": "carol", "reaction": "♥"}]


@pytest.mark.parametrize("path", ["team/bob", "team%2Fbob", "%74eam/bob"])
@pytest.mark.one_engine("its server has an event loop of its own")
def test_an_identity_with_a_slash_is_removed_by_its_path(path: str) -> None:
    with running() as server:
        message = server.api.message("alice")
        target = f"/v1/messages/{message['id']}/reactions"
        server.api("POST", target, {"id": "team/bob", "reaction": "+1"})
        (reply,) = server.exchange(request("DELETE", f"{target}/{path}"))
        assert reply.status == 204
        assert server.api("GET", target).json["reactions"] == []


@pytest.mark.parametrize("path", ["%ff", "%c3", "a%ed%a0%80", ""])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_path_that_is_no_text_names_no_identity(path: str) -> None:
    """The bytes that are no UTF-8 are read as U+FFFD, which is another identity."""
    with running() as server:
        message = server.api.message("alice")
        target = f"/v1/messages/{message['id']}/reactions"
        server.api("POST", target, {"id": "\ufffd", "reaction": "+1"})
        (reply,) = server.exchange(request("DELETE", f"{target}/{path}"))
        assert (reply.status, reply.json) == (404, {"error": "not found"})
        assert len(server.api("GET", target).json["reactions"]) == 1


def request(method: str, target: str) -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\n\r\n".encode()


@pytest.mark.parametrize(
    "sent", [{}, {"id": "bob"}, {"reaction": "+1"}, {"id": "", "reaction": "+1"}, {"id": "bob", "reaction": ""}]
)
@pytest.mark.one_engine("refused before the store is asked")
def test_a_reaction_needs_an_identity_and_a_value(sent: dict[str, str]) -> None:
    api = Api()
    message = api.message("alice")
    reply = api("POST", f"/v1/messages/{message['id']}/reactions", sent)
    assert (reply.status, reply.error) == (400, "missing id or reaction")


@pytest.mark.parametrize(
    ("method", "tail", "body"),
    [("GET", "", None), ("POST", "", {"id": "bob", "reaction": "+1"}), ("DELETE", "/bob", None)],
)
def test_reactions_of_an_unknown_message_are_a_404(method: str, tail: str, body: object) -> None:
    reply = Api()(method, f"/v1/messages/msg-1-1/reactions{tail}", body)
    assert (reply.status, reply.error) == (404, "message not found")


@pytest.mark.parametrize(
    ("reactions", "error"),
    [
        ({"": "x" * 257}, REACTION_TOO_LONG),
        ({"bob": "x" * 257}, REACTION_TOO_LONG),
        ({"b" * 129: ""}, AUTHOR_TOO_LONG),
        ({"b" * 129: "+1"}, AUTHOR_TOO_LONG),
    ],
)
@pytest.mark.one_engine("refused before the store is asked")
def test_a_new_message_with_a_reaction_that_is_too_long_is_refused(reactions: dict[str, str], error: str) -> None:
    api = Api()
    reply = api("POST", "/v1/messages", {"author": "alice", "body": 1, "reactions": reactions})
    assert (reply.status, reply.error) == (400, error)
    assert api.store.empty


def test_a_new_message_drops_reactions_without_an_identity_or_a_value() -> None:
    sent = {"author": "alice", "body": 1, "reactions": {"": "+1", "bob": "", "carol": "+1"}}
    assert Api()("POST", "/v1/messages", sent).json["reactions"] == {"carol": "+1"}


def test_a_signed_user_reacts_only_as_itself() -> None:
    api = Api()
    message = api.message("alice")
    target = f"/v1/messages/{message['id']}/reactions"
    as_alice: dict[str, Any] = {"key": FRONTEND, "headers": signed("alice")}
    for reply in (
        api("POST", target, {"id": "bob", "reaction": "+1"}, **as_alice),
        api("DELETE", f"{target}/bob", **as_alice),
        api("POST", "/v1/messages", {"body": 1, "reactions": {"bob": "+1"}}, **as_alice),
    ):
        assert (reply.status, reply.error) == (403, "author mismatch between signature and reaction id")
    assert api("POST", target, {"id": "alice", "reaction": "+1"}, **as_alice).status == 200


# --- what the store says ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (StoreUnavailableError("the key service is not available", 3), 503, "the key service is not available"),
        (RecordUnreadableError("the record k can't be read"), 500, "the record k can't be read"),
        (IdempotencyConflictError(), 409, "this Idempotency-Key was used before with another request"),
        (InvalidThreadIdError("x"), 400, InvalidThreadIdError.text),
        (StoreError("private text"), 500, "internal error"),
        (ValueError("private text"), 500, "internal error"),
        (RecursionError("private text"), 500, "internal error"),
    ],
)  # fmt: skip
@pytest.mark.one_engine("the test replaces what the store answers")
def test_a_store_s_error_becomes_a_sentence(
    error: Exception, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Api()
    message = api.message()
    api.store.fail(error)
    for reply in (
        api("POST", "/v1/messages", {"author": "a", "body": 1}),
        api("GET", f"/v1/messages/{message['id']}"),
        api("GET", f"/v1/messages?thread={message['thread']}"),
    ):
        assert (reply.status, reply.error) == (status, sentence)
        assert reply.headers.get("retry-after") == ("3" if status == 503 else None)
    assert "private text" not in "".join(capsys.readouterr())


# --- Idempotency-Key --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads", "/v1/threads/t/messages"])
def test_a_retried_create_with_an_idempotency_key_is_stored_once(path: str) -> None:
    api = Api()
    replies = [
        api("POST", path, {"author": "alice", **TWO_FIELDS}, headers={"Idempotency-Key": "retry-1"}) for _ in range(4)
    ]
    assert {reply.status for reply in replies} == {200}
    assert len({reply.body for reply in replies}) == 1
    other = api("POST", path, {"author": "alice", "body": "y", "title": "y"}, headers={"Idempotency-Key": "retry-1"})
    assert (other.status, other.error) == (409, "this Idempotency-Key was used before with another request")


TWO_FIELDS = {"body": "x", "title": "x"}


def test_an_idempotency_key_counts_for_one_api_key_and_one_author() -> None:
    api = Api()
    made = {
        api("POST", "/v1/messages", {"author": author, "body": 1}, key=key, headers={"Idempotency-Key": "k"}).json["id"]
        for author in ("alice", "bob")
        for key in (BACKEND, ADMIN)
    }
    assert len(made) == 4
    signed_ids = {
        api("POST", "/v1/messages", {"body": 1}, key=key, headers={**signed("alice"), "Idempotency-Key": "k"}).json[
            "id"
        ]
        for key in (FRONTEND, BACKEND)
    }
    assert len(signed_ids - made) == 1  # the backend's call as alice is the one from above


def test_idempotency_scopes_cannot_be_derived_from_a_front_end_key() -> None:
    """Nor can those of callers without a key. All of them depend on the backend keys, and give away no author."""
    one = KeyTable(backend=("b1", "b2"), frontend=("f",))
    other = KeyTable(backend=("b3", "b2"), frontend=("f",))
    of_one, of_other = one.find(b"f"), other.find(b"f")
    assert of_one is not None
    assert of_other is not None
    assert re.fullmatch("[0-9a-f]{64}", of_one.scope("alice"))
    assert of_one.scope("alice") != of_other.scope("alice")
    assert one.anonymous.scope("alice") != other.anonymous.scope("alice")
    assert one.anonymous.scope("alice") != of_one.scope("alice")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\x7f"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/threads"])
@pytest.mark.one_engine("refused before the store is asked")
def test_a_malformed_idempotency_key_is_refused(path: str, key: str) -> None:
    api = Api()
    reply = api("POST", path, {"author": "a", **TWO_FIELDS}, headers={"Idempotency-Key": key})
    assert (reply.status, reply.error) == (400, "the Idempotency-Key must be 1 to 255 visible ASCII characters")
    assert api.store.empty
