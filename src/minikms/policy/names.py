"""Names of principals: one grammar for all of them.

Owns: which texts are names. docs/spec/policy.md is the specification. Invariants: a name is ASCII and at most
PRINCIPAL_CHARS_MAX characters long. No two texts name the same principal, because nothing has a second spelling: no
upper case where it means the same as lower case, no escape of a character that can stand for itself, no leading zero.
No name contains a character that has a meaning in a pattern. It must never correct a text: what is not a name is
refused.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from minikms.api.errors import InvalidRequestError

Scheme = Literal["uid", "spiffe", "dns", "oidc"]

PRINCIPAL_CHARS_MAX: Final = 200
UID_MAX: Final = 2**32 - 2
"""The next one means "no user" to the kernel."""

_ESCAPE: Final = "%[0-9A-F]{2}"
_LABEL: Final = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_UID: Final = re.compile(r"uid:(?:0|[1-9][0-9]{0,9})", re.ASCII)
_SPIFFE: Final = re.compile(r"spiffe://[a-z0-9][a-z0-9._-]*(?:/[A-Za-z0-9._-]+)+", re.ASCII)
_DNS: Final = re.compile(rf"dns:{_HOST}", re.ASCII)
_OIDC: Final = re.compile(
    rf"oidc:https://{_HOST}(?::[1-9][0-9]{{0,4}})?(?:/(?:[A-Za-z0-9._~:/@-]|{_ESCAPE})*)?"
    rf"\|(?:[A-Za-z0-9._~:/@-]|{_ESCAPE})+",
    re.ASCII,
)
_ESCAPED: Final = re.compile(_ESCAPE, re.ASCII)
_LITERAL: Final = re.compile(r"[A-Za-z0-9._~:/@-]", re.ASCII)

_WRITE: Final[dict[Scheme, str]] = {
    "uid": "a user id is uid: and a decimal number without leading zeros, such as uid:1000",
    "spiffe": "a SPIFFE id is spiffe://, a trust domain in lower case, and a path of A-Z, a-z, 0-9, '.', '_' and '-' "
    "between slashes, such as spiffe://prod/chat/api",
    "dns": "a DNS name is dns: and labels of a-z, 0-9 and '-' between dots, such as dns:api.example.com. It is in "
    "lower case, and no address",
    "oidc": "an OpenID subject is oidc:, the issuer's https URL, '|' and the subject, such as "
    "oidc:https://issuer.example|service-7; every byte but A-Z, a-z, 0-9 and '._~:/@-' is written as '%' and two "
    "hexadecimal digits in upper case, and those are never written so",
}


class PrincipalNameError(InvalidRequestError):
    """The text is not a name of a principal. The error says what to write and does not quote the text."""


class Name(NamedTuple):
    """The name of a principal. `text` is all of it, with the scheme."""

    scheme: Scheme
    text: str

    @property
    def uid(self) -> int | None:
        """The user id of a name with the scheme `uid`."""
        return int(self.text[4:]) if self.scheme == "uid" else None


def parse_name(text: str) -> Name:
    if len(text) > PRINCIPAL_CHARS_MAX:
        raise PrincipalNameError(f"the name of a principal has at most {PRINCIPAL_CHARS_MAX} characters")
    scheme = scheme_of(text)
    if not _is_name(scheme, text):
        raise PrincipalNameError(_WRITE[scheme])
    return Name(scheme, text)


def scheme_of(text: str) -> Scheme:
    """The scheme of a name or of a pattern. Raises PrincipalNameError."""
    before = text.partition(":")[0]
    for scheme in _WRITE:
        if before == scheme:
            return scheme
    raise PrincipalNameError("the name of a principal begins with uid:, spiffe://, dns: or oidc:, in lower case")


def _is_name(scheme: Scheme, text: str) -> bool:
    if scheme == "uid":
        return _UID.fullmatch(text) is not None and int(text[4:]) <= UID_MAX
    if scheme == "spiffe":
        return _SPIFFE.fullmatch(text) is not None and not {".", ".."} & set(text.split("/"))
    if scheme == "dns":
        return _DNS.fullmatch(text) is not None and not text.rpartition(".")[2].removeprefix("dns:").isdigit()
    # One spelling: what can stand for itself is not escaped.
    return _OIDC.fullmatch(text) is not None and not any(
        _LITERAL.fullmatch(chr(int(escape[1:], 16))) for escape in _ESCAPED.findall(text)
    )
