"""The policy file that is shipped: valid, without a warning, and no wider than its comments say."""

import json
import re
from pathlib import Path

import pytest

from minikms.policy.explanation import explain
from minikms.policy.file_policy import FilePolicy
from minikms.policy.rules import parse_policy
from tests.harness import forked

SHIPPED = Path(__file__).parents[2] / "deploy" / "policy.toml"
SERVER, OPERATOR, SERVICE = "uid:991", "uid:0", "uid:990"


def test_the_command_accepts_it_without_a_warning() -> None:
    done = forked.run("minikms", "policy", "check", SHIPPED, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["valid"], found["grants"], found["warnings"]) == (True, 3, [])


def test_its_examples_are_valid_too() -> None:
    text = SHIPPED.read_text()
    examples = re.findall(r"^# \[\[\w+\]\]\n(?:#.*\n)*", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        parse_policy((text + re.sub("^# ?", "", example, flags=re.MULTILINE)).encode())


@pytest.mark.parametrize(
    ("principal", "roles"),
    [
        (SERVER, {"create", "encrypt", "decrypt", "monitor"}),
        (OPERATOR, {"monitor", "rotate", "destroy", "audit", "unseal"}),
        (SERVICE, {"monitor"}),
    ],
)
def test_each_user_has_its_roles_and_no_other(principal: str, roles: set[str]) -> None:
    policy = FilePolicy(parse_policy(SHIPPED.read_bytes()))
    who = policy.principal(int(principal.removeprefix("uid:")), 1)
    assert who is not None
    assert who.roles == roles
    assert explain(policy, principal, "rotate", None, None).decision == ("allowed" if "rotate" in roles else "denied")


def test_the_message_server_has_a_limit_of_decryptions() -> None:
    (server, operators, _) = parse_policy(SHIPPED.read_bytes()).grants
    assert server.limits.decrypts_per_hour == 500_000
    assert "decrypt" not in operators.roles
