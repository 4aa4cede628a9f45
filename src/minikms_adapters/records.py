"""Sealed records: their format, what binds them to their place, and the calls that make and open them.

Owns: the bytes of a record (docs/spec/adapters.md), the names of the key service's threads, and the two ways of running
an adapter's method: it is written once, as a generator of steps without I/O, and `StepRunner` carries the steps out
with a blocking or an asyncio client. Invariants: the records of one call travel in one batch; a new record is sealed
under the thread's current key; a record opens only in the thread and place in which it was sealed. It must never return
what it could not open.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import functools
import hashlib
import inspect
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeGuard, TypeVar, cast
from uuid import UUID

from minikms import api
from minikms.api.errors import (
    DecryptionError,
    KeyDestroyedError,
    KeyNotFoundError,
    KeyRetiredError,
    KmsRefusedError,
    WrongThreadError,
)
from minikms.client import AsyncClient, Client, DecryptItem, EncryptItem, ReencryptItem
from minikms.client.verbs import AsyncRunner
from minikms_adapters.errors import (
    AdapterError,
    DestroyedRecordError,
    NotReadyError,
    NotSupportedError,
    PlaintextRecordError,
    RecordError,
    WrongPlaceError,
)

P = ParamSpec("P")
T = TypeVar("T")

MAGIC: Final = b"mKr1"
KEY_ID_CHARS: Final = 28
HEAD_BYTES: Final = len(MAGIC) + KEY_ID_CHARS
PIECE_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX
SEALED_PIECE_BYTES_MAX: Final = PIECE_BYTES_MAX + api.SEAL_BYTES
RECORD_BYTES_MAX: Final = 64 * PIECE_BYTES_MAX
"""The size of a plaintext: 256 MiB."""
OWNER_BYTES_MAX: Final = 1024
OWNED_MAGIC: Final = b"mKo1"
"""Begins a value with an owner: then the length of the owner's text (2 bytes), the text, and the record."""
KEYS_CACHED_MAX: Final = 4096
"""Threads whose current key an adapter remembers, and names and places that are kept."""
KEY_CHANGES_MAX: Final = 3
"""How often the key of a thread may be replaced during one call."""
JSON_FIELD: Final = "minikms"
"""The only member of a stored JSON value: the record, in base64."""
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)

KmsClient = Client | AsyncClient
Receipt = api.DestroyKeyAnswer


class Step(NamedTuple):
    """A call of the key service's client (`kms`), of the object that an adapter wraps, or of a function."""

    kms: bool
    method: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    of: object = None
    """Takes the place of the object that the adapter wraps."""
    each: Callable[[Any], Any] | None = None
    """The function for each element of an iterator: the step gives a list of its results."""


Steps = Generator[Step, Any, T]


def ask_kms(method: str, *args: Any, **kwargs: Any) -> Step:
    return Step(True, method, args, kwargs)


def ask_inner(method: str, *args: Any, **kwargs: Any) -> Step:
    return Step(False, method, args, kwargs)


def ask(function: Callable[..., Any], *args: Any) -> Step:
    return Step(False, function, args, {})


