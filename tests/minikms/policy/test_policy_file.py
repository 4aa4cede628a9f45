"""The policy file: what is refused, with the place and what to write; and that no input breaks the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.policy.rules import (
    GRANTS_COUNT_MAX,
    POLICY_BYTES_MAX,
    PRINCIPAL_PATTERNS_COUNT_MAX,
    THREAD_PATTERNS_COUNT_MAX,
    GrantLimits,
    PolicyFileError,
    parse_policy,
)

EXAMPLE = """\
version = 1
[[grant]]
principals = ["uid:1000", "spiffe://prod/chat/*"]
roles = ["create", "encrypt", "decrypt"]
threads = ["thread-*"]
limits = { requests_per_second = 2000, concurrent = 64, decrypts_per_hour = 500000, reencrypts_per_hour = 50000000 }
limits_total = { decrypts_per_hour = 5000000 }
[[proxy]]
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/**", "oidc:https://issuer.example|*"]
limits_total = { decrypts_per_hour = 2000000 }
"""


def grant(**members: str) -> str:
    """A file with one grant; a member of value "" is left out."""
    given = {"principals": '["uid:1000"]', "roles": '["decrypt"]', "threads": '["*"]'} | members
    return "version = 1\n[[grant]]\n" + "".join(f"{name} = {value}\n" for name, value in given.items() if value)


def proxy(**members: str) -> str:
    given = {"principals": '["uid:992"]', "on_behalf_of": '["spiffe://prod/**"]'} | members
    return "version = 1\n[[proxy]]\n" + "".join(f"{name} = {value}\n" for name, value in given.items() if value)


def refusal(text: str) -> str:
    with pytest.raises(PolicyFileError) as caught:
        parse_policy(text.encode())
    return str(caught.value)


def test_the_example_says_what_it_says() -> None:
    rules = parse_policy(EXAMPLE.encode())
    (one,), (asking,) = rules.grants, rules.proxies
    assert one.limits == GrantLimits(2000, 64, 500_000, 50_000_000)
    assert one.limits_total == GrantLimits(decrypts_per_hour=5_000_000)
    assert one.roles == {"create", "encrypt", "decrypt"}
    assert rules.granted_uids == {1000}
    assert rules.proxy_uids == asking.uids == {992}
    assert one.names_principal("spiffe://prod/chat/a") and not one.names_principal("uid:992")
    assert one.holds_thread("thread-1") and not one.holds_thread("thread")
    assert asking.may_name("oidc:https://issuer.example|7") and not asking.may_name("spiffe://other/a")
    assert len(rules.sha256) == 64


def test_a_file_without_grants_is_valid_and_allows_nothing() -> None:
    rules = parse_policy(b"version = 1\n")
    assert (rules.grants, rules.proxies) == ((), ())


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "version = 1"),
        ("version = 2", "version = 1"),
        ("version = true", "version = 1"),
        ("version = 1.0", "version = 1"),
        ('version = "1"', "version = 1"),
        ("version = 1\nversion = 1", "TOML"),
        ("version = 1\ngrants = 1", '"grants"'),
        ("version = 1\n[grant]\nroles = []", "[[grant]]"),
        ("version = 1\ngrant = [1]", "[[grant]]"),
        ("version = 1\n[[grant", "TOML"),
        (grant(thread='["*"]'), 'grant 1: there is no member "thread"; write one of name, principals'),
        (grant(threads=""), 'grant 1: threads is missing, which decrypt needs. For all threads write: threads = ["*"]'),
        (grant(roles='["rotate"]'), "grant 1: remove threads"),
        (grant(threads="[]"), "grant 1: threads is empty"),
        (grant(threads='["**"]'), 'grant 1, threads, "**": write one'),
        (grant(threads="[1]"), "grant 1: threads is a list of texts"),
        (grant(threads='"*"'), "grant 1: threads is a list of texts"),
        (grant(roles=""), "grant 1: roles is a list"),
        (grant(roles="[]"), "grant 1: roles is empty"),
        (grant(roles='["Decrypt"]'), 'grant 1, roles: "Decrypt" is none; the roles are create, encrypt'),
        (grant(principals='["root"]'), 'grant 1, principals, "root"'),
        (grant(principals='["uid:*"]'), "write each of them out"),
        (grant(principals="[]"), "grant 1: principals is empty"),
        (grant(name='"chat"', principals="[]"), "grant 1 (chat): principals is empty"),
        (grant(name='""'), "grant 1: name has 1 to 64 characters"),
        (grant(name='"a b"'), "grant 1: name has 1 to 64 characters"),
        (grant(limits="5"), "grant 1: limits is a table"),
        (grant(limits="{ decrypts_per_day = 5 }"), 'grant 1, limits: there is no member "decrypts_per_day"'),
        (grant(limits="{ concurrent = 0 }"), "grant 1, limits: concurrent is a whole number from 1"),
        (grant(limits="{ concurrent = true }"), "concurrent is a whole number"),
        (grant(limits="{ concurrent = 1.5 }"), "concurrent is a whole number"),
        (grant(limits_total="{ decrypts_per_hour = 1000000000001 }"), "grant 1, limits_total: decrypts_per_hour is a"),
        (proxy(limits="{ concurrent = 1 }"), 'proxy 1: there is no member "limits"'),
        (proxy(roles='["decrypt"]'), 'proxy 1: there is no member "roles"'),
        (proxy(principals='["spiffe://prod/gateway"]'), "proxy 1, principals: a proxy is a user of this machine"),
        (proxy(on_behalf_of='["uid:0"]'), "proxy 1, on_behalf_of: remove uid:"),
        (proxy(on_behalf_of='["spiffe://*/a"]'), "proxy 1, on_behalf_of"),
        (grant() + proxy(principals='["uid:1000"]').removeprefix("version = 1\n"), "uid:1000 is a proxy and is named"),
        (grant() + grant().removeprefix("version = 1\n"), "grant 2 has the budgets of grant 1"),
        (grant(name='"a"') + grant(name='"a"', threads='["b"]').removeprefix("version = 1\n"), "Give each a name"),
    ],
)
def test_a_refusal_names_the_place_and_says_what_to_write(text: str, place: str) -> None:
    assert place in refusal(text)


