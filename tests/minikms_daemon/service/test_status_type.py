"""`status()` is a value with types: it has each member that the daemon sends, and takes a daemon of another age."""

from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api.errors import KmsProtocolError
from minikms.client import Client
from minikms.client.calls import make_call
from minikms.client.wire import Answer
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import new_key, post, status


def read(body: bytes) -> api.StatusAnswer:
    return make_call(api.STATUS, api.Request()).read(Answer(200, body, reusable=True))


def test_every_member_of_the_wire_is_in_the_type(daemon: LiveDaemon) -> None:
    """A member that is added to the daemon's status is added to `minikms.api.status`, or is not seen by clients."""
    new_key(daemon)
    post(daemon, "/rotate_kek", {})
    raw: dict[str, Any] = status(daemon)
    typed = msgspec.to_builtins(read(msgspec.json.encode(raw)))
    assert typed == raw

    rotation = dict.fromkeys(("from_version", "to_version", "rewrapped", "total"), 1)
    rotation_text = {"started_at": "t", "new_root": True, "last_error": ""}
    assert read(msgspec.json.encode({**raw, "rotation": rotation | rotation_text})).rotation == api.RotationStatus(
        1, 1, "t", True, 1, "", 1
    )


def test_it_is_used_by_attribute(daemon: LiveDaemon) -> None:
    with Client(daemon.socket) as kms:
        found = kms.status()
    assert (found.status, found.reason, found.pid) == ("ok", "", daemon.pid)
    assert found.audit.writable
    assert not hasattr(found, "__getitem__")


def test_unknown_members_are_ignored_and_missing_ones_are_no_good_news() -> None:
    newer = read(b'{"status":"ok","epoch":7,"moon":{"phase":1},"audit":{"writable":true,"colour":"red"}}')
    assert (newer.status, newer.epoch, newer.audit.writable) == ("ok", 7, True)
    older = read(b"{}")
    assert older.status != "ok"
    assert older.epoch == 0
    assert not older.audit.writable
    assert not older.audit.synced
    assert older.keys.indexing


@pytest.mark.parametrize("body", [b"[]", b'"ok"', b'{"epoch":"7"}', b'{"audit":{"head":[]}}', b'{"warnings":{}}'])
def test_a_member_of_another_type_is_no_status(body: bytes) -> None:
    with pytest.raises(KmsProtocolError, match="does not have the expected form"):
        read(body)
