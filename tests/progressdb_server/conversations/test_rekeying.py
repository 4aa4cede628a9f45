"""Chunks of a thread's records as a rotation reads them, and what it writes of a chunk."""

import contextlib
import random

import pytest

from progressdb_server.store import keyspace, record
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import RecordUnreadableError
from tests.progressdb_server.store.faulty_reads import FaultyReads
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import fill, keys_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

OLD, OTHER, NEW = "k_old", "k_two", "k_newer"
FIRST = record.pack(record.MessageHeader(OLD, "", "ann", False), b"s" * 40)
RECORDS = [
    FIRST,
    record.pack(record.MessageHeader(OLD, "", "ann", False), b""),
    record.pack(record.MessageHeader(OTHER, "", "ann", False), b"s"),
    record.pack(record.MessageHeader(OLD, "", "bob", True), FIRST),
    record.pack(record.LaterHeader(OLD, "f", "ann", False, "c"), b"s"),
    record.pack(record.MessageHeader(OLD, "", "ann", False), FIRST[:10]),
    record.pack(record.ThreadHeader(OLD, "ann", "c", 1, 0), b"t"),
]
BROKEN = [b"", b"\x00", FIRST[:2], FIRST[:-45], b"\x07" + FIRST[1:], b"\x01\x00\x01\x90", b"\x01\x00\x02\x91\x05"]


async def test_a_chunk_has_each_record_as_it_is_by_itself() -> None:
    """Whatever stands beside it: neighbours with the same header are read in a shorter way."""
    engine = MemoryEngine()
    raws = [*RECORDS * 12, *BROKEN * 6]
    random.Random(1).shuffle(raws)
    entries = [(keyspace.records("t")[0] + b"%05d" % number, raw) for number, raw in enumerate(raws)]
    async with opened(engine, SealingProvider()) as store:
        engine.write(entries)
        for count in (1, 2, 1000):
            found = [each async for chunk in store.rekeying.chunks("t", count) for each in chunk.records]
            malformed = [key async for chunk in store.rekeying.chunks("t", count) for key in chunk.malformed]
            assert malformed == [key.decode() for key, raw in entries if raw in BROKEN]
            whole = [(key, raw) for key, raw in entries if raw in RECORDS]
            assert [(each.aad, each.raw) for each in found] == whole
            assert [(each.head, each.sealed) for each in found] == [record.split(raw) for _, raw in whole]
            assert [(each.key_id, each.sealed) for each in found] == [record.unpack_sealed(raw) for _, raw in whole]


async def test_a_step_has_the_new_records_and_then_what_they_were() -> None:
    """Each in ascending order, which the engine takes faster than the two in turn."""
    engine = MemoryEngine()
    entries = [(keyspace.records("t")[0] + b"%05d" % number, raw) for number, raw in enumerate(RECORDS)]
    async with opened(engine, SealingProvider()) as store:
        engine.write(entries)
        [chunk] = [each async for each in store.rekeying.chunks("t", 100)]
        moved = [(found, b"new" + found.sealed) for found in chunk.records]
        step = store.rekeying.moves("job", NEW, moved, chunk.read_at)
        assert isinstance(step, Write)
        written, kept = step.puts[: len(RECORDS)], step.puts[len(RECORDS) :]
        assert [key for key, _ in written] == [key for key, _ in entries]
        for (_, now), raw in zip(written, RECORDS, strict=True):
            assert now is not None and record.unpack_sealed(now) == (NEW, b"new" + record.split(raw)[1])
            assert record.same_version(raw, now)
        assert list(kept) == [(keyspace.replaced_records("job") + key, raw) for key, raw in entries]
        assert list(step.read) == entries


@pytest.mark.usefixtures("both_engines")
async def test_a_record_under_a_key_is_counted_whichever_entry_is_not_found() -> None:
    """Each record alone under the key, and each entry not found in turn, by walks or by reads of single entries: the
    count is never 0."""
    async with opened() as store:
        messages = await fill(store, 3)
        await store.messages.set_reaction(messages[1].id, "bob", "+1")
        await store.messages.delete(messages[2].id, author="ann")
        entries = [key.encode() for key in await keys_of(store)]
        records = [key for key in entries if key.startswith(keyspace.records("t")[0])]
        assert len(records) == 6
        current = await store.rekeying.key_of_thread("t") or ""
        assert await store.rekeying.count_under("t", [current]) == 6
        assert await store.rekeying.count_under("t", [OLD]) == 0
        store.rekeying.reads = faulty = FaultyReads(store.reads)
        for key in records:
            raw = await store.reads.get(key) or b""
            head, sealed = record.split(raw)
            await store.writer.commit(Write([(key, record.rekey(raw[0], head, OLD) + sealed)]))
            for missed in (faulty.walked, faulty.single):
                for entry in entries:
                    missed.add(entry)
                    with contextlib.suppress(RecordUnreadableError):
                        assert await store.rekeying.count_under("t", [OLD]) > 0, (key, entry)
                    missed.clear()
            await store.writer.commit(Write([(key, raw)]))


@pytest.mark.usefixtures("both_engines")
@pytest.mark.parametrize("lost", ["message", "order", "middle version", "metadata"])
async def test_records_that_indexes_do_not_name_or_that_are_lost_raise(lost: str) -> None:
    async with opened() as store:
        messages = await fill(store, 2)
        for reaction in "+-":
            await store.messages.set_reaction(messages[1].id, "bob", reaction)
        entries = [key.encode() for key in await keys_of(store)]
        prefix, at = {
            "message": (keyspace.messages("t"), 0),
            "order": (keyspace.order("t"), 0),
            "middle version": (keyspace.versions(messages[1].id), 1),
            "metadata": (keyspace.meta("t"), 0),
        }[lost]
        gone = [key for key in entries if key.startswith(prefix)][at]
        await store.writer.commit(Write([(gone, None)]))
        with pytest.raises(RecordUnreadableError):
            await store.rekeying.count_under("t", [OLD])
