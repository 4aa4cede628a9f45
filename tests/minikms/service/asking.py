"""Requests as bytes, and what was answered: for what a well-behaved client would never send.

Owns one connection a call. It asserts nothing about the answer but that it is HTTP with JSON.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.live_daemon import LiveDaemon

NO_KEY = "k_" + "0" * 26


class Answer(NamedTuple):
    status: int
    body: Any

    @property
    def code(self) -> str:
        """Of an error; empty for any other answer."""
        return str(self.body.get("code", "")) if isinstance(self.body, dict) else ""


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("kms", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def ask(daemon: LiveDaemon, method: str, target: str, body: object = None) -> Answer:
    """`body`: bytes as they are, anything else as JSON, None for none."""
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = Connection(daemon.socket)
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


def events(daemon: LiveDaemon, *types: str) -> list[dict[str, Any]]:
    """The audit log's events of these types, in order."""
    lines = (daemon.data_dir / "minikms-audit.log").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line)["event"])["type"] in types]
