"""`minikms policy explain` and a real daemon agree, for every verb, role, scope and state of a key."""

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api import Verb
from minikms.policy.explanation import explain
from minikms.policy.file_policy import FilePolicy
from minikms.policy.rules import parse_policy
from tests.harness import forked
from tests.harness.callers import NOBODY, OTHER, PROXY, ROOT_GRANT, USER, PolicyDaemon
from tests.harness.verb_requests import spelt
from tests.minikms_daemon.service.limiting import names_keys

THREADS = ("mine-1", "theirs-1")
FIRST_UID = 46_000
ROLES = ("create", "encrypt", "decrypt", "data_key", "monitor", "destroy", "rotate", "unseal", "audit", "ship")


def policy() -> str:
    """A user for each role alone, in one scope and in every thread; a user with all; one with none; a proxy."""
    text = ROOT_GRANT
    for number, role in enumerate(ROLES):
        for scope, pattern in enumerate(("mine-*", "*")):
            threads = f'threads = ["{pattern}"]' if role not in ("rotate", "unseal", "audit", "ship") else ""
            principals = f'["uid:{FIRST_UID + 2 * number + scope}", "spiffe://prod/{role}/{scope}"]'
            text += f'[[grant]]\nprincipals = {principals}\nroles = ["{role}"]\n{threads}\n'
    every_role = ", ".join(f'"{role}"' for role in ROLES)
    text += f'[[grant]]\nprincipals = ["uid:{USER}", "spiffe://prod/all"]\nroles = [{every_role}]\n'
    text += 'threads = ["mine-*", "open-*"]\n'
    return text + f'[[proxy]]\nprincipals = ["uid:{PROXY}"]\non_behalf_of = ["spiffe://prod/**"]\n'


def callers() -> Iterator[tuple[int, str | None]]:
    """Uid, and the principal that it names."""
    yield from ((uid, None) for uid in (0, USER, OTHER, NOBODY, PROXY))
    yield from ((FIRST_UID + number, None) for number in range(2 * len(ROLES)))
    yield from ((PROXY, f"spiffe://prod/{role}/{scope}") for role in ROLES for scope in range(2))
    yield from ((PROXY, name) for name in ("spiffe://prod/all", "spiffe://prod/none", "spiffe://test/all", "uid:0"))
    yield from ((uid, "spiffe://prod/all") for uid in (0, USER, NOBODY))


@pytest.fixture(scope="module")
def daemon() -> Iterator[PolicyDaemon]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, PolicyDaemon(Path(name), policy()) as running:
        yield running


class Kit:
    """A key of each thread and state."""

    def __init__(self, daemon: PolicyDaemon) -> None:
        self.keys: dict[tuple[str, str], str] = {}
        root = daemon.caller()
        for thread, state in itertools.product(THREADS, ("active", "retired", "destroyed")):
            key_id = self.keys[thread, state] = daemon.new_key(thread, purpose="data")
            if state != "active":
                assert root.post(f"/keys/{key_id}/retire", {}).status == 200
            if state == "destroyed":
                assert root.post(f"/keys/{key_id}/destroy", {"key_id": key_id}).status == 200


@pytest.fixture(scope="module")
def kit(daemon: PolicyDaemon) -> Kit:
    return Kit(daemon)


def by_key(key_id: str) -> dict[Verb[Any, Any], tuple[str, str, object]]:
    """Of each verb that names a key. A refusal for the state of the key says that it was allowed; to destroy the key
    is asked before it is retired.
    """
    return {verb: spelt(verb, key_id) for verb in reversed(api.VERBS) if names_keys(verb) and verb not in NOT_ASKED}


BY_NOTHING: dict[Verb[Any, Any], tuple[str, str, object]] = {
    api.STATUS: ("GET", "/status", None),
    api.METRICS: ("GET", "/metrics", None),
    api.LIST_KEYS: ("GET", "/keys?limit=1", None),
    api.RANDOM: ("POST", "/random", {"count": 1}),
    api.ROTATE_KEK: ("POST", "/rotate_kek", {"new_kek_hex": "00"}),
    api.PRUNE_KEK: ("POST", "/kek/prune", {"backups_before": "never"}),
    api.LIST_ROOTS: ("GET", "/roots", None),
    api.ADD_ROOT: ("POST", "/roots", {"provider": "file", "root_hex": "00"}),
    api.TEST_ROOT: ("POST", "/roots/s1/test", {"root_hex": "00"}),
    api.REMOVE_ROOT: ("POST", "/roots/s999/remove", {}),
    api.UNSEAL_STATUS: ("GET", "/unseal", None),
    api.UNSEAL: ("POST", "/unseal", {"from_source": True}),
    api.RELOAD_POLICY: ("POST", "/policy/reload", {}),
    api.REPORT_AUDIT_POSITION: ("POST", "/audit/position", {"origin": "o", "log_id": "", "seq": 0, "mac": ""}),
    **{verb: spelt(verb, "") for verb in api.REPLICA_VERBS},
}
"""Of verbs that name no key, made so that nothing changes when they are allowed."""
NOT_ASKED = {api.SEAL, api.CREATE_DEK, api.GET_OR_CREATE_DEK}
"""They would change something; the tests of attempts and of reloads ask them."""

