"""Long-term memory: the results of the inner store, what is refused, and the key of a namespace."""

import asyncio
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import BaseStore, GetOp, InvalidNamespaceError, Op, PutOp, Result
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import SqliteStore

from minikms import AsyncClient, Client
from minikms_adapters import DestroyedRecordError, NotSearchableError, PlaintextRecordError, WrongPlaceError
from minikms_adapters.langgraph import EncryptedStore
from minikms_adapters.records import Place, RecordSealer, StepRunner, as_json
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_adapters.test_records import Counting

TYPED = "allergic to penicillin"


@pytest.fixture
def user() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def sqlite(file: Path) -> Iterator[SqliteStore]:
    with SqliteStore.from_conn_string(str(file)) as store:
        store.setup()
        yield store


def plain(item: Any) -> Any:
    return None if item is None else (item.namespace, item.key, item.value)


def test_results_are_those_of_the_inner_store(sqlite: SqliteStore, kms: Client, user: str) -> None:
    def use(store: BaseStore) -> list[Any]:
        for number in range(3):
            store.put(("memories", user), f"{number}", {"note": TYPED, "number": number})
        store.put(("memories", user, "deep"), "k", {"ünï": ["cödé", None, 1.5]})
        store.delete(("memories", user), "1")
        found = [plain(store.get(("memories", user), key)) for key in ("0", "1", "2")]
        listed = sorted(plain(item) for item in store.search(("memories", user), limit=9))
        return [found, listed, sorted(store.list_namespaces(prefix=("memories", user)))]

    assert use(EncryptedStore(sqlite, kms)) == use(InMemoryStore())


def test_a_batch_is_one_exchange_and_leaves_no_plaintext(
    sqlite: SqliteStore, kms: Client, user: str, file: Path
) -> None:
    counting = Counting(kms)
    store = EncryptedStore(sqlite, counting)  # type: ignore[arg-type]  # it has the methods of a client
    store.batch([PutOp(("memories", user), str(number), {"note": TYPED}) for number in range(20)])
    assert counting.calls == ["get_or_create_dek_for_thread", "encrypt_batch"]
    counting.calls.clear()
    assert len(store.search(("memories", user), limit=20)) == 20
    assert counting.calls == ["decrypt_batch"]
    assert TYPED.encode() not in b"".join(each.read_bytes() for each in file.parent.glob(file.name + "*"))


def test_what_is_encrypted_can_not_be_searched(sqlite: SqliteStore, kms: Client, user: str) -> None:
    store = EncryptedStore(sqlite, kms)
    searches: list[Callable[[], object]] = [
        lambda: store.search(("memories", user), query="penicillin"),
        lambda: store.search(("memories", user), filter={"note": TYPED}),
        lambda: store.put(("memories", user), "k", {"note": TYPED}, index=["note"]),
    ]
    for search in searches:
        with pytest.raises(NotSearchableError):
            search()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("UPDATE store SET value = (SELECT value FROM store WHERE key = 'b') WHERE key = 'a'", WrongPlaceError),
        ("UPDATE store SET value = (SELECT value FROM store WHERE key = 'other') WHERE key = 'a'", WrongPlaceError),
        ("UPDATE store SET value = '{\"note\": \"forged\"}' WHERE key = 'a'", PlaintextRecordError),
    ],
)
def test_a_value_of_another_place_is_an_error(
    sqlite: SqliteStore, kms: Client, user: str, file: Path, change: str, error: type[Exception]
) -> None:
    store = EncryptedStore(sqlite, kms)
    store.put(("memories", user), "a", {"note": "one"})
    store.put(("memories", user), "b", {"note": "two"})
    store.put(("memories", str(uuid.uuid4())), "other", {"note": "three"})
    with closing(sqlite3.connect(file)) as database, database:
        assert database.execute(change).rowcount == 1
    with pytest.raises(error, match=f"namespace memories.{user}, item a"):
        store.get(("memories", user), "a")
    with pytest.raises(error):
        store.search(("memories", user))


def test_half_a_surrogate_pair_is_stored_as_by_the_inner_store(kms: Client, user: str) -> None:
    for store in (InMemoryStore(), EncryptedStore(InMemoryStore(), kms)):
        store.put(("memories", user), "a", {"note": "\ud83d"})
        assert plain(store.get(("memories", user), "a"))[2] == {"note": "\ud83d"}


def test_one_part_of_a_namespace_does_not_stand_for_two(kms: Client, user: str) -> None:
    inner = InMemoryStore()
    store = EncryptedStore(inner, kms)
    store.put(("memories", user), "a", {"note": TYPED})
    dotted = (f"memories.{user}",)
    with pytest.raises(InvalidNamespaceError):
        store.delete_namespace(dotted)
    with pytest.raises(InvalidNamespaceError):
        store.batch([PutOp(dotted, "a", {"note": TYPED})])
    assert plain(store.get(("memories", user), "a"))[2] == {"note": TYPED}


def test_what_an_older_version_stored_under_a_dotted_part_is_read(kms: Client, user: str) -> None:
    inner, part = InMemoryStore(), f"memories.{user}"
    place = Place(f"store.{part}", ("langgraph", "item", "a", part), "")
    [record] = StepRunner(kms).run(RecordSealer().seal([(place, b'{"note": "old"}')]))
    inner.batch([PutOp((part,), "a", as_json(record))])
    [item] = EncryptedStore(inner, kms).batch([GetOp((part,), "a")])
    assert plain(item)[2] == {"note": "old"}


class Misleading(InMemoryStore):
    """Its answers can be set."""

    answers: list[Any] | None = None

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        return super().batch(ops) if self.answers is None else self.answers


def test_a_search_gives_no_item_of_another_namespace(kms: Client, user: str) -> None:
    """Also where the database answers with one that is intact."""
    inner = Misleading()
    store = EncryptedStore(inner, kms)
    store.put(("memories", "somebody else"), "a", {"note": "one"})
    stolen = inner.search(("memories", "somebody else"))
    inner.answers = [stolen]
    with pytest.raises(WrongPlaceError, match="somebody else"):
        store.search(("memories", user))
    inner.answers = stolen
    with pytest.raises(WrongPlaceError, match="somebody else"):
        store.get(("memories", user), "a")


def test_a_deleted_namespace_gives_receipts_and_leaves_others(sqlite: SqliteStore, kms: Client, user: str) -> None:
    store = EncryptedStore(sqlite, kms)
    for number in range(150):
        store.put(("memories", user), str(number), {"number": number})
    store.put(("memories", user, "deep"), "kept", {"note": "kept"})
    row = sqlite.get(("memories", user), "7")
    assert row is not None
    [receipt] = store.delete_namespace(("memories", user))
    assert receipt.state == "destroyed"
    assert [plain(item)[1:] for item in store.search(("memories", user))] == [("kept", {"note": "kept"})]
    sqlite.put(row.namespace, row.key, row.value)
    with pytest.raises(DestroyedRecordError, match="item 7"):
        store.get(row.namespace, row.key)


def test_an_asyncio_client_works_too(daemon: LiveDaemon, user: str) -> None:
    async def use() -> Any:
        async with AsyncClient(daemon.socket) as kms:
            store = EncryptedStore(InMemoryStore(), kms)
            await store.aput(("memories", user), "a", {"note": TYPED})
            found = plain(await store.aget(("memories", user), "a"))
            await store.adelete_namespace(("memories", user))
            return found, await store.aget(("memories", user), "a")

    assert asyncio.run(use()) == ((("memories", user), "a", {"note": TYPED}), None)
