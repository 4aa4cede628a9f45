"""The interface of a key that is elsewhere and wraps a root key.

Owns: `Wrapper` and its two errors. Invariants: a wrapped key opens only with the context under which it was wrapped;
`RefusedError` is raised only for what the provider itself said, authenticated: by TLS with its name, or by the return
code of a device of this machine; everything else, a time-out too, is `AwayError`. A root key is written into the
caller's memory. It must never put it, a PIN, a token, or the text of a provider into an error.
"""

from __future__ import annotations

from typing import Final, Protocol

from minikms_tokens.signing import TokenError

KEY_BYTES: Final = 32
BLOB_BYTES_MAX: Final = 16 * 1024
"""Of a wrapped key."""


class RefusedError(TokenError):
    """The provider says that it does not open this key: disabled, deleted, denied, a policy that is not met."""


class AwayError(TokenError):
    """The provider does not answer, or what it answers can't be trusted to be its own."""


class Wrapper(Protocol):
    """A wrapping key that is elsewhere. Its methods block, for a bounded time, and raise TokenError."""

    def wrap(self, key: memoryview, context: str) -> bytes:
        """The wrapped key, at most BLOB_BYTES_MAX. `context`: 1 to 64 ASCII characters, bound to the result where the
        provider can bind it; the caller compares the opened key with a pin anyway.
        """
        ...

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        """Writes the KEY_BYTES of the wrapped key into `into`. Asks the provider anew at each call."""
        ...

    def close(self) -> None:
        """Ends the session with the provider."""
        ...
