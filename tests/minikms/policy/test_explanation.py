"""What explain says: the decision of the rules themselves, its grant, and changes that really change it."""

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.api import Role
from minikms.api.errors import ForbiddenError, InvalidRequestError
from minikms.policy.explanation import Explanation, explain
from minikms.policy.file_policy import FilePolicy
from minikms.policy.rules import PROXIED_ROLES, THREAD_ROLES, parse_policy

FILE = """
version = 1
[[grant]]
name = "chat"
principals = ["uid:1000", "spiffe://prod/chat/*"]
roles = ["create", "encrypt", "decrypt"]
threads = ["chat-*"]
limits = { decrypts_per_hour = 500 }
limits_total = { decrypts_per_hour = 1000 }
[[grant]]
name = "admins"
principals = ["uid:0", "spiffe://prod/admin"]
roles = ["create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor", "unseal"]
threads = ["*"]
[[grant]]
name = "readers"
principals = ["spiffe://prod/**"]
roles = ["decrypt", "monitor"]
threads = ["*"]
[[proxy]]
name = "gateway"
principals = ["uid:992", "uid:993"]
on_behalf_of = ["spiffe://prod/**"]
limits_total = { decrypts_per_hour = 800 }
"""
NAMES = (
    "uid:0",
    "uid:1000",
    "uid:992",
    "uid:7",
    "spiffe://prod/admin",
    "spiffe://prod/chat/a",
    "spiffe://x/a",
    "dns:a",
)
VIAS = (None, "uid:992", "uid:993", "uid:1000", "uid:7")


def explained(
    name: str, role: Role, thread: str | None = None, via: str | None = None, file: str = FILE
) -> Explanation:
    return explain(FilePolicy(parse_policy(file.encode())), name, role, thread, via)


@given(
    st.sampled_from(NAMES),
    st.sampled_from(get_args(Role)),
    st.sampled_from([None, "chat-1", "other"]),
    st.sampled_from(VIAS),
)
def test_explain_agrees_with_the_policy(name: str, role: Role, thread: str | None, via: str | None) -> None:
    """The model asks the policy as the daemon does."""
    if role not in THREAD_ROLES:
        thread = None
    policy = FilePolicy(parse_policy(FILE.encode()))
    found = explain(policy, name, role, thread, via)
    asking, named = (via or ("uid:992" if name.startswith("spiffe://prod/") else None)), name
    if asking is None and name.startswith("uid:"):
        asking, named = name, ""
    code, grant = api.CODE_FORBIDDEN, None
    if asking is not None:
        try:
            who = policy.principal(int(asking[4:]), 0, named or None)
        except ForbiddenError:
            who = None
        else:
            if who is None:
                code = api.CODE_UNAUTHORIZED
        if who is not None and role in who.roles:
            assert who.scope is not None
            grant = who.scope.decide(role, thread)
            if grant is None and role != "create":
                code = api.CODE_KEY_NOT_FOUND
    assert found.decision == ("denied" if grant is None else "allowed")
    assert found.code == ("" if grant is not None else code)
    assert found.grant == ("" if grant is None else grant.label)


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "uid:992"])
def test_the_last_change_of_an_explanation_allows_it(name: str, role: Role) -> None:
    """A table of an explanation is written at the end of the file."""
    file, thread = FILE, "other" if role in THREAD_ROLES else None
    for _ in range(3):
        found = explained(name, role, thread, file=file)
        if found.decision == "allowed" or not found.what_would_change:
            break
        table = re.fullmatch(r"add a table \[\[(\w+)\]\] with (.*)", found.what_would_change[-1])
        if table is None:
            assert found.what_would_change[-1].startswith("add "), found
            file = file.replace('on_behalf_of = ["spiffe', f'on_behalf_of = ["{name}", "spiffe')
        else:
            file += f"[[{table[1]}]]\n" + re.sub(r"\], ", "]\n", table[2].replace(" and ", ", ")) + "\n"
    refused = not name.startswith("uid:") and role not in PROXIED_ROLES
    assert found.decision == ("denied" if refused else "allowed"), (found, file)


def test_an_allowed_request_names_grant_limits_and_who_would_decide_next() -> None:
    found = explained("spiffe://prod/chat/a", "decrypt", "chat-1")
    assert (found.decision, found.grant, found.proxy, found.via) == (
        "allowed",
        "grant 1 (chat)",
        "proxy 1 (gateway)",
        "uid:992",
    )
    assert found.what_would_change == ("without grant 1 (chat), grant 3 (readers) would decide",)
    assert found.limits == (
        "grant 1 (chat), each principal: decrypts_per_hour = 500",
        "grant 1 (chat), all principals: decrypts_per_hour = 1000",
        "proxy 1 (gateway), all principals: decrypts_per_hour = 800",
    )


def test_an_allowed_request_of_no_thread_names_the_threads() -> None:
    assert "in the threads chat-*" in explained("uid:1000", "decrypt", None).why
    assert "in the thread" not in explained("uid:0", "rotate", None).why


def test_a_small_change_comes_before_a_new_table() -> None:
    found = explained("uid:1000", "encrypt", "other")
    assert (found.decision, found.code) == ("denied", "key_not_found")
    assert found.what_would_change[0] == 'add "other", or a pattern of it, to threads of grant 1 (chat)'
    assert 'add "uid:1000" to principals of grant 2 (admins)' in found.what_would_change


def test_creating_out_of_scope_is_forbidden_not_unknown() -> None:
    assert explained("uid:1000", "create", "other").code == "forbidden"


@pytest.mark.parametrize(
    ("name", "thread", "via"), [("root", None, None), ("uid:0", "a b", None), ("uid:0", None, "spiffe://prod/a")]
)
def test_what_is_no_name_or_thread_is_wrong_usage(name: str, thread: str | None, via: str | None) -> None:
    with pytest.raises(InvalidRequestError):
        explained(name, "decrypt", thread, via)


def test_a_thread_with_a_role_that_concerns_none_is_wrong_usage() -> None:
    with pytest.raises(InvalidRequestError, match="leave the thread out"):
        explained("uid:0", "rotate", "chat-1")


def test_allowed_uids_decide_first_who_connects() -> None:
    """As in the daemon. Where two uids may name the principal, the one that connects asks."""
    rules = parse_policy(FILE.encode())
    denied = explain(FilePolicy(rules, [993]), "uid:1000", "decrypt", "chat-1", None)
    assert (denied.code, denied.what_would_change) == (
        "unauthorized",
        ("add 1000 to ALLOWED_UIDS, which leaves it out",),
    )
    name = "spiffe://prod/chat/a"
    assert explain(FilePolicy(rules, [993]), name, "decrypt", "chat-1", None).via == "uid:993"
    assert explain(FilePolicy(rules, [7]), name, "decrypt", "chat-1", None).code == "unauthorized"
