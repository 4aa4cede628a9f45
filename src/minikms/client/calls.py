"""Calls of verbs as values: what is sent, how the answer is read, and when a failed call is made again.

Owns: the encoding of a request and the decoding of an answer, from the entry of the verb in `minikms.api`; the choice
between JSON and MessagePack for a batch. No sockets, no time. Invariants: an answer is decoded into a typed value or
refused as a whole; a batch has as many outcomes as items; a call is repeated only if that is harmless. A call must
never show what it carries in a repr.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast, get_args, get_type_hints
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api import Verb
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import (
    ForbiddenError,
    KmsError,
    KmsProtocolError,
    KmsRefusedError,
    KmsUnavailableError,
    RequestInterruptedError,
    ShuttingDownError,
    StandbyError,
    TooManyError,
    refusal,
)
from minikms.api.verb import Base64
from minikms.client.items import CheckOutcome, DecryptItem, Item, Outcome, Sent, check_id, checked_cost_bytes, invalid
from minikms.client.wire import JSON, Answer

if TYPE_CHECKING:
    from minikms.client.connecting import Endpoint

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")

PAUSE_S_MIN: Final = 0.005
PAUSE_S_MAX: Final = 0.25
FULL_PAUSE_S_MAX: Final = 1.0
"""Between attempts at a service that is full. It is longer, because each attempt costs the service a connection."""
_KEY_HEX: Final = re.compile(rb"[0-9a-fA-F]{%d}" % api.KEY_HEX_CHARS)
_SHARE: Final = re.compile(rb"[-0-9A-Za-z ]{1,%d}" % api.SHARE_BYTES_MAX)

_encode: Final = msgspec.json.Encoder().encode
_pack: Final = msgspec.msgpack.Encoder().encode
_MSGPACK: Final = api.MSGPACK.encode("ascii")
_decode_error: Final = msgspec.json.Decoder(api.ErrorAnswer).decode


class OneTimeKey(bytearray):
    """The hexadecimal characters of a root key, which are zeroed once the body of a request has them."""


class Call(NamedTuple, Generic[A]):
    """One request. `body` is None for a GET; a `bytearray` holds a key: wipe it once it is sent, and when the call has
    ended. `msgpack`: request and answer are MessagePack, not JSON.
    """

    verb: Verb[Any, A]
    target: bytes
    body: bytes | bytearray | None
    request_id: str | None
    msgpack: bool = False

    def __repr__(self) -> str:
        return f"Call({self.target!r})"

    def wipe(self) -> None:
        """Zeroes a body that holds a key."""
        if isinstance(self.body, bytearray):
            self.body[:] = bytes(len(self.body))

    @property
    def is_wiped(self) -> bool:
        """Whether it can't be sent again."""
        return isinstance(self.body, bytearray) and not any(self.body)

    @property
    def content_type(self) -> bytes:
        return _MSGPACK if self.msgpack else JSON

    def read(self, answer: Answer) -> A:
        """The value of an answer. Raises KmsRefusedError or KmsProtocolError."""
        try:
            if answer.status in (200, 202):
                decode = _array_decoder(self.verb) if self.msgpack else _decoder(self.verb)
                value: A = decode(answer.body)
                return value
            refused = _decode_error(answer.body)
        except UNDECODABLE as error:
            text = f"the key service's answer ({answer.status}) to {self.verb.name} does not have the expected form"
            raise KmsProtocolError(text) from error
        raise refusal(refused.code, refused.error, answer.status, answer.retry_after_s)


def make_call(
    verb: Verb[R, A],
    request: R | Sent | bytearray,
    request_id: str | None = None,
    named: str = "",
    *,
    msgpack: bool = False,
) -> Call[A]:
    """The call of a verb. `request_id` goes to the audit log. A bytearray is the body itself, and is wiped; then
    `named` is the id in the path, if it has one. `msgpack`: if it is a batch, its body is MessagePack.

    Raises InvalidRequestError before anything is sent, as the daemon would.
    """
    try:
        return _checked_call(verb, request, request_id, named, msgpack=msgpack)
    except BaseException:
        if isinstance(request, bytearray):
            request[:] = bytes(len(request))
        raise


