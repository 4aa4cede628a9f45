"""Strict MessagePack: the body of a batch is read in one way only, or refused, as `server.strictjson` does it.

Owns: decoding a request body into an array type of `minikms.api.msgpack`. Invariants:
- A body is one array with the members of its type, each of the declared type: no more members, no byte after it.
- Nothing is allocated by a length that the body only declares: msgspec checks that the bytes are there, and the number
  of items is compared with its bound before the first one is decoded.
- Error texts may name the place of a value by its index; they never show a value, and are truncated.
- `body` is not copied as a whole; each value becomes one object.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from minikms import api
from minikms.api.errors import InvalidRequestError
from minikms_daemon.server.strictjson import refused_sentence

R = TypeVar("R", bound=api.Request)

_ARRAY_16: Final = 0xDC
_ARRAY_32: Final = 0xDD
_HEADER_BYTES: Final = 5
"""Length of the longest array header."""


class Decoder(Generic[R]):
    """Decodes the requests of one verb."""

    def __init__(self, kind: type[R]) -> None:
        self._decode = msgspec.msgpack.Decoder(api.array_form(kind)).decode
        self._decode_around_items = msgspec.msgpack.Decoder(api.form_with_raw_items(kind)).decode

    def decode(self, body: memoryview | bytes) -> R:
        """A request with at most `api.BATCH_ITEMS_MAX` items. If there are more, its `items` is a `range` of their
        number, so that it is refused and audited as in JSON, and takes no more memory than its body.

        Raises InvalidRequestError.
        """
        try:
            try:
                return self._decode(body)
            except msgspec.ValidationError:
                request: Any = self._decode_around_items(body)
                with memoryview(request.items) as items:
                    count = _array_length(bytes(items[:_HEADER_BYTES]))
                request.items = range(count)  # and no view of the body, which the engine is about to release
                if count <= api.BATCH_ITEMS_MAX:
                    raise
                return cast(R, request)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(refused_sentence("The body does not have the expected form", error)) from None
        except msgspec.DecodeError as error:
            raise InvalidRequestError(refused_sentence("The body is not valid MessagePack", error)) from None
        except UnicodeDecodeError:
            raise InvalidRequestError("The body is not valid UTF-8.") from None
        except RecursionError:
            raise InvalidRequestError("The body is nested too deeply.") from None


def _array_length(header: bytes) -> int:
    """The number of elements that the first bytes of a value declare; 0 if it is no array of more than 15."""
    if header[0] == _ARRAY_16:
        return int.from_bytes(header[1:3])
    if header[0] == _ARRAY_32:
        return int.from_bytes(header[1:5])
    return 0
