"""Reactions to a message: list, set, remove.

Owns: the wire shape of a reaction. Invariants: each change appends a version of the message; a signed user reacts
only as itself, and only to a message that it may read.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.api import answer, head, reading
from progressdb_server.api.answer import Answer
from progressdb_server.api.call import Call
from progressdb_server.api.errors import bad_request
from progressdb_server.api.messages import checked_identity, checked_reaction
from progressdb_server.store.model import ConversationStore, Message


class ReactionBody(msgspec.Struct):
    id: str | None = None
    reaction: str | None = None


_BODY: Final = msgspec.json.Decoder(ReactionBody)
_UNKNOWN: Final = "message not found"


class ReactionRoutes:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def _readable(self, call: Call) -> Message:
        call.author()
        message = await self._store.get_message(call.id_from_path("message", _UNKNOWN))
        await reading.check_message_reader(self._store, call, message)
        return message

    async def list(self, call: Call) -> Answer:
        message = await self._readable(call)
        listed = [{"id": by, "reaction": value} for by, value in message.reactions.items()]
        return answer.json({"id": message.id, "reactions": listed})

    async def set(self, call: Call) -> Answer:
        """The identity is the body's `id`, or the header X-Identity. Answers the message."""
        sent = await call.json(_BODY)
        by = sent.id or head.header_text(call.headers.get(head.IDENTITY, b""), "X-Identity")
        if not by or not sent.reaction:
            raise bad_request("missing id or reaction")
        checked_identity(call, by)
        checked_reaction(sent.reaction)
        message = await self._readable(call)
        changed = await self._store.set_reaction(message.id, by, sent.reaction, request_id=call.request_id)
        return answer.json(changed)

    async def remove(self, call: Call) -> Answer:
        """Also when there is no such reaction."""
        by = checked_identity(call, call.parameters["identity"])
        message = await self._readable(call)
        await self._store.remove_reaction(message.id, by, request_id=call.request_id)
        return answer.NO_CONTENT
