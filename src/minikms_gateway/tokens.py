"""The principal of a token.

Owns: the rules for bearer tokens, in this order; the first that is broken refuses the token:
1. A compact JWS (RFC 7515) of at most TOKEN_BYTES_MAX, without `crit`, of a type that is an access token's or an
   SVID's, whose header names a key (`kid`) and an algorithm.
2. The issuer is chosen by the claims, which nothing has proven yet: by `iss`, or by the trust domain of a SPIFFE id in
   `sub`. Everything after that is decided by that issuer's table alone.
3. The algorithm is one of the issuer's list, and of the key's own `alg`; the key has that `kid`, and can't be a shared
   secret. joserfc verifies the signature.
4. `iss` is the issuer (of `oidc`), `aud` has the audience, `exp` is ahead and at most TOKEN_SECONDS_MAX after `iat`
   or now, `nbf` and `iat` are not ahead, with SKEW_SECONDS for clocks that differ.
5. `cnf` holds nothing but `x5t#S256` (RFC 8705), which is the certificate of this connection. Beside a certificate a
   token must have it: then the name is the token's, never two names together.
6. The name is one of `minikms.policy`: `oidc:ISSUER|SUBJECT`, or the SPIFFE id of a JWT-SVID, of its trust domain.
Pure: bytes, keys and time are passed in. It must never show a token, or keep one: `Verified` is found by its digest.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import InvalidRequestError, StartError
from minikms.policy.names import parse_name
from minikms_gateway.config import Issuer
from minikms_gateway.reasons import RefusedTokenError

TOKEN_BYTES_MAX: Final = 8 * 1024
TOKEN_SECONDS_MAX: Final = 24 * 3600
"""The whole life of a token: who steals one has it no longer."""
SKEW_SECONDS: Final = 30.0
KEYS_COUNT_MAX: Final = 64
KID_CHARS_MAX: Final = 256
RSA_BITS_MIN: Final = 2048
_TYPES: Final = frozenset({None, "jwt", "at+jwt", "application/at+jwt", "jose"})
_LITERAL: Final = "._~:/@-"
_THUMBPRINT: Final = "x5t#S256"
_BEARER: Final = "bearer"

Key = RSAKey | ECKey | OKPKey


class Verified(NamedTuple):
    """What a token proves: a name, until a time in Unix seconds, and with `thumbprint` only for the holder of that
    certificate's private key. `issuer`: its index in the configuration, `kid`: the key that has signed it, `begun`:
    when, 0 if the token does not say.
    """

    name: str
    until: float
    thumbprint: bytes | None
    issuer: int
    kid: str
    begun: float = 0.0

    @property
    def expires(self) -> float:
        """The end that the token states, in Unix seconds."""
        return self.until - SKEW_SECONDS


class Unverified(NamedTuple):
    """A token as it says about itself. Nothing of it is proven."""

    text: str
    kid: str
    algorithm: str
    issuer: int


class _Registry(JWSRegistry):
    """The bounds of joserfc, narrowed to a token of TOKEN_BYTES_MAX."""

    max_header_length = 2048
    max_payload_length = TOKEN_BYTES_MAX


def bearer(authorization: str) -> str:
    """The token of the header. Raises RefusedTokenError."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip(" ")
    if scheme.lower() != _BEARER or not token:
        raise RefusedTokenError("token_malformed")
    if len(token) > TOKEN_BYTES_MAX:
        raise RefusedTokenError("token_size")
    return token


def read(token: str, issuers: tuple[Issuer, ...]) -> Unverified:
    """Rules 1 and 2. Raises RefusedTokenError."""
    parts = token.split(".")
    if len(parts) != 3:
        raise RefusedTokenError("token_malformed")
    header, claims = _object(parts[0]), _object(parts[1])
    if "crit" in header:
        raise RefusedTokenError("token_crit")
    kind = header.get("typ")
    if kind is not None and (not isinstance(kind, str) or kind.lower() not in _TYPES):
        raise RefusedTokenError("token_type")
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str):
        raise RefusedTokenError("token_algorithm")
    index = _issuer(claims, issuers)
    if algorithm not in issuers[index].algorithms:
        raise RefusedTokenError("token_algorithm")
    if not isinstance(kid, str) or not 0 < len(kid) <= KID_CHARS_MAX:
        raise RefusedTokenError("token_key")
    return Unverified(token, kid, algorithm, index)


def verify(token: Unverified, issuer: Issuer, key: Key, *, now: float, thumbprint: bytes | None) -> Verified:
    """Rules 3 to 6. `thumbprint`: of the certificate of the connection. Raises RefusedTokenError."""
    if key.alg is not None and key.alg != token.algorithm:
        raise RefusedTokenError("token_algorithm")
    try:
        decoded = jwt.decode(
            token.text,
            key,
            algorithms=[token.algorithm],
            registry=_Registry(algorithms=[token.algorithm], strict_check_header=False),
        )
    except (JoseError, ValueError, TypeError):
        raise RefusedTokenError("token_signature") from None
    claims = decoded.claims
    until = _check_times(claims, now)
    if issuer.kind == "oidc" and claims.get("iss") != issuer.issuer:
        raise RefusedTokenError("token_issuer")
    audience = claims.get("aud")
    if issuer.audience not in (audience if isinstance(audience, list) else [audience]):
        raise RefusedTokenError("token_audience")
    bound = _bound_to(claims)
    check_binding(bound, thumbprint)
    issued_at = _time(claims, "iat") or 0.0
    return Verified(_name(claims, issuer), until, bound, token.issuer, token.kid, issued_at)


