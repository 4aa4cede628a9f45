"""Records: what they are bound to, values of every size, a key that changes during a call, and the two clients."""

import asyncio
import hashlib
import uuid
from typing import Any

import pytest

from minikms import AsyncClient, Client, KmsUnavailableError
from minikms_adapters import AdapterError, DestroyedRecordError, PlaintextRecordError, WrongPlaceError, records
from minikms_adapters.records import Place, RecordSealer, StepRunner, thread_name
from tests.harness.live_daemon import LiveDaemon


@pytest.fixture
def place() -> Place:
    return Place(thread_name("test", str(uuid.uuid4())), ("kind", "a", "b"), "record 1")


class Counting:
    """A client that counts the calls of each method."""

    def __init__(self, kms: Client) -> None:
        self._kms = kms
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self._kms, name)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("thread-1",), "test.thread-1"),
        (("a.b",), "test.a.b"),
        (("a", "b"), "test.a.b"),
        (("a.b", "c"), "test.sha256-"),
        (("Zoë",), "test.sha256-"),
        (("x" * 101,), "test.sha256-"),
        (("",), "test.sha256-"),
        (("sha256-aa",), "test.sha256-"),
    ],
)
def test_a_thread_has_a_readable_name_or_a_hash(parts: tuple[str, ...], name: str) -> None:
    found = thread_name("test", *parts)
    if "sha256-" in name:
        assert found.startswith("test.sha256-")
        assert len(found) == len("test.sha256-") + 64
    else:
        assert found == name


def test_the_associated_data_is_that_of_the_specification(kms: Client) -> None:
    """The vector of docs/spec/adapters.md, and what the key service itself takes it for."""
    place = Place("test.t", ("kind", ""), "")
    joined = b"\0\0\0\0\0\0\0\x06test.t" + b"\0\0\0\0\0\0\0\x04kind" + b"\0\0\0\0\0\0\0\0"
    bound = b"minikms-adapters 1\0" + hashlib.sha256(joined).digest()
    assert bound.hex().endswith("a6dd1db675c0d9cb31a28545682c386462d3670c12ed8b240b1ca6dbd42b95d0")
    [record] = StepRunner(kms).run(RecordSealer().seal([(place, b"text")]))
    assert record[:4] == b"mKr1"
    key_id, ciphertext = record[4:32].decode(), record[32:]
    aad = bound + b"\0\0\0\0" + b"\1"
    assert kms.decrypt(key_id, ciphertext, aad=aad, thread_id="test.t") == b"text"


@pytest.mark.parametrize("size", [0, 1, records.PIECE_BYTES_MAX, records.PIECE_BYTES_MAX + 1, 9 * 1024 * 1024])
def test_a_value_of_any_size_comes_back(kms: Client, place: Place, size: int) -> None:
    sealer, runner = RecordSealer(), StepRunner(kms)
    value = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    [record] = runner.run(sealer.seal([(place, value)]))
    assert runner.run(sealer.open([(place, record)])) == [value]


def test_the_pieces_of_a_value_can_be_neither_swapped_nor_cut_off(kms: Client, place: Place) -> None:
    sealer, runner = RecordSealer(), StepRunner(kms)
    [record] = runner.run(sealer.seal([(place, bytes(2 * records.PIECE_BYTES_MAX))]))
    head, first, second = (
        record[: records.HEAD_BYTES],
        record[records.HEAD_BYTES : records.HEAD_BYTES + records.SEALED_PIECE_BYTES_MAX],
        record[records.HEAD_BYTES + records.SEALED_PIECE_BYTES_MAX :],
    )
    for altered in (head + second + first, head + first, head + first + second + second, record[:-1]):
        with pytest.raises(WrongPlaceError, match="record 1"):
            runner.run(sealer.open([(place, altered)]))


