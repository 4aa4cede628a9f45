"""A key of the transit API: the keys of one thread of the key service, by their numbers.

Owns: how a name becomes a thread; requests to the key service for one principal; what it remembers of names.
Invariants: a number is the one that the key service stores with a key; what one principal has found is never used for
another one; what is remembered is only where to ask, since the key service decides each use, and is found anew when it
is out of date. It must never make or destroy a key.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

import msgspec

from minikms import api
from minikms.api import Verb
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import (
    KeyDestroyedError,
    KeyNotFoundError,
    KeyRetiredError,
    KeysNotReadError,
    KmsRefusedError,
    RequestInterruptedError,
    refusal,
)
from minikms.http import HttpRequest, ParsedHead, Response
from minikms_gateway.transit.wire import NO_CONTEXT, NO_MACS, NOT_FOUND, ONLY_MACS, TOO_NEW, TOO_OLD, VaultError

THREAD_PREFIX: Final = "transit."
NAME_CHARS_MAX: Final = api.ID_CHARS_MAX - len(THREAD_PREFIX)
NAME: Final = re.compile(rf"(?=.{{1,{NAME_CHARS_MAX}}}\Z)\w(?:[\w.-]*\w)?", re.ASCII)
"""The form of a name: Vault's, with a bound."""
VERSIONS_PAGES_MAX: Final = 8
"""Pages of versions of one key."""
VERSIONS_MAX: Final = VERSIONS_PAGES_MAX * api.LIST_KEYS_COUNT_MAX
"""A key with more would not be found any more."""
LIST_PAGES_MAX: Final = 100
"""Pages that a list of names looks at."""
REMEMBERED_VERSIONS_MAX: Final = 65_536
"""The versions of all keys of all principals together: 15 MiB, or 60 MiB if each key has one."""

Ask = Callable[[Verb[Any, Any], str, HttpRequest, str | None], Awaitable[bytes | Response]]
"""Sends a request of the key service for a principal; the last argument is the target, or None for its path."""
T = TypeVar("T")


class Version(NamedTuple):
    """`created`: in Unix seconds."""

    key_id: str
    created: int


class TransitKey:
    """`versions` by number; there is one at least. All have the same purpose."""

    def __init__(self, name: str, purpose: api.Purpose, versions: dict[int, Version]) -> None:
        self.name = name
        self.purpose = purpose
        self.versions = versions
        self.latest = max(versions)

    @property
    def latest_id(self) -> str:
        return self.versions[self.latest].key_id

    def check_use(self, *, macs: bool) -> None:
        """Checks that the key makes MACs or records, as `macs` says: it never makes both. Raises VaultError."""
        if (self.purpose == "mac") != macs:
            raise VaultError(NO_MACS if macs else ONLY_MACS)

    def check_context(self, context: str | None) -> None:
        if self.purpose == "derived" and not context:
            raise VaultError(NO_CONTEXT)

    def encrypts(self, number: int) -> None:
        """Checks that `number` is 0 or the latest version: the others are retired. Raises VaultError."""
        if number < 0:
            raise VaultError("requested version for encryption is negative")
        if number > self.latest:
            raise VaultError("requested version for encryption is higher than the latest key version")
        if 0 < number < self.latest:
            raise VaultError("requested version for encryption is less than the minimum encryption key version")

    def decrypting(self, number: int) -> str:
        """The id of a version. One that was destroyed is too old. Raises VaultError."""
        if number > self.latest:
            raise VaultError(TOO_NEW)
        version = self.versions.get(number)
        if version is None:
            raise VaultError(TOO_OLD)
        return version.key_id


class Remembered:
    """The keys that principals have found lately."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, str], TransitKey] = {}
        self._versions = 0

    def get(self, who: str, name: str) -> TransitKey | None:
        return self._keys.get((who, name))

    def put(self, who: str, key: TransitKey) -> None:
        self.forget(who, key.name)
        self._keys[who, key.name] = key
        self._versions += len(key.versions)
        while self._versions > REMEMBERED_VERSIONS_MAX:
            self.forget(*next(iter(self._keys)))

    def forget(self, who: str, name: str) -> None:
        key = self._keys.pop((who, name), None)
        self._versions -= 0 if key is None else len(key.versions)


class Lifetime(NamedTuple):
    """The lifetime of a caller's credential, in Unix seconds."""

    begun: float
    until: float


