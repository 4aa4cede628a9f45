"""Long-term memory of LangGraph, encrypted under one key for each namespace.

Owns: `EncryptedStore`, around any store. Invariants: a value is bound to its namespace and key; a search gives no item
of another namespace; nothing is indexed, filtered or ranked by a value. Namespaces and keys stay in plaintext.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any, Final

from langgraph.store.base import BaseStore, GetOp, InvalidNamespaceError, Item, Op, PutOp, Result, SearchOp, TTLConfig

from minikms_adapters.errors import NotSearchableError, WrongPlaceError
from minikms_adapters.records import (
    KmsClient,
    Place,
    Receipt,
    RecordSealer,
    StepRunner,
    Steps,
    as_json,
    ask_inner,
    both,
    from_json,
    json_bytes,
    thread_name,
)

PAGE_ITEMS: Final = 100
"""Items that a deletion of a namespace asks for at once."""

Namespace = tuple[str, ...]


class EncryptedStore(BaseStore):
    """A store around `inner`, whose database gets no plaintext of values.

    `kms` is a `minikms.Client` or a `minikms.AsyncClient`; the blocking methods need the first. A namespace can be
    listed; a query, a filter and an index raise NotSearchableError.

    Raises RecordError for a value that is in plaintext, was altered or moved, or whose key was destroyed.
    """

    def __init__(self, inner: BaseStore, kms: KmsClient) -> None:
        self._inner = inner
        self._sealer = RecordSealer()
        self._runner = StepRunner(kms, inner, prefix="a")

    @property
    def supports_ttl(self) -> bool:  # type: ignore[override]  # the base has a plain attribute
        return self._inner.supports_ttl

    @property
    def ttl_config(self) -> TTLConfig | None:  # type: ignore[override]  # the base has a plain attribute
        return self._inner.ttl_config

    def _batch(self, ops: Iterable[Op]) -> Steps[list[Result]]:
        ops = list(ops)
        puts = [op for op in ops if isinstance(op, PutOp) and op.value is not None]
        if any(isinstance(op, SearchOp) and (op.query or op.filter) for op in ops) or any(op.index for op in puts):
            raise NotSearchableError("values are encrypted: they can't be indexed, filtered or searched")
        for op in puts:
            _check_namespace(op.namespace)
        values = [(_place(op.namespace, op.key), json_bytes(op.value)) for op in puts]
        records = iter((yield from self._sealer.seal(values)))
        stored = [
            op._replace(value=as_json(next(records)), index=False)
            if isinstance(op, PutOp) and op.value is not None
            else op
            for op in ops
        ]
        results = yield ask_inner("batch", stored)
        checked = [_found(op, result) for op, result in zip(ops, results, strict=True)]
        places = [(_place(item.namespace, item.key), from_json(item.value)) for items in checked for item in items]
        plaintexts = iter((yield from self._sealer.open(places)))
        opened = [[_with_value(item, next(plaintexts)) for item in items] for items in checked]
        return [
            items if isinstance(op, SearchOp) else items[0] if items else result
            for op, result, items in zip(ops, results, opened, strict=True)
        ]

    batch, abatch = both(_batch)

    def _delete_namespace(self, namespace: Namespace) -> Steps[list[Receipt]]:
        """Destroys the keys of one namespace, then deletes its items. Gives the receipts. May be repeated."""
        _check_namespace(namespace)
        receipts = yield from self._sealer.destroy(thread_name("store", *namespace))
        offset = 0
        while True:
            search = SearchOp(namespace, limit=PAGE_ITEMS, offset=offset, refresh_ttl=False)
            [items] = yield ask_inner("batch", [search])
            own = [PutOp(item.namespace, item.key, None) for item in items if item.namespace == tuple(namespace)]
            if own:
                yield ask_inner("batch", own)
            offset += len(items) - len(own)
            if len(items) < PAGE_ITEMS:
                return receipts

    delete_namespace, adelete_namespace = both(_delete_namespace)


def _check_namespace(namespace: Namespace) -> None:
    """Refuses a part with a dot, as LangGraph's own methods do: it would have the key of the parts before and after the
    dot. Raises InvalidNamespaceError.
    """
    if any("." in part for part in namespace):
        raise InvalidNamespaceError(f"no part of a namespace has a dot: {namespace}")


def _place(namespace: Namespace, key: str) -> Place:
    thread = thread_name("store", *namespace)
    return Place(thread, ("langgraph", "item", key, *namespace), f"namespace {'.'.join(namespace)}, item {key}")


def _found(op: Op, result: Any) -> list[Item]:
    """The items of a result. Raises WrongPlaceError for one that the operation did not ask for."""
    items = result if isinstance(op, SearchOp) else [result] if isinstance(op, GetOp) and result is not None else []
    for item in items:
        if isinstance(op, SearchOp):
            matches = item.namespace[: len(op.namespace_prefix)] == tuple(op.namespace_prefix)
        else:
            matches = isinstance(op, GetOp) and (item.namespace, item.key) == (tuple(op.namespace), op.key)
        if not matches:
            raise WrongPlaceError(_place(item.namespace, item.key).record)
    return items


def _with_value(item: Item, plaintext: bytes) -> Item:
    opened = copy.copy(item)
    opened.value = json.loads(plaintext)
    return opened
