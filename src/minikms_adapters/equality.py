"""MACs by which equal texts are found: what the blind indexes of SQLAlchemy and of Django have in common.

Owns: the normalisations, what a MAC is bound to, and the requests for MACs. Invariants: the name of a normalisation is
part of what is authenticated, so that MACs of two normalisations are never equal; a normalisation never changes:
another one has another name. It must never return a plaintext.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal
from unicodedata import normalize

from minikms.client import MacItem
from minikms_adapters.errors import NotSupportedError
from minikms_adapters.records import ColumnValues, Place, Steps, ask_kms, bound

Normalization = Literal["", "nfc", "casefold"]
_NORMALIZATIONS: Final[dict[str, Callable[[str], str]]] = {
    "nfc": lambda text: normalize("NFC", text.strip()),
    "casefold": lambda text: normalize("NFC", normalize("NFD", text.strip()).casefold()),
}
"""The text that stands for all that are equal to it: without white space around it, and without its case."""


def index_values(framework: str, prefix: str, key: str, normalization: Normalization) -> ColumnValues:
    """The values of a blind index. Without a normalisation they are those of an encrypted column."""
    values = ColumnValues.of(framework, prefix, str, key, None)
    if not normalization:
        return values
    if normalization not in _NORMALIZATIONS:
        raise NotSupportedError(f"a normalization is one of: {', '.join(_NORMALIZATIONS)}")
    return values._replace(framework=f"{framework} {normalization} 1", to_text=_NORMALIZATIONS[normalization])


def macs(values: Sequence[tuple[Place, bytes]]) -> Steps[list[bytes]]:
    """The MAC of each value, with one request for each key."""
    results: dict[int, bytes] = {}
    for thread in dict.fromkeys(place.thread for place, _ in values):
        items = {
            index: MacItem(plaintext=plaintext, aad=bound(place))
            for index, (place, plaintext) in enumerate(values)
            if place.thread == thread
        }
        key = yield ask_kms("get_or_create_dek_for_thread", thread, purpose="mac")
        results |= zip(items, (yield ask_kms("mac", key.key_id, list(items.values()), thread_id=thread)), strict=True)
    return [results[index] for index in range(len(values))]
