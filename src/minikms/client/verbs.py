"""The methods of every client, described once: the verb, its request, and how the answer becomes a value.

Owns: `Verbs`, whose methods both clients and the embedded client have. A method is a description without I/O; a client
runs it. `method` gives it the type of that client: a value for `BlockingRunner`, a coroutine for `AsyncRunner`.
Invariants: a body that holds a root key is made when it is sent, and wiped after that; of many items each gets its own
outcome, in order. A description must never touch a socket, a clock or an event loop.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from minikms import api
from minikms.api import Verb
from minikms.client import calls
from minikms.client.base import ROTATE_TIMEOUT_S
from minikms.client.calls import Call, base64_text, make_call, optional
from minikms.client.items import (
    Batch,
    CheckBatch,
    CheckOutcome,
    DecryptItem,
    EncryptItem,
    MacItem,
    Outcome,
    ReencryptBatch,
    ReencryptItem,
    Sent,
    chunks,
)

P = ParamSpec("P")
A = TypeVar("A")
T = TypeVar("T")
V = TypeVar("V")


class ClientOperation(Generic[T]):
    """What a method asks for; T is the type of its value. Either `One` or `Many`."""

    __slots__ = ()


@dataclass(slots=True, eq=False)
class One(ClientOperation[T]):
    """One request. `request` is a function where the body holds a root key: it makes the body, which is wiped after it
    was sent. `named` is then the id in the path.
    """

    verb: Verb[Any, T]
    request: api.Request | Sent | Callable[[], bytearray] = field(repr=False)
    request_id: str | None = None
    named: str = ""
    timeout_s: float | None = None
    read: Callable[[Any], Any] | None = None

    def then(self, read: Callable[[T], V]) -> One[V]:
        """The same request, whose value is that of `read`."""
        self.read = read
        return self  # type: ignore[return-value]  # of a One[V] from here on

    def call(self, *, msgpack: bool = True) -> Call[Any]:
        """The request as it is sent; the caller wipes it. Raises InvalidRequestError."""
        request = self.request() if callable(self.request) else self.request
        return make_call(self.verb, request, self.request_id, self.named, msgpack=msgpack)

    def value(self, answer: Any) -> T:
        """The value of the method. Raises KmsProtocolError for an answer that can't be one."""
        value: T = answer if self.read is None else self.read(answer)
        return value


@dataclass(slots=True, eq=False)
class Many(ClientOperation[list[T]]):
    """Requests for any number of items: `batch` makes one of a run of items, `read` the outcomes of its answer."""

    verb: Verb[Any, Any]
    items: Sequence[Any] = field(repr=False)
    batch: Callable[[Sequence[Any]], Sent]
    read: Callable[[Any, int], list[T]]
    request_id: str | None = None

    def split(self, items_max: int = api.BATCH_ITEMS_MAX) -> Iterator[One[list[T]]]:
        """The requests, in order. Raises InvalidRequestError or TooLargeError before the first one."""
        for run in chunks(self.items, items_max):
            read = partial(self._outcomes, len(run))
            yield One(self.verb, self.batch(run), self.request_id).then(read)

    def _outcomes(self, count: int, answer: object) -> list[T]:
        return self.read(answer, count)


class BlockingRunner(ABC):
    """Base of a client whose methods return values."""

    @abstractmethod
    def _run(self, operation: ClientOperation[T]) -> T:
        """Does what a method describes. Raises KmsError."""


class AsyncRunner(ABC):
    """Base of a client whose methods return coroutines."""

    @abstractmethod
    def _run(self, operation: ClientOperation[T]) -> Coroutine[Any, Any, T]:
        """Does what a method describes. Raises KmsError."""


