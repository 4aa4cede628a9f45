"""Requests as bytes, and what was answered: for what a well-behaved client would never send.

Owns one connection a call. It asserts nothing about the answer but that it is HTTP with JSON.
"""

import base64
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.harness.live_daemon import LiveDaemon
from tests.harness.unix_http import UnixConnection

NO_KEY = "k_" + "0" * 26


STATUS_SECONDS_MAX = 60.0


class Answer(NamedTuple):
    status: int
    body: Any

    @property
    def code(self) -> str:
        """Of an error; empty for any other answer."""
        return str(self.body.get("code", "")) if isinstance(self.body, dict) else ""


def ask(daemon: LiveDaemon, method: str, target: str, body: object = None) -> Answer:
    """`body`: bytes as they are, anything else as JSON, None for none."""
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = UnixConnection(daemon.socket)
    try:
        connection.request(method, target, sent)
        response = connection.getresponse()
        text = response.read()
        return Answer(response.status, json.loads(text) if text.startswith((b"{", b"[")) else text)
    finally:
        connection.close()


def post(daemon: LiveDaemon, target: str, body: object) -> Answer:
    return ask(daemon, "POST", target, body)


def b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def new_key(daemon: LiveDaemon, thread_id: str = "t", **others: str) -> str:
    answer = post(daemon, "/create_dek_for_thread", {"thread_id": thread_id, **others})
    assert answer.status == 200, answer
    return str(answer.body["key_id"])


def encrypted(daemon: LiveDaemon, key_id: str, plaintext: bytes = b"text", **others: str) -> str:
    answer = post(daemon, "/encrypt", {"key_id": key_id, "plaintext": b64(plaintext), **others})
    assert answer.status == 200, answer
    return str(answer.body["ciphertext"])


def status(daemon: LiveDaemon) -> Any:
    answer = ask(daemon, "GET", "/status")
    assert answer.status == 200, answer
    return answer.body


def status_once(daemon: LiveDaemon, holds: Callable[[dict[str, Any]], bool]) -> Any:
    """The first status for which `holds` is true."""
    deadline = time.monotonic() + STATUS_SECONDS_MAX
    while not holds(found := status(daemon)):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found
