"""Another user, for real: a child process that has given up root for a uid of its own.

Owns: how a test acts as another user. Invariants: the child is a fork, so it can use modules whose files the other
user could not read; it never returns into the test, and its answer or exception comes back as text.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

from tests import needs

UID = 45_678
"""Belongs to nobody on the machine; neither root's nor the overflow uid."""


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
