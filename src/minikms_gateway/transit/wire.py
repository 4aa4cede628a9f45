"""Bodies and answers in the form of Vault.

Owns: the lenient reading of a body, the envelope of an answer, the form and the texts of errors. Invariants: an answer
shows no text of a library and nothing that the client sent, except what Vault echoes as data; the content type is
exactly `application/json`, without which hvac reads no error. It must never know an operation.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from pybase64 import b64decode, b64encode

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import InvalidRequestError, KmsRefusedError, UnauthorizedError
from minikms.http import Response

BATCH_ITEMS_MAX: Final = api.BATCH_ITEMS_MAX
TEXT_CHARS_MAX: Final = 1024
"""The length of a `reference`, a type, or another short text."""
NUMBER_MAX: Final = 2**31
OBJECTS_COUNT_MAX: Final = 8 * BATCH_ITEMS_MAX
"""Braces that open in a body: before it is decoded, so that a body of 16 MiB is not some million items."""

BOUND_LABEL: Final = b"minikms/transit/v1\0"
"""Begins the `aad` of a record: then context and associated data, each behind its length (4 bytes, big-endian)."""

Short = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
Number = Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]

TOO_OLD: Final = "ciphertext or signature version is disallowed by policy (too old)"
TOO_NEW: Final = "invalid ciphertext: version is too new"
NOT_FOUND: Final = "encryption key not found"
DENIED: Final = "permission denied"
ONLY_MACS: Final = (
    "message encryption and decryption are not supported for key type hmac: it makes MACs and nothing else"
)
NO_MACS: Final = "MACs need a key of the type hmac: make one of another name"
NO_CONTEXT: Final = (
    "missing 'context' for key derivation; the key was created using a derived key, which means additional, "
    "per-request information must be included in order to perform operations with the key"
)
_TEXTS: Final = {
    api.CODE_DECRYPTION_FAILED: (400, "cipher: message authentication failed"),
    api.CODE_KEY_NOT_FOUND: (400, NOT_FOUND),
    api.CODE_KEY_DESTROYED: (400, TOO_OLD),
    api.CODE_KEY_RETIRED: (400, "requested version for encryption is less than the minimum encryption key version"),
    api.CODE_WRONG_THREAD: (403, DENIED),
    api.CODE_FORBIDDEN: (403, DENIED),
    api.CODE_UNAUTHORIZED: (403, DENIED),
    api.CODE_SEALED: (503, "Vault is sealed"),
}
"""Status and text of what the key service refuses; any other refusal keeps its own."""


class VaultError(InvalidRequestError):
    """A refusal with the status and text that a client of Vault expects."""

    def __init__(self, text: str, status: int = 400, allow: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.allow = allow
        """The methods of the path, for a 405."""


def text_of(error: KmsRefusedError) -> str:
    return _TEXTS[error.code][1] if error.code in _TEXTS else str(error)


def error_response(error: KmsRefusedError) -> Response:
    """A client that has no name gets 403, as from Vault, and its connection ends as on other paths."""
    status, text = error.status, str(error)
    if not isinstance(error, VaultError):
        status, text = _TEXTS.get(error.code, (status, text))
    body = msgspec.json.encode({"errors": [text] if text else []})
    answer = Response(status, body, close=isinstance(error, UnauthorizedError))
    if error.retry_after_s:
        answer.headers = (("retry-after", str(error.retry_after_s)),)
    elif isinstance(error, VaultError) and error.allow:
        answer.headers = (("allow", error.allow),)
    return answer


class _Envelope(msgspec.Struct):
    data: Any = None
    auth: Any = None
    warnings: list[str] | None = None
    request_id: str = ""
    lease_id: str = ""
    renewable: bool = False
    lease_duration: int = 0
    wrap_info: None = None


_encode: Final = msgspec.json.Encoder().encode


def envelope(data: Any, *, auth: Any = None, warning: str = "") -> bytes:
    return _encode(_Envelope(data, auth, [warning] if warning else None))


T = TypeVar("T", bound=msgspec.Struct)


class TransitBody(msgspec.Struct):
    """Base of bodies and answers: a `repr` shows no value. Unknown fields are ignored, and null is the same as
    absent.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def decode(body: bytes | memoryview, kind: type[T]) -> T:
    """An empty body is an empty object. Texts of numbers are numbers. Raises VaultError."""
    if len(body) > OBJECTS_COUNT_MAX and bytes(body).count(b"{") > OBJECTS_COUNT_MAX:
        raise VaultError("the body has too many objects", 413)
    try:
        return msgspec.json.decode(body, type=kind, strict=False) if len(body) else kind()
    except UNDECODABLE:
        raise VaultError("the body is no JSON object of the expected form, or a value in it is out of bounds") from None


_LINE_ENDS: Final = re.compile(r"[\r\n]")


def decode_base64(text: str) -> bytes:
    """Standard base64 with padding, in which line ends are ignored. Raises VaultError."""
    try:
        return b64decode(text, None, True)
    except ValueError:
        pass
    try:
        return b64decode(_LINE_ENDS.sub("", text), None, True)
    except ValueError:
        raise VaultError("illegal base64 data") from None


def encode_base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def bound(context: str | None, associated_data: str | None) -> bytes:
    """The caller's `aad` of a record. Raises VaultError."""
    if not context and not associated_data:
        return UNBOUND
    fields = [decode_base64(text) if text else b"" for text in (context, associated_data)]
    aad = BOUND_LABEL + b"".join([len(field).to_bytes(4, "big") + field for field in fields])
    if len(aad) > api.AAD_BYTES_MAX:
        raise VaultError("context and associated_data are together larger than is accepted")
    return aad


UNBOUND: Final = BOUND_LABEL + bytes(8)
