"""The paths of the transit API, and the life of a request to one of them.

Owns: the table of operations; where the credential of a request is. Invariants: a path has one spelling, without
percent escapes, and is compared whole; a name of a key matches `NAME` before anything is done with it; every error
leaves in the form of Vault. It must never decide who a caller is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from minikms.api.errors import InvalidRequestError, KmsRefusedError
from minikms.http import HttpRequest, ParsedHead, Response, parse_query
from minikms_gateway.reasons import RefusedTokenError
from minikms_gateway.transit import encryption, generated, keys, macs, system
from minikms_gateway.transit.keyring import NAME, Ask, Lifetime, Remembered, TransitCaller
from minikms_gateway.transit.system import LOGIN_BYTES_MAX, Login
from minikms_gateway.transit.wire import TransitBody, VaultError, decode, error_response

API: Final = "/v1/"
MTLS_TOKEN: Final = "mtls"  # noqa: S105  no secret: it says that the certificate is the credential
"""The text in place of a token, beside a client certificate, for clients that insist on one."""
_WRITE: Final = ("POST", "PUT")
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})


class TransitOperation(NamedTuple):
    """`path`: below the API or, with `{mount}`, below the mount; `{}` is a name, `{count}` a number."""

    methods: tuple[str, ...]
    path: str
    body: type[Any]
    run: Callable[[TransitCaller, str, Any], Awaitable[bytes | Response]]


OPERATIONS: Final = (
    TransitOperation(_WRITE, "{mount}/encrypt/{}", encryption.Records, encryption.encrypt),
    TransitOperation(_WRITE, "{mount}/decrypt/{}", encryption.Records, encryption.decrypt),
    TransitOperation(_WRITE, "{mount}/rewrap/{}", encryption.Records, encryption.rewrap),
    TransitOperation(
        _WRITE, "{mount}/datakey/plaintext/{}", generated.DataKey, partial(generated.data_key, plaintext=True)
    ),
    TransitOperation(
        _WRITE, "{mount}/datakey/wrapped/{}", generated.DataKey, partial(generated.data_key, plaintext=False)
    ),
    TransitOperation(_WRITE, "{mount}/random", generated.Random, generated.random),
    TransitOperation(_WRITE, "{mount}/random/{count}", generated.Random, generated.random),
    TransitOperation(_WRITE, "{mount}/hmac/{}", macs.Macs, macs.generate),
    TransitOperation(_WRITE, f"{{mount}}/hmac/{{}}/{macs.ALGORITHM}", macs.Macs, macs.generate),
    TransitOperation(_WRITE, "{mount}/verify/{}", macs.Macs, macs.verify),
    TransitOperation(_WRITE, f"{{mount}}/verify/{{}}/{macs.ALGORITHM}", macs.Macs, macs.verify),
    TransitOperation(("LIST",), "{mount}/keys", TransitBody, keys.list_names),
    TransitOperation(_WRITE, "{mount}/keys/{}", keys.KeySettings, keys.create),
    TransitOperation(("GET",), "{mount}/keys/{}", TransitBody, keys.read),
    TransitOperation(("DELETE",), "{mount}/keys/{}", TransitBody, keys.refuse_destruction),
    TransitOperation(_WRITE, "{mount}/keys/{}/rotate", TransitBody, keys.rotate),
    TransitOperation(_WRITE, "{mount}/keys/{}/config", keys.KeySettings, keys.configure),
    TransitOperation(_WRITE, "{mount}/keys/{}/trim", TransitBody, keys.refuse_destruction),
    TransitOperation(("GET", "HEAD"), "sys/health", TransitBody, system.health),
    TransitOperation(("GET",), "sys/seal-status", TransitBody, system.seal_status),
    TransitOperation(("GET", *_WRITE), "auth/token/lookup-self", TransitBody, system.lookup_self),
    TransitOperation(_WRITE, "auth/token/renew-self", TransitBody, system.renew_self),
    TransitOperation(_WRITE, "auth/{}/login", Login, system.login),  # any mount: the client chooses it
)
_TABLE: Final = {
    path: {method: entry for entry in OPERATIONS if entry.path == path for method in entry.methods}
    for path in dict.fromkeys(entry.path for entry in OPERATIONS)
}
_NAME_PLACES: Final = (1, 2, 3)
"""The segments that may be a name: of the mount of a login, or of a key."""


class Transit:
    """`ask` sends requests to the key service."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._remembered = Remembered()

    @staticmethod
    def credential(head: ParsedHead, body: memoryview | None) -> str | None:
        """What a header `Authorization` would hold; None: the certificate. `body`: None before it has arrived. Raises
        VaultError, RefusedTokenError.
        """
        token = head.vault.get("token", "")
        if Transit.is_login(head):
            if body is None:
                raise ValueError("a login is known by its body")
            token = decode(body, Login).jwt or ""
            if not token or token == MTLS_TOKEN:
                raise VaultError("missing token")
            if not token.isascii():
                raise RefusedTokenError("token_malformed")
        elif head.authorization is not None:
            if token:
                raise RefusedTokenError("token_malformed")  # which of the two would count?
            return head.authorization
        return f"Bearer {token}" if token and token != MTLS_TOKEN else None

    @staticmethod
    def is_login(head: ParsedHead) -> bool:
        """Whether the credential is in the body, which is bounded. Raises VaultError."""
        first, *rest = head.path.removeprefix(API).split("/")
        if head.method not in _WRITE or first != "auth" or rest[1:] != ["login"] or NAME.fullmatch(rest[0]) is None:
            return False
        if head.chunked or head.content_length > LOGIN_BYTES_MAX:
            raise VaultError("the body of a login is too large, or of unknown length", 413)
        return True

    def answer(
        self, who: str, request: HttpRequest, mount: str, lifetime: Callable[[], Lifetime]
    ) -> Response | Awaitable[bytes | Response]:
        try:
            _check_headers(request.head)
            operation, name = find(request.head, mount)
            body = decode(request.body, operation.body)
        except KmsRefusedError as error:
            return error_response(error)
        caller = TransitCaller(who, request.head, self._ask, self._remembered, lifetime)
        return _run(operation, caller, name, body)