class StepRunner:
    """Carries steps out. `prefix` is what the names of the inner object's asyncio methods begin with."""

    def __init__(self, kms: KmsClient, inner: object = None, *, prefix: str = "") -> None:
        self._kms = kms
        self._inner = inner
        self._prefix = prefix
        self._blocking = not isinstance(kms, AsyncRunner)

    def run(self, steps: Steps[T]) -> T:
        """With a blocking client. Its calls are never awaited, so that the coroutine ends without an event loop."""
        if not self._blocking:
            raise AdapterError("a blocking method needs a blocking client: give it a minikms.Client")
        try:
            self._carry_out(steps, self._call).send(None)
        except StopIteration as end:
            return cast("T", end.value)
        raise AssertionError("a blocking call was awaited")

    async def run_async(self, steps: Steps[T]) -> T:
        """With either client. A blocking one works in another thread, so that it does not hold up the event loop."""
        return await self._carry_out(steps, self._call_async)

    async def _carry_out(self, steps: Steps[T], call: Callable[[Step], Coroutine[Any, Any, Any]]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    outcome = await call(step)
                except Exception as error:  # noqa: BLE001 - the steps raise it again unless they handle it
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            return cast("T", end.value)

    async def _call(self, step: Step) -> Any:
        result = self._function(step)(*step.args, **step.kwargs)
        return result if step.each is None else [step.each(element) for element in result]

    async def _call_async(self, step: Step) -> Any:
        if step.kms and self._blocking:
            return await asyncio.to_thread(self._function(step), *step.args, **step.kwargs)
        result = self._function(step, self._prefix)(*step.args, **step.kwargs)
        if step.each is not None:
            return [step.each(element) async for element in result]
        return await result if inspect.isawaitable(result) else result

    def _function(self, step: Step, prefix: str = "") -> Callable[..., Any]:
        if callable(step.method):
            return step.method
        verb = getattr(self._kms, step.method) if step.kms else getattr(step.of or self._inner, prefix + step.method)
        return cast("Callable[..., Any]", verb)


def asynchronous(
    describe: Callable[Concatenate[Any, P], Steps[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The asynchronous method of an adapter whose steps `describe` gives. The adapter has a `StepRunner` as
    `_runner`."""

    @functools.wraps(describe)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        done: T = await self._runner.run_async(describe(self, *args, **kwargs))
        return done

    return method


def both(
    describe: Callable[Concatenate[Any, P], Steps[T]],
) -> tuple[Callable[Concatenate[Any, P], T], Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]]:
    """The blocking method, and that of `asynchronous`."""

    @functools.wraps(describe)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        done: T = self._runner.run(describe(self, *args, **kwargs))
        return done

    return method, asynchronous(describe)


# --- places -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(KEYS_CACHED_MAX)
def thread_name(adapter: str, *parts: str) -> str:
    """The thread of the key service for a framework's thread, session or namespace: `adapter.part.part`. The SHA-256 of
    the parts takes their place where they are long or have other characters, or a dot in one of several.
    """
    joined = ".".join(parts)
    plain = _PLAIN_NAME.fullmatch(joined) and not joined.startswith("sha256-")
    if plain and (len(parts) == 1 or not any("." in part for part in parts)):
        return f"{adapter}.{joined}"
    return f"{adapter}.sha256-{_digest(parts).hex()}"


def _digest(parts: Sequence[str]) -> bytes:
    """SHA-256 of the parts, each with its length before it, so that no two lists have the same one."""
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join([len(text).to_bytes(8, "big") + text for text in texts])).digest()


class Place(NamedTuple):
    """The place where a record is stored: `thread` of the key service, `parts` for the rest, and `record`, the id in an
    error.
    """

    thread: str
    parts: tuple[str, ...]
    record: str


@functools.lru_cache(KEYS_CACHED_MAX)
def bound(place: Place) -> bytes:
    """What a record is bound to. The values of a column share it."""
    return b"minikms-adapters 1\0" + _digest((place.thread, *place.parts))


def _pieces(place: Place, value: bytes, size: int, start: int = 0) -> list[tuple[bytes, bytes]]:
    """The pieces of a plaintext or a record, each with its AAD."""
    place_bound, starts = bound(place), range(start, len(value), size) or (start,)
    return [
        (value[at : at + size], place_bound + index.to_bytes(4, "big") + bytes([at == starts[-1]]))
        for index, at in enumerate(starts)
    ]


@contextlib.contextmanager
def malformed(record: str) -> Iterator[None]:
    """While a stored row is read that nothing has authenticated: an error of its form becomes a RecordError."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RecordError(record) from error


# --- values of columns ------------------------------------------------------------------------------------------------

_TEXTS: Final[dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]]] = {
    str: (str, str),
    bool: (json.dumps, {"true": True, "false": False}.__getitem__),
    int: (str, int),
    float: (repr, float),
    Decimal: (str, Decimal),
    UUID: (str, UUID),
    date: (date.isoformat, date.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    object: (json.dumps, json.loads),
}
"""How a value becomes text, and back. `object` is a value of JSON."""


class Owned(str):
    """A text with the owner of its row, whose key encrypts it."""

    __slots__ = ("owner",)

    def __new__(cls, text: str, owner: object) -> Owned:
        value = super().__new__(cls, text)
        value.owner = str(owner)
        return value

    owner: str

    def __reduce__(self) -> tuple[type[Owned], tuple[str, str]]:
        return Owned, (str(self), self.owner)


def column_thread(prefix: str, key: str | None, owner: object) -> str:
    """The thread of the key service for a column's key, or for an owner's."""
    if (key is None) == (owner is None):
        raise TypeError("give either key or owner")
    return thread_name(prefix, key) if key is not None else thread_name(f"{prefix}-owner", str(owner))


@functools.lru_cache(KEYS_CACHED_MAX)
def _column_place(framework: str, prefix: str, key: str | None, names: tuple[str, ...], owner: str | None) -> Place:
    thread, joined = column_thread(prefix, key, owner), ".".join(names)
    if owner is None:
        return Place(thread, (framework, *names), joined)
    return Place(thread, (framework, *names, owner), f"{joined} of owner {owner}")


class ColumnValues(NamedTuple):
    """The values of a column of a database: their form, and which key encrypts them."""

    framework: str
    prefix: str
    """The prefix of the key service's threads."""
    key: str | None
    """The name of the key of all values, or None if each row has an owner with a key."""
    kind: type
    to_text: Callable[[Any], str]
    from_text: Callable[[str], Any]

    @classmethod
    def of(cls, framework: str, prefix: str, kind: type, key: str | None, key_of: str | None) -> ColumnValues:
        if (key is None) == (key_of is None):
            raise TypeError("give either key or key_of")
        if key_of is not None and kind is not str:
            raise NotSupportedError("a column with the keys of owners holds text")
        if issubclass(kind, Enum):
            return cls(framework, prefix, key, kind, lambda value: str(value.name), kind.__getitem__)
        if kind is not bytes and kind not in _TEXTS:
            raise NotSupportedError(f"a column of {kind.__name__} can't be encrypted")
        return cls(framework, prefix, key, kind, *_TEXTS.get(kind, _TEXTS[str]))

    def place(self, names: tuple[str, ...], owner: str | None) -> Place:
        """`names` are those of table and column."""
        return _column_place(self.framework, self.prefix, self.key, names, owner)

    def encode(self, names: tuple[str, ...], value: Any) -> tuple[bytes, Place, bytes]:
        """What stands before the record, its place, and its plaintext."""
        subclass = (self.kind is int and isinstance(value, bool)) or (self.kind is date and isinstance(value, datetime))
        if not isinstance(value, self.kind) or subclass:
            raise TypeError(f"the value of this encrypted column is a {self.kind.__name__}")
        plaintext = value if isinstance(value, bytes) else self.to_text(value).encode("utf-8", "surrogatepass")
        if self.key is not None:
            return b"", self.place(names, None), plaintext
        if not isinstance(value, Owned):
            raise NotSupportedError("outside of a flush or save, give the value as Owned(text, owner)")
        owner = value.owner.encode()
        if len(owner) > OWNER_BYTES_MAX:
            raise NotSupportedError(f"an owner has at most {OWNER_BYTES_MAX} bytes")
        return OWNED_MAGIC + len(owner).to_bytes(2, "big") + owner, self.place(names, value.owner), plaintext

    def locate(self, names: tuple[str, ...], stored: object) -> tuple[Place, Any]:
        """The place where a stored value belongs, and its record. Its owner is a claim until the record is opened."""
        record, owner = bytes(stored) if isinstance(stored, (bytes, memoryview)) else stored, None
        if isinstance(record, bytes) and record.startswith(OWNED_MAGIC):
            start = len(OWNED_MAGIC) + 2
            end = start + int.from_bytes(record[len(OWNED_MAGIC) : start], "big")
            owner, record = record[start:end].decode(errors="replace"), record[end:]
        if (owner is None) != (self.key is not None):
            raise PlaintextRecordError(".".join(names))
        return self.place(names, owner), record

    def decode(self, place: Place, plaintext: bytes) -> Any:
        """Decodes a plaintext. Raises RecordError if it holds a value of another type."""
        try:
            value: Any = plaintext if self.kind is bytes else self.from_text(plaintext.decode("utf-8", "surrogatepass"))
        except (ArithmeticError, LookupError, RecursionError, ValueError):
            raise RecordError(place.record) from None
        return value if self.key is not None else Owned(value, place.parts[-1])


# --- sealing and opening ----------------------------------------------------------------------------------------------


def is_sealed(value: object) -> TypeGuard[bytes]:
    """Whether a stored value has the form of a record; only `RecordSealer.open` says whether it is one."""
    return isinstance(value, bytes) and value.startswith(MAGIC) and len(value) >= HEAD_BYTES + api.SEAL_BYTES


def json_bytes(value: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """A plaintext that `json.loads` reads. Half a surrogate pair, as cut text of a model has, stays what it is."""
    return json.dumps(value, default=default, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_json(record: bytes) -> dict[str, str]:
    """For a database that stores JSON."""
    return {JSON_FIELD: b64encode(record).decode("ascii")}


def from_json(value: object) -> object:
    """The record of a stored JSON value, or what is there in its place."""
    if not isinstance(value, dict) or set(value) != {JSON_FIELD}:
        return value
    try:
        return b64decode(value[JSON_FIELD], validate=True)
    except (binascii.Error, TypeError, ValueError):
        return value


def key_of(record: bytes) -> str:
    """The key that a record names. It is a claim until the record is opened."""
    return record[len(MAGIC) : HEAD_BYTES].decode("ascii", "replace")


class RecordSealer:
    """The steps that seal and open records, and the current key of each thread as far as it is remembered."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def seal(self, values: Sequence[tuple[Place, bytes]], after: Collection[str] = ()) -> Steps[list[bytes]]:
        """A record for each value, in order, under the current keys of their threads. `after`: keys of the thread that
        sealed what the values follow from; raises KeyDestroyedError if one of them was destroyed.
        """
        if any(len(value) > RECORD_BYTES_MAX for _, value in values):
            raise AdapterError(f"a value has at most {RECORD_BYTES_MAX} bytes")
        for attempts_left in reversed(range(KEY_CHANGES_MAX + 1)):
            try:
                return (yield from self._seal_once(values, after))
            except (KeyRetiredError, KeyDestroyedError, KeyNotFoundError) as error:
                self.forget(*(place.thread for place, _ in values))
                if not attempts_left or (after and isinstance(error, KeyDestroyedError)):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _seal_once(self, values: Sequence[tuple[Place, bytes]], after: Collection[str]) -> Steps[list[bytes]]:
        items: list[EncryptItem] = []
        named: list[tuple[str, int]] = []
        for place, value in values:
            key_id = yield from self.current_key(place.thread)
            pieces = _pieces(place, value, PIECE_BYTES_MAX)
            items += [
                EncryptItem(key_id=key_id, plaintext=piece, aad=aad, thread_id=place.thread) for piece, aad in pieces
            ]
            named.append((key_id, len(pieces)))
        if not items:
            return []
        used = {key_id for key_id, _ in named}
        probes = [
            EncryptItem(key_id=key, plaintext=b"", thread_id=values[0][0].thread) for key in after if key not in used
        ]
        answered = yield ask_kms("encrypt_batch", items + probes)
        for outcome in answered[len(items) :]:  # a retired key refuses in another way
            if isinstance(outcome, KeyDestroyedError):
                raise outcome
        outcomes = iter(_values(answered[: len(items)]))
        return [
            b"".join([MAGIC, key_id.encode("ascii"), *(next(outcomes) for _ in range(count))])
            for key_id, count in named
        ]

    def current_key(self, thread: str) -> Steps[str]:
        """The key that the key service named last, unless it was forgotten."""
        if thread in self._keys:
            return self._keys[thread]
        answer = yield ask_kms("get_or_create_dek_for_thread", thread, purpose="data")
        if len(self._keys) >= KEYS_CACHED_MAX:
            self._keys.clear()
        self._keys[thread] = answer.key_id
        return str(answer.key_id)

    def forget(self, *threads: str) -> None:
        for thread in threads:
            self._keys.pop(thread, None)

    def open(self, records: Sequence[tuple[Place, object]]) -> Steps[list[bytes]]:
        """The value of each record, in order. Raises RecordError for the first one that gives none."""
        items: list[DecryptItem] = []
        counts: list[int] = []
        for place, record in records:
            key_id, pieces = _key_and_pieces(place, record)
            items += [
                DecryptItem(key_id=key_id, ciphertext=piece, aad=aad, thread_id=place.thread) for piece, aad in pieces
            ]
            counts.append(len(pieces))
        if not items:
            return []
        outcomes = iter((yield ask_kms("decrypt_batch", items)))
        return [
            _whole(place, [next(outcomes) for _ in range(count)])
            for (place, _), count in zip(records, counts, strict=True)
        ]

    def move(self, records: Sequence[tuple[Place, object]]) -> Steps[list[bytes | None]]:
        """The records that are under a replaced key, under the current one. None for the others, and for those whose
        key was destroyed. The plaintext does not leave the key service.
        """
        self.forget(*(place.thread for place, _ in records))
        groups: dict[tuple[str, str], list[tuple[int, list[ReencryptItem]]]] = {}
        for index, (place, record) in enumerate(records):
            old, pieces = _key_and_pieces(place, record)
            new = yield from self.current_key(place.thread)
            if old != new:
                items = [ReencryptItem(ciphertext=piece, aad=aad) for piece, aad in pieces]
                groups.setdefault((old, new), []).append((index, items))
        moved: list[bytes | None] = [None] * len(records)
        for (old, new), group in groups.items():
            pieces_of_all = [item for _, items in group for item in items]
            try:
                outcomes = iter((yield ask_kms("reencrypt_batch", old, new, pieces_of_all)))
            except KeyDestroyedError:
                continue
            except (KeyNotFoundError, WrongThreadError) as error:
                raise WrongPlaceError(records[group[0][0]][0].record) from error
            for index, items in group:
                piece = _whole(records[index][0], [next(outcomes) for _ in items])
                moved[index] = MAGIC + new.encode("ascii") + piece
        return moved

    def destroy(self, thread: str) -> Steps[list[Receipt]]:
        """Destroys every key of the thread that adapters make, and so all its records. Gives a receipt for each key."""
        receipts: list[Receipt] = []
        while keys := (yield from self._data_keys(thread)):  # again, since a write may have made another one
            for key in keys:
                if key.state == "active":
                    yield ask_kms("retire_key", key.key_id)
                receipts.append((yield ask_kms("destroy_key", key.key_id)))
        self.forget(thread)
        return receipts

    def _data_keys(self, thread: str) -> Steps[list[api.KeyAnswer]]:
        keys: list[api.KeyAnswer] = []
        cursor: str | None = None
        while True:
            page = yield ask_kms("list_keys", thread_id=thread, cursor=cursor, limit=api.LIST_KEYS_COUNT_MAX)
            if page.indexing:
                raise NotReadyError("the key service is still reading its key files; try again")
            keys += [key for key in page.keys if key.purpose != "thread"]
            cursor = page.next_cursor
            if cursor is None:
                return keys


def _key_and_pieces(place: Place, record: object) -> tuple[str, list[tuple[bytes, bytes]]]:
    """The key that a record names, and its `_pieces`. Raises RecordError for what is no record."""
    if not is_sealed(record):
        raise PlaintextRecordError(place.record)
    key_id = key_of(record)
    if api.KEY_ID_PATTERN.fullmatch(key_id) is None or len(record) > 2 * RECORD_BYTES_MAX:
        raise WrongPlaceError(place.record)
    return key_id, _pieces(place, record, SEALED_PIECE_BYTES_MAX, HEAD_BYTES)


def _values(outcomes: Sequence[bytes | KmsRefusedError]) -> list[bytes]:
    for outcome in outcomes:
        if isinstance(outcome, KmsRefusedError):
            raise outcome
    return cast("list[bytes]", outcomes)


def _whole(place: Place, outcomes: Sequence[bytes | KmsRefusedError]) -> bytes:
    try:
        pieces = _values(outcomes)
    except (DecryptionError, WrongThreadError, KeyNotFoundError) as error:
        raise WrongPlaceError(place.record) from error
    except KeyDestroyedError as error:
        raise DestroyedRecordError(place.record) from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
