"""Heads of requests, from the first byte to the empty line, and their query strings.

Owns: which heads are accepted (RFC 9112 and RFC 9110, narrowed), what the engine learns from them, and the decoding of
a query. Rules, in the order in which they are checked:
1. The head is bounded.
2. The version is 1.1 or 1.0, the method is one of RFC 9110 (without CONNECT and TRACE) or LIST, the target is a
   bounded path.
3. The headers match the grammar in this module: lines end in CR LF, no line is folded, and there is no control
   character but a tab. Only then httptools (llhttp) parses the head, and both must find the same headers.
4. Host occurs exactly once (1.0: at most once), other single-valued headers at most once.
5. The engine refuses what it does not support, and never ignores it: Upgrade, Trailer, other expectations, compressed
   bodies.
6. The body has exactly one possible length: from one Content-Length, or from `Transfer-Encoding: chunked` in 1.1. A
   method with a body needs one of the two. Both together, or anything else, are refused: two parsers could disagree.
7. A query is `name=value` pairs joined by `&`, percent-encoded UTF-8. A repeated name, a malformed escape or invalid
   UTF-8 is refused.
Pure: bytes in, a value or an error out. It must never see a body.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

import httptools
import msgspec

from minikms import api
from minikms.api.errors import InvalidRequestError
from minikms.http.limits import (
    BAD_CONTENT_ENCODING,
    BAD_CONTENT_LENGTH,
    BAD_EXPECT,
    BAD_HEADER,
    BAD_HOST,
    BAD_METHOD,
    BAD_REQUEST_LINE,
    BAD_TARGET,
    BAD_TRANSFER_ENCODING,
    BAD_VERSION,
    BODY_TOO_LARGE,
    CACHED_HEAD_BYTES_MAX,
    CACHED_HEADS_COUNT_MAX,
    HEAD_TOO_LARGE,
    LENGTH_REQUIRED,
    METHOD_BYTES_MAX,
    QUERY_PARAMETERS_COUNT_MAX,
    REPEATED_HEADER,
    TARGET_TOO_LONG,
    TOO_MANY_HEADERS,
    TRAILER,
    UPGRADE,
    Limits,
    RefusedError,
)

METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"LIST"})
"""LIST, of the clients of Vault, is a GET to llhttp, which does not know it."""
_METHODS_WITH_BODY: Final = frozenset({b"POST", b"PUT", b"PATCH"})

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE: Final = re.compile(rb"(%b{1,%d}) ([!-~]+) HTTP/([0-9]\.[0-9])\r\n" % (_TOKEN, METHOD_BYTES_MAX))
_TARGET: Final = re.compile(rb"/[A-Za-z0-9\-._~!$&'()*+,;=:@%/?]*")
_FIELDS: Final = re.compile(rb"(?:%b+:[\t -~\x80-\xff]*\r\n)*\r\n" % _TOKEN)
_STRAY: Final = re.compile(rb"\r[^\n]|(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Bytes that no accepted head contains, whatever follows them."""
_HOST: Final = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=:\[\]%]*")
_LENGTH: Final = re.compile(rb"[0-9]+")

_REQUEST_ID: Final = api.REQUEST_ID_HEADER.encode()
_PRINCIPAL: Final = api.PRINCIPAL_HEADER.encode()
_RESERVED: Final = api.RESERVED_HEADERS.encode()
_AUTHORIZATION: Final = b"authorization"
_VAULT: Final = b"x-vault-"
_TRACEPARENT: Final = b"traceparent"
_VAULT_TOKEN: Final = b"x-vault-token"
_NOT_CACHED: Final = frozenset(
    {_AUTHORIZATION, _VAULT_TOKEN, b"cookie", b"proxy-authorization", _REQUEST_ID, _PRINCIPAL, _TRACEPARENT}
)
_ONCE: Final = frozenset(
    {
        _AUTHORIZATION,
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"transfer-encoding",
        _VAULT_TOKEN,
        b"x-vault-namespace",
        b"x-vault-wrap-ttl",
        _PRINCIPAL,
        _REQUEST_ID,
    }
)


class ParsedHead(msgspec.Struct, frozen=True, gc=False):
    """What the engine and the application need from a head.

    `path` and `query` are as sent, not percent-decoded. `content_length` is 0 for a chunked or absent body.
    `principal`: the value of `X-MiniKMS-Principal`, unchecked, even if it is empty; None without that header.
    `authorization`: likewise, that of `Authorization`. `traceparent`: unchecked too. `reserved`: there is a header
    `X-MiniKMS-*`. `vault`: the
    headers `X-Vault-*` by the rest of their names, in lower case. `plain`: a 200 with JSON needs no special header (the
    connection stays open, the method is not HEAD, no request id to repeat).
    `cacheable`: `HeadCache` may keep it, because it contains no credential and is likely to recur.
    """

    method: str
    path: str
    query: str
    keep_alive: bool
    content_length: int
    chunked: bool
    expect_continue: bool
    content_type: str
    request_id: str | None
    principal: str | None
    plain: bool
    cacheable: bool
    authorization: str | None = None
    reserved: bool = False
    traceparent: str | None = None
    vault: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"ParsedHead({self.method} {self.path})"


