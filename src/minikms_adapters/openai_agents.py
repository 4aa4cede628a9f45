"""Sessions of the OpenAI Agents SDK, encrypted under one key for each session.

Owns: `EncryptedSession`, around any session. Each item becomes one record that is bound to its session. Invariants: an
item that does not open is an error, never left out of the history; nothing is removed before it was opened. The order
of items is the inner session's: a record does not say where it stood.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from agents.memory.session import SessionABC

from minikms_adapters.errors import NotSupportedError
from minikms_adapters.records import (
    KmsClient,
    Place,
    RecordSealer,
    StepRunner,
    Steps,
    as_json,
    ask,
    ask_inner,
    asynchronous,
    from_json,
    json_bytes,
    thread_name,
)

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.memory.session_settings import SessionSettings

ITEMS_MAX: Final = 1_000_000
"""The items of a session that can be re-encrypted."""
REPLACE_TRIES_MAX: Final = 10
"""How often `EncryptedSession.reencrypt` begins again because somebody added an item."""


class EncryptedSession(SessionABC):
    """A session around `inner`, whose database gets no plaintext of items.

    `kms` is a `minikms.Client` or a `minikms.AsyncClient`.

    Raises RecordError for an item that is in plaintext, was altered, belongs to another session, or whose key was
    destroyed.
    """

    def __init__(self, session_id: str, inner: SessionABC, kms: KmsClient) -> None:
        self.session_id = session_id
        self._inner = inner
        self._thread = thread_name("agents", session_id)
        self._sealer = RecordSealer()
        self._runner = StepRunner(kms, inner)

    @property
    def session_settings(self) -> SessionSettings | None:  # type: ignore[override]  # the base has a plain attribute
        """The settings of the inner session, which applies them."""
        return self._inner.session_settings

    @session_settings.setter
    def session_settings(self, value: SessionSettings | None) -> None:
        self._inner.session_settings = value

    @asynchronous
    def get_items(self, limit: int | None = None) -> Steps[list[TResponseInputItem]]:
        return (yield from self._open((yield ask_inner("get_items", limit))))

    @asynchronous
    def add_items(self, items: list[TResponseInputItem]) -> Steps[None]:
        yield ask_inner("add_items", (yield from self._seal(items)))

    @asynchronous
    def pop_item(self) -> Steps[TResponseInputItem | None]:
        """Removes the newest item once it was opened, so that a failure removes nothing."""
        newest = yield ask_inner("get_items", 1)
        opened = yield from self._open(newest)
        removed = yield ask_inner("pop_item")
        if removed is None or [removed] == newest:
            return None if removed is None else opened[0]
        return (yield from self._open([removed]))[0]  # somebody else changed the session meanwhile

    @asynchronous
    def clear_session(self) -> Steps[Any]:
        """Destroys the session's keys, then removes its items, and gives the receipts, a list of `Receipt`. May be
        repeated after a failure. The type is Any, since the SDK's own sessions give nothing.
        """
        receipts = yield from self._sealer.destroy(self._thread)
        yield ask_inner("clear_session")
        return receipts

    @asynchronous
    def reencrypt(self) -> Steps[int]:
        """Encrypts each item under the session's current key, with one transaction. Gives the number of items.

        Raises NotSupportedError if the inner session can't replace its items in a transaction.
        """
        if not hasattr(self._inner, "_get_compaction_snapshot"):
            raise NotSupportedError("this session can't replace its items in one transaction")
        self._sealer.forget(self._thread)
        for _ in range(REPLACE_TRIES_MAX):
            snapshot = yield ask_inner("_get_compaction_snapshot", ITEMS_MAX)
            if snapshot is None or not snapshot.complete:
                raise NotSupportedError("this session can't replace its items in one transaction")
            if not snapshot.items:
                return 0
            sealed = yield from self._seal((yield from self._open(snapshot.items)))
            if (yield ask(snapshot.replace_suffix, 0, sealed)):
                return len(sealed)
        raise NotSupportedError("items were added to the session all the time")

    def _place(self, index: int = -1) -> Place:
        record = f"session {self.session_id}, item {index}"
        return Place(self._thread, ("openai-agents", "item", self.session_id), record)

    def _seal(self, items: Sequence[TResponseInputItem]) -> Steps[list[TResponseInputItem]]:
        values = [(self._place(), json_bytes(item, _as_dict)) for item in items]
        records = yield from self._sealer.seal(values)
        sealed = [as_json(record) for record in records]
        return cast("list[TResponseInputItem]", sealed)

    def _open(self, items: Sequence[object]) -> Steps[list[TResponseInputItem]]:
        records = [(self._place(index), from_json(item)) for index, item in enumerate(items)]
        return [json.loads(value) for value in (yield from self._sealer.open(records))]


def _as_dict(value: Any) -> Any:
    """A model of the SDK that stands for an item."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(f"a session can't hold a value of type {type(value).__name__}: it has no form in JSON")
