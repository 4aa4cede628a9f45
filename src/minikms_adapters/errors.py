"""The error tree of the adapters.

Owns: what a record, a search or a framework can do wrong. A failure of the key service itself stays a `KmsError` of
`minikms.client`. Invariant: no text holds a plaintext, a ciphertext or a key.
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of every error of the adapters."""


class RecordError(AdapterError):
    """A stored record that gives no value. `record` is its id."""

    reason = "can't be read"

    def __init__(self, record: str) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        return f"{self.record}: the record {self.reason}"


class PlaintextRecordError(RecordError):
    """The record was never encrypted, or something else replaced it."""

    reason = "is not encrypted"


class WrongPlaceError(RecordError):
    """The record was altered, or it is a record of another place, version or owner. Or its key is not one of this key
    service.
    """

    reason = "does not open in this place"


class DestroyedRecordError(RecordError):
    """The key of the record was destroyed: nothing can read it any more."""

    reason = "can't be read any more, because its key was destroyed"


class MigrationError(AdapterError):
    """Some threads can't be read. `failed` has the reason of each; `rewritten` is the number of the others that were
    rewritten.
    """

    def __init__(self, failed: dict[str, str], rewritten: int) -> None:
        super().__init__(f"{len(failed)} threads can't be read; the first: {next(iter(failed.values()))}")
        self.failed = failed
        self.rewritten = rewritten


class NotSearchableError(AdapterError):
    """A search, filter or order by something that the database holds encrypted."""


class NotSupportedError(AdapterError):
    """The inner saver, session or store can't do this."""


class NotReadyError(AdapterError):
    """The key service still reads its key files after a start, so it may not know each key. Try again."""
