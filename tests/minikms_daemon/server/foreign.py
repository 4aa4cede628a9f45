"""Another user, for real: a child process that has given up root for a uid of its own.

Owns: how a test acts as another user. Invariants: the child is a fork, so it can use modules whose files the other
user could not read; it never returns into the test, and its answer or exception comes back as text.
"""

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tests import needs
from tests.harness.waiting import wait_until

UID = 45_678
"""Belongs to nobody on the machine; neither root's nor the overflow uid."""
SETTLED_S = 0.3
"""Time for a daemon to close more connections than it should."""


def run_as(uid: int, action: Callable[[], Any], *, groups: tuple[int, ...] = ()) -> Any:
    """The result of `action` (JSON values) in a child with that uid, the gid of the same number, and `groups`.

    Raises AssertionError when `action` raises.
    """
    needs.root()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = {"answer": action()}
        except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
            answer = {"raised": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(child, 0)
    assert "raised" not in answer, answer["raised"]
    return answer["answer"]


def closed_count(held: Sequence[socket.socket], expected: int) -> int:
    """How many of these connections, on which nothing was sent, the daemon has closed, after it closed `expected`."""
    for connection in held:
        connection.setblocking(False)

    def closed() -> int:
        count = 0
        for connection in held:
            try:
                count += connection.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                continue
        return count

    wait_until(lambda: closed() >= expected)
    time.sleep(SETTLED_S)
    return closed()