def test_everything_in_a_file_is_bounded() -> None:
    assert str(POLICY_BYTES_MAX) in refusal("#" * (POLICY_BYTES_MAX + 1))
    grants = [f'[[grant]]\nprincipals = ["uid:{uid}"]\nroles = ["audit"]\n' for uid in range(GRANTS_COUNT_MAX + 1)]
    assert str(GRANTS_COUNT_MAX) in refusal("version = 1\n" + "".join(grants))
    threads = [f'"t{number}"' for number in range(THREAD_PATTERNS_COUNT_MAX + 1)]
    assert str(THREAD_PATTERNS_COUNT_MAX) in refusal(grant(threads=f"[{', '.join(threads)}]"))
    parse_policy(grant(threads=f"[{', '.join(threads[1:])}]").encode())
    half = ", ".join(f'"uid:{uid}"' for uid in range(PRINCIPAL_PATTERNS_COUNT_MAX // 2 + 1))
    other = grant(principals=f"[{half}]", threads='["a"]').removeprefix("version = 1\n")
    assert str(PRINCIPAL_PATTERNS_COUNT_MAX) in refusal(grant(principals=f"[{half}]") + other)


def test_monitor_alone_may_have_no_thread() -> None:
    """Then it reads the status and lists no key."""
    (one,) = parse_policy(grant(roles='["monitor"]', threads="[]").encode()).grants
    assert not one.holds_thread("a")


def test_without_a_name_the_budgets_are_those_of_what_a_grant_concerns() -> None:
    def identity(text: str) -> str:
        return parse_policy(text.encode()).grants[0].identity

    one = identity(grant(principals='["uid:1", "uid:2"]'))
    assert one == identity(grant(principals='["uid:2", "uid:1"]', limits="{ concurrent = 1 }", roles='["encrypt"]'))
    assert one != identity(grant(principals='["uid:1"]'))
    assert one != identity(grant(principals='["uid:1", "uid:2"]', threads='["a"]'))
    assert identity(grant(name='"a"')) == identity(grant(name='"a"', principals='["uid:7"]'))


PARTS = st.sampled_from(
    [
        *EXAMPLE.split("\n"),
        *EXAMPLE.split(),
        "[[",
        "]]",
        '"',
        "'''",
        "=",
        "{",
        "}",
        "\n",
        "grant",
        "nan",
        "1979-99-99",
        "[" * 2000,
    ]
)


@given(st.one_of(st.binary(max_size=60), st.lists(PARTS, max_size=14).map(lambda parts: "\n".join(parts).encode())))
def test_any_content_is_rules_or_refused_with_a_printable_sentence(data: bytes) -> None:
    try:
        parse_policy(data)
    except PolicyFileError as error:
        assert str(error).isprintable()


@given(st.integers(0, len(EXAMPLE)), st.text(alphabet='"[]{}=\n#é\0 a1,.*', max_size=3), st.integers(0, 9))
def test_any_damage_of_a_file_is_rules_or_refused(at: int, put: str, cut: int) -> None:
    try:
        parse_policy((EXAMPLE[:at] + put + EXAMPLE[at + cut :]).encode())
    except PolicyFileError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("part", ["a", '"a"', " a "])
def test_a_key_of_thousands_of_parts_is_not_parsed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes the square of their number in time and memory: seconds and a GiB for the largest file, and a
    second for many lines.
    """
    monkeypatch.setattr("tomllib.loads", None)
    line = ".".join([part] * 9_000)
    for text in (f"{line} = 1", f"[{line}]", f"{line[:512]} = 1\n" * 126):
        with pytest.raises(PolicyFileError, match="too many dots"):
            parse_policy(b"version = 1\n" + text.encode())


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    assert "TOML" in refusal("version = " + "1" * 5000)
