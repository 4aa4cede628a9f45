"""What the audit log says of requests that were refused, on a real daemon."""

from pathlib import Path

from minikms import api
from minikms.audit.queries import query
from minikms.audit.record import Event, escape
from tests.harness.callers import ROOT_GRANT, USER, PolicyDaemon
from tests.harness.waiting import wait_until

NAME = "spiffe://prod/a%20b"
POLICY = f"""
[[grant]]
principals = ["uid:{USER}"]
roles = ["create"]
threads = ["mine-*"]
"""


def test_a_request_that_is_refused_before_a_verb_leaves_a_line(public: Path) -> None:
    """Also one for an unknown path, with a wrong method or with too large a body; a refused create names its thread."""
    with PolicyDaemon(public, ROOT_GRANT + POLICY) as daemon:
        user = daemon.caller(USER)
        asked = ("X-Request-ID: r/1",)
        assert user.ask("GET", "/nothing", headers=asked).status == 404
        assert user.ask("GET", "/encrypt", headers=asked).status == 405
        assert user.post("/create_dek_for_thread", {"thread_id": "theirs-1"}).status == 403
        large = f"Content-Length: {api.ROOT_BODY_BYTES_MAX + 1}"
        user.sock.sendall(f"POST /unseal HTTP/1.1\r\nHost: x\r\n{large}\r\n\r\n{{".encode())
        assert user.receive().status == 413
        who = f"peer_uid:{USER}"
        wait_until(lambda: len([line for line in daemon.events("refused") if line["actor"] == who]) == 3)
        lines = [line for line in daemon.events("refused") if line["actor"] == who]
        assert [line["outcome"] for line in lines] == ["not_found", "method_not_allowed", "too_large"]
        assert [line["request_id"] for line in lines[:2]] == ["r/1"] * 2
        refused = daemon.events("create_dek")[-1]
        assert (refused["outcome"], refused["thread_id"]) == ("forbidden", "theirs-1")


def test_actor_and_request_are_found_as_typed_and_as_in_the_log() -> None:
    event = Event(type="encrypt", actor=escape(NAME), request_id=escape("r%1"))
    assert event.actor != NAME
    for typed in (NAME, event.actor):
        assert query(actor=typed).matches(event)
    for typed in ("r%1", event.request_id):
        assert query(request=typed).matches(event)
    assert not query(actor=NAME + "x").matches(event)
