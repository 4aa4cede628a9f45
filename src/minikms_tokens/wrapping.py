"""The interface of a key that is elsewhere and wraps a root key.

Owns: `Wrapper` and its two errors, the time limit of calls, the check of an opened key, and the reading of files that a
source names. Invariants: a wrapped key opens only with the context under which it was wrapped; `UnwrapRefusedError` is
raised only for what the provider itself said, authenticated: by TLS with its name, or by the return code of a device of
this machine; everything else, a time-out too, is `AwayError`. A root key is written into the caller's memory. It must
never put it, a PIN, a token, or the text of a provider into an error.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final, Protocol

from minikms_tokens.signing import TimedCalls, TokenError

KEY_BYTES: Final = 32
BLOB_BYTES_MAX: Final = 16 * 1024
"""The size of a wrapped key."""
PROVIDER_SECONDS_MAX: Final = 15.0
"""How long a caller waits for a provider: less than the key service waits for its unlock service."""
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class UnwrapRefusedError(TokenError):
    """The provider says that it does not open this key: disabled, deleted, denied, a policy that is not met."""


class AwayError(TokenError):
    """The provider does not answer, or what it answers can't be trusted to be its own."""


class ProviderCalls(TimedCalls):
    """Calls of a provider, which is away if they fail or take too long."""

    seconds_max = PROVIDER_SECONDS_MAX
    error = AwayError


class Wrapper(Protocol):
    """A wrapping key that is elsewhere. Its methods block, for a bounded time, and raise TokenError. A session with the
    provider ends with the process.
    """

    def wrap(self, key: memoryview, context: str) -> bytes:
        """The wrapped key, at most BLOB_BYTES_MAX. `context`: 1 to 64 ASCII characters, bound to the result where the
        provider can bind it; the caller compares the opened key with a pin anyway.
        """
        ...

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        """Writes the KEY_BYTES of the wrapped key into `into`. Asks the provider anew at each call."""
        ...


def give(key: bytes | memoryview, into: memoryview, what: str) -> None:
    """Writes an opened key into the memory of the caller of `unwrap`, in the caller's thread: a call that was given up
    must not write it later. Raises AwayError for another length and for zeros.
    """
    if len(key) != KEY_BYTES or not any(key):
        into[:] = bytes(len(into))
        raise AwayError(f"{what} gives what is no root key")
    into[:] = key


OWN_IT: Final = "chown root:minikms-unlock and chmod 640, so that `configure` and the service can read it"


def read_file(path: str, what: str, bytes_max: int, *, is_secret: bool = False) -> bytes:
    """Reads a file that only root and this user can have written, and a secret one that only they can read. Raises
    AwayError.
    """
    why = f"can't be read by uid {os.geteuid()}: {OWN_IT}"
    with contextlib.suppress(OSError), open(os.open(path, _READ_FLAGS), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > bytes_max:
            why = f"is no regular file of at most {bytes_max} bytes"
        elif status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            why = f"must belong to root or to uid {os.geteuid()}, and nobody else may write it: {OWN_IT}"
        elif is_secret and status.st_mode & stat.S_IRWXO:
            why = f"can be read by other users: {OWN_IT}"
        else:
            return file.read(bytes_max)
    raise AwayError(f"the {what} {path} {why}")
