"""A wrapping key in the transit engine of Vault or OpenBao, or of another miniKMS (docs/spec/transit.md).

Owns: the source of such a key, requests over TLS, and which answers are a refusal. Invariants: the engine's certificate
is verified against the CAs of `ca-file`, with its name; no redirect is followed, and no proxy of the environment is
used; the token is read from its file at each call; an answer is bounded. The JSON of a request or an answer has the
root key in `bytes` and text, which stay in memory until the process ends. It must never put what the engine answers
into an error.
"""

from __future__ import annotations

import binascii
import http.client
import json
import re
import ssl
from typing import Any, Final

from minikms_tokens.signing import TokenError
from minikms_tokens.wrapping import AwayError, ProviderCalls, UnwrapRefusedError, give, read_file

STEP_SECONDS_MAX: Final = 8.0
"""The time for a connection, a handshake, or a read. `ProviderCalls` bounds the whole."""
TOKEN_BYTES_MAX: Final = 16 * 1024
PEM_BYTES_MAX: Final = 256 * 1024
ANSWER_BYTES_MAX: Final = 16 * 1024
BLOB_VERSION: Final = b"\x01"
REFUSALS: Final = {
    400: (
        "encryption key not found",
        "ciphertext or signature version is disallowed by policy (too old)",
        "cipher: message authentication failed",
        "invalid ciphertext: unable to decrypt",
        "invalid ciphertext: version is too new",
    ),
    403: ("permission denied", "invalid token"),
    404: ("no handler for route",),
}
"""What the engine itself says about the key, by the status of the answer. 403 is also that of a token that was revoked
or has expired: the engine does not tell them apart. Everything else is AwayError.
"""
_SOURCE: Final = re.compile(
    r"vault-transit:https://([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?"
    r"(/v1(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+)\?([A-Za-z0-9_./=&-]+)#([A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,118}[A-Za-z0-9_])?)",
    re.ASCII,
)
_PAIR: Final = {"cert-file", "key-file"}
_FILES: Final = ({"ca-file", "token-file"}, {"ca-file", *_PAIR}, {"ca-file", "token-file", *_PAIR})
_TOKEN: Final = re.compile(r"[!-~]+", re.ASCII)
_CIPHERTEXT: Final = re.compile(r"vault:v[0-9]{1,10}:[A-Za-z0-9+/]{1,4096}={0,2}", re.ASCII)
_WHO: Final = "the transit engine"


class VaultTransitWrapper:
    """A key of a transit engine. The context is the `associated_data`, and the `context` of a derived key. A wrapped
    key is BLOB_VERSION and the ciphertext of the engine.
    """

    def __init__(self, source: str) -> None:
        match = _SOURCE.fullmatch(source)
        pairs = [part.partition("=")[::2] for part in match[4].split("&")] if match is not None else []
        self._files = dict(pairs)
        is_complete = len(self._files) == len(pairs) and self._files.keys() in _FILES
        if match is None or not is_complete or not all(path.startswith("/") for path in self._files.values()):
            raise TokenError(
                "vault-transit: is followed by https://HOST:PORT/v1/MOUNT?ca-file=/PATH&token-file=/PATH#KEY; "
                "cert-file=/PATH and key-file=/PATH name a client certificate, with or without token-file="
            )
        self._host, self._port = match[1].strip("[]"), int(match[2] or 443)
        self._mount, self._key = match[3], match[5]
        self._calls = ProviderCalls(_WHO)

    def __repr__(self) -> str:
        return "<VaultTransitWrapper>"

    def wrap(self, key: memoryview, context: str) -> bytes:
        text = self._calls.call(lambda: self._ask("encrypt", "ciphertext", context, plaintext=_base64(key)))
        if _CIPHERTEXT.fullmatch(text) is None:
            raise AwayError(f"{_WHO} gives a ciphertext of another form")
        return BLOB_VERSION + text.encode("ascii")

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        text = blob[1:].decode("ascii", "replace")
        if not blob.startswith(BLOB_VERSION) or _CIPHERTEXT.fullmatch(text) is None:
            raise AwayError("this is no wrapped key of a transit engine, or one of another version")
        answer = self._calls.call(lambda: self._ask("decrypt", "plaintext", context, ciphertext=text))
        try:
            key = binascii.a2b_base64(answer, strict_mode=True)
        except ValueError:
            key = b""
        give(key, into, _WHO)

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _ask(self, operation: str, member: str, context: str, **fields: str) -> str:
        bound = _base64(context.encode("ascii"))
        body = json.dumps({**fields, "associated_data": bound, "context": bound})
        headers = {"X-Vault-Token": self._token(), "X-Vault-Request": "true", "Content-Type": "application/json"}
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=STEP_SECONDS_MAX, context=self._tls())
        try:
            connection.request("POST", f"{self._mount}/{operation}/{self._key}", body, headers)
            with connection.getresponse() as answer:
                content, status = answer.read(ANSWER_BYTES_MAX + 1), answer.status
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AwayError(f"{_WHO} does not answer: {type(error).__name__}") from None
        finally:
            connection.close()
        members = _members(content)
        if status == http.HTTPStatus.OK:
            data = members.get("data")
            value = data.get(member) if isinstance(data, dict) else None
            if not isinstance(value, str):
                raise AwayError(f"{_WHO} gives an answer of another form")
            return value
        errors = members.get("errors")
        reason = " ".join(text for text in errors if isinstance(text, str)) if isinstance(errors, list) else ""
        for known in REFUSALS.get(status, ()):
            if known in reason:
                raise UnwrapRefusedError(f"{_WHO} refuses: {known} (status {status})")
        raise AwayError(f"{_WHO} answers with status {status}")

    def _token(self) -> str:
        path = self._files.get("token-file")
        if path is None:
            return "mtls"
        token = read_file(path, "token file", TOKEN_BYTES_MAX, is_secret=True).decode("ascii", "replace").strip()
        if _TOKEN.fullmatch(token) is None:
            raise AwayError(f"the token file {path} has no token")
        return token

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        authorities = read_file(self._files["ca-file"], "file of CAs", PEM_BYTES_MAX)
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii"))
            if cert := self._files.get("cert-file"):
                read_file(cert, "certificate", PEM_BYTES_MAX)
                read_file(self._files["key-file"], "private key", PEM_BYTES_MAX, is_secret=True)
                context.load_cert_chain(cert, self._files["key-file"], password=lambda: b"")
        except (OSError, ValueError):  # a wrong PEM is one of them
            raise AwayError("the file of CAs, or certificate and private key, are none, or do not fit") from None
        return context


def _members(content: bytes) -> dict[str, Any]:
    """The members of a JSON object; none for anything else."""
    try:
        parsed = json.loads(content) if len(content) <= ANSWER_BYTES_MAX else None
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {}


def _base64(data: bytes | memoryview) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")
