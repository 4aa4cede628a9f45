"""Pages of long lists, and the parameters that several lists take.

Owns: `limit`, the cursor of a page, and the member of the response that is the cursor of the next one. Invariants:
without both parameters a list is whole; a page has at most `PAGE_COUNT_MAX` entries; a malformed limit or cursor is a
400, never a default.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

from progressdb_server.api.gate.errors import bad_request
from progressdb_server.api.gate.limits import PAGE_COUNT_MAX
from progressdb_server.api.gate.response import JsonList
from progressdb_server.api.openapi.description import Parameter, Schema, list_of
from progressdb_server.store.model import Page

INVALID_LIMIT: Final = "limit must be a whole number that is not negative"
_LIMIT_MAX: Final = 2**62
"""No list is as long, so a larger limit gives the same one."""


def read_limit(query: dict[str, str]) -> int | None:
    """The limit that the query names. Raises ApiError 400."""
    text = query.get("limit")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise bad_request(INVALID_LIMIT)
    digits = text.lstrip("0")
    return _LIMIT_MAX if len(digits) > 18 else int(digits or "0")


class Paging(NamedTuple):
    """The paging of one list, which is the member `items` of its response. The next page is asked for by the parameter
    `cursor` with the value of the member `following`.
    """

    items: str
    cursor: str
    following: str
    form: re.Pattern[str]
    """The form of a cursor."""

    @property
    def errors(self) -> tuple[str, str]:
        return INVALID_LIMIT, f"{self.cursor} must be the {self.following} of another page"

    @property
    def parameters(self) -> tuple[Parameter, Parameter]:
        limit = f"Entries of one page, at most {PAGE_COUNT_MAX}; without it and `{self.cursor}`, the whole list."
        return (
            Parameter("limit", {"type": "integer", "minimum": 0}, limit),
            Parameter(self.cursor, self._schema, f"The `{self.following}` of the page before."),
        )

    @property
    def _schema(self) -> Schema:
        return {"type": "string", "pattern": f"^(?:{self.form.pattern})$"}

    def response(self, items: Schema) -> Schema:
        listed = list_of(self.items, items)
        following = {**self._schema, "description": f"`{self.cursor}` of the next page, absent on the last one."}
        return {**listed, "properties": {**listed["properties"], self.following: following}}

    def read(self, query: dict[str, str]) -> Page | None:
        """None for the whole list. Raises ApiError 400."""
        limit, cursor = read_limit(query), query.get(self.cursor)
        if cursor is not None and not self.form.fullmatch(cursor):
            raise bad_request(self.errors[1])
        if limit is None and cursor is None:
            return None
        return Page(PAGE_COUNT_MAX if limit is None else min(limit, PAGE_COUNT_MAX), cursor or "")

    def list(self, chunks: AsyncIterator[Sequence[Any]], page: Page | None) -> JsonList:
        def members() -> dict[str, str]:
            return {self.following: page.following} if page is not None and page.following else {}

        return JsonList(b'{"%b":[' % self.items.encode(), chunks, members)
