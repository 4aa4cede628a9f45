"""docs/spec/api.md and the program say the same: every call with its role, every code with its status."""

import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, cast

from minikms import api
from minikms.api import ROLES
from minikms.api.errors import BY_CODE, ArenaFullError, KmsRefusedError
from minikms.http.exchange import METHODS_SERVED
from minikms.policy.principal import Principal
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.service.base import Perform, VerbTable
from minikms_daemon.service.keys import KeyVerbs
from minikms_daemon.service.lifecycle import LifecycleVerbs
from minikms_daemon.service.records import RecordVerbs
from minikms_daemon.service.roots import RootVerbs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import OpenedVault, SilentAudit, opened_vault
from tests.harness.verb_requests import example, examples
from tests.minikms_daemon.service.asking import NO_KEY, ask, status

PAGE = (Path(__file__).parents[3] / "docs" / "spec" / "api.md").read_text()


def rows(first_header: str) -> list[list[str]]:
    """The cells of the table whose first column has this header."""
    table = PAGE[PAGE.index(f"| {first_header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def calls() -> dict[tuple[str, str], set[str]]:
    """Role or roles by method and path."""
    found = {}
    for cells in rows("call"):
        method = cells[0].split()[0]
        paths = re.findall(r"`(/[^`?]*)", cells[0])
        roles = re.findall(r"[a-z_]+", cells[1].replace(" and ", " "))
        for index, path in enumerate(paths):
            found[method, path] = {roles[index]} if len(paths) > 1 else set(roles)
    return found


def test_every_call_is_on_the_page_and_no_other() -> None:
    assert {(verb.method, verb.path) for verb in (*api.VERBS, api.HEALTH, api.READY)} == calls().keys()


def test_the_page_names_the_roles_of_the_verb_table() -> None:
    for verb in api.VERBS:
        assert calls()[verb.method, verb.path] == set(verb.roles)


def test_an_unknown_method_is_answered_with_the_methods_of_the_calls() -> None:
    """`METHODS_SERVED` is what the HTTP engine sends; it does not know the table of calls."""
    assert ", ".join(sorted({method for method, _ in calls()})) == METHODS_SERVED


def test_every_code_is_on_the_page_with_its_status_and_no_other() -> None:
    told = {
        code: {int(number) for number in re.findall(r"\d{3}", cells[1])}
        for cells in rows("code")
        for code in re.findall(r"`([a-z_]+)`", cells[0])
    }
    assert told.keys() == {value for name, value in vars(api).items() if name.startswith("CODE_")}
    kinds: list[type[KmsRefusedError]] = [*BY_CODE.values(), ArenaFullError]
    for kind in kinds:
        assert kind.status in told[kind.code], kind


def served(one: OpenedVault) -> VerbTable:
    """Every verb in this process, but what the daemon says of itself."""
    table = VerbTable(SilentAudit())
    RecordVerbs(one.vault, table)
    KeyVerbs(one.vault, table, one.indexing)
    LifecycleVerbs(vault=one.vault, table=table, indexing=one.indexing, reader=one.reader)
    keks = one.kek_verbs(table)
    RootVerbs(keks=keks, in_use_slot_id=one.slot.slot_id)
    table.now(api.STATUS, lambda request, event: b"{}")
    table.now(api.METRICS, lambda request, event: "")
    table.now(api.RELOAD_POLICY, lambda request, event: b"{}")
    table.now(api.SEAL, lambda request, event: b"{}")
    table.now(api.UNSEAL_STATUS, lambda request, event: b"{}")
    table.now(api.UNSEAL, lambda request, event: b"{}")
    table.later(api.REPORT_AUDIT_POSITION, reported, audited=False)
    NoMember().add_verbs(table, cast("Any", None))
    return table


async def reported(*_: object) -> api.AuditPositionAnswer:
    return api.AuditPositionAnswer("", api.DurableLine(0, b""), b"")


async def is_forbidden(perform: Perform[Any], request: api.Request, roles: frozenset[api.Role]) -> bool:
    try:
        answer = perform(Principal(0, 0, "peer_uid:0", roles), request, "")
        if isinstance(answer, Awaitable):
            answer = await answer
    except KmsRefusedError as error:
        return error.code == api.CODE_FORBIDDEN
    return isinstance(answer, bytes) and b'"forbidden"' in answer  # an item of a batch


async def test_a_verb_asks_for_its_roles_and_for_no_other(tmp_path: Path) -> None:
    """With every role but that one it is forbidden; with only that one it is not."""
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        table, made = served(one), examples(key_id)
        made |= {verb: example(verb, NO_KEY) for verb in (api.RETIRE_KEY, api.DESTROY_KEY)}
        assert made.keys() == set(api.VERBS)
        for verb, request in made.items():
            for role in verb.roles:
                assert await is_forbidden(table[verb], request, ROLES - {role}), (verb.name, role)
            assert not await is_forbidden(table[verb], request, frozenset(verb.roles)), verb.name


def test_the_status_has_the_members_of_the_page(daemon: LiveDaemon) -> None:
    told = {member for cells in rows("member") for member in re.findall(r"`([a-z_]+)`", cells[0])}
    assert told == status(daemon).keys()
    assert ask(daemon, "GET", "/health").body == b"ok"
