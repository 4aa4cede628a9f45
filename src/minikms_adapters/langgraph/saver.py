"""Checkpoints of LangGraph, encrypted under one key for each thread.

Owns: `EncryptedSaver`, around any saver. A checkpoint becomes several records: its *head* (metadata, channel versions,
parent, names of the channels) in one field of the metadata, each channel value, and each pending write. Invariants: a
value is bound to thread, namespace, channel and version; a head to thread, namespace and checkpoint; a write to these
and its task and channel. The head says which values and versions belong to the checkpoint, so that none can be swapped,
set back or left out. What is stored in plaintext too (ids, names and versions of channels, `PLAIN_METADATA`) comes from
the head. It must never give the inner saver a value, or the caller's config, in plaintext, and never deserialise with
the program's serializer what is not authenticated; only `migrate` does that.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
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
    empty_checkpoint,
    get_checkpoint_id,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from minikms.api.errors import KeyDestroyedError
from minikms_adapters.errors import (
    DestroyedRecordError,
    MigrationError,
    NotSearchableError,
    PlaintextRecordError,
    RecordError,
    WrongPlaceError,
)
from minikms_adapters.langgraph.rows import Spot, check_asked, closed, config_of, head_of, inner_config, records_of
from minikms_adapters.records import (
    KEYS_CACHED_MAX,
    KmsClient,
    Place,
    Receipt,
    RecordSealer,
    Step,
    StepRunner,
    Steps,
    as_json,
    ask,
    ask_inner,
    both,
    is_sealed,
    key_of,
    malformed,
    thread_name,
)

PLAIN_METADATA: Final = frozenset(
    {"source", "step", "parents", "run_id", "counters_since_delta_snapshot", "delta_writes_versioned"}
)
"""What savers read in the database to filter, to delete runs and to prune. It is made by LangGraph, never typed."""
PAGE_CHECKPOINTS: Final = 128
"""Checkpoints of a listing that are opened with one batch."""
STAGING_SUFFIX: Final = "~minikms-migration"
"""The suffix of the thread that holds the checkpoints of another one while `EncryptedSaver.migrate` rewrites that one.
"""
STAGED_NAMESPACE: Final = "minikms-migration"
"""Its checkpoint says that the staging thread is complete."""
FORMAT_OF_CHECKPOINTS: Final = 4
"""The stored `v` is at least this. With a lower one, a saver looks for sends in the parent's encrypted writes."""


class ChannelWrite(NamedTuple):
    """A pending write, with the two members that order it among those of its checkpoint."""

    task_id: str
    channel: str
    value: Any
    position: int
    task_path: str


class Opened(NamedTuple):
    """A checkpoint in plaintext. `parent` is what its head says; the stored one may be gone after a prune."""

    found: CheckpointTuple
    writes: list[ChannelWrite]
    parent: str | None

    def tasks(self) -> Iterator[tuple[tuple[str, str], list[tuple[str, Any]]]]:
        """The writes of each task, by its id and path, in the order in which they were made."""
        for task in dict.fromkeys((write.task_id, write.task_path) for write in self.writes):
            writes = [write for write in self.writes if (write.task_id, write.task_path) == task]
            writes.sort(key=lambda write: (write.channel in WRITES_IDX_MAP, write.position))
            yield task, [(write.channel, write.value) for write in writes]


