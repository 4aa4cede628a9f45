"""Strict parsing of a request's head: headers, query, request id.

Owns: the names of the headers that the API acts on. Invariants: such a header counts only if it was sent once, and so
does a query parameter; text that is not UTF-8 is refused. No I/O, no clock. It must never choose between two values
that contradict each other.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from minikms import api as kms_api
from progressdb_server.api.gate import limits
from progressdb_server.api.gate.errors import INVALID_ENCODING, REPEATED_PARAMETER, bad_request

ORIGIN: Final = b"origin"
AUTHORIZATION: Final = b"authorization"
API_KEY: Final = b"x-api-key"
USER_ID: Final = b"x-user-id"
USER_SIGNATURE: Final = b"x-user-signature"
REQUEST_ID: Final = b"x-request-id"
IDENTITY: Final = b"x-identity"
IDEMPOTENCY_KEY: Final = b"idempotency-key"
CONTENT_LENGTH: Final = b"content-length"
EXPECT: Final = b"expect"
COOKIE: Final = b"cookie"
IF_NONE_MATCH: Final = b"if-none-match"
FORWARDED_FOR: Final = b"x-forwarded-for"
"""Read from the raw headers, because each proxy may add one (`access.Proxies`)."""

_DECISIVE: Final = {AUTHORIZATION, API_KEY, USER_ID, USER_SIGNATURE, IDENTITY, IDEMPOTENCY_KEY, CONTENT_LENGTH}
"""Sent twice, these are refused."""
_HARMLESS: Final = {ORIGIN, REQUEST_ID, EXPECT, COOKIE, IF_NONE_MATCH}
"""Sent twice, these count as not sent."""

Headers = dict[bytes, bytes]


def read_headers(raw: Sequence[tuple[bytes, bytes]]) -> tuple[Headers, bytes | None]:
    """The headers by lower-case name, and the name of a decisive header that was sent twice (None if there is none).

    If any name is repeated, the headers that the API does not act on are left out.
    """
    headers: Headers = dict(raw)
    if len(headers) == len(raw):
        return headers, None
    headers.clear()
    repeated: set[bytes] | None = None
    for name, value in raw:
        if name not in _DECISIVE and name not in _HARMLESS:
            continue
        if name in headers:
            repeated = {name} if repeated is None else repeated | {name}
        else:
            headers[name] = value
    if repeated is None:
        return headers, None
    for name in repeated & _HARMLESS:
        del headers[name]
    refused = sorted(repeated & _DECISIVE)
    return headers, refused[0] if refused else None


def header_text(value: bytes, name: str) -> str:
    """A header's value as text. Raises ApiError 400 unless it is UTF-8."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request(f"the header {name} is not UTF-8") from None


_ENTITY_TAG: Final = re.compile(rb'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


def names_tag(if_none_match: bytes, tag: bytes) -> bool:
    """Whether a value of `If-None-Match` names the entity tag, or is `*`. The comparison is weak (RFC 9110, sections
    8.8.3.2 and 13.1.2)."""
    return if_none_match.strip(b" \t") == b"*" or tag in _ENTITY_TAG.findall(if_none_match)


def _field_text(raw: bytes) -> str:
    if b"%" in raw and not _percent_is_valid(raw):
        raise bad_request("the query has a malformed percent-encoding")
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request(INVALID_ENCODING) from None


_HEX: Final = frozenset(b"0123456789abcdefABCDEF")


def _percent_is_valid(raw: bytes) -> bool:
    at = raw.find(b"%")
    while at != -1:
        digits = raw[at + 1 : at + 3]
        if len(digits) != 2 or not _HEX.issuperset(digits):
            return False
        at = raw.find(b"%", at + 3)
    return True


def is_utf8(path: bytes) -> bool:
    """Whether a path, with its percent-encoding, is UTF-8."""
    try:
        unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_query(raw: bytes) -> dict[str, str]:
    """The query's fields, or those of a form. Raises ApiError 400 if a name is repeated or anything is malformed."""
    fields: dict[str, str] = {}
    if not raw:
        return fields
    parts = raw.split(b"&", limits.QUERY_FIELDS_COUNT_MAX + 1)
    if len(parts) > limits.QUERY_FIELDS_COUNT_MAX:
        raise bad_request("the query has too many parameters")
    for part in parts:
        if not part:
            continue
        raw_name, _, raw_value = part.partition(b"=")
        name = _field_text(raw_name)
        if name in fields:
            raise bad_request(REPEATED_PARAMETER)
        fields[name] = _field_text(raw_value)
    return fields


_process_id: Final = secrets.token_hex(6)
_numbers: Final = itertools.count(1)


def request_id(headers: Headers) -> str:
    """The caller's own request id if it is valid, otherwise a new one that is unique across restarts."""
    own = headers.get(REQUEST_ID)
    if own is not None and own.isascii():
        text = own.decode("ascii")
        if kms_api.REQUEST_ID_PATTERN.fullmatch(text):
            return text
    return f"r-{_process_id}-{next(_numbers)}"