class _Fields:
    """Collects what httptools reports."""

    __slots__ = ("fields", "url")

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp keeps the white space after a value, which is not a part of it (RFC 9110 section 5.5).
        self.fields.append((name.lower(), value.strip(b" \t")))


def parse_head(raw: bytes, limits: Limits) -> ParsedHead:
    """Parse one head, from the method to the empty line inclusive. Raises RefusedError."""
    if len(raw) > limits.head_bytes_max:
        raise RefusedError(HEAD_TOO_LARGE)
    line = _REQUEST_LINE.match(raw)
    if line is None:
        raise RefusedError(BAD_REQUEST_LINE)
    method, target, version = line.groups()
    _check_request_line(method, target, version, limits)
    if _FIELDS.fullmatch(raw, line.end()) is None:
        raise RefusedError(BAD_HEADER)
    if raw.count(b"\r\n") - 2 > limits.headers_count_max:
        raise RefusedError(TOO_MANY_HEADERS)
    fields = _single_fields(_parse_fields(raw, target))
    is_1_1 = version == b"1.1"
    _check_host(fields, is_1_1)
    _check_unsupported(fields)
    content_length, chunked = _body_length(fields, method, is_1_1, limits)
    request_id = _request_id(fields)
    keep_alive = is_1_1 and b"close" not in _tokens(fields.get(b"connection", b""))
    path, _, query = target.decode("ascii").partition("?")
    return ParsedHead(
        method=method.decode("ascii"),
        path=path,
        query=query,
        keep_alive=keep_alive,
        content_length=content_length,
        chunked=chunked,
        expect_continue=is_1_1 and b"expect" in fields,
        content_type=fields.get(b"content-type", b"").decode("latin-1"),
        request_id=request_id,
        principal=fields[_PRINCIPAL].decode("latin-1") if _PRINCIPAL in fields else None,
        plain=keep_alive and method != b"HEAD" and request_id is None,
        cacheable=not query and fields.keys().isdisjoint(_NOT_CACHED),
        authorization=fields[_AUTHORIZATION].decode("latin-1") if _AUTHORIZATION in fields else None,
        traceparent=fields[_TRACEPARENT].decode("latin-1") if _TRACEPARENT in fields else None,
        reserved=any(name.startswith(_RESERVED) for name in fields),
        vault={
            name[len(_VAULT) :].decode("ascii"): value.decode("latin-1")
            for name, value in fields.items()
            if name.startswith(_VAULT)
        },
    )


def check_partial_head(data: bytearray, start: int, end: int, limits: Limits) -> None:
    """Raise RefusedError if an incomplete head can't become an acceptable one; otherwise the engine waits for more.

    Without this check, a peer that sends HTTP/0.9, TLS or bare LF would wait for the timeout. The bytes are not copied:
    if they are not a head, they may be a misplaced body that holds a key.
    """
    if end - start > limits.head_bytes_max:
        in_request_line = data.find(b"\r\n", start, end) < 0
        raise RefusedError(TARGET_TOO_LONG if in_request_line else HEAD_TOO_LARGE)
    if not data[start : start + 1].isalpha():
        raise RefusedError(BAD_REQUEST_LINE)
    in_request_line = data.find(b"\n", start, end) < 0
    if not in_request_line:
        line = _REQUEST_LINE.match(data, start, end)
        if line is None:
            raise RefusedError(BAD_REQUEST_LINE)
        method, target, version = line.groups()
        _check_request_line(method, target, version, limits)
    if _STRAY.search(data, start, end) is not None:
        raise RefusedError(BAD_REQUEST_LINE if in_request_line else BAD_HEADER)


def _check_request_line(method: bytes, target: bytes, version: bytes, limits: Limits) -> None:
    if version not in (b"1.1", b"1.0"):
        raise RefusedError(BAD_VERSION)
    if method not in METHODS:
        raise RefusedError(BAD_METHOD)
    if len(target) > limits.target_bytes_max:
        raise RefusedError(TARGET_TOO_LONG)
    if _TARGET.fullmatch(target) is None:
        raise RefusedError(BAD_TARGET)


