"""A root key for the tests of wrappers, and what opens it."""

import traceback
from typing import Final

from minikms_tokens import TokenError, Wrapper

KEY: Final = bytes(range(32))
CONTEXT: Final = "kr_0123456789abcdef"
NO_KEYS: Final = {"31 bytes": b"k" * 31, "33 bytes": b"k" * 33, "zeros": bytes(32), "none": b""}
"""What is no root key."""
_BEFORE: Final = b"\xff" * 32


def wrap(wrapper: Wrapper, key: bytes = KEY) -> bytes:
    return wrapper.wrap(memoryview(bytearray(key)), CONTEXT)


def unwrapped(wrapper: Wrapper, blob: bytes, context: str = CONTEXT) -> bytes:
    """Raises what `unwrap` does, and AssertionError if its memory or its error then has a part of a key."""
    into = bytearray(_BEFORE)
    try:
        wrapper.unwrap(blob, context, memoryview(into))
    except TokenError as error:
        assert into in (bytes(32), _BEFORE)
        said = "".join(traceback.format_exception(error)) + repr(wrapper)
        assert KEY.hex() not in said and repr(KEY)[2:-1] not in said
        raise
    return bytes(into)
