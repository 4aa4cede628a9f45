"""Checkpoints of LangGraph, encrypted under one key for each thread.

Owns: `EncryptedSaver`, around any saver. A checkpoint becomes several records: its *head* (metadata, channel versions,
parent, names of the channels) in one field of the metadata, each channel value, and each pending write. Invariants: a
value is bound to thread, namespace, channel and version; a head to thread, namespace and checkpoint; a write to these
and its task and channel. The head says which values and versions belong to the checkpoint, so that none can be swapped,
set back or left out. What is stored in plaintext too (ids, names and versions of channels, `PLAIN_METADATA`) comes from
the head. It must never give the inner saver a value, or the caller's config, in plaintext.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, cast

import msgspec
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    PendingWrite,
    get_checkpoint_id,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from minikms_adapters.errors import NotSearchableError, PlaintextRecordError, WrongPlaceError
from minikms_adapters.records import (
    KmsClient,
    Place,
    Receipt,
    Runner,
    Sealer,
    Steps,
    ask_inner,
    ask_kms,
    both,
    is_sealed,
    key_of,
    thread_name,
)

HEAD_FIELD: Final = "minikms"
"""Of the stored metadata: the head, in base64."""
PLAIN_METADATA: Final = frozenset(
    {"source", "step", "parents", "run_id", "counters_since_delta_snapshot", "delta_writes_versioned"}
)
"""What savers read in the database to filter, to delete runs and to prune. It is made by LangGraph, never typed."""
PAGE_CHECKPOINTS: Final = 128
"""Checkpoints of a listing that are opened with one batch."""
STAGING_SUFFIX: Final = "~minikms-migration"
"""Of the thread that holds the checkpoints of another one while `EncryptedSaver.migrate` rewrites that one."""
STAGED_NAMESPACE: Final = "minikms-migration"
"""Its checkpoint says that the staging thread is complete."""
FORMAT_OF_CHECKPOINTS: Final = 4
"""The stored `v` is at least this. With a lower one, a saver looks for sends in the parent's encrypted writes."""


class Write(NamedTuple):
    """A pending write, with the two members that order it among those of its checkpoint."""

    task_id: str
    channel: str
    value: Any
    position: int
    task_path: str


class Opened(NamedTuple):
    """A checkpoint in plaintext. `parent` is what its head says; the stored one may be gone after a prune."""

    found: CheckpointTuple
    writes: list[Write]
    parent: str | None


class _Spot(NamedTuple):
    """The ids of a checkpoint, and the places of its records."""

    thread_id: str
    namespace: str
    checkpoint_id: str

    @classmethod
    def of(cls, config: RunnableConfig, checkpoint_id: str, thread_id: str | None = None) -> _Spot:
        """`thread_id`: in the place of the one in the config."""
        given = config["configurable"]
        return cls(
            str(given["thread_id"]) if thread_id is None else thread_id, given.get("checkpoint_ns", ""), checkpoint_id
        )

    @property
    def config(self) -> RunnableConfig:
        return _config(self.thread_id, self.namespace, self.checkpoint_id)

    def _place(self, what: str, *parts: str, record: str = "") -> Place:
        checkpoint = f"thread {self.thread_id}, namespace {self.namespace!r}, checkpoint {self.checkpoint_id}"
        thread = thread_name("langgraph", self.thread_id)
        return Place(thread, ("langgraph", what, self.thread_id, self.namespace, *parts), checkpoint + record)

    def head(self) -> Place:
        return self._place("head", self.checkpoint_id)

    def value(self, channel: str, version: object) -> Place:
        return self._place("value", channel, str(version), record=f", channel {channel!r}, version {version}")

    def write(self, task_id: str, channel: str) -> Place:
        record = f", write of task {task_id} to channel {channel!r}"
        return self._place("write", self.checkpoint_id, task_id, channel, record=record)


