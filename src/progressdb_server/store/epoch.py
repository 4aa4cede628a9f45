"""Whether the key service is the one that sealed this store's records, and not an older state of it.

Owns: the entry `keyspace.EPOCH`. Every start and every keyring write of the key service raises its epoch; each audit
line raises its head's sequence. Invariants: the highest epoch seen is remembered; a lower one, another keyring, or an
audit log that is shorter than one remembered is refused, unless the operator accepts a restore. Only a line that is on
the key service's disk is remembered: it may lose its newest ones with the machine's power. `judge` sees only where the
log ends; a key service that was started with a shortened log has written lines of its own by then. So the server passes
the remembered line (`audit_head`) to a key service that it starts, which looks for it in its log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import Commits, Reads
from progressdb_server.store.model import ConditionFailedError, StoreReadOnlyError

WAY_OUT: Final = "If that is a restore or a new audit log, start once with --accept-restore (the runbook says how)."
OLDER_STATE: Final = (
    "the key service is in an older state than this store has seen (the server's log says which). If that is intended, "
    "restart the server once with --accept-restore (the runbook says how)"
)
"""Why nothing is sealed meanwhile, for clients and for `progressdb status`."""


class RestoredError(Exception):
    """The key service's state is older than what this store has seen, or belongs to another one; the text says what to
    do."""


class SeenState(msgspec.Struct):
    epoch: int
    keyring_id: str
    head_seq: int
    head_sig: str


class EpochMemory:
    def __init__(self, reads: Reads, writer: Commits) -> None:
        self._reads = reads
        self._writer = writer

    async def observe(
        self, ask: Callable[[], Awaitable[api.StatusAnswer]], *, accept_restore: bool = False
    ) -> api.StatusAnswer:
        """Ask for the key service's `/status`, judge the answer, and remember what it shows.

        What is remembered is read before: another server may remember what is later than the answer. A sealed key
        service is not judged, nor a provider without epochs (development), unless the store has seen one. Raises
        RestoredError, StoreUnavailableError, KmsError.
        """
        raw = await self._reads.get(keyspace.EPOCH)
        status = await ask()
        if status.status == api.CODE_SEALED:
            return status
        known = None if accept_restore else _parse(raw)
        if not (status.epoch and status.keyring_id):
            if known is not None:
                raise RestoredError(f"the key service does not report its epoch, which it did before. {WAY_OUT}")
            return status
        seen = status.audit.head
        if known is not None:
            judge(known, status.epoch, status.keyring_id, seen.seq, seen.sig)
        if status.status != "ok":  # the audit log can't be written: its newest lines may never be durable
            return status
        head = status.audit.durable.seq, status.audit.durable.mac
        if known is not None and known.head_seq >= head[0]:
            head = known.head_seq, known.head_sig
        new = SeenState(status.epoch, status.keyring_id, *head)
        if new != known:
            # Another server was first: the next look judges by that. A store that takes no writes is still read.
            with contextlib.suppress(ConditionFailedError, StoreReadOnlyError):
                await self._writer.commit(
                    Write(((keyspace.EPOCH, msgspec.json.encode(new)),), ((keyspace.EPOCH, raw),))
                )
        return status


async def seen_state(reads: Reads) -> SeenState | None:
    """The state that the store remembers. Raises RestoredError when it can't be read; StoreUnavailableError."""
    return _parse(await reads.get(keyspace.EPOCH))


def _parse(raw: bytes | None) -> SeenState | None:
    try:
        return msgspec.json.decode(raw, type=SeenState) if raw else None
    except UNDECODABLE:
        raise RestoredError(f"what this store remembers of the key service is damaged. {WAY_OUT}") from None


async def audit_head(reads: Reads) -> str:
    """The line that the key service's audit log must have (`SEQ:SIG`), empty if none is remembered.

    Raises RestoredError, StoreUnavailableError.
    """
    known = await seen_state(reads)
    return f"{known.head_seq}:{known.head_sig}" if known is not None and known.head_seq else ""


def judge(known: SeenState, epoch: int, keyring_id: str, head_seq: int, head_sig: str) -> None:
    if keyring_id != known.keyring_id:
        raise RestoredError(
            f"the key service has another keyring than this store's records were sealed with. {WAY_OUT}"
        )
    if epoch < known.epoch:
        raise RestoredError(
            f"the key service is at epoch {epoch}, this store has seen {known.epoch}: its data directory is an older "
            f"copy, and keys made since are missing. {WAY_OUT}"
        )
    if head_seq < known.head_seq or (head_seq == known.head_seq and head_sig != known.head_sig):
        raise RestoredError(
            f"the key service's audit log ends at line {head_seq}, this store has seen line {known.head_seq}: "
            f"lines were removed or replaced. {WAY_OUT}"
        )
