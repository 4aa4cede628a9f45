"""`progressdb check`: walks the whole store and names what is wrong; `repair` rebuilds what can be rebuilt.

The rules, each with the kind of its finding:
- unknown: a key that belongs to no space of store/keyspace.py, or is malformed within its space;
- damaged: a record or an index value that this version can't parse;
- unreadable: a record that its key does not open, or whose sealed part contradicts its header or its place: it was
  altered or moved, or its key is gone;
- orphaned: a record, map or index entry of a thread that has no metadata;
- keyless: a thread without a key map, or whose mapped key the key service does not have;
- unindexed: a record that no index entry leads to;
- dangling: an index entry, or a thread's last stamp in a database, that leads to nothing, or not to the newest version;
- miscounted: a counter that differs from what was counted, or a last stamp that is older than a record's;
- lost: a part of a file of RocksDB that can't be read, and each entry that it seems to hold.

Invariants: records are the truth and are never changed here; a fix only puts or deletes index entries and counters,
all of which follow from records, and deletes damaged entries of retries (`store.idempotency`), which nothing can
rebuild. What a rule can't look up, because a file is damaged there, is no finding. A damaged store is repaired only as
`store.rocks.salvage.rebuild` makes another one of it. Memory is bounded: the walk reads chunks, and what their rules
look up is read together up to a bound.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Generator, Sequence
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsError, KmsRefusedError
from minikms.client import DecryptItem
from progressdb_server.kms.provider import Provider
from progressdb_server.store import keyspace, places, record
from progressdb_server.store.engine import Counters
from progressdb_server.store.epoch import SeenState as KeyService
from progressdb_server.store.idempotency import IdempotencyRecord
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import RecordUnreadableError, StoreDamagedError, StoreUnavailableError, shown
from progressdb_server.store.offline import WALK_BYTES_MAX, Entries, Lost, View

CHUNK_ENTRIES: Final = 500
REPAIR_PASSES_MAX: Final = 4
"""An index that is rebuilt from another one is right in the pass after that other one."""

AS_THE_SERVER: Final = (
    "run it as the server's user, with the group of the socket: runuser -u progressdb -g progressdb -G minikms -- "
    "progressdb check"
)
MAY_NOT_DECRYPT: Final = (
    "the key service does not let this user decrypt, so no record was examined: give this user the role decrypt for "
    f"the time of the check, or {AS_THE_SERVER}"
)

ParseJob: TypeAlias = Callable[[str, bytes], object]
"""A function that parses a job's id and row; it raises RecordUnreadableError."""
JOB_DAMAGED: Final = (
    "the job does not go on, and no old key is destroyed; restore the entry from a backup, or delete it"
)

Kind = Literal["unknown", "damaged", "unreadable", "orphaned", "keyless", "unindexed", "dangling", "miscounted", "lost"]

_OTHER_SPACES: Final = (keyspace.MIGRATED, keyspace.BACKUPS, keyspace.CLAIMS, keyspace.SERVERS)
"""Counted, not checked."""

_THREAD_INDEXES: Final = {
    keyspace.CREATED: (4, 3),
    keyspace.AUTHOR: (5, 4),
    keyspace.WRITER: (4, 2),
    keyspace.CLOSED: (3, 2),
}
"""The number of parts in the keys of each index, and which part is the thread."""


Put: TypeAlias = tuple[bytes, bytes | None]


class Problem(NamedTuple):
    """`fix`: the puts that repair it, empty if nothing can."""

    kind: Kind
    key: str
    detail: str
    fix: tuple[Put, ...] = ()


class _Reporter(Protocol):
    """Reports a problem of the entry that a rule judges, with the puts that repair it."""

    def __call__(self, kind: Kind, detail: str, *fix: Put) -> None: ...


class _Lookup(NamedTuple):
    """What a rule awaits: the value at a key or, with `newest`, the last key that begins so. `Checker._judge_all`
    reads it, no event loop."""

    key: bytes
    newest: bool = False

    def __await__(self) -> Generator[_Lookup, bytes | None, bytes | None]:
        return (yield self)


_Answer: TypeAlias = bytes | StoreDamagedError | None