def _parse_fields(raw: bytes, target: bytes) -> list[tuple[bytes, bytes]]:
    """Header names in lower case, and values, as httptools parses them."""
    sink = _Fields()
    try:
        known = b"GET" + raw[4:] if raw.startswith(b"LIST ") else raw
        httptools.HttpRequestParser(sink).feed_data(known)
    except httptools.HttpParserUpgrade:
        raise RefusedError(UPGRADE) from None
    except httptools.HttpParserError:
        raise RefusedError(BAD_HEADER) from None
    if sink.url != target or len(sink.fields) != raw.count(b"\r\n") - 2:
        raise RefusedError(BAD_HEADER)
    return sink.fields


def _single_fields(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Values by name; those of a repeated list-valued header are joined by commas (RFC 9110 section 5.3)."""
    single: dict[bytes, bytes] = {}
    for name, value in fields:
        if name not in single:
            single[name] = value
        elif name in _ONCE:
            raise RefusedError(REPEATED_HEADER)
        else:
            single[name] += b", " + value
    return single


def _check_host(fields: dict[bytes, bytes], is_1_1: bool) -> None:
    host = fields.get(b"host")
    if (host is None and is_1_1) or (host is not None and _HOST.fullmatch(host) is None):
        raise RefusedError(BAD_HOST)


def _check_unsupported(fields: dict[bytes, bytes]) -> None:
    if b"upgrade" in fields or b"upgrade" in _tokens(fields.get(b"connection", b"")):
        raise RefusedError(UPGRADE)
    if b"trailer" in fields:
        raise RefusedError(TRAILER)
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise RefusedError(BAD_EXPECT)
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RefusedError(BAD_CONTENT_ENCODING)


def _body_length(fields: dict[bytes, bytes], method: bytes, is_1_1: bool, limits: Limits) -> tuple[int, bool]:
    """(Content-Length or 0, chunked)."""
    length = fields.get(b"content-length")
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or not is_1_1 or coding.lower() != b"chunked":
            raise RefusedError(BAD_TRANSFER_ENCODING)
        return 0, True
    if length is None:
        if method in _METHODS_WITH_BODY:
            raise RefusedError(LENGTH_REQUIRED)
        return 0, False
    if _LENGTH.fullmatch(length) is None:
        raise RefusedError(BAD_CONTENT_LENGTH)
    # llhttp has refused a number that needs more than 64 bits.
    if int(length) > limits.body_bytes_max:
        raise RefusedError(BODY_TOO_LARGE)
    return int(length), False


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip(b" \t").lower() for token in value.split(b",")]


def _request_id(fields: dict[bytes, bytes]) -> str | None:
    value = fields.get(_REQUEST_ID)
    if value is None:
        return None
    text = value.decode("latin-1")
    return text if api.REQUEST_ID_PATTERN.fullmatch(text) else None


class HeadCache:
    """Caches parsed heads by their exact bytes, so that a repeated head is parsed once.

    Bounded in number and size; it drops all entries when it is full. It never keeps a head with a credential.
    """

    __slots__ = ("_heads", "_limits", "get")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heads: dict[bytes, ParsedHead] = {}
        self.get = self._heads.get
        """`get(raw)`: the cached head, or None."""

    def parse(self, raw: bytes) -> ParsedHead:
        """Parse a head that `get` does not have, and cache it if it is cacheable. Raises RefusedError."""
        head = parse_head(raw, self._limits)
        if head.cacheable and len(raw) <= CACHED_HEAD_BYTES_MAX:
            if len(self._heads) >= CACHED_HEADS_COUNT_MAX:
                self._heads.clear()
            self._heads[raw] = head
        return head


_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_query(query: str) -> dict[str, str]:
    """The parameters by name, decoded; `+` is a space, as in HTML forms. Raises InvalidRequestError."""
    parameters: dict[str, str] = {}
    if not query:
        return parameters
    pairs = query.split("&")
    if len(pairs) > QUERY_PARAMETERS_COUNT_MAX:
        raise InvalidRequestError(f"The query has more than {QUERY_PARAMETERS_COUNT_MAX} parameters.")
    for pair in pairs:
        name_text, equals, value_text = pair.partition("=")
        name = _decode(name_text)
        if not equals or not name:
            raise InvalidRequestError("The query must consist of name=value pairs.")
        if name in parameters:
            raise InvalidRequestError("A query parameter is repeated.")
        parameters[name] = _decode(value_text)
    return parameters


def _decode(text: str) -> str:
    if _BAD_ESCAPE.search(text) is not None:
        raise InvalidRequestError("The query has a malformed percent escape.")
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequestError("The query is not UTF-8.") from None
