"""Both processes, killed together under load at a moment of chance's choosing, again and again on the same directory.

Afterwards every acknowledged message reads back as it was acknowledged, its encryption is in the audit log, that log
verifies, and what was typed is nowhere in the bytes of the data directories or of the logs.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.harness.scripts import verify_audit
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.store.test_nothing_in_plaintext import traces

CLIENTS = 6
LOAD_S_MAX = 0.8
AUTHOR = "alice"
TYPED = "xyzzy-planted-5e1f"
TITLED = "xyzzy-titled-77c0"
REACTED = "xyzzy-reacted-c2d4"
Bodies = dict[str, list[Any]]
"""By message: what its body may be. More than one while an edit has been sent and not acknowledged."""


class Ledger:
    """What the clients were told, over all the lives of the server."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.request_ids: set[str] = set()
        self.threads: dict[str, Bodies] = defaultdict(dict)

    @property
    def acknowledged(self) -> int:
        return sum(len(bodies) for bodies in self.threads.values())


class Client(threading.Thread):
    """Writes without a pause until the server is gone: new threads, new messages, edits, reactions."""

    def __init__(self, server: RealServer, ledger: Ledger, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._server, self._ledger = server, ledger
        self.unexpected: list[object] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        # The end of the server ends the client: OSError, or an answer that was cut off.
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            for turn in range(1_000_000):
                self._turn(connection, turn)

    def _turn(self, connection: http.client.HTTPConnection, turn: int) -> None:
        made = self._ask(connection, turn, "POST", "/v1/threads", {"author": AUTHOR, "title": f"{TITLED} {turn}"})
        thread = made["id"]
        for number in range(5):
            body: dict[str, object] = {"text": TYPED, "of": self.name, "at": [turn, number]}
            sent = {"thread": thread, "author": AUTHOR, "body": body}
            message = self._ask(connection, turn, "POST", "/v1/messages", sent)["id"]
            may_be = self._ledger.threads[thread][message] = [body]
            if number % 2:
                body = {**body, "edited": True}
                self._ledger.sent.add(json.dumps(body))
                may_be.append(body)
                self._ask(connection, turn, "PUT", f"/v1/messages/{message}", {"author": AUTHOR, "body": body})
                del may_be[0]
        reaction = {"id": "bob", "reaction": REACTED}
        self._ask(connection, turn, "POST", f"/v1/messages/{message}/reactions", reaction)

    def _ask(self, connection: http.client.HTTPConnection, turn: int, method: str, path: str, sent: Any) -> Any:
        if "body" in sent:
            self._ledger.sent.add(json.dumps(sent["body"]))
        request_id = f"{self.name}-{turn}-{len(self._ledger.request_ids)}"
        reply = self._server(method, path, sent, headers={"X-Request-Id": request_id}, connection=connection)
        if reply.status != 200:
            if reply.status != 503:  # which is right where the key service died before the server did
                self.unexpected.append(reply)
            raise http.client.HTTPException(reply)
        self._ledger.request_ids.add(request_id)
        return reply.json


def kill_both(server: RealServer) -> None:
    """SIGKILL to the server and to the key service that it spawned, in either order, with nothing between."""
    spawned = [line["pid"] for line in server.log if line["event"] == "miniKMS spawned"]
    with contextlib.ExitStack() as opened:
        both = [os.pidfd_open(pid) for pid in (server.pid, int(spawned[-1]))]
        for process in both:
            opened.callback(os.close, process)
        random.shuffle(both)
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
    server.kill()


def verify_messages(server: RealServer, ledger: Ledger, threads: list[str]) -> None:
    """Every acknowledged message of these threads is there, and nothing that nobody sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        for thread in threads:
            reply = server("GET", f"/v1/messages?thread={thread}", connection=connection)
            assert reply.status == 200, reply
            stored = {message["id"]: message["body"] for message in reply.json["messages"]}
            for message, may_be in ledger.threads[thread].items():
                assert stored[message] in may_be
            assert {json.dumps(body) for body in stored.values()} <= ledger.sent


def kill_and_verify(directory: Path, kills: int) -> Ledger:
    ledger = Ledger()
    data_dir = directory / "db" / "kms"
    of_last_life: list[str] = []
    for life in range(kills):
        with real_server(directory) as server:
            verify_messages(server, ledger, of_last_life)
            verify_audit(data_dir)
            before = set(ledger.threads)
            clients = [Client(server, ledger, f"life{life}-client{number}") for number in range(CLIENTS)]
            for client in clients:
                client.start()
            time.sleep(random.uniform(0, LOAD_S_MAX))
            while not ledger.threads and any(client.is_alive() for client in clients):
                time.sleep(0.01)  # at least the first kill interrupts something
            kill_both(server)
            for client in clients:
                client.join(60)
                assert not client.is_alive()
                assert client.unexpected == []
            of_last_life = list(ledger.threads.keys() - before)
    with real_server(directory) as server:
        verify_messages(server, ledger, list(ledger.threads))
        assert server.stop() == 0
    verify_audit(data_dir)
    return ledger


def assert_all_told(directory: Path, ledger: Ledger) -> None:
    """The acknowledged writes of content are in the audit log; no content is in any file."""
    logs = [path for path in (directory / "db" / "kms").glob("minikms-audit.log*") if path.suffix != ".confirmed"]
    audit_log = "".join(path.read_text() for path in logs)
    assert [one for one in ledger.request_ids if f'"{one}"' not in audit_log] == []
    contents = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    sought = [trace for text in (TYPED, TITLED, REACTED) for trace in traces(text)]
    assert [trace for trace in sought if any(trace in content for content in contents)] == []
    assert len(contents) > 8


def test_both_processes_killed_under_load_lose_and_reveal_no_message(tmp_path: Path) -> None:
    """No text of a message is on the disk."""
    ledger = kill_and_verify(tmp_path, 3)
    assert ledger.acknowledged > 0
    assert_all_told(tmp_path, ledger)


@pytest.mark.torture
def test_a_hundred_times_both_processes_are_killed_under_load(tmp_path: Path) -> None:
    ledger = kill_and_verify(tmp_path, 100)
    print(f"{ledger.acknowledged} acknowledged messages in {len(ledger.threads)} threads")
    assert ledger.acknowledged > 1000
    assert_all_told(tmp_path, ledger)
