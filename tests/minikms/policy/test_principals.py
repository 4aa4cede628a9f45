"""Who asks: uids, proxies, and the scope that the rules give them."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api import ROLES, Role
from minikms.api.errors import ForbiddenError
from minikms.policy.file_policy import SCOPES_COUNT_MAX, FilePolicy
from minikms.policy.names import PrincipalNameError
from minikms.policy.policy import Policy
from minikms.policy.principal import Principal
from minikms.policy.rules import PROXIED_ROLES, PolicyFileError, parse_policy

FILE = b"""
version = 1
[[grant]]
name = "everything"
principals = ["uid:0", "spiffe://prod/admin"]
roles = ["create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor", "unseal"]
threads = ["*"]
[[grant]]
name = "chat"
principals = ["uid:1000", "spiffe://prod/chat/*"]
roles = ["create", "encrypt", "decrypt"]
threads = ["chat-*"]
[[grant]]
name = "readers"
principals = ["uid:1000", "spiffe://prod/**"]
roles = ["decrypt", "monitor"]
threads = ["*"]
[[proxy]]
name = "gateway"
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/**"]
"""


def policy(*, service_uid: int | None = None, overflow_uid: int | None = None) -> FilePolicy:
    return FilePolicy(parse_policy(FILE), service_uid=service_uid, overflow_uid=overflow_uid)


def principal(name: str) -> Principal:
    """A principal of `policy()`: a uid by itself, any other name through the proxy."""
    one = policy()
    found = one.principal(int(name[4:]), 7) if name.startswith("uid:") else one.principal(992, 7, name)
    assert found is not None
    return found


def decides(name: str, role: Role, thread: str | None) -> str | None:
    scope = principal(name).scope
    assert scope is not None
    grant = scope.decide(role, thread)
    return None if grant is None else grant.label.partition("(")[2].rstrip(")")


def test_a_uid_of_a_grant_has_its_roles_and_keeps_its_name_in_the_log() -> None:
    found = principal("uid:1000")
    assert (found.uid, found.pid, found.actor, found.via) == (1000, 7, "peer_uid:1000", "")
    assert found.roles == {"create", "encrypt", "decrypt", "monitor"}


def test_an_unnamed_uid_does_not_connect_not_even_root() -> None:
    assert policy().principal(1001, 7) is None
    assert FilePolicy(parse_policy(b"version = 1")).principal(0, 7) is None


def test_the_first_grant_with_role_and_thread_decides() -> None:
    assert decides("uid:1000", "decrypt", "chat-1") == "chat"
    assert decides("uid:1000", "decrypt", "other") == "readers"
    assert decides("uid:1000", "encrypt", "other") is None
    assert decides("uid:1000", "encrypt", None) == "chat"
    assert decides("spiffe://prod/chat/a", "monitor", "chat-1") == "readers"
    assert decides("spiffe://prod/chat/a/b", "encrypt", "chat-1") is None


def test_a_scope_says_whether_the_thread_matters() -> None:
    scope = principal("uid:1000").scope
    assert scope is not None
    everywhere, anywhere = scope.everywhere("decrypt"), scope.anywhere("decrypt")
    assert everywhere is None
    assert anywhere is not None and anywhere.label == "grant 3 (readers)"
    assert scope.everywhere("monitor") is scope.anywhere("monitor") is anywhere
    assert scope.everywhere("rotate") is scope.anywhere("rotate") is scope.anywhere("encrypt") is None
    assert scope.decide("monitor", "anything") is anywhere


def test_a_proxied_principal_has_no_administrative_role() -> None:
    """Even if a grant gives it all."""
    found = principal("spiffe://prod/admin")
    assert found.roles == PROXIED_ROLES == {"create", "encrypt", "decrypt", "data_key", "monitor"}
    assert (found.actor, found.via, found.uid) == ("spiffe://prod/admin", "peer_uid:992", 992)
    assert found.scope is not None
    for role in ROLES - PROXIED_ROLES:
        assert found.scope.decide(role, None) is None
        with pytest.raises(ForbiddenError):
            found.require(role)


def test_a_proxy_that_names_nobody_has_no_role() -> None:
    found = policy().principal(992, 7)
    assert found is not None and found.scope is not None
    assert found.roles == set()
    assert policy().is_proxy(992) and not policy().is_proxy(1000)


@pytest.mark.parametrize("uid", [0, 1000])
def test_who_is_no_proxy_may_name_nobody(uid: int) -> None:
    for name in ("spiffe://prod/chat/a", f"uid:{uid}", "nonsense"):
        with pytest.raises(ForbiddenError, match="no proxy"):
            policy().principal(uid, 7, name)


@pytest.mark.parametrize("name", ["uid:0", "uid:1000", "uid:992", "spiffe://other/a", "dns:prod", "oidc:https://i|a"])
def test_a_proxy_may_not_name_whom_its_table_does_not(name: str) -> None:
    with pytest.raises(ForbiddenError):
        policy().principal(992, 7, name)


@pytest.mark.parametrize(
    "name",
    ["", "spiffe://prod/*", "spiffe://PROD/a", "spiffe://prod/é", "spiffe://prod/" + "a" * 200, "spiffe://prod/.."],
)
def test_a_proxy_that_sends_no_name_is_refused_as_such(name: str) -> None:
    with pytest.raises(PrincipalNameError):
        policy().principal(992, 7, name)


def test_without_a_policy_file_nobody_acts_for_others() -> None:
    with pytest.raises(ForbiddenError, match="no policy file"):
        Policy([1000]).principal(1000, 7, "spiffe://prod/a")
    assert Policy([1000]).principal(1001, 7, "spiffe://prod/a") is None
    assert not Policy([1000]).is_proxy(1000)


def test_allowed_uids_only_narrow_who_connects() -> None:
    one = FilePolicy(parse_policy(FILE), [1000, 1001])
    assert one.allowed == {1000}
    assert one.principal(0, 7) is one.principal(1001, 7) is one.principal(992, 7, "spiffe://prod/a") is None


def test_the_services_uid_and_the_overflow_uid_are_refused() -> None:
    with pytest.raises(PolicyFileError, match="user of its own"):
        policy(service_uid=992)
    for uid in (992, 1000):
        with pytest.raises(PolicyFileError, match="overflow"):
            policy(overflow_uid=uid)
    assert policy(service_uid=1000).principal(1000, 7) is not None


def test_a_replacement_holds_at_once_and_raises_the_generation() -> None:
    one = policy(service_uid=5)
    before = one.principal(992, 7, "spiffe://prod/chat/a")
    assert before is not None and before.scope is not None
    assert before.scope.generation == one.generation
    one.replace(parse_policy(FILE.replace(b'"spiffe://prod/**"]\nroles', b'"uid:7"]\nroles')))
    after = one.principal(992, 7, "spiffe://prod/chat/a")
    assert after is not None and after.scope is not None
    assert after.scope.generation == one.generation > before.scope.generation
    assert "monitor" in before.roles - after.roles
    assert one.principal(7, 7) is not None


def test_a_refused_replacement_changes_nothing() -> None:
    one = policy(service_uid=5)
    generation, rules = one.generation, one.rules
    with pytest.raises(PolicyFileError):
        one.replace(parse_policy(FILE.replace(b"uid:992", b"uid:5")))
    assert (one.generation, one.rules) == (generation, rules)
    assert one.is_proxy(992) and not one.is_proxy(5)


def test_invented_names_fill_no_memory() -> None:
    one = policy()
    first = one.principal(992, 7, "spiffe://prod/n0")
    for number in range(SCOPES_COUNT_MAX + 10):
        one.principal(992, 7, f"spiffe://prod/n{number}")
    again = one.principal(992, 7, "spiffe://prod/n0")
    assert first is not None and again is not None
    assert first.scope is not again.scope, "the oldest was dropped, and is made again"


def test_invented_names_do_not_drive_out_a_principal_that_asks() -> None:
    one = policy()
    first = one.principal(992, 7, "spiffe://prod/chat/a")
    for number in range(2 * SCOPES_COUNT_MAX):
        one.principal(992, 7, f"spiffe://prod/n{number}")
        if number % 1000 == 0:
            again = one.principal(992, 7, "spiffe://prod/chat/a")
            assert first is not None and again is not None and first.scope is again.scope


THREADS = st.one_of(st.none(), st.sampled_from(["chat-1", "other", "chat"]))
NAMES = st.sampled_from(["uid:0", "uid:1000", "spiffe://prod/admin", "spiffe://prod/chat/a", "spiffe://prod/x"])


@given(NAMES, st.sampled_from(get_args(Role)), THREADS)
def test_a_decision_needs_a_role_and_agrees_with_the_shortcuts(name: str, role: Role, thread: str | None) -> None:
    who = principal(name)
    assert who.scope is not None
    decided = who.scope.decide(role, thread)
    assert (role in who.roles) == (who.scope.decide(role, None) is not None)
    assert decided is None or role in who.roles
    everywhere = who.scope.everywhere(role)
    assert everywhere is None or decided is everywhere
    anywhere = who.scope.anywhere(role)
    assert anywhere is None or decided is not None
