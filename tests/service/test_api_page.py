"""docs/spec/api.md and the program say the same: every call with its role, every code with its status."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from asking import NO_KEY, ask, status

from live_daemon import LiveDaemon
from minikms import api, errors
from minikms.daemon.application import Application
from minikms.errors import MiniKmsError
from minikms.http.exchange import METHODS_SERVED
from minikms.policy import ROLES, Policy, Principal, Role
from minikms.service.keks import KekVerbs
from minikms.service.keys import KeyIssuing
from minikms.service.lifecycle import KeyLifecycle
from minikms.service.records import KeyService
from vaults import OpenedVault, SilentAudit, opened_vault

PAGE = (Path(__file__).parents[2] / "docs" / "spec" / "api.md").read_text()


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


class Nothing:
    """Stands for every part of an application whose routes are only looked at."""

    def __getattr__(self, name: str) -> Any:
        return Nothing()


def operations() -> list[tuple[str, str, str]]:
    parts = {name: Nothing() for name in ("service", "issuing", "lifecycle", "keks", "audit", "vault")}
    return Application(policy=Policy([0]), connections_max=1, **parts).operations()  # type: ignore[arg-type]  # see Nothing


def test_every_call_is_on_the_page_and_no_other() -> None:
    assert {(method, path) for method, path, _ in operations()} | {("GET", "/health")} == calls().keys()


def test_the_methods_that_the_engine_names_to_one_it_does_not_know_are_those_of_the_calls() -> None:
    assert ", ".join(sorted({method for method, _ in calls()})) == METHODS_SERVED


def test_every_code_is_on_the_page_with_its_status_and_no_other() -> None:
    told = {
        code: {int(number) for number in re.findall(r"\d{3}", cells[1])}
        for cells in rows("code")
        for code in re.findall(r"`([a-z_]+)`", cells[0])
    }
    assert told.keys() == {value for name, value in vars(api).items() if name.startswith("CODE_")}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, MiniKmsError) and kind not in (MiniKmsError, errors.StartError):
            assert kind.status in told[kind.code], kind


def verbs(one: OpenedVault, key_id: str) -> dict[tuple[str, str], Callable[[Principal], Any]]:
    """Each call, for a principal, in this process."""
    vault, audit = one.vault, SilentAudit()
    records = KeyService(vault, audit)
    issuing = KeyIssuing(vault, audit, dict)
    life = KeyLifecycle(vault=vault, audit=audit, indexing=one.indexing, reader=one.reader)
    keks = KekVerbs(vault=vault, audit=audit, rotation=one.rotation, pruning=one.pruning, opened_slot_id="")
    items = [api.EncryptItem(key_id, "")]
    sealed = [api.DecryptItem(key_id, "")]
    return {
        ("GET", "/status"): lambda who: issuing.status(who, ""),
        ("GET", "/metrics"): lambda who: issuing.metrics(who, ""),
        ("POST", "/create_dek_for_thread"): lambda who: issuing.create_dek_for_thread(
            who, api.CreateDekRequest("t"), ""
        ),
        ("GET", "/get_wrapped"): lambda who: issuing.get_wrapped(who, key_id, ""),
        ("POST", "/encrypt"): lambda who: records.encrypt(who, items[0], ""),
        ("POST", "/decrypt"): lambda who: records.decrypt(who, sealed[0], ""),
        ("POST", "/encrypt_batch"): lambda who: records.encrypt_batch(who, api.EncryptBatchRequest(items), ""),
        ("POST", "/decrypt_batch"): lambda who: records.decrypt_batch(who, api.DecryptBatchRequest(sealed), ""),
        ("POST", "/reencrypt_batch"): lambda who: records.reencrypt_batch(
            who, api.ReencryptBatchRequest(key_id, key_id, []), ""
        ),
        ("POST", "/check_batch"): lambda who: records.check_batch(who, api.CheckBatchRequest(key_id, []), ""),
        ("POST", "/generate_data_key"): lambda who: issuing.generate_data_key(
            who, api.GenerateDataKeyRequest(key_id), ""
        ),
        ("POST", "/random"): lambda who: issuing.random(who, api.RandomRequest(1), ""),
        ("GET", "/keys"): lambda who: life.list_keys(
            who, thread_id=None, state=None, cursor="", limit=1, request_id=""
        ),
        ("GET", "/keys/{key_id}"): lambda who: life.get_key(who, key_id, ""),
        ("POST", "/keys/{key_id}/retire"): lambda who: life.retire(who, NO_KEY, ""),
        ("POST", "/keys/{key_id}/destroy"): lambda who: life.destroy(who, NO_KEY, api.DestroyKeyRequest(NO_KEY), ""),
        ("POST", "/rotate_kek"): lambda who: keks.rotate_kek(who, api.RotateKekRequest(), None, ""),
        ("POST", "/kek/prune"): lambda who: keks.prune_keks(who, api.PruneKekRequest(), ""),
    }


async def is_forbidden(call: Callable[[Principal], Any], roles: frozenset[Role]) -> bool:
    try:
        answer = call(Principal(0, 0, "peer_uid:0", roles))
        if isinstance(answer, Awaitable):
            answer = await answer
    except MiniKmsError as error:
        return error.code == api.CODE_FORBIDDEN
    return isinstance(answer, bytes) and b'"forbidden"' in answer  # an item of a batch


def test_a_call_asks_for_the_role_that_the_page_names_and_for_no_other(tmp_path: Path) -> None:
    """With every role but that one it is forbidden; with only that one it is not."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id] = await one.make(1)
            made = verbs(one, key_id)
            assert made.keys() | {("GET", "/health")} == calls().keys()
            for call, perform in made.items():
                needed = {role for role in ROLES if role in calls()[call]}
                for role in needed:
                    assert await is_forbidden(perform, ROLES - {role}), (call, role)
                assert not await is_forbidden(perform, frozenset(needed)), call

    asyncio.run(main())


def test_the_status_has_the_members_of_the_page(daemon: LiveDaemon) -> None:
    told = {member for cells in rows("member") for member in re.findall(r"`([a-z_]+)`", cells[0])}
    assert told == status(daemon).keys()
    assert ask(daemon, "GET", "/health").body == b"ok"
