"""Submitting tree checkpoints to witnesses (C2SP tlog-witness).

Owns: the request `add-checkpoint` and its answers, what each witness is known to have, and the round in which all of
them are asked at once. Invariants: a round is bounded in time; a cosignature is used only if it verifies; a witness
that knows another or a larger tree raises WitnessAlarmError, which is never only a failure, also if it comes after the
round. It must never send anything but a tree checkpoint and a consistency proof.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple

from minikms.api.base64 import encode_text
from minikms.audit import tree
from minikms.audit.note import Note, NoteError, Signature, VerifierKey, cosigned_at, parse_signatures
from minikms.audit.tree import Node
from minikms.processes.http_client import ExchangeError, HttpClient
from minikms.processes.tls_files import client_context
from minikms_auditor.config import AuditorFiles, Witness

ROUND_SECONDS_MAX: Final = 10.0
"""The time in which all witnesses must answer: less than the time for which the daemon takes an auditor for attached.
"""
GRACE_SECONDS: Final = 1.0
"""How much longer the others may take once a quorum has answered: one of them may know another tree."""
ATTEMPTS: Final = 3
BACKOFF_SECONDS_MAX: Final = 60.0
CLOCK_SECONDS_MAX: Final = 300
"""How far ahead the clock of a witness may be."""
_SIZE: Final = re.compile(rb"(0|[1-9][0-9]{0,18})\n")


class WitnessAlarmError(Exception):
    """A witness knows a tree that this one does not extend. Its text is for the operator."""


class WitnessFailedError(Exception):
    """A witness did not cosign now. Its text is for the operator."""


class Submission(NamedTuple):
    """A tree checkpoint to cosign: its note, size, and the hashes of its tree."""

    note: Note
    size: int
    node: Node


class WitnessClient:
    def __init__(self, witness: Witness, files: AuditorFiles) -> None:
        self.url = witness.url
        self.key: VerifierKey = witness.verifier
        self.error = ""
        """Why it did not cosign the last time; empty if it did."""
        self.cosigned_at = 0
        """Unix seconds of its last cosignature."""
        self.known_size = 0
        """The size of the tree that the witness cosigned last, as far as it is known."""
        self.retry_s = 0.0
        """Monotonic seconds before which it is not asked."""
        self._failures = 0
        context = client_context(files, ca=witness.ca) if witness.url.startswith("https:") else None
        self.http = HttpClient(witness.url, context, agent="minikms-auditor")

    def submit(self, submission: Submission, ends_s: float) -> Signature:
        """Its cosignature. Raises WitnessAlarmError, WitnessFailedError."""
        try:
            signature = self._submit(submission, ends_s)
        except (WitnessFailedError, ExchangeError, OSError) as error:
            self._failures += 1
            self.retry_s = time.monotonic() + min(2.0**self._failures, BACKOFF_SECONDS_MAX)
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.error = f"the witness {self.key.name}: {text}"
            raise WitnessFailedError(self.error) from None
        except WitnessAlarmError as error:
            self.error = str(error)
            raise
        self._failures, self.error, self.known_size = 0, "", submission.size
        self.cosigned_at = cosigned_at(signature) or 0
        return signature

    def _submit(self, submission: Submission, ends_s: float) -> Signature:
        old, is_disputed = min(self.known_size, submission.size), False
        for _ in range(ATTEMPTS):
            proof = tree.consistency_proof(submission.node, old, submission.size)
            lines = [f"old {old}", *map(encode_text, proof), "", ""]
            content = "\n".join(lines).encode() + submission.note.encode()
            headers = {"Content-Type": "text/plain; charset=utf-8"}
            status, body, _ = self.http.post(f"{self.http.path}/add-checkpoint", content, headers, ends_s)
            if status == 200:
                return self._cosignature(submission.note.text, body)
            if status == 422:
                raise WitnessAlarmError(f"the witness {self.key.name} knows a tree that this one does not extend")
            match = _SIZE.fullmatch(body) if status == 409 else None
            if status == 409 and match is None and old == submission.size and not is_disputed:
                # It knows another tree of this size, or this is no answer of a witness. One names its size here:
                old, is_disputed = 0, True
                continue
            known = int(match[1]) if match else old
            if known > submission.size:
                raise WitnessAlarmError(
                    f"the witness {self.key.name} knows a tree of {known} leaves, and this one has {submission.size}: "
                    "the state of the auditor or the log is an older copy"
                )
            if match and known == submission.size and (is_disputed or old == known):
                raise WitnessAlarmError(f"the witness {self.key.name} knows another tree of {known} leaves")
            if known == old:
                raise WitnessFailedError(f"it answers {status}")
            old = self.known_size = known
        raise WitnessFailedError("it names another size at each attempt")

    def _cosignature(self, text: str, body: bytes) -> Signature:
        try:
            signatures = parse_signatures(body.decode("utf-8"))
        except (NoteError, UnicodeDecodeError):
            raise WitnessFailedError("its answer is no cosignature") from None
        for signature in signatures:
            if self.key.is_named_by(signature) and self.key.verifies(text, signature):
                if (cosigned_at(signature) or 0) > time.time() + CLOCK_SECONDS_MAX:
                    raise WitnessFailedError("its clock is ahead")
                return signature
        raise WitnessFailedError("its answer has no valid cosignature by its key")


class Round(NamedTuple):
    """What witnesses answered. alarm: the text of the first alarm, else empty."""

    signatures: tuple[Signature, ...]
    alarm: str


class Witnesses:
    def __init__(self, configured: Sequence[Witness], files: AuditorFiles) -> None:
        self.clients = tuple(WitnessClient(witness, files) for witness in configured)
        self._threads = ThreadPoolExecutor(max(1, len(self.clients)), "witness")
        self._running: dict[WitnessClient, tuple[Future[Signature], Submission, float]] = {}
        """The requests under way, and when each must be answered."""

    def submit(self, submission: Submission, quorum: int) -> Round:
        """Ask all witnesses that are due, at once, and wait for at most `ROUND_SECONDS_MAX`; once a quorum has
        cosigned, for at most `GRACE_SECONDS` longer. `collect` gets an alarm of the others then.
        """
        until_s = ends_s = time.monotonic() + ROUND_SECONDS_MAX
        late: set[Future[Signature]] = set()
        for client in filter(self._is_due, self.clients):
            answer = self._threads.submit(client.submit, submission, ends_s)
            self._running[client] = answer, submission, ends_s
            late.add(answer)
        cosigned = 0
        while late and (left_s := until_s - time.monotonic()) > 0:
            done, late = wait(late, left_s, FIRST_COMPLETED)
            cosigned += sum(answer.exception() is None for answer in done)
            if cosigned >= quorum and until_s == ends_s:
                until_s = min(ends_s, time.monotonic() + GRACE_SECONDS)
        return self.collect(submission)

    def collect(self, newest: Submission | None = None) -> Round:
        """What was answered since the last call: alarms, and cosignatures of `sent`. Ends what takes too long."""
        signatures: list[Signature] = []
        alarm = ""
        for client, (answer, submission, ends_s) in list(self._running.items()):
            if not answer.done():
                if time.monotonic() >= ends_s:
                    client.http.abort()
                continue
            del self._running[client]
            try:
                signature = answer.result()
                if submission is newest:
                    signatures.append(signature)
            except WitnessAlarmError as error:
                alarm = alarm or str(error)
            except WitnessFailedError:
                continue  # the client keeps it
        return Round(tuple(signatures), alarm)

    def may_reach(self, quorum: int) -> bool:
        """Whether enough witnesses for a quorum can be asked now: after a failure each has a pause."""
        return sum(map(self._is_due, self.clients)) >= quorum

    def _is_due(self, client: WitnessClient) -> bool:
        return client not in self._running and time.monotonic() >= client.retry_s

    def close(self) -> None:
        for client in self.clients:
            client.http.abort()
        self._threads.shutdown(wait=False, cancel_futures=True)
