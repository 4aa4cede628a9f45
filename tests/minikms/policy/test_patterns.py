"""The matchers against an independent model: a recursion that follows the sentences of docs/spec/policy.md."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.policy.names import PRINCIPAL_CHARS_MAX, PrincipalNameError, parse_name
from minikms.policy.patterns import THREAD_PATTERN_CHARS_MAX, PatternError, PrincipalPattern, ThreadPattern


def model(pattern: str, text: str, separator: str) -> bool:
    """Whether the text matches, character by character. `separator` is empty where there are no segments."""
    if not pattern:
        return not text
    if pattern.startswith("**"):
        return any(model(pattern[2:], text[at:], separator) for at in range(len(text) + 1))
    if pattern[0] == "*":
        runs = (text[:at] for at in range(len(text) + 1))
        return any(
            model(pattern[1:], text[len(run) :], separator) for run in runs if not separator or separator not in run
        )
    return bool(text) and text[0] == pattern[0] and model(pattern[1:], text[1:], separator)


AUTHORITIES = ("spiffe://d/", "spiffe://da/", "dns:", "oidc:https://i|", "oidc:https://i/a|")
PIECES = st.sampled_from(["a", "b", "ab", "A", "/", ".", "*", "**", "a*", "*b", "-", "%20"])


def separator_of(text: str) -> str:
    return "." if text.startswith("dns:") else "/"


@given(
    st.sampled_from(AUTHORITIES),
    st.lists(PIECES, max_size=6),
    st.sampled_from(AUTHORITIES),
    st.lists(PIECES, max_size=7),
)
def test_a_pattern_of_principals_matches_what_the_model_says(
    authority: str, pieces: list[str], of_name: str, name_pieces: list[str]
) -> None:
    pattern, name = authority + "".join(pieces), of_name + "".join(name_pieces).replace("*", "b")
    try:
        parsed = PrincipalPattern(pattern)
        text = parse_name(name).text
    except (PatternError, PrincipalNameError):
        return
    assert parsed.matches(text) == model(pattern, text, separator_of(pattern))


@given(st.sampled_from(AUTHORITIES), st.lists(st.sampled_from("ab"), min_size=1, max_size=5), st.data())
def test_a_pattern_made_of_a_name_matches_it_as_the_model_says(
    authority: str, segments: list[str], data: st.DataObject
) -> None:
    """Runs of a name become wildcards, so that most of these match."""
    separator = separator_of(authority)
    name = authority + separator.join(segments)
    start = data.draw(st.integers(len(authority), len(name)))
    end = data.draw(st.integers(start, len(name)))
    pattern = name[:start] + data.draw(st.sampled_from(["*", "**"])) + name[end:]
    parsed = PrincipalPattern(pattern)
    crosses = separator in name[start:end]
    assert parsed.matches(name) == model(pattern, name, separator)
    assert parsed.matches(name) or (crosses and "**" not in pattern)


@given(st.text(alphabet="ab*", min_size=1, max_size=7), st.text(alphabet="ab", min_size=1, max_size=9))
def test_a_pattern_of_threads_matches_what_the_model_says(pattern: str, thread_id: str) -> None:
    try:
        parsed = ThreadPattern(pattern)
    except PatternError:
        assert "**" in pattern
        return
    assert parsed.matches(thread_id) == model(pattern, thread_id, "")


@given(
    st.sampled_from(AUTHORITIES),
    st.lists(PIECES, max_size=4),
    st.lists(PIECES, max_size=4),
    st.lists(st.sampled_from(["a", "b", "/", "."]), max_size=5),
)
def test_a_pattern_that_covers_another_matches_all_its_names(
    authority: str, wide: list[str], narrow: list[str], name_pieces: list[str]
) -> None:
    try:
        one, other = (PrincipalPattern(authority + "".join(pieces)) for pieces in (wide, narrow))
        name = parse_name(authority + "".join(name_pieces)).text
    except (PatternError, PrincipalNameError):
        return
    if one.covers(other) and other.matches(name):
        assert one.matches(name)


@given(*[st.text(alphabet="ab*", min_size=1, max_size=5)] * 2, st.text(alphabet="ab", min_size=1, max_size=6))
def test_a_thread_pattern_that_covers_another_matches_all_its_ids(wide: str, narrow: str, thread_id: str) -> None:
    try:
        one, other = ThreadPattern(wide), ThreadPattern(narrow)
    except PatternError:
        return
    if one.covers(other) and other.matches(thread_id):
        assert one.matches(thread_id)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (
            "spiffe://prod/chat/*",
            ["spiffe://prod/chat/a"],
            ["spiffe://prod/chat/a/b", "spiffe://prod/chat", "spiffe://prod2/chat/a", "spiffe://prod/Chat/a"],
        ),
        ("spiffe://prod/**", ["spiffe://prod/a", "spiffe://prod/a/b"], ["spiffe://production/a", "spiffe://pro/d/a"]),
        ("spiffe://prod/chat", ["spiffe://prod/chat"], ["spiffe://prod/chat2", "spiffe://prod/cha"]),
        ("dns:*.example.com", ["dns:a.example.com"], ["dns:a.b.example.com", "dns:example.com", "dns:a.example.org"]),
        ("dns:**.example.com", ["dns:a.b.example.com"], ["dns:example.com", "dns:a.example.com.evil"]),
        (
            "oidc:https://issuer.example|*",
            ["oidc:https://issuer.example|7"],
            [
                "oidc:https://issuer.example|a/b",
                "oidc:https://issuer.example.evil|7",
                "oidc:https://issuer.example/a|7",
            ],
        ),
        ("uid:1000", ["uid:1000"], ["uid:10000", "uid:100"]),
    ],
)
def test_a_pattern_stays_in_its_segment_and_authority(pattern: str, matching: list[str], others: list[str]) -> None:
    parsed = PrincipalPattern(pattern)
    assert [text for text in matching if not parsed.matches(parse_name(text).text)] == []
    assert [text for text in others if parsed.matches(parse_name(text).text)] == []
    assert parsed.is_name == ("*" not in pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        "**",
        "uid:*",
        "uid:1*",
        "spiffe://*/a",
        "spiffe://*",
        "spiffe://prod*/a",
        "spiffe://prod/***",
        "spiffe://prod//*",
        "spiffe://prod/?",
        "spiffe://prod/[a-z]",
        "spiffe://prod/..",
        "oidc:*|a",
        "oidc:https://*|a",
        "oidc:https://issuer.example*",
        "oidc:https://issuer.example|%*1",
        "oidc:https://issuer.example|%4*",
        "dns:a..*",
        "dns:-*",
        "DNS:*.a",
        "spiffe://prod/" + "a" * PRINCIPAL_CHARS_MAX,
    ],
)
def test_what_is_no_pattern_is_refused_with_a_sentence(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"\w+ .*\w+"):
        PrincipalPattern(pattern)


@pytest.mark.parametrize("pattern", ["", "**", "a**b", "a b", "é", "?", "a/b", "a" * (THREAD_PATTERN_CHARS_MAX + 1)])
def test_what_is_no_pattern_of_threads_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        ThreadPattern(pattern)


def test_no_pattern_makes_a_match_slow() -> None:
    """A matcher that goes back to each wildcard would take longer than the universe exists."""
    end = "b" * 3
    pattern = PrincipalPattern("spiffe://d/" + "*a" * 90 + end)
    across = PrincipalPattern("oidc:https://i|" + "**a" * 60 + end)
    thread = ThreadPattern("*a" * 60 + end)
    for _ in range(50):
        assert not pattern.matches("spiffe://d/" + "a" * (PRINCIPAL_CHARS_MAX - 11))
        assert not across.matches("oidc:https://i|" + "a" * (PRINCIPAL_CHARS_MAX - 15))
        assert not thread.matches("a" * 128)
