"""Routing: finds the entry of a table for the path and method of a request.

Owns: paths with an id, and the answers to a path or a method that no entry has. It must never know what an entry is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

from minikms import api
from minikms.http.exchange import Response, error_response

T = TypeVar("T")

_PARAMETER: Final = re.compile(r"\{\w+\}")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Routes(dict[str, Mapping[str, T]]):
    """The entries of a path by method; none if there is no such path. The second segment of a path may be `{name}`,
    which stands for any id.
    """

    def __init__(self, entries: Iterable[tuple[str, str, T]]) -> None:
        """Takes the method, the path, and the handler of each route."""
        super().__init__()
        for method, path, entry in entries:
            any_id = _PARAMETER.sub("{}", path)
            self[any_id] = {**self.get(any_id, _NOTHING), method: entry}

    def __missing__(self, path: str) -> Mapping[str, T]:
        return self.get(_without_id(path), _NOTHING)


def path_id(path: str) -> str:
    return path.split("/")[2]


def no_route(methods: Iterable[str]) -> Response:
    """405 for a path that has other `methods`; without any, 404."""
    allowed = list(methods)
    if not allowed:
        return error_response(
            404, api.CODE_NOT_FOUND, "there is no such path; the page `The key service's API` lists them"
        )
    answer = error_response(405, api.CODE_METHOD_NOT_ALLOWED, f"use {' or '.join(allowed)} here")
    answer.headers = (("allow", ", ".join(allowed)),)
    return answer


def _without_id(path: str) -> str:
    """`/keys/{}` or `/keys/{}/<action>` of a path with an id; `""` of any other."""
    parts = path.split("/")
    if len(parts) not in (3, 4) or parts[0] or not all(parts[1:]):
        return ""
    parts[2] = "{}"
    return "/".join(parts)
