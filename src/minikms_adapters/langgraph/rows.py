"""Rows of an inner saver, of which nothing is authenticated yet.

Owns: the serializer that the inner saver gets, the ids of a checkpoint, and its records with their places. Invariants:
reading a row imports no module and calls no object that the row names; a row of another checkpoint than the one that
was asked for is an error. It must never give a row to the serializer of the program.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import EXT_DELTA_SNAPSHOT
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from minikms_adapters.errors import WrongPlaceError
from minikms_adapters.records import JSON_FIELD, Place, from_json, thread_name


class Unreadable:
    """Stands for a stored value that is no record: a type of the program, or bytes of another format."""


class ClosedSerializer(SerializerProtocol):
    """Stores bytes, text, numbers, lists, maps and snapshots of delta channels, in LangGraph's own format.

    Anything else that is stored reads as `Unreadable`.
    """

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        if obj is None:
            return "null", b""
        if isinstance(obj, bytes):
            return "bytes", obj
        return "msgpack", _packed(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, stored = data
        if kind == "null":
            return None
        if kind == "bytes":
            return stored
        try:
            return _unpacked(stored) if kind == "msgpack" else Unreadable()
        except (ValueError, TypeError, RecursionError):
            return Unreadable()


def _packed(value: object) -> bytes:
    options = ormsgpack.OPT_NON_STR_KEYS | ormsgpack.OPT_REPLACE_SURROGATES
    packed: bytes = ormsgpack.packb(value, default=_extension, option=options | ormsgpack.OPT_PASSTHROUGH_DATACLASS)
    return packed


def _extension(value: object) -> Any:
    if isinstance(value, _DeltaSnapshot):
        return ormsgpack.Ext(EXT_DELTA_SNAPSHOT, _packed(value.value))
    raise TypeError(f"a value of type {type(value).__name__} can't be stored in plaintext")


def _unpacked(stored: bytes) -> Any:
    return ormsgpack.unpackb(stored, ext_hook=_extended, option=ormsgpack.OPT_NON_STR_KEYS)


def _extended(code: int, stored: bytes) -> Any:
    return _DeltaSnapshot(_unpacked(stored)) if code == EXT_DELTA_SNAPSHOT else Unreadable()


def closed(inner: BaseCheckpointSaver[Any]) -> BaseCheckpointSaver[Any]:
    """A saver of the same database, with `ClosedSerializer`. It keeps the cipher of an `EncryptedSerializer`, under
    which older versions of this module stored their rows.
    """
    clone = copy.copy(inner)
    clone.serde = ClosedSerializer()
    if isinstance(inner.serde, EncryptedSerializer):
        clone.serde = EncryptedSerializer(inner.serde.cipher, clone.serde)
    return clone


class Spot(NamedTuple):
    """The ids of a checkpoint, and the places of its records."""

    thread_id: str
    namespace: str
    checkpoint_id: str

    @classmethod
    def of(cls, config: RunnableConfig, **others: str) -> Spot:
        """The ids of a config. `others` take the place of the config's own."""
        ids = {**config["configurable"], **others}
        return cls(str(ids["thread_id"]), ids.get("checkpoint_ns", ""), str(ids.get("checkpoint_id")))

    @property
    def config(self) -> RunnableConfig:
        return config_of(self.thread_id, self.namespace, self.checkpoint_id)

    def _place(self, what: str, *parts: str, record: str = "") -> Place:
        checkpoint = f"thread {self.thread_id}, namespace {self.namespace!r}, checkpoint {self.checkpoint_id}"
        thread = thread_name("langgraph", self.thread_id)
        ids = (self.thread_id, self.namespace, *parts)
        return Place(thread, ("langgraph", what, *map(str, ids)), checkpoint + record)

    def head(self) -> Place:
        return self._place("head", self.checkpoint_id)

    def value(self, channel: str, version: object) -> Place:
        return self._place("value", channel, str(version), record=f", channel {channel!r}, version {version}")

    def write(self, task_id: str, channel: str) -> Place:
        record = f", write of task {task_id} to channel {channel!r}"
        return self._place("write", self.checkpoint_id, task_id, channel, record=record)


def config_of(thread_id: str, namespace: str, checkpoint_id: str | None) -> RunnableConfig:
    named = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": namespace, **named}}


def inner_config(config: RunnableConfig) -> RunnableConfig:
    """The ids alone: a saver stores other members of a config, which may hold what a user typed."""
    ids = config["configurable"]
    optional = {name: ids[name] for name in ("checkpoint_ns", "checkpoint_id") if ids.get(name) is not None}
    return {"configurable": {"thread_id": str(ids["thread_id"]), **optional}}


def check_asked(wanted: RunnableConfig | None, row: CheckpointTuple) -> None:
    """Checks that a row is of the thread, namespace and checkpoint of `wanted`, an `inner_config`. Raises
    WrongPlaceError.
    """
    ids = row.config["configurable"]
    for name, value in wanted["configurable"].items() if wanted else ():
        if str(ids.get(name)) != str(value):
            raise WrongPlaceError(Spot.of(row.config).head().record)


def records_of(spot: Spot, row: CheckpointTuple) -> list[tuple[Place, object]]:
    """The records of a stored checkpoint with their places: head, values, writes."""
    versions = row.checkpoint["channel_versions"]
    values = row.checkpoint["channel_values"].items()
    return [
        (spot.head(), head_of(row)),
        *(
            (spot.value(name, versions.get(name)), v.value if isinstance(v, _DeltaSnapshot) else v)
            for name, v in values
        ),
        *((spot.write(task_id, channel), value) for task_id, channel, value in row.pending_writes or ()),
    ]


def head_of(row: CheckpointTuple) -> object:
    """The record of a head, which is a member of the metadata, or what is there in its place."""
    return from_json({JSON_FIELD: row.metadata.get(JSON_FIELD)})
