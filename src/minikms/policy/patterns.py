"""Patterns of principals and of thread ids, and the matchers.

Owns: which texts are patterns, and what they match. docs/spec/policy.md is the specification. In a pattern of
principals `*` stands for any run of characters within a segment and `**` for any run across segments; segments end at
`/`, in `dns:` at `.`. The scheme and the authority (trust domain, issuer) are literal, and a uid has no pattern. A
thread id has no segments: `*` stands for any run. Invariants: a match is case-sensitive, and takes time proportional to
the length of the text, whatever the pattern is. It must never build a regular expression from its input.
"""

from __future__ import annotations

from typing import Final

from minikms import api
from minikms.api.errors import InvalidRequestError
from minikms.policy.names import PRINCIPAL_CHARS_MAX, Name, PrincipalNameError, Scheme, parse_name, scheme_of

THREAD_PATTERN_CHARS_MAX: Final = 128
_ANY: Final = "*"
_ANY_ACROSS: Final = "**"
_SAMPLE: Final = "x"
"""Takes the place of a wildcard when the rest of a pattern is checked. It is no hexadecimal digit."""
_ACROSS: Final = "\0"
"""Stands for a `**` of another pattern in `PrincipalPattern.covers`. No name contains it."""


class PatternError(InvalidRequestError):
    """The text is not a pattern. The error says what to write and does not quote the text."""


class PrincipalPattern:
    """A pattern of principals, or a name, which matches itself.

    It is an automaton with a position before and after each token. Its states are the bits of an integer, so that a
    character takes a few operations, whatever the pattern is.
    """

    __slots__ = ("_across", "_end", "_literals", "_prefix", "_separator", "_wild", "authority", "scheme", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.scheme = _scheme(text)
        self.authority = _authority(self.scheme, text)
        _check(text, self.authority)
        self._separator = "." if self.scheme == "dns" else "/"
        self._prefix = text.partition(_ANY)[0]
        self._literals: dict[str, int] = {}
        self._wild = self._across = 0
        position = 0
        rest = text[len(self._prefix) :]
        while rest:
            token = _ANY_ACROSS if rest.startswith(_ANY_ACROSS) else rest[0]
            bit = 1 << position
            if token == _ANY_ACROSS:
                self._across |= bit
            if token in (_ANY, _ANY_ACROSS):
                self._wild |= bit
            else:
                self._literals[token] = self._literals.get(token, 0) | bit
            position += 1
            rest = rest[len(token) :]
        self._end = 1 << position

    def __repr__(self) -> str:
        return f"PrincipalPattern({self.text!r})"

    @property
    def uid(self) -> int | None:
        """The user id of a pattern with the scheme `uid`."""
        return Name(self.scheme, self.text).uid

    @property
    def is_name(self) -> bool:
        """Whether it matches one name only."""
        return self._prefix == self.text

    def matches(self, name: str) -> bool:
        if not name.startswith(self._prefix):
            return False
        wild, across, literals = self._wild, self._across, self._literals
        states = 1 | (wild & 1) << 1
        for char in name[len(self._prefix) :]:
            stays = states & (across if char in (self._separator, _ACROSS) else wild)
            states = stays | (states & literals.get(char, 0)) << 1
            if not states:
                return False
            states |= (states & wild) << 1  # a wildcard may stand for nothing; no two of them are adjacent
        return bool(states & self._end)

    def covers(self, other: PrincipalPattern) -> bool:
        """Whether every name that matches `other` matches this pattern too. It may be false although they do."""
        return self.matches(other.text.replace(_ANY_ACROSS, _ACROSS))


class ThreadPattern:
    """A pattern of thread ids, or a thread id, which matches itself."""

    __slots__ = ("_between", "_length_min", "_prefix", "_suffix", "text")

    def __init__(self, text: str) -> None:
        if not 0 < len(text) <= THREAD_PATTERN_CHARS_MAX:
            raise PatternError(f"a pattern of threads has 1 to {THREAD_PATTERN_CHARS_MAX} characters")
        if _ANY_ACROSS in text:
            raise PatternError("write one '*': in a pattern of threads it stands for any run of characters")
        if api.THREAD_ID_PATTERN.fullmatch(text.replace(_ANY, _SAMPLE)) is None:
            raise PatternError("a pattern of threads holds A-Z, a-z, 0-9, '.', '_', '-' and '*', such as thread-*")
        self.text = text
        self._prefix, *rest = text.split(_ANY)
        self._suffix = rest[-1] if rest else None
        self._between = rest[:-1]
        self._length_min = len(text) - text.count(_ANY)

    def __repr__(self) -> str:
        return f"ThreadPattern({self.text!r})"

    @property
    def is_all(self) -> bool:
        """Whether it matches every thread."""
        return self.text == _ANY

    def matches(self, thread_id: str) -> bool:
        """Whether the thread id matches. Each part between two wildcards is taken where it occurs first."""
        if self._suffix is None:
            return thread_id == self._prefix
        if len(thread_id) < self._length_min or not (
            thread_id.startswith(self._prefix) and thread_id.endswith(self._suffix)
        ):
            return False
        place, end = len(self._prefix), len(thread_id) - len(self._suffix)
        for part in self._between:
            index = thread_id.find(part, place, end)
            if index < 0:
                return False
            place = index + len(part)
        return True

    def covers(self, other: ThreadPattern) -> bool:
        """Whether every thread id that matches `other` matches this pattern too. It may be false although they do."""
        return self.matches(other.text)  # only a wildcard can stand for the `*` in the text


def _scheme(text: str) -> Scheme:
    try:
        return scheme_of(text)
    except PrincipalNameError as error:
        raise PatternError(str(error)) from None


def _authority(scheme: Scheme, text: str) -> str:
    """The part of a pattern that is literal in any case: the scheme, and the trust domain or the issuer."""
    if scheme == "spiffe":
        return text[: text.find("/", len("spiffe://")) + 1]
    if scheme == "oidc":
        return text[: text.find("|") + 1]
    return text if scheme == "uid" else "dns:"


def _check(text: str, authority: str) -> None:
    if len(text) > PRINCIPAL_CHARS_MAX:
        raise PatternError(f"a pattern of principals has at most {PRINCIPAL_CHARS_MAX} characters")
    if _ANY in authority:
        raise PatternError("'*' can't stand in a uid, a trust domain or an issuer: write each of them out")
    if _ANY in text and not authority:
        raise PatternError(
            "a pattern is a name with '*' or '**' after its trust domain or issuer, such as spiffe://prod/**"
        )
    if "***" in text:
        raise PatternError("write '*' for a run within a segment, or '**' for a run across segments")
    try:
        parse_name(text.replace(_ANY_ACROSS, _SAMPLE).replace(_ANY, _SAMPLE))
    except PrincipalNameError as error:
        raise PatternError(str(error)) from None