class EncryptedSaver(BaseCheckpointSaver[Any]):
    """A saver around `inner`, whose database gets no plaintext of values, writes and metadata.

    `kms` is a `minikms.Client` or a `minikms.AsyncClient`; the blocking methods need the first. `plain_metadata` names
    further fields of the metadata that stay in plaintext, so that `list` can filter by them.

        saver = EncryptedSaver(SqliteSaver(connection), Client("/run/minikms/minikms.sock"))
        graph = builder.compile(checkpointer=saver)

    Raises RecordError for a record that is in plaintext, was altered or moved, or whose key was destroyed.
    """

    def __init__(
        self, inner: BaseCheckpointSaver[Any], kms: KmsClient, *, plain_metadata: Collection[str] = ()
    ) -> None:
        serde = inner.serde
        super().__init__(serde=serde.serde if isinstance(serde, EncryptedSerializer) else serde)
        self._inner = inner
        self._plain = PLAIN_METADATA | set(plain_metadata)
        self._sealer = Sealer()
        self._runner = Runner(kms, inner, prefix="a")

    @property
    def config_specs(self) -> list[Any]:
        return self._inner.config_specs

    def get_next_version(self, current: Any, channel: None) -> Any:
        return self._inner.get_next_version(current, channel)

    # --- writing ---

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Steps[RunnableConfig]:
        spot = _Spot.of(config, checkpoint["id"])
        yield from self._store_checkpoint(spot.thread_id, config, checkpoint, metadata, new_versions)
        return spot.config

    put, aput = both(_put)

    def _store_checkpoint(
        self,
        stored_in: str,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Steps[None]:
        """`stored_in`: the thread in whose rows it is stored, which is not its own during a migration."""
        spot = _Spot.of(config, checkpoint["id"])
        parent = get_checkpoint_id(config)
        metadata = get_checkpoint_metadata(config, metadata)
        values, versions = checkpoint["channel_values"], checkpoint["channel_versions"]
        header = {name: value for name, value in checkpoint.items() if name != "channel_values"}
        records = yield from self._sealer.seal(
            [
                (
                    spot.head(),
                    self._dump({"header": header, "metadata": metadata, "parent": parent, "channels": [*values]}),
                ),
                *((spot.value(channel, versions.get(channel)), self._dump(value)) for channel, value in values.items()),
            ]
        )
        sealed = {
            channel: _DeltaSnapshot(record) if isinstance(value, _DeltaSnapshot) else record
            for (channel, value), record in zip(values.items(), records[1:], strict=True)
        }
        stored = {**checkpoint, "v": max(checkpoint["v"], FORMAT_OF_CHECKPOINTS), "channel_values": sealed}
        plain = {name: value for name, value in metadata.items() if name in self._plain}
        plain[HEAD_FIELD] = b64encode(records[0]).decode("ascii")
        yield ask_inner("put", _config(stored_in, spot.namespace, parent), stored, plain, new_versions)

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> Steps[None]:
        spot = _Spot.of(config, str(get_checkpoint_id(config)))
        yield from self._store_writes(spot.thread_id, spot, writes, task_id, task_path)

    put_writes, aput_writes = both(_put_writes)

    def _store_writes(
        self, stored_in: str, spot: _Spot, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> Steps[None]:
        records = yield from self._sealer.seal(
            [
                (
                    spot.write(task_id, channel),
                    self._dump(value, WRITES_IDX_MAP.get(channel, index), task_path),
                )
                for index, (channel, value) in enumerate(writes)
            ]
        )
        sealed = [(channel, record) for (channel, _), record in zip(writes, records, strict=True)]
        where = _config(stored_in, spot.namespace, spot.checkpoint_id)
        yield ask_inner("put_writes", where, sealed, task_id, task_path)

    def _dump(self, value: object, *order: object) -> bytes:
        return msgspec.msgpack.encode((*self.serde.dumps_typed(value), *order))

    def _load(self, plaintext: bytes) -> tuple[Any, ...]:
        """The value, and for a write its order."""
        kind, data, *order = msgspec.msgpack.decode(plaintext)
        return self.serde.loads_typed((kind, data)), *order

    # --- reading ---

    def _get_tuple(self, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
        found = yield ask_inner("get_tuple", _inner_config(config))
        return None if found is None else (yield from self._open([found]))[0].found

    get_tuple, aget_tuple = both(_get_tuple)

    def _open(self, stored: Sequence[CheckpointTuple], thread_id: str | None = None) -> Steps[list[Opened]]:
        """All records of these checkpoints, with one batch. `thread_id`: their thread, if they are staged."""
        records: list[tuple[Place, object]] = []
        for found in stored:
            spot = _Spot.of(found.config, found.checkpoint["id"], thread_id)
            records += _records(spot, found)
        plaintexts = iter((yield from self._sealer.open(records)))
        return [
            self._opened(_Spot.of(found.config, found.checkpoint["id"], thread_id), found, plaintexts)
            for found in stored
        ]

    def _opened(self, spot: _Spot, found: CheckpointTuple, plaintexts: Iterator[bytes]) -> Opened:
        (head,) = self._load(next(plaintexts))
        self._check_head(spot, found, head)
        values = {channel: self._load(next(plaintexts))[0] for channel in found.checkpoint["channel_values"]}
        writes = [
            Write(task_id, channel, *self._load(next(plaintexts))) for task_id, channel, _ in found.pending_writes or ()
        ]
        writes.sort(key=lambda write: writes_sort_key(write.task_path, write.task_id, write.position))
        if len({(write.task_id, write.position) for write in writes}) < len(writes):
            raise WrongPlaceError(f"{spot.head().record}, pending writes")
        ordered = {channel: values[channel] for channel in head["channels"] if channel in values}
        return Opened(
            CheckpointTuple(
                config=spot.config,
                checkpoint=cast("Checkpoint", {**head["header"], "channel_values": ordered}),
                metadata=head["metadata"],
                parent_config=found.parent_config and _config(spot.thread_id, spot.namespace, head["parent"]),
                pending_writes=[(write.task_id, write.channel, write.value) for write in writes],
            ),
            writes,
            head["parent"],
        )

    def _check_head(self, spot: _Spot, found: CheckpointTuple, head: Mapping[str, Any]) -> None:
        """Raises WrongPlaceError unless the stored row has the id, parent, channels, versions and plain metadata that
        the head has.
        """
        stored, versions = found.checkpoint, head["header"]["channel_versions"]
        parent = get_checkpoint_id(found.parent_config) if found.parent_config else head["parent"]
        plain = {name: value for name, value in head["metadata"].items() if name in self._plain}
        stored_plain = {name: value for name, value in found.metadata.items() if name in self._plain}
        if (
            not get_checkpoint_id(found.config) == spot.checkpoint_id == head["header"]["id"]
            or parent != head["parent"]
            or set(stored["channel_values"]) != set(head["channels"])
            or any(str(stored["channel_versions"].get(name)) != str(versions.get(name)) for name in head["channels"])
            or (plain != stored_plain and _as_json(plain) != _as_json(stored_plain))
        ):
            raise WrongPlaceError(spot.head().record)

    # --- histories of delta channels ---

    def _get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Steps[Mapping[str, DeltaChannelHistory]]:
        """Follows the parents as their heads name them. The inner saver's own method gives writes without their
        checkpoint, so that nothing would show whether one comes from another branch.
        """
        if not channels:
            return {}
        chain: dict[str | None, CheckpointTuple] = {}
        missing = set(channels)
        found = yield ask_inner("get_tuple", _inner_config(config))
        if found is not None:
            chain[get_checkpoint_id(found.config)] = found
        while found is not None and found.parent_config is not None and missing:
            parent = get_checkpoint_id(found.parent_config)
            if parent in chain:
                break  # a cycle: a program put a checkpoint twice, or the database was altered
            found = yield ask_inner("get_tuple", found.parent_config)
            if found is None:
                break
            chain[parent] = found
            missing -= found.checkpoint["channel_values"].keys()
        opened = yield from self._open([*chain.values()])
        ends = {None, *(each.found.checkpoint["id"] for each in opened)}
        if opened and missing and opened[-1].parent not in ends:
            last = opened[-1].found
            raise WrongPlaceError(f"{_Spot.of(last.config, last.checkpoint['id']).head().record}: no parent")
        return {channel: _history_of(channel, opened[1:]) for channel in channels}

    get_delta_channel_history, aget_delta_channel_history = both(_get_delta_channel_history)

    # --- threads ---

    def _delete_thread(self, thread_id: str) -> Steps[list[Receipt]]:
        """Destroys the thread's keys, then deletes its rows. Gives the receipts. May be repeated after a failure."""
        receipts = yield from self._sealer.destroy(thread_name("langgraph", str(thread_id)))
        yield ask_inner("delete_thread", str(thread_id))
        return receipts

    delete_thread, adelete_thread = both(_delete_thread)  # type: ignore[assignment]  # the base gives nothing

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Steps[None]:
        """Encrypts every checkpoint of the source under the target's key."""
        found = yield ask_inner("list", {"configurable": {"thread_id": str(source_thread_id)}})
        yield from self._store(str(target_thread_id), (yield from self._open(list(found))))

    copy_thread, acopy_thread = both(_copy_thread)

    def _prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> Steps[None]:
        """As the inner saver prunes; `delete` also destroys the keys."""
        if strategy == "delete":
            for thread_id in thread_ids:
                yield from self._delete_thread(thread_id)
        else:
            yield ask_inner("prune", thread_ids, strategy=strategy)

    prune, aprune = both(_prune)

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Steps[None]:
        yield ask_inner("delete_for_runs", run_ids)

    delete_for_runs, adelete_for_runs = both(_delete_for_runs)

    def _store(self, thread_id: str, checkpoints: Sequence[Opened], stored_in: str | None = None) -> Steps[None]:
        """Seals checkpoints for a thread, parents before children. `stored_in`: as `_store_checkpoint`."""
        where = stored_in or thread_id
        for opened in sorted(checkpoints, key=lambda each: each.found.checkpoint["id"]):
            spot = _Spot.of(opened.found.config, opened.found.checkpoint["id"], thread_id)
            checkpoint = opened.found.checkpoint
            parent = _config(thread_id, spot.namespace, opened.parent)
            versions = checkpoint["channel_versions"]
            yield from self._store_checkpoint(where, parent, checkpoint, opened.found.metadata, versions)
            for task in dict.fromkeys((write.task_id, write.task_path) for write in opened.writes):
                writes = [write for write in opened.writes if (write.task_id, write.task_path) == task]
                writes.sort(key=lambda write: (write.channel in WRITES_IDX_MAP, write.position))
                pairs = [(write.channel, write.value) for write in writes]
                yield from self._store_writes(where, spot, pairs, *task)

    # --- migration ---

    def _keys_of(self, found: CheckpointTuple) -> set[str]:
        """The keys that the records of a stored checkpoint name; empty text for a record in plaintext."""
        spot = _Spot.of(found.config, found.checkpoint["id"])
        return {key_of(record) if is_sealed(record) else "" for _, record in _records(spot, found)}

    def _migrate(self, thread_id: str, keys: set[str]) -> Steps[bool]:
        """Rewrites a thread through a staging thread, unless all is under its current key. True if it did."""
        staging = thread_id + STAGING_SUFFIX
        staged = list((yield ask_inner("list", {"configurable": {"thread_id": staging}})))
        mark = _config(staging, STAGED_NAMESPACE, None)
        if not any(found.config["configurable"]["checkpoint_ns"] == STAGED_NAMESPACE for found in staged):
            if len(keys) == 1 and "" not in keys:
                kms_thread = thread_name("langgraph", thread_id)
                answer = yield ask_kms("get_or_create_dek_for_thread", kms_thread, purpose="data")
                if keys == {answer.key_id}:
                    return False
            yield ask_inner("delete_thread", staging)
            stored = list((yield ask_inner("list", {"configurable": {"thread_id": thread_id}})))
            yield from self._store(thread_id, (yield from self._open_any(stored)), stored_in=staging)
            empty = Checkpoint(
                v=FORMAT_OF_CHECKPOINTS,
                id=STAGED_NAMESPACE,
                ts="",
                channel_values={},
                channel_versions={},
                versions_seen={},
                updated_channels=None,
            )
            yield ask_inner("put", mark, empty, {}, {})
            staged = list((yield ask_inner("list", {"configurable": {"thread_id": staging}})))
        rows = [found for found in staged if found.config["configurable"]["checkpoint_ns"] != STAGED_NAMESPACE]
        opened = yield from self._open(rows, thread_id)
        yield ask_inner("delete_thread", thread_id)
        yield from self._store(thread_id, opened)
        yield ask_inner("delete_thread", staging)
        return True

    def _open_any(self, stored: Sequence[CheckpointTuple]) -> Steps[list[Opened]]:
        """Opens checkpoints that are encrypted, and takes those that are not as they are."""
        sealed = [found for found in stored if "" not in self._keys_of(found)]
        for found in stored:
            if (keys := self._keys_of(found)) != {""} and "" in keys:
                raise PlaintextRecordError(_Spot.of(found.config, found.checkpoint["id"]).head().record)
        opened = yield from self._open(sealed)
        plain = [_as_found(found) for found in stored if self._keys_of(found) == {""}]
        return [*opened, *plain]

    def migrate(self) -> int:
        """Encrypts what is stored in plaintext, and what is under a retired key, anew. Gives the number of threads that
        it rewrote. Needs that no agent writes meanwhile; after a crash, call it again before one does.
        """
        keys = _keys_by_thread((found, self._keys_of(found)) for found in self._inner.list(None))
        return sum(self._runner.run(self._migrate(thread_id, keys[thread_id])) for thread_id in sorted(keys))

    async def amigrate(self) -> int:
        """As `migrate`."""
        keys = _keys_by_thread([(found, self._keys_of(found)) async for found in self._inner.alist(None)])
        return sum([await self._runner.run_async(self._migrate(thread, keys[thread])) for thread in sorted(keys)])

    # --- listings ---

    def _query(self, config: RunnableConfig | None, filter_by: Mapping[str, Any] | None) -> dict[str, Any]:
        if sealed := sorted(set(filter_by or ()) - self._plain):
            raise NotSearchableError(f"metadata that is encrypted can't be filtered by: {', '.join(sealed)}")
        return {"config": None if config is None else _inner_config(config), "filter": filter_by}

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        found = iter(self._inner.list(**self._query(config, filter), before=before, limit=limit))
        while page := [*islice(found, PAGE_CHECKPOINTS)]:
            for opened in self._runner.run(self._open(page)):
                yield opened.found

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        page: list[CheckpointTuple] = []
        async for found in self._inner.alist(**self._query(config, filter), before=before, limit=limit):
            page.append(found)
            if len(page) == PAGE_CHECKPOINTS:
                for opened in await self._runner.run_async(self._open(page)):
                    yield opened.found
                page.clear()
        for opened in await self._runner.run_async(self._open(page)):
            yield opened.found


def _config(thread_id: str, namespace: str, checkpoint_id: str | None) -> RunnableConfig:
    named = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": namespace, **named}}


def _inner_config(config: RunnableConfig) -> RunnableConfig:
    """The ids alone: a saver stores other members of a config, which may hold what a user typed."""
    given = config["configurable"]
    named = {name: given[name] for name in ("checkpoint_ns", "checkpoint_id") if given.get(name) is not None}
    return {"configurable": {"thread_id": str(given["thread_id"]), **named}}


def _records(spot: _Spot, found: CheckpointTuple) -> list[tuple[Place, object]]:
    """The records of a stored checkpoint with their places: head, values, writes."""
    versions = found.checkpoint["channel_versions"]
    values = found.checkpoint["channel_values"].items()
    head = found.metadata.get(HEAD_FIELD)
    return [
        (spot.head(), _decoded(head)),
        *(
            (spot.value(name, versions.get(name)), v.value if isinstance(v, _DeltaSnapshot) else v)
            for name, v in values
        ),
        *((spot.write(task_id, channel), value) for task_id, channel, value in found.pending_writes or ()),
    ]


def _as_json(plain: Mapping[str, Any]) -> Any:
    """Plain metadata as a database gives it that stores JSON."""
    return json.loads(json.dumps(plain, default=str))


def _decoded(head: object) -> object:
    """The record of a head, or what was there in its place."""
    try:
        return b64decode(head, validate=True) if isinstance(head, str) else head
    except (binascii.Error, ValueError):
        return head


def _history_of(channel: str, ancestors: Sequence[Opened]) -> DeltaChannelHistory:
    """The writes to a channel from its last stored value on, oldest first. `ancestors`: nearest first."""
    writes: list[PendingWrite] = []
    for ancestor in ancestors:
        writes[:0] = [write for write in ancestor.found.pending_writes or () if write[1] == channel]
        values = ancestor.found.checkpoint["channel_values"]
        if channel in values:
            return {"writes": writes, "seed": values[channel]}
    return {"writes": writes}


def _as_found(found: CheckpointTuple) -> Opened:
    """A checkpoint that was stored in plaintext. The order of its writes becomes their task path: no saver gives the
    one that was stored.
    """
    tasks: dict[str, int] = {}
    writes: list[Write] = []
    for index, (task_id, channel, value) in enumerate(found.pending_writes or ()):
        order = tasks.setdefault(task_id, len(tasks))
        writes.append(Write(task_id, channel, value, WRITES_IDX_MAP.get(channel, index), f"{order:08}"))
    return Opened(found, writes, get_checkpoint_id(found.parent_config) if found.parent_config else None)


def _keys_by_thread(found: Iterable[tuple[CheckpointTuple, set[str]]]) -> dict[str, set[str]]:
    """The keys that the records of each thread name. A thread that a migration left staged is named too."""
    keys: dict[str, set[str]] = {}
    for each, named in found:
        thread_id = str(each.config["configurable"]["thread_id"])
        staged = thread_id.endswith(STAGING_SUFFIX)
        keys.setdefault(thread_id.removesuffix(STAGING_SUFFIX), set()).update(set() if staged else named)
    return keys
