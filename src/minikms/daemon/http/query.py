"""Query strings: `name=value` pairs joined by `&`, percent-encoded UTF-8.

Owns: decoding them so that a parameter has exactly one reading. Invariants: a repeated name, a malformed percent
escape or invalid UTF-8 is refused, never guessed at. Pure.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from minikms.daemon.http.limits import QUERY_PARAMETERS_COUNT_MAX
from minikms.errors import InvalidRequestError

_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_query(query: str) -> dict[str, str]:
    """Parameters by name, decoded; `+` is a space, as HTML forms write it. Raises `InvalidRequestError`."""
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