def check_proxied(verb: Verb[Any, Any]) -> None:
    """Refuses a verb that no gateway takes. It might hold a root key, so it is not even sent. Raises ForbiddenError."""
    if verb.roles and not verb.proxied:
        text = f"{verb.name} works only at the key service's own socket, not through a gateway"
        raise ForbiddenError(text)


def _checked_call(
    verb: Verb[R, A], request: R | Sent | bytearray, request_id: str | None, named: str, *, msgpack: bool
) -> Call[A]:
    body: bytes | bytearray | None = None
    packed = False
    if isinstance(request, bytearray):
        check_id(verb.path_field, named)
        target, body = _path(verb, named), request
    else:
        if isinstance(request, Item):
            checked_cost_bytes(request)
        else:
            _check_texts(request)
        target = _target(verb, request)
        if msgpack and verb.is_batch and isinstance(request, Sent):
            body, packed = _encode_array(verb, request), True
        elif verb.method == "POST":
            body = _encode(request) if verb.has_body else b"{}"
    if request_id is not None and api.REQUEST_ID_PATTERN.fullmatch(request_id) is None:
        invalid(f"a request id is 1 to {api.REQUEST_ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ : / + = -")
    return Call(verb, target, body, request_id, packed)


def _encode_array(verb: Verb[Any, Any], batch: Sent) -> bytes:
    """The MessagePack of a batch (`minikms.api.msgpack`), whose fields have the order of the request's. An array does
    not name its members, so the daemon could take an item of another verb for one of this verb. Raises
    InvalidRequestError for such an item.
    """
    members = {name: getattr(batch, name) for name in batch.__struct_fields__}
    expected, kinds = api.item_fields(verb), set[Any](map(type, members["items"]))
    for kind in kinds:
        if kind.__struct_fields__ != expected:
            invalid(f"an item of {verb.name} has the fields {', '.join(expected)}")
    members["items"] = list(map(msgspec.structs.astuple, members["items"]))
    return _pack(list(members.values()))


def rotation(
    new_kek_hex: bytes | bytearray | str | None,
    wait: bool,
    verify: Sequence[DecryptItem],
    priority: api.Priority | None = None,
) -> bytearray:
    """The body of ROTATE_KEK."""
    before = b'{"wait":true' if wait else b'{"wait":false'
    if priority is not None:
        before += b',"priority":' + _encode(priority)
    if verify:
        samples = [{"key_id": item.key_id, "ciphertext": item.ciphertext, "aad": item.aad} for item in verify]
        before += b',"verify":' + _encode(samples)
    if new_kek_hex is None:
        return bytearray(before + b"}")
    return _with_secret(before + b',"new_kek_hex":"', _checked_hex(new_kek_hex, "new_kek_hex"))


def new_root(root_hex: bytes | bytearray | str, provider: str, shares: api.GivenShares | None) -> bytearray:
    """The body of ADD_ROOT."""
    before = b'{"provider":' + _encode(provider)
    if shares is not None:
        before += b',"shares":' + _encode(shares)
    return _with_secret(before + b',"root_hex":"', _checked_hex(root_hex, "root_hex"))


def root_test(root_hex: bytes | bytearray | str) -> bytearray:
    """The body of TEST_ROOT."""
    return _with_secret(b'{"root_hex":"', _checked_hex(root_hex, "root_hex"))


def unsealing(root_hex: bytes | bytearray | str | None, share: bytes | bytearray | str | None) -> bytearray:
    """The body of UNSEAL; without a key and a share: from the daemon's own source."""
    if root_hex is not None and share is not None:
        invalid("give a root key or a share, not both")
    if root_hex is not None:
        return _with_secret(b'{"root_hex":"', _checked_hex(root_hex, "root_hex"))
    if share is not None:
        text = share.encode("ascii", "replace") if isinstance(share, str) else share
        if _SHARE.fullmatch(text) is None:
            invalid(f"a share is at most {api.SHARE_BYTES_MAX} letters, digits, hyphens and spaces")
        return _with_secret(b'{"share":"', text)
    return bytearray(b'{"from_source":true}')