def check_binding(bound: bytes | None, thumbprint: bytes | None) -> None:
    """Rule 5, for each connection. Raises RefusedTokenError."""
    if bound is None:
        if thumbprint is not None:
            raise RefusedTokenError("token_unbound")
    elif thumbprint is None or not hmac.compare_digest(bound, thumbprint):
        raise RefusedTokenError("token_binding")


def parse_keys(content: bytes) -> dict[str, Key]:
    """The keys of a JWK set that verify signatures, by `kid`. Raises StartError. A key without a `kid`, for another
    use, or of a kind that is not for signatures by a private key, is left out.
    """
    try:
        members = msgspec.json.decode(content, type=dict[str, Any]).get("keys")
    except UNDECODABLE:
        members = None
    if not isinstance(members, list) or len(members) > KEYS_COUNT_MAX:
        raise StartError(f"no JWK set of at most {KEYS_COUNT_MAX} keys")
    keys: dict[str, Key] = {}
    for one in members:
        if not isinstance(one, dict) or one.get("use", "sig") not in ("sig", "jwt-svid"):
            continue
        kid = one.get("kid")
        if not isinstance(kid, str) or not 0 < len(kid) <= KID_CHARS_MAX:
            continue
        if kid in keys:
            raise StartError("a JWK set with two keys of one kid")
        key = _key(one)
        if key is not None:
            keys[kid] = key
    if not keys:
        raise StartError("a JWK set without a key that verifies signatures and has a kid")
    return keys


def _key(jwk: Mapping[str, Any]) -> Key | None:
    """Only the members of the public key are taken over."""
    members = {name: jwk[name] for name in ("kty", "crv", "x", "y", "n", "e", "alg") if name in jwk}
    try:
        [key] = KeySet.import_key_set({"keys": [members]}).keys
        if isinstance(key, RSAKey) and key.raw_value.key_size < RSA_BITS_MIN:
            return None
        return key if isinstance(key, RSAKey | ECKey | OKPKey) else None
    except (JoseError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _object(part: str) -> dict[str, Any]:
    """A base64url part that holds a JSON object. Raises RefusedTokenError."""
    try:
        data = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(data, type=dict[str, Any])
    except UNDECODABLE:
        raise RefusedTokenError("token_malformed") from None


def _issuer(claims: Mapping[str, Any], issuers: tuple[Issuer, ...]) -> int:
    """The index of the issuer that the claims point to. Raises RefusedTokenError."""
    subject, says = claims.get("sub"), claims.get("iss")
    for index, issuer in enumerate(issuers):
        if issuer.kind == "oidc":
            if says == issuer.issuer:
                return index
        elif isinstance(subject, str) and subject.startswith(f"spiffe://{issuer.trust_domain}/"):
            return index
    raise RefusedTokenError("token_issuer")


def _check_times(claims: Mapping[str, Any], now: float) -> float:
    """Until when the token is good. Raises RefusedTokenError."""
    until = _time(claims, "exp")
    if until is None:
        raise RefusedTokenError("token_expired")
    if not now < until + SKEW_SECONDS:
        raise RefusedTokenError("token_expired")
    issued_at = _time(claims, "iat")
    for start in (issued_at, _time(claims, "nbf")):
        if start is not None and not start <= now + SKEW_SECONDS:
            raise RefusedTokenError("token_not_yet_valid")
    if not until - (now if issued_at is None else issued_at) <= TOKEN_SECONDS_MAX + SKEW_SECONDS:
        raise RefusedTokenError("token_lifetime")
    return until + SKEW_SECONDS


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 2**53:
        raise RefusedTokenError("token_malformed")
    return float(value)


def _bound_to(claims: Mapping[str, Any]) -> bytes | None:
    """The thumbprint in `cnf`; None without `cnf`. Raises RefusedTokenError."""
    if "cnf" not in claims:
        return None
    confirmation = claims["cnf"]
    if not isinstance(confirmation, dict) or confirmation.keys() != {_THUMBPRINT}:
        raise RefusedTokenError("token_cnf")
    text = confirmation[_THUMBPRINT]
    try:
        return base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise RefusedTokenError("token_cnf") from None


def _name(claims: Mapping[str, Any], issuer: Issuer) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise RefusedTokenError("token_name")
    try:
        if issuer.kind == "oidc":
            return parse_name(f"oidc:{issuer.issuer}|{quote(subject, safe=_LITERAL)}").text
        if not subject.startswith(f"spiffe://{issuer.trust_domain}/"):
            raise RefusedTokenError("token_name")
        return parse_name(subject).text
    except (InvalidRequestError, UnicodeEncodeError):
        raise RefusedTokenError("token_name") from None
