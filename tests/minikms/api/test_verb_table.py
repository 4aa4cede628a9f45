"""The verb table and its frame: every verb once, authorised before it acts, and audited whatever the outcome."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import ROLES, audit_verbs, replica_verbs, root_verbs, seal_verbs, verbs
from minikms.api.errors import AuditUnavailableError, ConflictError, ForbiddenError, KmsRefusedError
from minikms.audit import Event
from minikms.custody.vault import Permit
from minikms.policy.principal import Principal
from minikms_daemon.service.base import AfterLine, VerbTable
from minikms_daemon.service.encoding import Reply
from tests.harness.vaults import SilentAudit

ANYONE = Principal(0, 7, "peer_uid:0", ROLES)
NOBODY = msgspec.structs.replace(ANYONE, roles=frozenset[api.Role]())


class KeptAudit(SilentAudit):
    """Keeps every event, and whether its line was durable before the answer."""

    def __init__(self, *, writable: bool = True) -> None:
        self.lines: list[tuple[str, str, bool]] = []
        self._writable = writable

    def add(self, event: Event) -> None:
        self.lines.append((event.type, event.outcome, False))

    async def add_written(self, event: Event, *, durable: bool) -> None:
        self.lines.append((event.type, event.outcome, durable))

    def require_writable(self) -> None:
        if not self._writable:
            raise AuditUnavailableError("the audit log can't be written")


def perform(table: VerbTable, verb: api.Verb[Any, Any], request: api.Request, who: Principal = ANYONE) -> Reply:
    async def main() -> Reply:
        answer = table[verb](who, request, "r-1")
        return await answer if isinstance(answer, Awaitable) else answer

    return asyncio.run(main())


def test_every_verb_has_a_name_a_path_and_a_role_of_its_own() -> None:
    assert len({verb.name for verb in api.VERBS}) == len(api.VERBS)
    assert len({(verb.method, verb.path) for verb in api.VERBS}) == len(api.VERBS)
    assert all(verb.roles and set(verb.roles) <= ROLES for verb in api.VERBS)
    assert api.HEALTH not in api.VERBS and api.READY not in api.VERBS
    rooms = (verbs, root_verbs, seal_verbs, audit_verbs, replica_verbs)
    defined = [verb for room in rooms for verb in vars(room).values()]
    assert {verb for verb in defined if isinstance(verb, api.Verb) and verb.roles} == set(api.VERBS)


def test_no_method_acts_before_its_caller_is_authorised() -> None:
    acted: list[str] = []
    audit = KeptAudit()
    table = VerbTable(audit)

    async def rotate(request: api.RotateKekRequest, event: Event, permit: Permit) -> api.RotateKekAnswer:
        acted.append(event.type)
        return api.RotateKekAnswer("ok", 1, 0)

    async def encrypt_all(request: api.EncryptBatchRequest, event: Event, permit: Permit) -> api.EncryptBatchAnswer:
        acted.append(event.type)
        return api.EncryptBatchAnswer([])

    table.now(api.RANDOM, lambda request, event: api.RandomAnswer(acted.append(event.type) or b""))  # type: ignore[func-returns-value]  # notes the call
    table.later(api.ROTATE_KEK, rotate, durable=True)
    table.later(api.ENCRYPT_BATCH, encrypt_all)
    requests: list[tuple[api.Verb[Any, Any], api.Request]] = [
        (api.RANDOM, api.RandomRequest(1)),
        (api.ROTATE_KEK, api.RotateKekRequest()),
        (api.ENCRYPT_BATCH, api.EncryptBatchRequest([])),
    ]
    for verb, request in requests:
        with pytest.raises(ForbiddenError):
            perform(table, verb, request, NOBODY)
    assert acted == []
    assert [(name, outcome) for name, outcome, _ in audit.lines] == [(verb.name, "forbidden") for verb, _ in requests]
    for verb, request in requests:
        perform(table, verb, request)
    assert acted == [verb.name for verb, _ in requests]


@pytest.mark.parametrize("durable", [False, True])
def test_no_key_change_begins_while_the_audit_log_cannot_be_written(durable: bool) -> None:
    acted: list[str] = []
    table = VerbTable(KeptAudit(writable=False))

    async def retire(request: api.KeyRequest, event: Event, permit: Permit) -> api.KeyAnswer:
        acted.append(event.type)
        raise ConflictError("it acted")

    table.later(api.RETIRE_KEY, retire, durable=durable)
    with pytest.raises(AuditUnavailableError if durable else ConflictError):
        perform(table, api.RETIRE_KEY, api.KeyRequest("k"))
    assert acted == ([] if durable else ["retire_key"])


def test_work_after_the_audit_line_fails_the_answer_and_not_the_line() -> None:
    audit = KeptAudit()
    table = VerbTable(audit)

    async def fail() -> api.RotateKekAnswer:
        assert audit.lines == [("rotate_kek", "ok", True)]
        raise ConflictError("after the line")

    async def rotate(request: api.RotateKekRequest, event: Event, permit: Permit) -> AfterLine[api.RotateKekAnswer]:
        return AfterLine(fail)

    table.later(api.ROTATE_KEK, rotate, durable=True)
    with pytest.raises(ConflictError):
        perform(table, api.ROTATE_KEK, api.RotateKekRequest())
    assert audit.lines == [("rotate_kek", "ok", True)]


def test_a_body_that_cannot_be_decoded_is_audited_under_its_verb() -> None:
    audit = KeptAudit()
    VerbTable(audit).malformed(api.CREATE_DEK, ANYONE, KmsRefusedError("not one"), "r-1")
    assert audit.lines == [("create_dek", "internal", False)]


def test_an_error_of_an_unexpected_type_is_audited_as_internal() -> None:
    audit = KeptAudit()
    table = VerbTable(audit)

    def fail_now(request: api.RandomRequest, event: Event) -> api.RandomAnswer:
        raise RuntimeError("a defect")

    async def fail_later(request: api.KeyRequest, event: Event, permit: Permit) -> api.KeyAnswer:
        raise RuntimeError("a defect")

    table.now(api.RANDOM, fail_now)
    table.later(api.RETIRE_KEY, fail_later, durable=True)
    with pytest.raises(RuntimeError):
        perform(table, api.RANDOM, api.RandomRequest(1))
    with pytest.raises(RuntimeError):
        perform(table, api.RETIRE_KEY, api.KeyRequest("k"))
    assert audit.lines == [("random", "internal", False), ("retire_key", "internal", False)]