class Checker:
    """One walk. `counts` is how many entries of each space were seen."""

    def __init__(self, view: View, provider: Provider | None, parse_job: ParseJob | None = None) -> None:
        """Without a provider nothing is decrypted and no key is looked up; without `parse_job` no row is examined."""
        self._view = view
        self._parse_job = parse_job
        self._provider = provider
        self.counts: Counter[str] = Counter()
        self._newest = Stamp(0, 0)
        """The highest stamp of a record. A later record must get a higher one."""
        self._judges = {
            keyspace.THREAD: self._judge_record,
            keyspace.VERSION: self._judge_version,
            keyspace.ORDER: self._judge_order,
            keyspace.INDEX: self._judge_thread_index,
            keyspace.MAP: self._judge_map,
            keyspace.IDEMPOTENCY: self._judge_retry,
            keyspace.JOBS: self._judge_job,
        }
        """The rules of each space; the order index is looked for before other indexes."""

    async def run(self) -> AsyncIterator[Problem]:
        async for page in self._view.walk():
            for start in range(0, len(page), CHUNK_ENTRIES):
                chunk = page[start : start + CHUNK_ENTRIES]
                for finding in await self._judge_all(chunk) + await self._open(chunk):
                    yield finding
        for judge in (self._judge_heads, self._judge_counters):
            async for finding in judge():
                yield finding

    async def _judge_all(self, chunk: Sequence[tuple[bytes, bytes]]) -> list[Problem]:
        """The rules of all entries side by side, so that a round trip answers what they look up at a time."""
        findings: list[list[Problem]] = [[] for _ in chunk]
        passes = [self._judge(*entry, into) for entry, into in zip(chunk, findings, strict=True)]
        ready: dict[Coroutine[_Lookup, bytes | None, None], _Answer] = dict.fromkeys(passes)
        waiting: dict[Coroutine[_Lookup, bytes | None, None], _Lookup] = {}
        try:
            while ready:
                for judging, answer in ready.items():
                    with contextlib.suppress(StopIteration):
                        if isinstance(answer, StoreDamagedError):
                            judging.throw(answer)  # that entry's rules end there
                        else:
                            waiting[judging] = judging.send(answer)
                answers = await self._answers(dict.fromkeys(waiting.values()))
                ready = {judging: answers[lookup] for judging, lookup in waiting.items() if lookup in answers}
                waiting = {judging: lookup for judging, lookup in waiting.items() if lookup not in answers}
        finally:
            for judging in passes:
                judging.close()
        return [finding for of_entry in findings for finding in of_entry]

    async def _answers(self, lookups: Collection[_Lookup]) -> dict[_Lookup, _Answer]:
        """The answers to at least one look-up; no more once the values together have WALK_BYTES_MAX."""
        try:
            return await self._answered(lookups)
        except StoreDamagedError as error:
            if len(lookups) == 1:
                return dict.fromkeys(lookups, error)
        answers: dict[_Lookup, _Answer] = {}
        size = 0
        for lookup in lookups:
            answers |= await self._answers([lookup])
            size += len(answer) if isinstance(answer := answers[lookup], bytes) else 0
            if size >= WALK_BYTES_MAX:
                break
        return answers

    async def _answered(self, lookups: Collection[_Lookup]) -> dict[_Lookup, _Answer]:
        prefixes = [lookup for lookup in lookups if lookup.newest]
        keys = [lookup.key for lookup in lookups if not lookup.newest]
        newest = await self._view.newest([lookup.key for lookup in prefixes])
        answers: dict[_Lookup, _Answer] = dict(zip(prefixes, newest, strict=True))
        values = await self._view.values(keys, bytes_max=WALK_BYTES_MAX)
        if sum(map(len, values.values())) >= WALK_BYTES_MAX:
            keys = keys[: keys.index(next(reversed(values))) + 1]
        return answers | {_Lookup(key): values.get(key) for key in keys}

    async def _judge(self, key: bytes, value: bytes, findings: list[Problem]) -> None:
        def report(kind: Kind, detail: str, *fix: Put) -> None:
            findings.append(Problem(kind, shown(key), detail, fix))

        judge = next((judge for space, judge in self._judges.items() if key.startswith(space)), None)
        try:
            if judge is not None:
                await judge(key, value, report)
            elif key.startswith(_OTHER_SPACES):
                self.counts["other"] += 1
            elif key == keyspace.EPOCH:
                msgspec.json.decode(value, type=KeyService)
            elif key not in (keyspace.FORMAT, keyspace.STATE, keyspace.CLOCK):
                report("unknown", "the key belongs to no space of the store")
        except (*UNDECODABLE, record.RecordFormatError) as error:
            report("damaged", str(error))
        except StoreDamagedError:
            pass

    async def _judge_retry(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["idempotency"] += 1
        try:
            IdempotencyRecord.parse(key, value)
        except RecordUnreadableError:
            report("damaged", "a retried create is refused by it", (key, None))

    async def _judge_job(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["other"] += 1
        try:
            if self._parse_job is not None:
                self._parse_job(shown(key[len(keyspace.JOBS) :]), value)
        except RecordUnreadableError as error:
            report("damaged", f"{error}: {JOB_DAMAGED}")

    # --- records --------------------------------------------------------------------------------------------------
    async def _judge_record(self, key: bytes, value: bytes, report: _Reporter) -> None:
        match key.split(b":"):
            case [_, thread, b"meta"]:
                self.counts["threads"] += 1
                await self._judge_meta(value, keyspace.unpart(thread), report)
            case [_, thread, b"msg", stamp]:
                self.counts["messages"] += 1
                await self._judge_message(key, value, keyspace.unpart(thread), Stamp.parse(stamp.decode()), report)
            case _:
                report("unknown", "the key is no record's")

    async def _judge_meta(self, value: bytes, thread: str, report: _Reporter) -> None:
        header, _ = record.unpack_thread(value)
        self._newest = max(self._newest, Stamp.parse(header.created))
        key_map = keyspace.key_map(thread)
        if await _Lookup(key_map) is None:
            report("keyless", "the thread has no key map", (key_map, header.key_id.encode()))
        entry = keyspace.creation(Stamp.parse(header.created), thread)
        wanted = [
            keyspace.CREATED + entry,
            keyspace.author_threads(header.author) + entry,
            keyspace.writer(thread, header.author),
        ]
        if header.deleted_ns:
            wanted.append(keyspace.closed_key(thread))
        await self._judge_indexed([(index, b"") for index in wanted], report)

    async def _judge_message(self, key: bytes, value: bytes, thread: str, stamp: Stamp, report: _Reporter) -> None:
        header, _ = record.unpack_message(value)
        self._newest = max(self._newest, stamp)
        first = Stamp.parse(header.first) if header.first else stamp
        own = stamp.text.encode()
        if await _Lookup(keyspace.meta(thread)) is None:
            report("orphaned", "the record's thread has no metadata")
        if isinstance(header, record.LaterHeader) and header.content:
            await self._judge_content(key, header, report)
        wanted = [
            (keyspace.versions(keyspace.message_id(first)) + own, keyspace.part(thread)),
            (keyspace.writer(thread, header.author), b""),
        ]
        entry = await _Lookup(wanted[1][0])
        if entry is not None or (header.deleted and first == stamp):
            # A removed author, or the event of a thread's deletion, whose author may not have written in it
            wanted.pop()
        await self._judge_indexed(wanted, report)
        place = keyspace.order(thread) + first.text.encode()
        order = await _Lookup(place)
        if order is None or keyspace.latest(first.raw, order) < own:
            fix = keyspace.place(own, is_first=first == stamp, deleted=header.deleted)
            report("unindexed", "the order index does not lead to this version", (place, fix))

    async def _judge_content(self, key: bytes, header: record.LaterHeader, report: _Reporter) -> None:
        """The problems of a version that takes its content from another one."""
        stamp = Stamp.parse(header.content)
        place = key[: -keyspace.STAMP_BYTES] + stamp.raw
        raw = await _Lookup(place)
        content = record.unpack_message(raw)[0] if raw is not None else None
        is_of_another = content is None or (content.first or stamp.text) != header.first
        if is_of_another or (isinstance(content, record.LaterHeader) and content.content):
            report("damaged", f"its content is missing: {shown(place)} does not have it")

    async def _judge_indexed(self, entries: list[tuple[bytes, bytes]], report: _Reporter) -> None:
        for index, expected in entries:
            if await _Lookup(index) != expected:
                report("unindexed", f"{shown(index)} does not lead to it", (index, expected))

    async def _open(self, chunk: Sequence[tuple[bytes, bytes]]) -> list[Problem]:
        """Decrypts the records among the entries; what can't be parsed was reported before."""
        if self._provider is None:
            return []
        records = _items(chunk)
        wanted = [item for item, _ in records]
        with contextlib.suppress(StoreDamagedError):
            wanted += await self._key_probes(wanted)
        answers = await _decrypted(self._provider, wanted)
        findings: list[Problem] = []
        for (item, raw), answer in zip(records, answers, strict=False):
            problem = _judge_opened(item, raw, answer)
            if problem is not None:
                findings.append(problem)
        for item, answer in zip(wanted[len(records) :], answers[len(records) :], strict=True):
            if not isinstance(answer, KmsRefusedError) or answer.code != api.CODE_DECRYPTION_FAILED:
                code = answer.code if isinstance(answer, KmsRefusedError) else "it opened"
                findings.append(Problem("keyless", shown(item.aad), f"the mapped key {item.key_id}: {code}"))
        return findings

    async def _key_probes(self, records: list[DecryptItem]) -> list[DecryptItem]:
        """For threads whose metadata is not under the mapped key: a ciphertext that no key opens. The code of its
        refusal shows whether the mapped key exists."""
        probes: list[DecryptItem] = []
        maps = {keyspace.key_map(item.thread_id or ""): item for item in records if item.aad.endswith(b":meta")}
        for map_key, raw in (await self._view.values(maps)).items():
            item, mapped = maps[map_key], _key_id(raw)
            if mapped is not None and mapped != item.key_id:
                probe = DecryptItem(
                    key_id=mapped, ciphertext=bytes(api.SEAL_BYTES), aad=map_key, thread_id=item.thread_id
                )
                probes.append(probe)
        return probes

    # --- indexes --------------------------------------------------------------------------------------------------
    async def _judge_version(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["versions"] += 1
        message, stamp = key[len(keyspace.VERSION) :].split(b":")
        first = keyspace.parse_message_id(message.decode())
        target = keyspace.message_of(value, stamp)
        raw = await _Lookup(target)
        header = record.unpack_message(raw)[0] if raw is not None else None
        if header is None or first is None or (header.first or stamp.decode()) != first.text:
            report("dangling", f"{shown(target)} is no version of it", (key, None))

    async def _judge_order(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["order"] += 1
        thread, first = (part for part in key[len(keyspace.ORDER) :].split(b":"))
        versions = keyspace.versions(keyspace.message_id(Stamp.parse(first.decode())))
        newest = await _Lookup(versions, newest=True)
        if newest is None:
            if await _Lookup(keyspace.message_of(thread, first)) is None:
                report("dangling", "the message has no version", (key, None))
            return  # else the record's own rule rebuilds its version entry first
        stamp = newest[len(versions) :]
        raw = await _Lookup(keyspace.message_of(thread, stamp))
        if raw is None:
            return  # the version entry dangles, which is reported there; the next pass sees the one before it
        deleted = record.unpack_message(raw)[0].deleted
        expected = keyspace.place(stamp, is_first=stamp == first, deleted=deleted)
        if value != expected:
            report("dangling", "it does not lead to the newest version", (key, expected))

    async def _judge_thread_index(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["indexes"] += 1
        parts = key.split(b":")
        space = b":".join(parts[:2]) + b":"
        length, at = _THREAD_INDEXES.get(space, (0, 0))
        if len(parts) != length:
            report("unknown", "the key is no index entry")
            return
        raw = await _Lookup(keyspace.meta_of(parts[at]))
        if raw is None:
            report("dangling", "the thread has no metadata", (key, None))
        elif space == keyspace.CLOSED and not record.unpack_thread(raw)[0].deleted_ns:
            report("dangling", "the thread is not deleted", (key, None))
        elif space == keyspace.WRITER and value not in (keyspace.MEMBER, keyspace.REMOVED):
            fix = (key, keyspace.REMOVED)  # the author of a damaged entry counts as removed until added again
            report("damaged", "the entry says neither member nor removed", fix)

    async def _judge_map(self, key: bytes, value: bytes, report: _Reporter) -> None:
        self.counts["maps"] += 1
        if _key_id(value) is None:
            report("damaged", "the map does not hold the id of a key")
        if await _Lookup(keyspace.meta_of(key[len(keyspace.MAP) :])) is None:
            report("orphaned", "the mapped thread has no metadata")

    async def _judge_heads(self) -> AsyncIterator[Problem]:
        async for heads in self._view.heads():
            for head in heads:
                if head.last != head.newest:
                    key = keyspace.HEADS + head.thread_part
                    has = "no row" if head.last is None else f"the last stamp {shown(head.last)!r}"
                    detail = f"the thread has {has}, its newest version has {shown(head.newest)!r}"
                    yield Problem("dangling", shown(key), detail, ((key, head.newest),))

    async def _judge_counters(self) -> AsyncIterator[Problem]:
        threads, messages = self.counts["threads"], self.counts["messages"]
        try:
            raw = await self._view.get(keyspace.STATE)
            state = msgspec.msgpack.decode(raw, type=Counters) if raw else Counters()
        except StoreDamagedError:
            return
        except UNDECODABLE as error:
            fixed = msgspec.msgpack.encode(Counters.of(threads, messages, self._newest))
            yield Problem("miscounted", shown(keyspace.STATE), f"damaged: {error}", ((keyspace.STATE, fixed),))
            return
        if (state.threads, state.messages) != (threads, messages) or state.last < self._newest:
            fixed = msgspec.msgpack.encode(Counters.of(threads, messages, max(state.last, self._newest)))
            counted = f"{state.threads} threads and {state.messages} messages stored, {threads} and {messages} counted"
            older = "the last stamp is older than a record's"
            detail = counted if state.last >= self._newest else older
            yield Problem("miscounted", shown(keyspace.STATE), detail, ((keyspace.STATE, fixed),))


class Report(NamedTuple):
    """`counts`: entries of each space. `opened`: whether a key service was there to decrypt the records."""

    findings: list[Problem]
    counts: dict[str, int]
    opened: bool


async def check(place: str, provider: Provider | None, parse_job: ParseJob | None) -> Report:
    """Walk the store at `place`, a path or the URL of a database, also beside servers that have it open; its records
    are decrypted if the key service answers. Of a damaged store, all that can be read. Raises FormatError, KmsError,
    StoreUnavailableError, even if this user may not decrypt."""
    provider = await _answering(provider)
    try:
        async with places.open_view(place) as view:
            return await _checked(view, provider, parse_job)
    except StoreDamagedError as error:
        salvage = places.salvage_of(place)
        if salvage is None:
            raise
        damage = error
        with salvage.open_remains(place) as remains:
            report = await _checked(remains, provider, parse_job)
            judged = [finding for finding in report.findings if finding.kind != "miscounted"]
            return report._replace(findings=[*_named(remains.lost, damage), *judged])


async def _checked(view: View, provider: Provider | None, parse_job: ParseJob | None) -> Report:
    checker = Checker(view, provider, parse_job)
    findings = [finding async for finding in checker.run()]
    return Report(findings, dict(checker.counts), provider is not None)


async def _answering(provider: Provider | None) -> Provider | None:
    if provider is not None:
        try:
            await provider.status()
        except KmsError:
            return None
    return provider


def _named(damaged: Sequence[Lost], met: StoreDamagedError) -> list[Problem]:
    """`met`: what was damage to the engine, and is a finding also if everything else can be read."""
    problems = [] if damaged else [Problem("lost", met.file or "log", str(met))]
    for lost in damaged:
        place = f"entries from {shown(lost.lower)} to {shown(lost.upper)}" if lost.upper else "some of the last writes"
        problems.append(Problem("lost", lost.file, f"the file is damaged: {place}"))
        for key, _ in lost.seen:
            problems.append(Problem("lost", shown(key), f"the entry is in the damaged part of {lost.file}"))
    return problems


async def repair_offline(
    place: str, provider: Provider | None = None, *, drop: bool = False
) -> tuple[list[Problem], list[Problem]]:
    """Repair the store at `place`, which no server has open; returns what was dropped and what was fixed. Only with
    `drop` a damaged store is replaced by what can be read of it: a record of a damaged part stays if its key opens it.
    Raises StoreLockedError, StoreDamagedError, StoreUnavailableError, FormatError."""
    try:
        return [], await _repaired(place)
    except StoreDamagedError as error:
        salvage = places.salvage_of(place)
        if not drop or salvage is None:
            raise
        damage = error
    provider = await _answering(provider)
    repaired: set[str] = set()

    async def prove(seen: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        proved = await _proved(provider, seen)
        repaired.update(shown(key) for key, _ in proved)
        return proved

    lost: list[Lost] = await salvage.rebuild(place, prove)
    dropped = [problem for problem in _named(lost, damage) if problem.key not in repaired]
    return dropped, await _repaired(place)


async def _repaired(place: str) -> list[Problem]:
    async with places.alone(place) as entries:
        return (await repair(entries))[0]


async def _proved(provider: Provider | None, seen: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The records that their keys open: what the key service opens at its place is what was sealed for it."""
    if provider is None:
        return []
    proved: list[tuple[bytes, bytes]] = []
    for start in range(0, len(seen), CHUNK_ENTRIES):
        records = _items(seen[start : start + CHUNK_ENTRIES])
        answers = await _decrypted(provider, [item for item, _ in records])
        proved += [
            (item.aad, raw)
            for (item, raw), answer in zip(records, answers, strict=True)
            if _judge_opened(item, raw, answer) is None
        ]
    return proved


async def repair(entries: Entries) -> tuple[list[Problem], list[Problem]]:
    """Applies every fix; returns what was fixed and what is left. Nobody else uses the store meanwhile."""
    fixed: list[Problem] = []
    for _ in range(REPAIR_PASSES_MAX):
        findings = [finding async for finding in Checker(entries, None).run()]
        fixable = [finding for finding in findings if finding.fix]
        if not fixable:
            break
        for start in range(0, len(fixable), CHUNK_ENTRIES):
            await entries.put([put for finding in fixable[start : start + CHUNK_ENTRIES] for put in finding.fix])
        fixed += fixable
    return fixed, [finding async for finding in Checker(entries, None).run()]


def _is_record(key: bytes) -> bool:
    return keyspace.is_version(key) or (key.startswith(keyspace.THREAD) and key.endswith(b":meta"))


def _items(entries: Sequence[tuple[bytes, bytes]]) -> list[tuple[DecryptItem, bytes]]:
    """What opens the records among the entries, beside each record that is well formed."""
    items: list[tuple[DecryptItem, bytes]] = []
    for key, raw in entries:
        if not _is_record(key):
            continue
        with contextlib.suppress(record.RecordFormatError, ValueError):
            key_id, ciphertext = record.unpack_sealed(raw)
            thread = keyspace.unpart(key.split(b":")[1])
            items.append((DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=key, thread_id=thread), raw))
    return items


async def _decrypted(provider: Provider, items: Sequence[DecryptItem]) -> list[bytes | KmsRefusedError]:
    """Decrypts the items. Raises StoreUnavailableError if this user may not decrypt: that says nothing about the
    records.
    """
    answers = await provider.decrypt_batch(items) if items else []
    if any(isinstance(answer, KmsRefusedError) and answer.code == api.CODE_FORBIDDEN for answer in answers):
        raise StoreUnavailableError(MAY_NOT_DECRYPT)
    return answers


def _judge_opened(item: DecryptItem, raw: bytes, answer: bytes | KmsRefusedError) -> Problem | None:
    if isinstance(answer, KmsRefusedError):
        return Problem("unreadable", shown(item.aad), f"its key does not open it ({answer.code})")
    thread = item.thread_id or ""
    try:
        if item.aad.endswith(b":meta"):
            header, _ = record.unpack_thread(raw)
            record.open_thread(header, thread, answer)
        else:
            version, _ = record.unpack_message(raw)
            first = version.first or item.aad[-keyspace.STAMP_BYTES :].decode()
            record.open_message(version, item.aad, thread, first, answer)
    except record.RecordFormatError as error:
        return Problem("unreadable", shown(item.aad), str(error))
    return None


def _key_id(raw: bytes) -> str | None:
    text = raw.decode("ascii", "replace")
    return text if api.THREAD_ID_PATTERN.fullmatch(text) else None  # key ids have the same characters