@dataclass(eq=False)
class TransitCaller:
    """One request of a principal. `head`: of the client's request, whose id goes along."""

    who: str
    head: ParsedHead
    ask: Ask
    remembered: Remembered
    lifetime: Callable[[], Lifetime]

    async def native(
        self,
        verb: Verb[Any, Any],
        kind: type[T],
        *,
        body: object = None,
        packed: bool = False,
        target: str | None = None,
    ) -> T:
        """The answer to a request of the key service. `packed`: both are MessagePack. Raises KmsRefusedError."""
        encode, decode = (_PACK, msgspec.msgpack.decode) if packed else (_JSON, msgspec.json.decode)
        head = msgspec.structs.replace(self.head, content_type=api.MSGPACK if packed else "")
        request = HttpRequest(head, memoryview(b"" if body is None else encode(body)))
        answer = await self.ask(verb, self.who, request, target)
        if isinstance(answer, Response) and answer.status != 200:
            raise _refusal(answer)
        try:
            return decode(answer if isinstance(answer, bytes) else answer.body, type=kind)
        except UNDECODABLE:
            raise RequestInterruptedError("the key service sent an answer that can't be read") from None

    async def ready(self) -> None:
        """Checks that the key service serves. Raises its error otherwise."""
        answer = await self.ask(api.READY, self.who, HttpRequest(self.head, memoryview(b"")), None)
        if isinstance(answer, Response) and answer.status != 200:
            raise _refusal(answer)

    async def key(self, name: str, *, at_least: int = 0) -> TransitKey:
        """A key that may be out of date, but has the version `at_least` if there is one. Raises VaultError."""
        keys = self.remembered.get(self.who, name)
        return keys if keys is not None and at_least <= keys.latest else await self.found(name)

    async def found(self, name: str) -> TransitKey:
        """A key as it is now. Raises VaultError."""
        key = await self.lookup(name)
        if key is None:
            raise VaultError(NOT_FOUND)
        return key

    async def lookup(self, name: str) -> TransitKey | None:
        """The same; None if the principal sees no such key."""
        keys: list[api.KeyAnswer] = []
        async for page in self._pages(VERSIONS_PAGES_MAX, thread_id=THREAD_PREFIX + name):
            keys += [key for key in page if key.number]
        if not keys:
            self.remembered.forget(self.who, name)
            return None
        versions = {key.number: Version(key.key_id, _unix(key.created_at)) for key in keys}
        key = TransitKey(name, keys[-1].purpose, versions)
        self.remembered.put(self.who, key)
        return key

    async def names(self) -> list[str]:
        """The names of all keys that the principal sees, sorted."""
        names: set[str] = set()
        async for page in self._pages(LIST_PAGES_MAX):
            names.update(
                key.thread_id.removeprefix(THREAD_PREFIX)
                for key in page
                if key.number and key.thread_id.startswith(THREAD_PREFIX)
            )
        return sorted(name for name in names if NAME.fullmatch(name))

    async def _pages(self, count_max: int, **query: str) -> Any:
        cursor: dict[str, str] = {}
        for _ in range(count_max):
            target = f"{api.LIST_KEYS.path}?" + urlencode({"limit": api.LIST_KEYS_COUNT_MAX, **query, **cursor})
            page = await self.native(api.LIST_KEYS, api.KeyListAnswer, target=target)
            if page.indexing:
                raise KeysNotReadError("key files are still being read after the start; try again")
            yield page.keys
            if page.next_cursor is None:
                return
            cursor = {"cursor": page.next_cursor}
        raise VaultError("there are more keys to look at than this API lists; list them at the key service")

    async def using(
        self, name: str, use: Callable[[TransitKey], Awaitable[T]], *, at_least: int = 0, macs: bool = False
    ) -> T:
        """`use` with a key, and once more with what is found now if the key that was remembered was out of date."""
        key = await self.key(name, at_least=at_least)
        key.check_use(macs=macs)
        try:
            return await use(key)
        except OUT_OF_DATE:
            now = await self.found(name)
            if now.versions == key.versions:
                raise
            return await use(now)


OUT_OF_DATE: Final = (KeyRetiredError, KeyNotFoundError, KeyDestroyedError)
_JSON: Final = msgspec.json.Encoder().encode
_PACK: Final = msgspec.msgpack.Encoder().encode


def _refusal(answer: Response) -> KmsRefusedError:
    try:
        error = msgspec.json.decode(answer.body, type=api.ErrorAnswer)
    except UNDECODABLE:
        error = api.ErrorAnswer("the key service refused the request", api.CODE_INTERNAL)
    retry = dict(answer.headers).get("retry-after", "0")
    return refusal(error.code, error.error, answer.status, int(retry))


def _unix(text: str) -> int:
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp())
    except ValueError:
        return 0
