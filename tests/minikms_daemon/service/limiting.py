"""Policies, requests and answers of the tests of limited callers, and the work that a request costs.

Owns: grants as text, a request of each verb that names a key, and the number of instructions that an act takes. It
asserts nothing about the answers.
"""

import base64
import gc
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from minikms import api
from minikms.api import Verb
from minikms.api.errors import KmsRefusedError
from minikms.policy.principal import Principal
from tests.harness.limited import Limited
from tests.harness.verb_requests import example

ALL_ROLES = '["create", "encrypt", "decrypt", "data_key", "monitor", "destroy", "rotate"]'


def grant(uid: int, threads: str, roles: str = ALL_ROLES, more: str = "") -> str:
    return f'[[grant]]\nprincipals = ["uid:{uid}"]\nroles = {roles}\nthreads = {threads}\n{more}\n'


MINE = grant(1, '["mine-*"]')
EVERYBODY = grant(1, '["*"]') + grant(2, '["*"]')


def b64(data: bytes = b"text") -> str:
    return base64.b64encode(data).decode()


def names_keys(verb: Verb[Any, Any]) -> bool:
    fields = set(verb.request.__struct_fields__)
    return not fields.isdisjoint(("key_id", "from_key_id", "replaces")) or verb.roles_by_item


def requests(key_id: str, mine: str) -> dict[Verb[Any, Any], api.Request]:
    """Of each verb that names a key."""
    others = {api.REENCRYPT_BATCH: {"from_key_id": mine}, api.CREATE_DEK: {"thread_id": "mine-1", "replaces": key_id}}
    return {verb: example(verb, key_id, **others.get(verb, {})) for verb in api.VERBS if names_keys(verb)}


def instructions(act: Callable[[], object]) -> int:
    """How many instructions of the interpreter are carried out in the code of the project."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode" and "/minikms/" in frame.f_code.co_filename
        return trace

    gc.disable()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
        gc.enable()
    return count


def outcome(made: Limited, who: Principal, verb: Verb[Any, Any], request: api.Request) -> str:
    """The answer or the error, as text. A request that would have to wait is an error of the test."""
    try:
        answer = made.begin(who, verb, request)
        if isinstance(answer, Awaitable):
            try:
                answer.send(None)  # type: ignore[attr-defined]  # a coroutine
            except StopIteration as done:
                answer = done.value
            else:
                raise AssertionError(f"{verb.name} waits")
    except KmsRefusedError as error:
        return f"{error.code}: {error}"
    return str(answer)