@pytest.mark.parametrize("stored", ["text", None, b"", b"plaintext", records.MAGIC + b"short", 7])
def test_what_is_not_a_record_is_an_error(kms: Client, place: Place, stored: object) -> None:
    with pytest.raises(PlaintextRecordError, match="record 1"):
        StepRunner(kms).run(RecordSealer().open([(place, stored)]))


def test_a_record_opens_in_its_thread_and_place_only(kms: Client, place: Place) -> None:
    sealer, runner = RecordSealer(), StepRunner(kms)
    [record] = runner.run(sealer.seal([(place, b"text")]))
    others = [
        place._replace(thread=place.thread + "x"),
        place._replace(parts=("kind", "a", "c")),
        place._replace(parts=("kind", "ab", "")),
        place._replace(parts=("kind", "a", "b", "")),
    ]
    for other in others:
        with pytest.raises(WrongPlaceError):
            runner.run(sealer.open([(other, record)]))
    unknown = records.MAGIC + b"k_" + b"0" * 26 + record[records.HEAD_BYTES :]
    for altered in (unknown, records.MAGIC + b"?" * 28 + record[records.HEAD_BYTES :]):
        with pytest.raises(WrongPlaceError):
            runner.run(sealer.open([(place, altered)]))


def test_a_key_that_was_replaced_is_not_used_again(kms: Client, place: Place) -> None:
    sealer, counting = RecordSealer(), Counting(kms)
    runner = StepRunner(counting)  # type: ignore[arg-type]  # it has the methods of a client
    [first] = runner.run(sealer.seal([(place, b"1")]))
    created = kms.create_dek_for_thread(place.thread, replaces=records.key_of(first), purpose="data")
    [second] = runner.run(sealer.seal([(place, b"2")]))
    assert records.key_of(second) == created.key_id
    assert runner.run(sealer.open([(place, first), (place, second)])) == [b"1", b"2"]
    assert counting.calls == [
        *("get_or_create_dek_for_thread", "encrypt_batch"),
        *("encrypt_batch", "get_or_create_dek_for_thread", "encrypt_batch"),
        "decrypt_batch",
    ]


def test_destroyed_keys_give_receipts_and_their_records_an_error(kms: Client, place: Place) -> None:
    sealer, runner = RecordSealer(), StepRunner(kms)
    [first] = runner.run(sealer.seal([(place, b"1")]))
    kms.create_dek_for_thread(place.thread, replaces=records.key_of(first), purpose="data")
    [second] = runner.run(sealer.seal([(place, b"2")]))
    receipts = runner.run(sealer.destroy(place.thread))
    assert {receipt.key_id for receipt in receipts} == {records.key_of(first), records.key_of(second)}
    assert {receipt.state for receipt in receipts} == {"destroyed"}
    for record in (first, second):
        with pytest.raises(DestroyedRecordError, match="record 1"):
            runner.run(sealer.open([(place, record)]))
    assert runner.run(sealer.destroy(place.thread)) == []
    [third] = runner.run(sealer.seal([(place, b"3")]))
    assert runner.run(sealer.open([(place, third)])) == [b"3"]


def test_a_blocking_method_refuses_an_asyncio_client(daemon: LiveDaemon, place: Place) -> None:
    async def use() -> bytes:
        async with AsyncClient(daemon.socket) as kms:
            sealer, runner = RecordSealer(), StepRunner(kms)
            with pytest.raises(AdapterError, match="blocking client"):
                runner.run(sealer.seal([(place, b"text")]))
            [record] = await runner.run_async(sealer.seal([(place, b"text")]))
            return (await runner.run_async(sealer.open([(place, record)])))[0]

    assert asyncio.run(use()) == b"text"


def test_a_failure_of_the_key_service_stays_its_own_error(daemon: LiveDaemon, place: Place) -> None:
    with Client(str(daemon.socket) + "-absent", wait_s=0) as absent, pytest.raises(KmsUnavailableError):
        StepRunner(absent).run(RecordSealer().seal([(place, b"text")]))
