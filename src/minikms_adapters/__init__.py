"""Encrypted memory for agent frameworks and databases, whose keys stay in the key service.

Owns: one module for each framework, and `records`, which all of them use. A framework is imported by its own module
only, so that a program needs no other one. Invariants: no module holds a key; a record is bound to its place; what does
not open is an error, never a value and never a gap. Imports `minikms.client` and `minikms.api` only.
"""

from minikms_adapters.errors import (
    AdapterError,
    DestroyedRecordError,
    MigrationError,
    NotReadyError,
    NotSearchableError,
    NotSupportedError,
    PlaintextRecordError,
    RecordError,
    WrongPlaceError,
)

__all__ = [
    "AdapterError",
    "DestroyedRecordError",
    "MigrationError",
    "NotReadyError",
    "NotSearchableError",
    "NotSupportedError",
    "PlaintextRecordError",
    "RecordError",
    "WrongPlaceError",
]
