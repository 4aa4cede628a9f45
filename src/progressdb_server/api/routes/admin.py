"""What operators read: health, counts, all threads, stored keys and raw values; and signatures for backends.

Owns: the answers of /healthz, /v1/_sign and /admin. Invariant: a raw value leaves as it is stored, encrypted;
nothing here asks the key service to open one. Which role may call a route is in the table of routes.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.api.http import limits, response
from progressdb_server.api.http.access import checked_author
from progressdb_server.api.http.errors import ApiError, bad_request, not_found
from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer, JsonList
from progressdb_server.store.model import ConversationStore


class SignBody(msgspec.Struct):
    user_id: str = msgspec.field(name="userId")


_SIGN: Final = msgspec.json.Decoder(SignBody)


async def health(call: Call) -> Answer:
    """That the server answers; without a key."""
    return response.json({"status": "ok"})


async def sign(call: Call) -> Answer:
    """A signature of a user id under the caller's own key."""
    refusal = "invalid payload"
    sent = await call.json(_SIGN, refusal)
    if not sent.user_id:
        raise bad_request(refusal)
    try:
        checked_author(sent.user_id)
    except ApiError:
        raise bad_request(refusal) from None
    return response.json({"userId": sent.user_id, "signature": call.principal.sign(sent.user_id)})


class AdminRoutes:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def health(self, call: Call) -> Answer:
        return response.json({"status": "ok", "service": "progressdb"})

    async def stats(self, call: Call) -> Answer:
        """Threads, and messages with each stored version counted."""
        counts = await self._store.stats()
        return response.json({"threads": counts["threads"], "messages": counts["messages"]})

    async def threads(self, call: Call) -> JsonList:
        """Everybody's, deleted ones too."""
        return JsonList(b'{"threads":[', self._store.list_threads(author=None, include_deleted=True))

    async def keys(self, call: Call) -> JsonList:
        return JsonList(b'{"keys":[', self._store.stored_keys(_stored_key(call.query.get("prefix", ""))))

    async def value(self, call: Call) -> Answer:
        """One raw value, as stored."""
        key = call.parameters["key"]
        value = await self._store.raw_value(key) if len(key.encode()) <= limits.STORED_KEY_BYTES_MAX else None
        if value is None:
            raise not_found("key not found")
        return response.octets(value)


def _stored_key(text: str) -> str:
    if len(text.encode()) > limits.STORED_KEY_BYTES_MAX:
        raise bad_request("prefix too long")
    return text
