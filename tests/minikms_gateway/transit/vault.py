"""A daemon, a gateway that serves the transit API, and requests as clients of Vault send them.

Owns: the configuration and the policy of these tests, and the form of a request. It asserts nothing about the answers.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.harness.callers import Caller, Reply
from tests.harness.gateways import POLICY, Pair
from tests.harness.tokens import OIDC_TABLE, TokenIssuer
from tests.harness.waiting import wait_until

TABLES = '[transit]\nmount = "transit"\n' + OIDC_TABLE
LIMITED = "spiffe://prod/limited/api"
TRANSIT_POLICY = f"""
[[grant]]
name = "limited"
principals = ["{LIMITED}"]
roles = ["create", "encrypt", "decrypt", "monitor"]
threads = ["*"]
limits = {{ decrypts_per_hour = 1 }}
{POLICY}
"""
ISSUER = TokenIssuer()


@contextlib.contextmanager
def transit_pair(policy: str = TRANSIT_POLICY) -> Iterator[Pair]:
    with Pair(policy=policy, tables=TABLES, files={"oidc.json": ISSUER.jwks}) as pair:
        wait_until(lambda: not pair.daemon.status()["keys"]["indexing"])  # until then transit answers 503
        yield pair


class Vault:
    """One connection. `token`: of the header X-Vault-Token."""

    def __init__(self, caller: Caller, token: str = "") -> None:
        self.caller = caller
        self.token = token

    def ask(
        self, method: str, path: str, body: object = None, headers: tuple[str, ...] = ("X-Vault-Request: true",)
    ) -> Reply:
        """`path`: below the mount, or from the root. `body`: bytes as they are, None for none, other things as JSON."""
        sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        named = (f"X-Vault-Token: {self.token}",) if self.token else ()
        length = (f"Content-Length: {len(sent)}",) if method == "PUT" or (sent and method != "POST") else ()
        target = path if path.startswith("/") else f"/v1/transit/{path}"
        return self.caller.ask(method, target, sent, headers=(*headers, *named, *length))

    def post(self, path: str, body: object = None) -> Any:
        """`data` of the answer, None for one without a body."""
        answer = self.ask("POST", path, body)
        assert answer.status in (200, 204), (path, answer)
        return answer.body["data"] if answer.status == 200 else None

    def encrypt(self, key: str, plaintext: bytes = b"hi", **members: Any) -> str:
        body = {"plaintext": base64.b64encode(plaintext).decode(), **members}
        return str(self.post(f"encrypt/{key}", body)["ciphertext"])


def filled(body: Any, ciphertexts: Mapping[str, str]) -> Any:
    """`body` with the ciphertexts in the place of their names, such as `{one}`."""
    if isinstance(body, dict):
        return {name: filled(value, ciphertexts) for name, value in body.items()}
    if isinstance(body, list):
        return [filled(value, ciphertexts) for value in body]
    named = isinstance(body, str) and body.startswith("{")
    return ciphertexts[body[1:-1]] if named else body


def errors(answer: Reply) -> str:
    """The only error of an answer, empty without one, in the form that every client reads."""
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.body) == {"errors"} and len(answer.body["errors"]) <= 1, answer
    return "".join(answer.body["errors"])
