"""The key service as the message server uses it: the part of the client's interface that it calls, and whose fault an
error is.

Owns: `Provider`, the provider that a server uses (`RemoteProvider`) and the one for development (`open_local`); the
request for which records are opened (`READING`).
Invariants: items and errors are those of `minikms.client`; a failure is raised and never answered by a default; with
`RemoteProvider` no raw key is in this process. It must never fall back to storing plaintext.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from minikms.client import AsyncClient, DecryptItem, EncryptItem, ReencryptItem
from minikms.platform.logs import Log
from minikms.processes.tracing import TracedExchange
from progressdb_server.metrics import KmsMetrics

WAIT_S: Final = 5.0
"""How long a call waits for a key service that is away."""
TIMEOUT_S: Final = 8.0
"""How long a call waits for its answer. Below the 10 s after which many HTTP clients give up, so that they still read
the 503."""
LISTED_KEYS_MAX: Final = 512
"""Keys of a page: the key service reads a file for each."""


class Fault(enum.Enum):
    """Whose fault a failure is: of the key service (the same call may succeed later), of a key that the key service
    can't read until an operator repairs it, or of what was asked."""

    SERVICE = enum.auto()
    KEY = enum.auto()
    REQUEST = enum.auto()


_log: Final = Log()
_CODES_OF_THE_SERVICE: Final = frozenset(
    {
        api.CODE_UNAUTHORIZED,
        api.CODE_AUDIT_UNAVAILABLE,
        api.CODE_AUDIT_LAGGING,
        api.CODE_STORAGE_UNAVAILABLE,
        api.CODE_SHUTTING_DOWN,
        api.CODE_INTERRUPTED,
        api.CODE_TIMEOUT,
        api.CODE_SEALED,
        api.CODE_STANDBY,
        api.CODE_LIMIT_EXCEEDED,
        api.CODE_INTERNAL,
    }
)
LIMITED: Final = "the key service answers no more of these requests now: a limit of its policy is used up"
SEALED: Final = "the key service is sealed: `minikms status` says what it waits for"


def fault(error: KmsError) -> Fault:
    """Whose fault a failure of a call, or of one item of a batch, is. Everything that depends on this asks here."""
    if not isinstance(error, KmsRefusedError) or error.code in _CODES_OF_THE_SERVICE:
        return Fault.SERVICE
    return Fault.KEY if error.code == api.CODE_KEY_UNREADABLE else Fault.REQUEST


_PERMANENT_CODES: Final = frozenset(
    {
        api.CODE_FORBIDDEN,
        api.CODE_INVALID_REQUEST,
        api.CODE_NOT_FOUND,
        api.CODE_METHOD_NOT_ALLOWED,
        api.CODE_KEY_NOT_FOUND,
        api.CODE_KEY_DESTROYED,
        api.CODE_WRONG_THREAD,
        api.CODE_WRONG_PURPOSE,
        api.CODE_DECRYPTION_FAILED,
        api.CODE_TOO_LARGE,
    }
)
"""Not `key_unreadable`: once an operator has put the file back, the same request succeeds."""


def is_permanent(error: KmsError) -> bool:
    """Whether the same call is refused again, however late, unless an operator changes keys, policy or program."""
    return isinstance(error, KmsRefusedError) and error.code in _PERMANENT_CODES


class Provider(Protocol):
    """The methods of `minikms.client.AsyncClient` that the message server calls, as they are documented there.

    Each raises KmsError. A batch takes any number of items and gives one outcome for each, in order: the value, or the
    KmsRefusedError of that item alone.
    """

    async def create_dek_for_thread(
        self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
    ) -> api.CreateDekAnswer: ...

    def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None
    ) -> Coroutine[Any, Any, bytes]: ...

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]: ...

    async def decrypt_batch(
        self, items: Sequence[DecryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]: ...

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]: ...

    async def check_batch(
        self, key_id: str, items: Sequence[ReencryptItem], *, thread_id: str | None, request_id: str | None = None
    ) -> list[KmsRefusedError | None]: ...

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer: ...

    async def list_keys(
        self, *, thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
    ) -> api.KeyListAnswer: ...

    async def get_key(self, key_id: str) -> api.KeyAnswer: ...

    async def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> api.DestroyKeyAnswer: ...

    async def status(self) -> api.StatusAnswer: ...

    async def close(self) -> None: ...


class RequestReads:
    """A request of a client, for which records may be opened. `opened` is how many were. `exchanges`: those with the
    key service, if it is traced.
    """

    __slots__ = ("exchanges", "opened", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.opened = 0
        self.exchanges: tuple[TracedExchange, ...] = ()


READING: Final[ContextVar[RequestReads | None]] = ContextVar("progressdb_reading", default=None)
"""The request that is being handled, so that every record that is opened for it gets its id in the audit log, however
it is read: a parameter of each method could be forgotten. None for work of the server's own."""


async def key_pages(
    provider: Provider, *, thread_id: str | None = None, state: api.State | None = None, cursor: str | None = None
) -> AsyncIterator[api.KeyListAnswer]:
    """The keys, page by page; each page is asked for when it is taken. Raises KmsError."""
    while True:
        page = await provider.list_keys(thread_id=thread_id, state=state, cursor=cursor, limit=LISTED_KEYS_MAX)
        yield page
        cursor = page.next_cursor
        if cursor is None:
            return


def created_ns(key: api.KeyAnswer) -> int:
    """Unix nanoseconds."""
    moment = datetime.fromisoformat(key.created_at)
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000


class RemoteProvider(AsyncClient):
    """miniKMS at a socket, or behind a gateway: `kms_client` of the configuration."""

    def __init__(self, address: str | os.PathLike[str], **arguments: Any) -> None:
        super().__init__(address, **{"timeout_s": TIMEOUT_S, "wait_s": WAIT_S, **arguments})
        self.metrics = KmsMetrics(self.addresses)
        self.on_exchange = self.metrics.exchanged
        self._logged: Sequence[str] = ()
        self._served = self.address

    async def status(self) -> api.StatusAnswer:
        try:
            status = await self.serving_status()
        except KmsError as error:
            if not isinstance(error, LimitExceededError):
                self.metrics.lost()
            raise
        finally:
            for text in set(self.warnings).difference(self._logged):
                _log.warning(text)
            self._logged = self.warnings
        self.metrics.seen(status)
        if self.address != self._served:
            _log.warning("kms_address_changed", address=self.address, before=self._served)
        self._served = self.metrics.address = self.address
        return status

    async def serving_status(self) -> api.StatusAnswer:
        """The status of the address that serves. A sealed host answers this too: `ready` leaves it if another one
        serves.
        """
        if len(self.addresses) > 1:
            with contextlib.suppress(SealedError):
                await self.ready()
        return await super().status()


class LocalProviderError(Exception):
    """The key service can't be opened in this process; the text says why and what to do."""


async def open_local(
    data_dir: str | os.PathLike[str], *, master_key_file: str | os.PathLike[str] | None = None
) -> Provider:
    """For development only: the key service in this process. Opens or makes the data directory, which a daemon can open
    later; without a key file, makes one beside it. Raises LocalProviderError.

    The server's memory then holds the keys, and the server may do everything that miniKMS may.
    """
    from minikms_daemon.embedded import EmbeddedClient, EmbeddedError  # loaded in no other server process

    try:
        return await EmbeddedClient.open(data_dir, master_key_file=master_key_file)
    except EmbeddedError as error:
        raise LocalProviderError(str(error)) from None