async def _run(operation: TransitOperation, caller: TransitCaller, name: str, body: Any) -> bytes | Response:
    try:
        return await operation.run(caller, name, body)
    except KmsRefusedError as error:
        return error_response(error)


def _check_headers(head: ParsedHead) -> None:
    """Refuses headers that would change what a request means. Raises VaultError."""
    if head.vault.get("namespace", "").strip("/") not in ("", "root"):
        raise VaultError("there are no namespaces here", 404)
    if "wrap-ttl" in head.vault:
        raise VaultError("response wrapping is not offered")


def find(head: ParsedHead, mount: str) -> tuple[TransitOperation, str]:
    """The operation of a request, and the name in its path. Raises VaultError."""
    method = head.method
    if method == "GET" and _lists(head.query):
        method = "LIST"
    parts = head.path.removeprefix(API).split("/")
    if method == "LIST" and parts[-1] == "":
        parts.pop()
    if parts[0] == mount:
        parts[0] = "{mount}"
    elif parts[0] not in ("sys", "auth"):
        parts = []
    methods, name = _TABLE.get("/".join(parts), {}), ""
    for place in _NAME_PLACES:
        if not methods and place < len(parts) and NAME.fullmatch(parts[place]) is not None:
            methods = _TABLE.get("/".join([*parts[:place], "{}", *parts[place + 1 :]]), {})
            name = parts[place]
    if not methods and parts[:2] == ["{mount}", "random"] and len(parts) == 3:
        methods, name = _TABLE["{mount}/random/{count}"], parts[2]
    if not methods:
        raise VaultError("unsupported path", 404)
    if method not in methods:
        raise VaultError("unsupported operation", 405, ", ".join(methods))
    return methods[method], name


def _lists(query: str) -> bool:
    try:
        return parse_query(query).get("list", "") in _TRUE
    except InvalidRequestError:
        raise VaultError("the query is malformed") from None
