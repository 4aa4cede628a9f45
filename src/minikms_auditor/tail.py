"""Reading the log: from lines that the daemon calls durable to leaves that may enter the tree.

Owns: where reading begins, the verification on the way, and the faults that stop it. Invariants: no line beyond the
last durable one is given out, because a daemon may still take it back; a leaf is given out only if a valid signature
covers its line, so the last line given out is a signed one; a continued tree begins at the line of its last leaf, which
must be the same one; memory is bounded by `PENDING_LINES_MAX` hashes and by `LEAVES_AT_A_TIME`. It must never write.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Collection
from typing import Final, NamedTuple

from minikms.api.base64 import decode_exact, encode_text
from minikms.audit import record
from minikms.audit.chain import PUBLIC_KEY_BYTES
from minikms.audit.following import LogFollower, segment_before
from minikms.audit.reader import DamagedSegmentError
from minikms.audit.record import Event, LineRef, MalformedLineError
from minikms.audit.rules import Trust
from minikms.audit.tree import leaf_of, leaf_of_entry
from minikms.audit.verify import Verifier
from minikms_auditor.store import TreeLine

LEAVES_AT_A_TIME: Final = 65_536
"""The leaves in one commit: as many as fill a tile of the second level."""
PENDING_LINES_MAX: Final = 1_000_000
"""Lines without a signed line after them. The daemon signs at least every 10,000."""
READ_LINES: Final = 4096


class LogFaultError(Exception):
    """The log is not one that continues the tree. Its text is for the operator."""


class UnknownLogError(LogFaultError):
    """A log begins with a public key that nobody has configured or accepted."""

    def __init__(self, log_id: str, public_key: bytes) -> None:
        super().__init__(
            f"the log {log_id} begins with the public key {encode_text(public_key)}, which is not known: if it is the "
            "daemon's, run `minikms-auditor accept-log`"
        )
        self.log_id = log_id
        self.public_key = public_key


class Grown(NamedTuple):
    """Leaves that continue the tree. first_seq: of the first one's line. line: that of the last one. keys: public keys
    that `audit_key` lines among them have named.
    """

    first_seq: int
    leaves: list[bytes]
    line: TreeLine
    keys: tuple[bytes, ...]


class Tail:
    """Reads one log. line, leaf: the last line of it that the tree has, and its leaf hash; None to begin with the log.

    trusted: public keys that the log may begin with. may_be_cut: the log may begin with a later segment, whose earlier
    ones were removed.
    """

    def __init__(
        self,
        directory: str,
        log_id: str,
        *,
        line: TreeLine | None,
        leaf: bytes = b"",
        trusted: Collection[bytes] = (),
        may_be_cut: bool = False,
    ) -> None:
        self.log_id = log_id
        self._line = line
        self._leaf = leaf
        self._trusted = frozenset(trusted)
        self._may_be_cut = may_be_cut
        self._verifier: Verifier | None = None
        self._pending: list[bytes] = []
        self._keys: list[bytes] = []
        self._fault: LogFaultError | None = None
        after_seq = 0 if line is None else line.seq - 1
        after = segment_before(directory, line.seq) if line is not None else 0
        self._follower = LogFollower(directory, after_seq=after_seq, after_segment=after)
        self.seq = after_seq
        """The last line that was read."""

    def close(self) -> None:
        self._follower.close()

    def read(self, durable: LineRef) -> Grown | None:
        """More leaves, at most about `LEAVES_AT_A_TIME`, from lines up to `durable`; None if there are none yet.

        Raises LogFaultError, OSError. After either, this reader is of no more use.
        """
        if self._fault is not None:
            raise self._fault
        leaves: list[bytes] = []
        last: TreeLine | None = None
        until = max(durable.seq, 0 if self._line is None else self._line.seq)
        while self.seq < until and len(leaves) < LEAVES_AT_A_TIME:
            try:
                for line in self._lines(until, durable):
                    signed = self._feed(line, durable)
                    if signed is not None:
                        leaves += self._pending
                        self._pending.clear()
                        last = signed
            except LogFaultError as error:
                if last is None:
                    raise
                self._fault = error  # after what was verified before it
                break
        if last is None:
            return None
        keys, self._keys = tuple(self._keys), []
        return Grown(last.seq - len(leaves) + 1, leaves, last, keys)

    def _lines(self, until: int, durable: LineRef) -> list[bytes]:
        try:
            lines = self._follower.read(min(until - self.seq, READ_LINES))
        except DamagedSegmentError as error:
            raise LogFaultError(str(error)) from None
        if not lines and until > durable.seq:
            raise LogFaultError(
                f"the log has no line {self.seq + 1}, the tree has line {until}, and the daemon has written line "
                f"{durable.seq}: log and keys are an older copy"
            )
        if not lines:
            raise LogFaultError(f"the log has no line {self.seq + 1}, and the daemon has written line {until}")
        return lines

    def _feed(self, line: bytes, durable: LineRef) -> TreeLine | None:
        """Verify the next line. Returns it if it is a signed one, which covers all that were pending."""
        begins = self._verifier is None
        verifier = self._verifier or self._begin(line)
        self._verifier = verifier
        key = verifier.key.public_key
        verifier.feed(line)
        if verifier.findings:
            raise LogFaultError(f"the log is not intact: {verifier.findings[0].text}")
        head = verifier.chain.head
        if head is None or verifier.log_id != self.log_id:
            raise LogFaultError(f"the log is {verifier.log_id}, and the daemon writes {self.log_id}")
        seq = head.seq
        if seq == durable.seq and not hmac.compare_digest(head.sig, durable.sig):
            raise LogFaultError(f"line {seq} of the log is not the line that the daemon has written")
        self.seq = seq
        if begins and self._line is not None and seq == self._line.seq:
            return None  # the tree has it
        self._pending.append(leaf_of(line))
        if len(self._pending) > PENDING_LINES_MAX:
            raise LogFaultError(f"more than {PENDING_LINES_MAX} lines follow without a signed one")
        if verifier.key.public_key != key and key is not None and verifier.key.public_key is not None:
            self._keys.append(verifier.key.public_key)
        if verifier.covered_seq != seq or key is None:
            return None
        return TreeLine(self.log_id, seq, head.sig, key)

    def _begin(self, line: bytes) -> Verifier:
        """The verifier for the first line that was read."""
        try:
            event = record.parse_line(line)[0]
        except MalformedLineError as error:
            raise LogFaultError(f"the log is not intact: {error}") from None
        if self._line is not None:
            return self._continue(event, line, self._line)
        genesis = event.type == record.TYPE_GENESIS
        if not genesis and not self._may_be_cut:
            raise LogFaultError(f"the log begins with line {event.seq}: its earlier lines were removed")
        named = str(event.facts.get("public_key", ""))
        if named not in map(encode_text, self._trusted):
            raise UnknownLogError(str(event.facts.get("log_id", "")), decode_exact(named, PUBLIC_KEY_BYTES) or b"")
        return Verifier(Trust(public_keys=self._trusted))

    def _continue(self, event: Event, line: bytes, last: TreeLine) -> Verifier:
        """Begin at the last line that the tree has; or after it, if it was the last one of a file that was removed."""
        if event.seq == last.seq:
            if not hmac.compare_digest(leaf_of(line), self._leaf):
                raise LogFaultError(f"line {last.seq} of the log is not the one in the tree: the log was replaced")
            return Verifier(Trust(public_keys=frozenset((last.public_key,))), from_signed_line=True)
        if event.type == record.TYPE_SEGMENT_OPEN and event.seq == last.seq + 1:
            with contextlib.suppress(ValueError, TypeError):
                entry = bytes.fromhex(str(event.facts.get("previous_sha256")))
                if hmac.compare_digest(leaf_of_entry(entry), self._leaf):
                    return Verifier(Trust(public_keys=frozenset((last.public_key,))))
        raise LogFaultError(f"the log has no line {last.seq}, the last one of the tree: it goes on with {event.seq}")