def _checked_hex(key: bytes | bytearray | str, name: str) -> bytes | bytearray:
    digits = key.encode("ascii", "replace") if isinstance(key, str) else key
    if _KEY_HEX.fullmatch(digits) is None:
        invalid(f"{name} has {api.KEY_HEX_CHARS} hexadecimal characters")
    return digits


def _with_secret(before: bytes, secret: bytes | bytearray) -> bytearray:
    """A body of its final size at once: one that grows leaves copies of the secret."""
    body = bytearray(len(before) + len(secret) + 2)
    body[: len(before)] = before
    body[len(before) : -2] = secret
    body[-2:] = b'"}'
    if isinstance(secret, OneTimeKey):
        secret[:] = bytes(len(secret))
    return body


def base64_text(value: bytes) -> str:
    """Bytes as a field of a request. Raises TypeError."""
    return base64.b64encode(value).decode("ascii")


def optional(value: A | None) -> A | UnsetType:
    """An argument as a field: None is absent."""
    return UNSET if value is None else value


def _target(verb: Verb[Any, Any], request: api.Request | Sent) -> bytes:
    if verb.path_field:
        return _path(verb, getattr(request, verb.path_field))
    path = verb.path
    if verb.method == "GET":
        values = {name: getattr(request, name) for name in request.__struct_fields__}
        query = urlencode({name: value for name, value in values.items() if value is not UNSET})
        path = f"{path}?{query}" if query else path
    return path.encode("ascii")


def _path(verb: Verb[Any, Any], named: str) -> bytes:
    """The path of a verb, which names a key or a slot, or nothing."""
    return verb.path.replace("{" + verb.path_field + "}", quote(named, safe="")).encode("ascii")


def _check_texts(request: api.Request | Sent) -> None:
    """Every text of a request that is not Base64 is an id, or as short and as plain as one."""
    for name in _text_fields(type(request)):
        value = getattr(request, name)
        if value is not UNSET and value is not None:
            check_id(name, value)


@cache
def _text_fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    hints = get_type_hints(kind, include_extras=True)
    fields = ((name, hints[name]) for name in kind.__struct_fields__)
    return tuple(name for name, hint in fields if hint is str or (hint != Base64 and str in get_args(hint)))


@cache
def _decoder(verb: Verb[Any, A]) -> Callable[[bytes], A]:
    if verb.answer is str:
        return lambda body: cast(A, body.decode("ascii"))
    return msgspec.json.Decoder(verb.answer).decode


@cache
def _array_decoder(verb: Verb[Any, A]) -> Callable[[bytes], A]:
    """For an answer in MessagePack. In the place of a list of items it gives an `api.ItemsArray`."""
    return cast("Callable[[bytes], A]", msgspec.msgpack.Decoder(api.answer_array(verb)).decode)


# --- answers ---------------------------------------------------------------------------------------------------------


def is_healthy(answer: str) -> bool:
    """True; raises KmsProtocolError for any other text than `ok`."""
    if answer.strip() != "ok":
        raise KmsProtocolError("the key service's health is not `ok`")
    return True


def is_ready(answer: str) -> bool:
    """True; raises KmsProtocolError for any other text than `ready`."""
    if answer.strip() != "ready":
        raise KmsProtocolError("the key service's readiness is not `ready`")
    return True


def random_bytes(answer: api.RandomAnswer, count: int) -> bytes:
    if len(answer.random) != count:
        raise KmsProtocolError(f"the key service answered {len(answer.random)} random bytes instead of {count}")
    return answer.random


def outcomes(answer: api.EncryptBatchAnswer | api.DecryptBatchAnswer | api.ItemsArray, count: int) -> list[Outcome]:
    """The value or the error of each item. Raises KmsProtocolError unless there are `count` of them."""
    if len(answer.items) != count:
        raise KmsProtocolError(f"the key service answered {len(answer.items)} items of {count}")
    if isinstance(answer, api.ItemsArray):
        return [item if isinstance(item, bytes) else refusal(item.code, item.error) for item in answer.items]
    if isinstance(answer, api.EncryptBatchAnswer):
        return [
            item.ciphertext
            if isinstance(item.ciphertext, bytes) and item.error is UNSET and item.code is UNSET
            else _refused(item.ciphertext, item.error, item.code)
            for item in answer.items
        ]
    return [
        item.plaintext
        if isinstance(item.plaintext, bytes) and item.error is UNSET and item.code is UNSET
        else _refused(item.plaintext, item.error, item.code)
        for item in answer.items
    ]


