"""An issuer of tokens for the tests: keys, a JWK set, and tokens of every kind, good and bad."""

import base64
import json
import time
from typing import Any

from joserfc import jws
from joserfc.jwk import ECKey, KeyParameters, KeySet, RSAKey

ISSUER = "https://issuer.example"
AUDIENCE = "minikms"
OIDC_TABLE = f"""
[[issuer]]
kind = "oidc"
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
algorithms = ["ES256"]
jwks_file = "oidc.json"
"""
"""Of the gateway's configuration."""


def encoded(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenIssuer:
    """`kid`: of its only key, of which `algorithm` says the kind: ES256 or RS256."""

    def __init__(self, issuer: str = ISSUER, kid: str = "key-1", algorithm: str = "ES256") -> None:
        self.issuer = issuer
        self.kid = kid
        self.algorithm = algorithm
        named: KeyParameters = {"kid": kid, "use": "sig", "alg": algorithm}
        self.key: ECKey | RSAKey
        if algorithm == "ES256":
            self.key = ECKey.generate_key("P-256", named)
        else:
            self.key = RSAKey.generate_key(2048, named)

    @property
    def jwks(self) -> bytes:
        return json.dumps(KeySet([self.key]).as_dict(private=False)).encode()

    def token(self, *, header: dict[str, Any] | None = None, without: str = "", **claims: Any) -> str:
        """A good token, changed by `claims` and `header`, and without the claim `without`."""
        now = int(time.time())
        said: dict[str, Any] = {
            "iss": self.issuer, "sub": "service-7", "aud": AUDIENCE, "exp": now + 600, "iat": now,
        } | claims  # fmt: skip
        said.pop(without, None)
        named = {"alg": self.algorithm, "typ": "at+jwt", "kid": self.kid} | (header or {})
        return self.signed(named, json.dumps(said).encode())

    def signed(self, header: dict[str, Any], payload: bytes) -> str:
        """A compact JWS whose signature is good, whatever the header says."""
        text = f"{encoded(json.dumps(header).encode())}.{encoded(payload)}"
        algorithm = jws.JWSRegistry.algorithms[self.algorithm]
        return f"{text}.{encoded(algorithm.sign(text.encode(), self.key))}"
