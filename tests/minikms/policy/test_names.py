"""Names of principals: what is one, and that each principal has one name only."""

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.policy.names import PRINCIPAL_CHARS_MAX, PrincipalNameError, parse_name

LONGEST = "spiffe://prod/" + "a" * (PRINCIPAL_CHARS_MAX - len("spiffe://prod/"))


@pytest.mark.parametrize(
    "text",
    [
        "uid:0",
        "uid:1000",
        "uid:4294967294",
        "spiffe://prod/chat/api",
        "spiffe://a.b_c-d/X/y.z",
        "dns:api.example.com",
        "dns:db",
        "dns:1.a",
        "oidc:https://issuer.example|service-7",
        "oidc:https://issuer.example:8443/tenant/9|repo:org/name:ref",
        "oidc:https://issuer.example|auth0%7C12%20%C3%A9",
        LONGEST,
    ],
)
def test_a_name_of_the_grammar_is_taken_as_it_is(text: str) -> None:
    name = parse_name(text)
    assert name.text == text
    assert text.startswith(f"{name.scheme}:")
    assert name.uid == (int(text[4:]) if name.scheme == "uid" else None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root",
        "1000",
        "uid:",
        "uid:01",
        "uid:-1",
        "uid:+1",
        "uid:1e3",
        "uid: 1",
        "uid:1\n",
        "uid:٣",
        "uid:4294967295",
        "uid:99999999999",
        "UID:1",
        "spiffe://prod",
        "spiffe://prod/",
        "spiffe:///a",
        "spiffe://Prod/a",
        "SPIFFE://prod/a",
        "spiffe://prod//a",
        "spiffe://prod/a/",
        "spiffe://prod/../b",
        "spiffe://prod/.",
        "spiffe://prod/a%20b",
        "spiffe://prod/a b",
        "spiffe://prod/é",
        "spiffe://prod:80/a",
        "spiffe://user@prod/a",
        "spiffe://prod/a?b",
        "spiffe://prod/*",
        "spiffe://prod/[a]",
        "dns:",
        "dns:API.example.com",
        "dns:api.example.com.",
        "dns:.example.com",
        "dns:a..b",
        "dns:-a.b",
        "dns:a-.b",
        "dns:a_b.c",
        "dns:*.example.com",
        "dns:10.0.0.1",
        "dns:7",
        "dns:" + "a" * 64,
        "oidc:https://issuer.example",
        "oidc:https://issuer.example|",
        "oidc:http://issuer.example|a",
        "oidc:https://Issuer.example|a",
        "oidc:https://issuer.example:0|a",
        "oidc:https://issuer.example|a|b",
        "oidc:https://issuer.example|a b",
        "oidc:https://issuer.example|a%2fb",
        "oidc:https://issuer.example|a%2Fb",
        "oidc:https://issuer.example|%41",
        "oidc:https://issuer.example|%",
        "oidc:https://issuer.example|a*",
        "oidc:https://issuer.example?a=b|c",
        "oidc:https://issuer.example/a%2Fb|c",
        LONGEST + "a",
        "mailto:a@b",
        "spiffe://prod/chat\x00",
    ],
)
def test_what_is_no_name_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(PrincipalNameError) as caught:
        parse_name(text)
    assert str(caught.value).isascii()
    if len(text) <= PRINCIPAL_CHARS_MAX:
        with pytest.raises(PrincipalNameError) as of_another:
            parse_name(text.partition(":")[0] + ":!")
        assert str(caught.value) == str(of_another.value)


ALPHABET = "uidspfenco:/|.-_~@%*?[AaFf019 é\n"


@given(
    st.text(alphabet=ALPHABET, max_size=12), st.sampled_from(["uid:", "spiffe://p/", "dns:a.", "oidc:https://i|", ""])
)
def test_any_text_is_a_printable_ascii_name_or_refused(rest: str, begin: str) -> None:
    try:
        name = parse_name(begin + rest)
    except PrincipalNameError:
        return
    assert re.fullmatch(r"[!-~]{1,200}", name.text)
    assert not set("*?[") & set(name.text)
    assert parse_name(name.text) == name


@given(st.binary(min_size=1, max_size=20))
def test_each_subject_has_exactly_one_spelling(subject: bytes) -> None:
    """Escape every byte that can't stand for itself: that spelling is a name, and no other one is."""
    literal = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~:/@-"
    spelled = "".join(chr(byte) if byte in literal else f"%{byte:02X}" for byte in subject)
    name = parse_name(f"oidc:https://issuer.example|{spelled}")
    assert unquote_to_bytes(name.text.partition("|")[2]) == subject
    everything = "".join(f"%{byte:02X}" for byte in subject)
    for other in {everything, everything.lower(), spelled.lower()}:
        if other != spelled and unquote_to_bytes(other) == subject:
            with pytest.raises(PrincipalNameError):
                parse_name(f"oidc:https://issuer.example|{other}")