def _refused(value: bytes | UnsetType, error: str | UnsetType, code: str | UnsetType) -> KmsRefusedError:
    if value is UNSET and isinstance(error, str) and isinstance(code, str):
        return refusal(code, error)
    raise KmsProtocolError("an item of the key service's answer is neither a value nor an error")


def check_outcomes(answer: api.CheckBatchAnswer, count: int) -> list[CheckOutcome]:
    """None or the error of each item. Raises KmsProtocolError unless each of `count` items is accounted for once."""
    outcomes: list[CheckOutcome] = [None] * count
    after = -1
    for refused in answer.refused:
        if not after < refused.item < count:
            raise KmsProtocolError(f"the key service refused item {refused.item} of {count} after item {after}")
        after = refused.item
        outcomes[after] = refusal(refused.code, refused.error)
    if answer.opened + len(answer.refused) != count:
        raise KmsProtocolError(f"the key service answered other than {count} items")
    return outcomes


def macs(answer: api.MacAnswer, count: int) -> list[bytes]:
    if len(answer.macs) != count or any(len(mac) != api.MAC_BYTES for mac in answer.macs):
        raise KmsProtocolError(f"the key service did not answer a MAC for each of {count} items")
    return answer.macs


# --- repetition ------------------------------------------------------------------------------------------------------


class Attempts:
    """When a failed call is made again, and after which pause. `wait_s` is when to give up on a daemon that is away (it
    restarts, its connection broke, it is stopping or a standby), `full_s` on one that is full. `now_s` is by the
    caller's clock. `endpoint` and `timeout_s`: where the next attempt goes, and how long it may take.

    A call is repeated only if that is harmless: the verb is repeatable, or the request was certainly not carried out. A
    timeout, a malformed answer and every other refusal than `shutting_down`, `interrupted`, `standby` and a 503
    `too_many` end the call at once.
    """

    __slots__ = ("_count", "_full_until_s", "_repeatable", "_until_s", "endpoint", "timeout_s")

    def __init__(
        self, endpoint: Endpoint, now_s: float, timeout_s: float, *, repeatable: bool, wait_s: float, full_s: float
    ) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._repeatable = repeatable
        self._until_s = now_s + wait_s
        self._full_until_s = now_s + full_s
        self._count = 0

    @property
    def connect_s(self) -> float:
        """How long the next attempt may take to connect."""
        return self.timeout_s

    def is_harmless(self, error: KmsError) -> bool:
        """Whether the call may be made again after this error."""
        if isinstance(error, KmsUnavailableError | RequestInterruptedError):
            return self._repeatable or not getattr(error, "sent", True)
        return isinstance(error, ShuttingDownError | StandbyError) or _is_full(error)

    def pause_s(self, error: KmsError, now_s: float) -> float | None:
        """How long to wait before the next attempt; None if there must not be one."""
        is_full = _is_full(error)
        left_s = (self._full_until_s if is_full else self._until_s) - now_s
        if left_s <= 0 or not self.is_harmless(error):
            return None
        if is_full:
            pause_s = self.random_pause_s(left_s)
            self._until_s += pause_s
            return pause_s
        self._count += 1
        if self._count == 1:
            return 0.0  # a kept connection that a restarted daemon no longer knows: a fresh one will do
        longest_s = PAUSE_S_MIN * 2.0 ** min(self._count, 16)
        return min(left_s, min(PAUSE_S_MAX, longest_s) * random.uniform(0.5, 1.0))  # noqa: S311 - spreads clients, protects nothing

    def random_pause_s(self, left_s: float) -> float:
        """Wholly random, so that clients that were refused together do not come together."""
        self._count += 1
        longest_s = min(FULL_PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(self._count, 16))
        return min(left_s, random.uniform(0.0, longest_s))  # noqa: S311 - as above


def _is_full(error: KmsError) -> bool:
    return isinstance(error, TooManyError) and error.status == 503