if TYPE_CHECKING:

    class method(Generic[P, T]):
        """What type checkers see of a method: its type depends on the client."""

        def __init__(self, describe: Callable[Concatenate[Any, P], ClientOperation[T]]) -> None: ...
        @overload
        def __get__(self, client: BlockingRunner, owner: type) -> Callable[P, T]: ...
        @overload
        def __get__(self, client: AsyncRunner, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
        @overload
        def __get__(self, client: None, owner: type) -> Self: ...
        def __get__(self, client: Any, owner: type) -> Any: ...

else:

    def method(describe):
        """A method of both kinds of client, from the function that describes it."""

        @functools.wraps(describe)
        def run(self, *args, **kwargs):
            return self._run(describe(self, *args, **kwargs))

        return run


def ciphertext_of(answer: api.EncryptAnswer) -> bytes:
    return answer.ciphertext


def plaintext_of(answer: api.DecryptAnswer) -> bytes:
    return answer.plaintext


class Verbs:
    """One method for each verb, so as many as there are verbs, over `_run` of its client. Each raises KmsError."""

    @method
    def health(self) -> One[bool]:
        """Whether the daemon answers: True, or an error. Needs no role and writes no audit line."""
        return One(api.HEALTH, api.Request()).then(calls.is_healthy)

    @method
    def ready(self) -> One[bool]:
        """Whether the daemon serves: True, or an error. Needs no role and writes no audit line. Raises SealedError,
        AuditUnavailableError, AuditLaggingError.
        """
        return One(api.READY, api.Request()).then(calls.is_ready)

    @method
    def status(self) -> One[api.StatusAnswer]:
        """The daemon's state for operators. Answered even while the audit log can't be written; `status` is not `ok`
        then. Needs the role `monitor`."""
        return One(api.STATUS, api.Request())

    @method
    def create_dek_for_thread(
        self,
        thread_id: str,
        *,
        replaces: str | None = None,
        purpose: api.Purpose | None = None,
        numbered: bool | None = None,
        request_id: str | None = None,
    ) -> One[api.CreateDekAnswer]:
        """A new key for the thread, durable before this returns; `replaces` retires that key of the same thread in
        the same step. With `numbered` it gets the thread's next number, and has to replace the newest numbered key.

        Repeated by itself only if the request was certainly not carried out. After KmsUnavailableError with `sent`, or
        KmsTimeoutError, there may be a key that no caller knows.
        """
        request = api.CreateDekRequest(
            thread_id, replaces=optional(replaces), purpose=optional(purpose), numbered=optional(numbered)
        )
        return One(api.CREATE_DEK, request, request_id)

    @method
    def get_or_create_dek_for_thread(
        self, thread_id: str, *, purpose: api.Purpose | None = None, request_id: str | None = None
    ) -> One[api.GetOrCreateDekAnswer]:
        """The newest active key of the thread (`key_id`), or a new one (`created`), durable before this returns.

        Processes that call it at once for one thread get the same key, so it is repeated by itself. `purpose` is
        `thread` by default; keys of another purpose are not looked at. Raises StorageUnavailableError while the daemon
        still reads its key files after a start, KeyUnreadableError when the thread's key can't be read.
        """
        request = api.GetOrCreateDekRequest(thread_id, purpose=optional(purpose))
        return One(api.GET_OR_CREATE_DEK, request, request_id)

    @method
    def get_wrapped(self, key_id: str) -> One[bytes]:
        """The key as its file holds it: sealed under the current KEK. Raises KeyNotFoundError, KeyDestroyedError."""
        return One(api.GET_WRAPPED, api.KeyRequest(key_id)).then(lambda answer: answer.wrapped)

    @method
    def encrypt(
        self,
        key_id: str,
        plaintext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> One[bytes]:
        """Encrypts at most 4 MiB, to nonce (24 bytes), ciphertext and tag (16 bytes).

        Concurrent calls travel in one batch.

        Raises KeyRetiredError, WrongThreadError.
        """
        item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        return One(api.ENCRYPT, item).then(ciphertext_of)

    @method
    def decrypt(
        self,
        key_id: str,
        ciphertext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> One[bytes]:
        """Decrypts a result of `encrypt`, under the same key and `aad`. Concurrent calls travel in one batch.

        Raises DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError.
        """
        item = DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id, request_id=request_id)
        return One(api.DECRYPT, item).then(plaintext_of)

    @method
    def encrypt_batch(self, items: Sequence[EncryptItem]) -> Many[Outcome]:
        """One ciphertext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: KeyRetiredError, KeyNotFoundError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.
        """
        return Many(api.ENCRYPT_BATCH, items, Batch, calls.outcomes)

    @method
    def decrypt_batch(self, items: Sequence[DecryptItem], *, request_id: str | None = None) -> Many[Outcome]:
        """One plaintext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.

        `request_id` is that of all items, in the audit log; an item may have one of its own beside it.
        """
        return Many(api.DECRYPT_BATCH, items, Batch, calls.outcomes, request_id)

    @method
    def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> Many[Outcome]:
        """A ciphertext under another key of the same thread, or KmsRefusedError, for each item, in order; the `aad` (at
        most 4,096 bytes) stays the same, and plaintext (at most 4 MiB) never leaves the daemon. Any number of items.

        Returned for its item alone: DecryptionError. Raises KeyNotFoundError, KeyDestroyedError,
        KeyRetiredError (of `to_key_id`), WrongThreadError, WrongPurposeError.
        """
        batch = partial(ReencryptBatch, from_key_id, to_key_id)
        return Many(api.REENCRYPT_BATCH, items, batch, calls.outcomes, request_id)

    @method
    def check_batch(
        self,
        key_id: str,
        items: Sequence[ReencryptItem],
        *,
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Many[CheckOutcome]:
        """For each item, in order, None if it opens under the key, or why not. Plaintext never leaves the daemon.

        Any number of items: they are split as needed.
        """
        batch = partial(CheckBatch, key_id, thread_id=thread_id)
        return Many(api.CHECK_BATCH, items, batch, calls.check_outcomes, request_id)

    @method
    def mac(
        self, key_id: str, items: Sequence[MacItem], *, thread_id: str | None = None, request_id: str | None = None
    ) -> Many[bytes]:
        """HMAC-SHA-256 (32 bytes) of each item, in order, under a key whose purpose must be `mac`. Any number of items.

        Raises KeyRetiredError, WrongThreadError, WrongPurposeError.
        """
        batch = partial(CheckBatch, key_id, thread_id=thread_id)
        return Many(api.MAC, items, batch, calls.macs, request_id)

    @method
    def generate_data_key(
        self, key_id: str, *, aad: bytes = b"", with_plaintext: bool = True, request_id: str | None = None
    ) -> One[api.DataKeyAnswer]:
        """A fresh 32-byte key sealed under `key_id`, whose purpose must be `data`; open it again with `decrypt`."""
        request = api.GenerateDataKeyRequest(key_id, aad=base64_text(aad), plaintext=with_plaintext)
        return One(api.GENERATE_DATA_KEY, request, request_id)

    @method
    def random(self, count: int) -> One[bytes]:
        """`count` random bytes from the daemon, at most `api.RANDOM_BYTES_MAX`. Needs the role `data_key`."""
        return One(api.RANDOM, api.RandomRequest(count)).then(lambda answer: calls.random_bytes(answer, count))

    @method
    def rotate_kek(
        self,
        *,
        new_kek_hex: bytes | bytearray | str | None = None,
        wait: bool = True,
        verify: Sequence[DecryptItem] = (),
        priority: api.Priority | None = None,
        request_id: str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> One[api.RotateKekAnswer]:
        """Rotates the KEK; a key given becomes the new root key too. `verify` samples are decrypted before and after.
        `priority` is that of the rotation against requests, `normal` by default; on one that runs it is changed.

        A `bytearray` stays the caller's to zero; a `str` can't be zeroed.
        """
        body = partial(calls.rotation, new_kek_hex, wait, verify, priority)
        return One(api.ROTATE_KEK, body, request_id, timeout_s=timeout_s)

    @method
    def list_roots(self) -> One[api.RootListAnswer]:
        """The root keys that open the keyring, and the removed ones whose revocation has not ended."""
        return One(api.LIST_ROOTS, api.Request())

    @method
    def add_root(
        self,
        root_hex: bytes | bytearray | str,
        *,
        provider: str,
        shares: api.GivenShares | None = None,
        request_id: str | None = None,
    ) -> One[api.RootAnswer]:
        """Adds a root key, 64 hex characters. A `bytearray` stays the caller's to zero; a `str` can't be zeroed.

        Raises ConflictError, NotPinnedError.
        """
        return One(api.ADD_ROOT, partial(calls.new_root, root_hex, provider, shares), request_id)

    @method
    def test_root(
        self, slot_id: str, root_hex: bytes | bytearray | str, *, request_id: str | None = None
    ) -> One[api.RootAnswer]:
        """Proves that the root key opens the slot. Raises WrongSlotError, NotFoundError."""
        return One(api.TEST_ROOT, partial(calls.root_test, root_hex), request_id, named=slot_id)

    @method
    def remove_root(self, slot_id: str, *, request_id: str | None = None) -> One[api.RootAnswer]:
        """Removes a root key at once; a KEK rotation follows. Raises LastRootError, NotTestedError, NotFoundError."""
        return One(api.REMOVE_ROOT, api.SlotRequest(slot_id), request_id)

    @method
    def seal(self) -> One[api.SealAnswer]:
        """Zeroes every key of the daemon at once. It answers when a restart would stay sealed too.

        Raises StorageUnavailableError: it is sealed even then, but a restart would not stay sealed.
        """
        return One(api.SEAL, api.Request())

    @method
    def unseal_status(self) -> One[api.UnsealStatusAnswer]:
        """Whether the daemon is sealed, since when and by whom."""
        return One(api.UNSEAL_STATUS, api.Request())

    @method
    def unseal(
        self,
        *,
        root_hex: bytes | bytearray | str | None = None,
        share: bytes | bytearray | str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> One[api.UnsealStatusAnswer]:
        """Gives a sealed daemon the root key or a share of it; without either it reads its own source of the root key.

        It serves on return, unless further shares are needed: then `sealed` is true. A `bytearray` stays the caller's
        to zero; a `str` can't be zeroed. Raises WrongRootError, WrongShareError, NotSealedError, TooManyAttemptsError,
        UnsealFailedError.
        """
        return One(api.UNSEAL, partial(calls.unsealing, root_hex, share), timeout_s=timeout_s)

    @method
    def report_audit_position(self, *, origin: str, log_id: str, seq: int, mac: bytes) -> One[api.AuditPositionAnswer]:
        """Reports the last line of the audit log that an auditor has taken; `seq` 0 and an empty `mac`: none. The first
        report fixes `origin`. Raises ConflictError for another origin or log, and for a line that is not durable;
        InvalidRequestError for a wrong `mac`.
        """
        request = api.ReportAuditPositionRequest(origin, log_id, seq, base64_text(mac))
        return One(api.REPORT_AUDIT_POSITION, request)

    @method
    def replica_follow(self, request: api.ReplicaFollowRequest) -> One[api.ReplicaPosition]:
        """For a replicator: gives a member changes of the database. Raises ReplicaForkedError, ReplicaRolledBackError:
        they don't follow from what the member has; ConflictError: not from its position, or it is no member.
        """
        return One(api.REPLICA_FOLLOW, request)

    @method
    def replica_next(self, request: api.ReplicaNextRequest) -> One[api.ReplicaNextAnswer]:
        """For a replicator: grants the lease, and waits for the next change. Raises ConflictError."""
        return One(api.REPLICA_NEXT, request)

    @method
    def replica_status(self) -> One[api.ReplicaStatusAnswer]:
        return One(api.REPLICA_STATUS, api.Request())

    @method
    def promote_replica(self, *, replace_database: bool = False) -> One[api.ReplicaStatusAnswer]:
        """Asks that this host takes over; `replace_database`: also into an empty database. Raises ConflictError."""
        return One(api.PROMOTE_REPLICA, api.PromoteReplicaRequest(replace_database))

    @method
    def invite_replica(self) -> One[api.ReplicaInvitation]:
        return One(api.INVITE_REPLICA, api.Request())

    @method
    def add_replica(self, request: api.AddReplicaRequest) -> One[api.ReplicaAnswer]:
        return One(api.ADD_REPLICA, request)

    @method
    def remove_replica(self, member_id: str) -> One[api.ReplicaAnswer]:
        return One(api.REMOVE_REPLICA, api.MemberRequest(member_id))

    @method
    def reload_policy(self) -> One[api.PolicyAnswer]:
        """Reads the policy file of the daemon again, and takes it into force. Raises InvalidPolicyError: the policy
        before it stays; ConflictError: the daemon was started without one.
        """
        return One(api.RELOAD_POLICY, api.Request())

    @method
    def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> One[api.KeyListAnswer]:
        """A page of keys, oldest first, at most `limit` (default 100); continue with `next_cursor` if it is set."""
        request = api.ListKeysRequest(optional(thread_id), optional(state), optional(cursor), optional(limit))
        return One(api.LIST_KEYS, request)

    @method
    def get_key(self, key_id: str) -> One[api.KeyAnswer]:
        """The state of one key. Raises KeyNotFoundError, KeyUnreadableError."""
        return One(api.GET_KEY, api.KeyRequest(key_id))

    @method
    def retire_key(self, key_id: str, *, request_id: str | None = None) -> One[api.KeyAnswer]:
        """The key only decrypts from now on; a retired key stays as it is. Raises KeyNotFoundError."""
        return One(api.RETIRE_KEY, api.KeyRequest(key_id), request_id)

    @method
    def destroy_key(
        self, key_id: str, *, thread_id: str | None = None, request_id: str | None = None
    ) -> One[api.DestroyKeyAnswer]:
        """Destroys a retired key permanently; returns the receipt. Raises ConflictError for an active key, and
        WrongThreadError for a key of another thread than `thread_id`."""
        return One(api.DESTROY_KEY, api.DestroyKeyRequest(key_id, optional(thread_id)), request_id)

    @method
    def prune_kek(
        self,
        *,
        backups: bool = False,
        backups_before: str | None = None,
        request_id: str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> One[api.PruneKekAnswer]:
        """Destroys retired KEK versions that no file names any more; the answer lists them, and why others are kept.

        With `backups` all intact rotation backups of DEK files are removed first, with `backups_before` (UTC, written
        `YYYYMMDDTHHMMSS`) only those made before that second. Raises ConflictError while a rotation runs,
        InvalidRequestError for another form of the time.
        """
        request = api.PruneKekRequest(backups, optional(backups_before))
        return One(api.PRUNE_KEK, request, request_id, timeout_s=timeout_s)