class EncryptedSaver(BaseCheckpointSaver[Any]):
    """A saver around `inner`, whose database gets no plaintext of values, writes and metadata. LangGraph's interface,
    which each operation has in two forms, makes it long.

    `kms` is a `minikms.Client` or a `minikms.AsyncClient`; the blocking methods need the first. `plain_metadata` names
    further fields of the metadata that stay in plaintext, so that `list` can filter by them.

    Raises RecordError for a record that is in plaintext, was altered or moved, or whose key was destroyed.
    """

    def __init__(
        self, inner: BaseCheckpointSaver[Any], kms: KmsClient, *, plain_metadata: Collection[str] = ()
    ) -> None:
        serde = inner.serde
        super().__init__(serde=serde.serde if isinstance(serde, EncryptedSerializer) else serde)
        self._given = inner
        self._inner = closed(inner)
        self._plain = PLAIN_METADATA | set(plain_metadata)
        self._sealer = RecordSealer()
        self._runner = StepRunner(kms, self._inner, prefix="a")
        self._keys: dict[tuple[str, str, object], str] = {}  # of checkpoints that were put or read last

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
        spot = Spot.of(config, checkpoint_id=checkpoint["id"])
        metadata = get_checkpoint_metadata(config, metadata)
        opened = Opened(CheckpointTuple(spot.config, checkpoint, metadata), [], get_checkpoint_id(config))
        before = {**(metadata.get("parents") or {}), spot.namespace: opened.parent}
        records = yield from self._seal_after(spot, before, self._contents(spot, opened))
        self._remember(spot, records[0])
        yield self._ask_put(spot, opened, new_versions, iter(records))
        return spot.config

    put, aput = both(_put)

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> Steps[None]:
        spot = Spot.of(config)
        contents = self._contents_of_writes(spot, writes, task_id, task_path)
        records = yield from self._seal_after(spot, {spot.namespace: spot.checkpoint_id}, contents)
        yield _ask_put_writes(spot, writes, task_id, task_path, iter(records))

    put_writes, aput_writes = both(_put_writes)

    def _seal_after(
        self, spot: Spot, before: Mapping[str, object], contents: Sequence[tuple[Place, bytes]]
    ) -> Steps[list[bytes]]:
        """Records of a state that follows from the checkpoints `before`, by namespace. Raises DestroyedRecordError if
        the key of one of them was destroyed: a run that goes on beside a deletion would bring its thread back.
        """
        keys = {self._keys.get((spot.thread_id, *each), "") for each in before.items()} - {""}
        try:
            return (yield from self._sealer.seal(contents, after=keys))
        except KeyDestroyedError as error:
            raise DestroyedRecordError(spot.head().record) from error

    def _remember(self, spot: Spot, head: bytes) -> None:
        self._keys.pop(spot, None)  # so that it becomes the newest
        self._keys[spot] = key_of(head)
        if len(self._keys) > KEYS_CACHED_MAX:
            del self._keys[next(iter(self._keys))]

    def _contents(self, spot: Spot, opened: Opened) -> list[tuple[Place, bytes]]:
        """The places and contents of the head, the values and the writes."""
        checkpoint = opened.found.checkpoint
        values, versions = checkpoint["channel_values"], checkpoint["channel_versions"]
        header = {name: value for name, value in checkpoint.items() if name != "channel_values"}
        head = {"header": header, "metadata": opened.found.metadata, "parent": opened.parent, "channels": [*values]}
        return [
            (spot.head(), self._dump(head)),
            *((spot.value(channel, versions.get(channel)), self._dump(value)) for channel, value in values.items()),
            *(each for task, writes in opened.tasks() for each in self._contents_of_writes(spot, writes, *task)),
        ]

    def _ask_put(self, stored_at: Spot, opened: Opened, versions: ChannelVersions, records: Iterator[bytes]) -> Step:
        """Takes the records of head and values. The thread of `stored_at` is another one during a migration."""
        checkpoint = opened.found.checkpoint
        plain = {**self._plain_of(opened.found.metadata), **as_json(next(records))}
        sealed = {
            channel: _DeltaSnapshot(next(records)) if isinstance(value, _DeltaSnapshot) else next(records)
            for channel, value in checkpoint["channel_values"].items()
        }
        stored = {**checkpoint, "v": max(checkpoint["v"], FORMAT_OF_CHECKPOINTS), "channel_values": sealed}
        where = config_of(stored_at.thread_id, stored_at.namespace, opened.parent)
        return ask_inner("put", where, stored, plain, versions)

    def _plain_of(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in metadata.items() if name in self._plain}

    def _contents_of_writes(
        self, spot: Spot, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> list[tuple[Place, bytes]]:
        return [
            (spot.write(task_id, channel), self._dump(value, WRITES_IDX_MAP.get(channel, index), task_path))
            for index, (channel, value) in enumerate(writes)
        ]

    def _dump(self, value: object, *order: object) -> bytes:
        return msgspec.msgpack.encode((*self.serde.dumps_typed(value), *order))

    def _load(self, plaintext: bytes) -> tuple[Any, ...]:
        """The value, and for a write its order."""
        kind, data, *order = msgspec.msgpack.decode(plaintext)
        return self.serde.loads_typed((kind, data)), *order

    # --- reading ---

    def _get_tuple(self, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
        row = yield from self._row(config)
        if row is None:
            return None
        [opened] = yield from self._open([row])
        self._remember(Spot.of(opened.found.config), cast("bytes", head_of(row)))
        return opened.found

    get_tuple, aget_tuple = both(_get_tuple)

    def _row(self, config: RunnableConfig, of: object = None) -> Steps[CheckpointTuple | None]:
        """The stored checkpoint of a config. `of`: the saver that reads it."""
        inner = inner_config(config)
        with malformed(f"thread {inner['configurable']['thread_id']}"):
            row: CheckpointTuple | None = yield ask_inner("get_tuple", inner)._replace(of=of)
            if row is not None:
                check_asked(inner, row)
        return row

    def _open(self, stored: Sequence[CheckpointTuple], thread_id: str | None = None) -> Steps[list[Opened]]:
        """All records of these checkpoints, with one batch. `thread_id`: their thread, if they are staged."""
        others = {} if thread_id is None else {"thread_id": thread_id}
        spots = [Spot.of(row.config, **others) for row in stored]
        records: list[tuple[Place, object]] = []
        for spot, row in zip(spots, stored, strict=True):
            with malformed(spot.head().record):
                records += records_of(spot, row)
        plaintexts = iter((yield from self._sealer.open(records)))
        return [self._opened(spot, row, plaintexts) for spot, row in zip(spots, stored, strict=True)]

    def _opened(self, spot: Spot, row: CheckpointTuple, plaintexts: Iterator[bytes]) -> Opened:
        (head,) = self._load(next(plaintexts))
        self._check_head(spot, row, head)
        values = {channel: self._load(next(plaintexts))[0] for channel in row.checkpoint["channel_values"]}
        writes = [
            ChannelWrite(task_id, channel, *self._load(next(plaintexts)))
            for task_id, channel, _ in row.pending_writes or ()
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
                parent_config=row.parent_config and config_of(spot.thread_id, spot.namespace, head["parent"]),
                pending_writes=[(write.task_id, write.channel, write.value) for write in writes],
            ),
            writes,
            head["parent"],
        )

    def _check_head(self, spot: Spot, row: CheckpointTuple, head: Mapping[str, Any]) -> None:
        """Checks that the stored row has the id, parent, channels, versions and plain metadata that the head has.
        Raises WrongPlaceError.
        """
        stored, versions = row.checkpoint, head["header"]["channel_versions"]
        parent = get_checkpoint_id(row.parent_config) if row.parent_config else head["parent"]
        plain, stored_plain = self._plain_of(head["metadata"]), self._plain_of(row.metadata)
        if (
            not stored.get("id") == spot.checkpoint_id == head["header"]["id"]
            or parent != head["parent"]
            or set(stored["channel_values"]) != set(head["channels"])
            or any(str(stored["channel_versions"].get(name)) != str(versions.get(name)) for name in head["channels"])
            or (plain != stored_plain and _as_stored(plain) != _as_stored(stored_plain))
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
        row = yield from self._row(config)
        if row is not None:
            chain[get_checkpoint_id(row.config)] = row
        while row is not None and row.parent_config is not None and missing:
            spot = Spot.of(row.config, checkpoint_id=str(get_checkpoint_id(row.parent_config)))
            if spot.checkpoint_id in chain:
                break  # a cycle: a program put a checkpoint twice, or the database was altered
            row = yield from self._row(spot.config)
            if row is None:
                break
            chain[spot.checkpoint_id] = row
            with malformed(spot.head().record):
                missing -= row.checkpoint["channel_values"].keys()
        opened = yield from self._open([*chain.values()])
        ends = {None, *(each.found.checkpoint["id"] for each in opened)}
        if opened and missing and opened[-1].parent not in ends:
            raise WrongPlaceError(f"{Spot.of(opened[-1].found.config).head().record}: no parent")
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
        for page in _pages((yield from self._spots(str(source_thread_id)))):
            opened = yield from self._open((yield from self._rows(page)))
            yield from self._store(str(target_thread_id), opened)

    copy_thread, acopy_thread = both(_copy_thread)

    def _prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> Steps[None]:
        """Prunes like the inner saver; `delete` also destroys the keys."""
        if strategy == "delete":
            for thread_id in thread_ids:
                yield from self._delete_thread(thread_id)
        else:
            yield ask_inner("prune", thread_ids, strategy=strategy)

    prune, aprune = both(_prune)

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Steps[None]:
        yield ask_inner("delete_for_runs", run_ids)

    delete_for_runs, adelete_for_runs = both(_delete_for_runs)

    def _spots(self, thread_id: str) -> Steps[list[Spot]]:
        """The checkpoints of a thread, parents before children."""
        thread: RunnableConfig = {"configurable": {"thread_id": thread_id}}

        def spot(row: CheckpointTuple) -> Spot:
            check_asked(thread, row)
            return Spot.of(row.config)

        with malformed(f"thread {thread_id}"):
            spots: list[Spot] = yield ask_inner("list", thread)._replace(each=spot)
        return sorted(spots, key=lambda each: each.checkpoint_id)

    def _rows(self, page: Sequence[Spot], of: object = None) -> Steps[list[CheckpointTuple]]:
        rows = []
        for spot in page:
            row = yield from self._row(spot.config, of)
            if row is None:
                raise WrongPlaceError(spot.head().record)
            rows.append(row)
        return rows

    def _store(self, thread_id: str, page: Sequence[Opened], stored_in: str | None = None) -> Steps[None]:
        """Seals checkpoints for a thread, with one batch. `stored_in`: the thread in whose rows they are stored."""
        spots = [
            Spot.of(opened.found.config, checkpoint_id=opened.found.checkpoint["id"], thread_id=thread_id)
            for opened in page
        ]
        contents = [each for spot, opened in zip(spots, page, strict=True) for each in self._contents(spot, opened)]
        records = iter((yield from self._sealer.seal(contents)))
        for spot, opened in zip(spots, page, strict=True):
            stored_at = spot._replace(thread_id=stored_in or thread_id)
            yield self._ask_put(stored_at, opened, opened.found.checkpoint["channel_versions"], records)
            for task, writes in opened.tasks():
                yield _ask_put_writes(stored_at, writes, *task, records)

    # --- migration ---

    def _keys_of(self, row: CheckpointTuple) -> set[str]:
        """The keys that the records of a stored checkpoint name; empty text for a record in plaintext."""
        spot = Spot.of(row.config)
        with malformed(spot.head().record):
            return {key_of(record) if is_sealed(record) else "" for _, record in records_of(spot, row)}

    def _migrate(self) -> Steps[int]:
        """Encrypts what is stored in plaintext, and what is under a retired key, anew. Gives the number of threads that
        it rewrote. Needs that no agent writes meanwhile; after a crash, call it again before one does. The inner
        saver's own serializer reads the plaintext, which may run code that a writer of the database chose.

        Raises MigrationError at its end if some threads can't be read.
        """
        keys: dict[str, set[str]] = {}

        def note(row: CheckpointTuple) -> None:
            named = keys.setdefault(str(row.config["configurable"]["thread_id"]), set())
            try:
                named |= self._keys_of(row)
            except RecordError:
                named.add("")

        yield ask_inner("list", None)._replace(each=note)
        rewritten = 0
        failed: dict[str, str] = {}
        for stored_in in sorted(keys):
            thread_id = stored_in
            try:
                if stored_in.endswith(STAGING_SUFFIX) and (yield from self._is_staging(stored_in)):
                    thread_id = stored_in.removesuffix(STAGING_SUFFIX)
                    if thread_id in keys:
                        continue
                rewritten += yield from self._migrate_thread(thread_id, keys.get(thread_id, set()))
            except RecordError as error:
                failed[thread_id] = str(error)
        if failed:
            raise MigrationError(failed, rewritten)
        return rewritten

    migrate, amigrate = both(_migrate)

    def _is_staging(self, thread_id: str) -> Steps[bool]:
        """Whether each checkpoint that is stored in the thread is one that a migration of another thread staged."""
        spots = yield from self._spots(thread_id)
        if any(spot.namespace == STAGED_NAMESPACE for spot in spots):
            return True
        try:
            for page in _pages(spots):
                yield from self._open((yield from self._rows(page)), thread_id.removesuffix(STAGING_SUFFIX))
        except (PlaintextRecordError, WrongPlaceError):
            return False
        return True

    def _migrate_thread(self, thread_id: str, keys: set[str]) -> Steps[bool]:
        """Rewrites a thread through a staging thread, unless all is under its current key. True if it did."""
        staging = thread_id + STAGING_SUFFIX
        if not (yield from self._is_staging(staging)):
            raise WrongPlaceError(f"thread {staging}")
        staged = yield from self._spots(staging)
        if not any(spot.namespace == STAGED_NAMESPACE for spot in staged):
            if staged:
                yield ask_inner("delete_thread", staging)
            if len(keys) == 1 and "" not in keys:
                kms_thread = thread_name("langgraph", thread_id)
                self._sealer.forget(kms_thread)
                if keys == {(yield from self._sealer.current_key(kms_thread))}:
                    return False
            for page in _pages((yield from self._spots(thread_id))):
                opened = yield from self._open_any((yield from self._rows(page, of=self._given)))
                yield from self._store(thread_id, opened, stored_in=staging)
            marker = {**empty_checkpoint(), "v": FORMAT_OF_CHECKPOINTS, "id": STAGED_NAMESPACE}
            yield ask_inner("put", config_of(staging, STAGED_NAMESPACE, None), marker, {}, {})
            staged = yield from self._spots(staging)
        pages = [*_pages([spot for spot in staged if spot.namespace != STAGED_NAMESPACE])]
        for page in pages:  # nothing is deleted before all of it was opened
            yield from self._open((yield from self._rows(page)), thread_id)
        yield ask_inner("delete_thread", thread_id)
        for page in pages:
            yield from self._store(thread_id, (yield from self._open((yield from self._rows(page)), thread_id)))
        yield ask_inner("delete_thread", staging)
        self._keys.clear()
        return True

    def _open_any(self, stored: Sequence[CheckpointTuple]) -> Steps[list[Opened]]:
        """Opens checkpoints that are encrypted, and takes those that are not as they are."""
        named = [self._keys_of(row) for row in stored]
        for row, keys in zip(stored, named, strict=True):
            if "" in keys and keys != {""}:
                raise PlaintextRecordError(Spot.of(row.config).head().record)
        sealed = [row for row, keys in zip(stored, named, strict=True) if "" not in keys]
        opened = iter((yield from self._open(sealed)))
        return [_as_found(row) if "" in keys else next(opened) for row, keys in zip(stored, named, strict=True)]

    # --- listings ---

    def _query(self, config: RunnableConfig | None, filter_by: Mapping[str, Any] | None) -> dict[str, Any]:
        if sealed := sorted(set(filter_by or ()) - self._plain):
            raise NotSearchableError(f"metadata that is encrypted can't be filtered by: {', '.join(sealed)}")
        return {"config": None if config is None else inner_config(config), "filter": filter_by}

    def _page(self, config: RunnableConfig | None, take: Callable[..., Any], listing: object) -> Steps[list[Opened]]:
        """Opens the next checkpoints of a listing. `take`: `next`, or `anext` if it is asynchronous."""
        inner = None if config is None else inner_config(config)
        stored: list[CheckpointTuple] = []
        with malformed("a list of checkpoints"):
            while len(stored) < PAGE_CHECKPOINTS and (row := (yield ask(take, listing, None))) is not None:
                check_asked(inner, row)
                stored.append(row)
        return (yield from self._open(stored))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        listing = iter(self._inner.list(**self._query(config, filter), before=before, limit=limit))
        while page := self._runner.run(self._page(config, next, listing)):
            for opened in page:
                yield opened.found

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        listing = self._inner.alist(**self._query(config, filter), before=before, limit=limit)
        while page := await self._runner.run_async(self._page(config, anext, listing)):
            for opened in page:
                yield opened.found


def _pages(spots: Sequence[Spot]) -> Iterator[Sequence[Spot]]:
    return (spots[start : start + PAGE_CHECKPOINTS] for start in range(0, len(spots), PAGE_CHECKPOINTS))


def _ask_put_writes(
    stored_at: Spot, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str, records: Iterator[bytes]
) -> Step:
    """Takes the record of each write."""
    sealed = [(channel, next(records)) for channel, _ in writes]
    return ask_inner("put_writes", stored_at.config, sealed, task_id, task_path)


def _as_stored(plain: Mapping[str, Any]) -> Any:
    """Plain metadata as a database gives it that stores JSON."""
    return json.loads(json.dumps(plain, default=str))


def _history_of(channel: str, ancestors: Sequence[Opened]) -> DeltaChannelHistory:
    """The writes to a channel from its last stored value on, oldest first. `ancestors`: nearest first."""
    writes: list[PendingWrite] = []
    for ancestor in ancestors:
        writes[:0] = [write for write in ancestor.found.pending_writes or () if write[1] == channel]
        values = ancestor.found.checkpoint["channel_values"]
        if channel in values:
            return {"writes": writes, "seed": values[channel]}
    return {"writes": writes}


def _as_found(row: CheckpointTuple) -> Opened:
    """A checkpoint that was stored in plaintext. The order of its writes becomes their task path: no saver gives the
    one that was stored.
    """
    tasks: dict[str, int] = {}
    writes: list[ChannelWrite] = []
    for index, (task_id, channel, value) in enumerate(row.pending_writes or ()):
        order = tasks.setdefault(task_id, len(tasks))
        writes.append(ChannelWrite(task_id, channel, value, WRITES_IDX_MAP.get(channel, index), f"{order:08}"))
    return Opened(row, writes, get_checkpoint_id(row.parent_config) if row.parent_config else None)