REFUSALS = ("unauthorized", "forbidden", "key_not_found")


def told(reply: Any) -> str:
    """The refusal of the policy, of the request or of its only item; empty if it was allowed."""
    code = reply.code
    if not code and isinstance(reply.body, dict) and reply.body.get("items"):
        code = reply.body["items"][0].get("code", "")
    return code if code in REFUSALS else ""


def explained(rules: FilePolicy, uid: int, name: str | None, verb: Verb[Any, Any], thread: str | None) -> str:
    """What `explain` says about all roles of a verb."""
    principal, via = (f"uid:{uid}", None) if name is None else (name, f"uid:{uid}")
    if name is not None and not verb.proxied and explain(rules, principal, "monitor", None, via).code != "unauthorized":
        return "forbidden"
    of_thread = None if verb.roles[0] in ("rotate", "unseal", "ship", "replicate") else thread
    codes = [explain(rules, principal, role, of_thread, via).code for role in verb.roles]
    worst = next((code for wanted in REFUSALS for code in codes if code == wanted), "")
    lacks_role = any(explain(rules, principal, role, None, via).code for role in verb.roles)
    # The role `create` in another thread: a new key is forbidden, and a key that exists looks unknown.
    return "key_not_found" if worst == "forbidden" and not lacks_role else worst


def test_explain_agrees_with_the_daemon(daemon: PolicyDaemon, kit: Kit) -> None:
    rules = FilePolicy(parse_policy(daemon.policy.read_bytes()), service_uid=0)
    assert {*by_key(""), *BY_NOTHING, *NOT_ASKED} == set(api.VERBS)
    wrong: list[object] = []
    asked = 0
    for uid, name in callers():
        who = daemon.caller(uid, name)
        refused = who.get("/nowhere")
        if refused.status == 401:
            assert explained(rules, uid, name, api.STATUS, None) == "unauthorized"
            continue
        for verb, request in BY_NOTHING.items():
            expected = explained(rules, uid, name, verb, None)
            if verb is api.PRUNE_KEK and not expected and explained(rules, uid, name, verb, "in-no-pattern"):
                expected = "forbidden"  # it concerns the keys of all threads
            asked += 1
            if (found := told(who.ask(*request))) != expected:
                wrong.append((uid, name, verb.name, found, expected))
        for (thread, state), key_id in kit.keys.items():
            for verb, request in by_key(key_id).items():
                if verb is api.RETIRE_KEY and state == "active":
                    continue  # it would be retired
                if verb is api.DESTROY_KEY and state == "retired":
                    continue  # it would be destroyed
                expected = explained(rules, uid, name, verb, thread)
                asked += 1
                if (found := told(who.ask(*request))) != expected:
                    wrong.append((uid, name, verb.name, thread, state, found, expected))
    assert wrong == []
    assert asked > 2_500


def test_the_command_says_the_same(daemon: PolicyDaemon) -> None:
    for words, status in (
        (("--principal", f"uid:{USER}", "--role", "decrypt", "--thread", "mine-1"), 0),
        (("--principal", f"uid:{USER}", "--role", "decrypt", "--thread", "theirs-1"), 1),
        (("--principal", "spiffe://prod/all", "--role", "rotate", "--via", f"uid:{PROXY}"), 1),
    ):
        done = forked.run("minikms", "policy", "explain", "--policy", daemon.policy, *words)
        assert done.returncode == status, done


def test_the_command_reloads(daemon: PolicyDaemon) -> None:
    def run(uid: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minikms", "policy", "reload", "--socket", str(daemon.socket)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, user=uid)

    generation = daemon.status()["policy"]["generation"]
    done = run(0)
    assert done.returncode == 0 and f"generation {generation + 1}" in done.stdout, done
