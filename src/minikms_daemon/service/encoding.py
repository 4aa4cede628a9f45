"""How the values of a request are read and its answer is written: as JSON, or a batch as MessagePack.

Owns: the choice of the encoding, which is that of the request, and the bytes of every answer. Invariants: a value means
the same in both, and has the same bounds; a verb that uses `Encoding` does not know which one it is. It must never
decode a body: `minikms_daemon.server` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from minikms import api
from minikms.api.base64 import decode_canonical, encode
from minikms.api.errors import KmsRefusedError, TooLargeError
from minikms.http import Response

Reply = bytes | Response
"""`bytes`: a JSON answer with status 200."""

json_answer: Final = msgspec.json.Encoder().encode
_pack: Final = msgspec.msgpack.Encoder().encode


class RefusedItem(NamedTuple):
    """Why an item of a batch was refused. It holds no exception, which would keep the request in memory."""

    error: str
    code: str


def refused_item(error: KmsRefusedError) -> RefusedItem:
    return RefusedItem(str(error), error.code)


Outcomes = Sequence[bytes | RefusedItem]
"""The outcome of each item in order: its value, or why it was refused."""


ReadBytes = Callable[[Any, int, str], bytes]
"""Reads a field: its value, the largest number of bytes, and its name for an error. Returns the bytes. Raises
InvalidRequestError, TooLargeError.
"""


class Encoding(NamedTuple):
    """How one request is read and answered.

    read: the bytes of a field. items: the answer to a batch, from the name of the member that holds a value, the
    outcomes, and how many of them are refusals. answer: the answer from any other struct.
    """

    read: ReadBytes
    items: Callable[[str, Outcomes, int], Reply]
    answer: Callable[[msgspec.Struct], Reply]


def encoding_of(request: api.Request) -> Encoding:
    """The encoding in which the request came, which is that of its answer."""
    return _MSGPACK if api.is_array_form(request) else JSON


def _json_items(member: str, outcomes: Outcomes, refused_count: int) -> bytes:
    begin, end = b'{"%b":"' % member.encode("ascii"), b'"}'
    if outcomes and not refused_count:  # nearly always
        values = (end + b"," + begin).join(map(encode, cast("list[bytes]", outcomes)))
        return b'{"items":[' + begin + values + end + b"]}"
    parts = [
        begin + encode(outcome) + end if isinstance(outcome, bytes) else json_answer(api.ErrorAnswer(*outcome))
        for outcome in outcomes
    ]
    return b'{"items":[' + b",".join(parts) + b"]}"


def _checked(value: bytes, bytes_max: int, what: str) -> bytes:
    if len(value) > bytes_max:
        raise TooLargeError(f"{what} is larger than {bytes_max} bytes")
    return value


def _msgpack_items(_member: str, outcomes: Outcomes, _refused_count: int) -> Response:
    return Response(200, _pack((outcomes,)), content_type=api.MSGPACK)  # a RefusedItem is an array too


def _msgpack_answer(answer: msgspec.Struct) -> Response:
    return Response(200, _pack(_members(answer)), content_type=api.MSGPACK)


def _members(value: Any) -> Any:
    """A struct as the tuple of its members, also in lists."""
    if isinstance(value, msgspec.Struct):
        return tuple(map(_members, msgspec.structs.astuple(value)))
    return list(map(_members, value)) if isinstance(value, list) else value


JSON: Final = Encoding(decode_canonical, _json_items, json_answer)
_MSGPACK: Final = Encoding(_checked, _msgpack_items, _msgpack_answer)
