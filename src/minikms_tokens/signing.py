"""The interface of a signing key that is elsewhere, and the time limit of its calls.

Owns: `Signer`, `TokenError`, the check of each signature, and calls into libraries that may block. Invariants: one call
at a time for each signer; a call that has not returned in time goes on in its thread, and until it ends every further
one is refused. It must never put what a library or a token says into an error as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Literal, Protocol, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

CALL_SECONDS_MAX: Final = 20.0
"""How long a caller waits for a token or a service."""

Algorithm = Literal["ed25519", "ecdsa-p256-sha256"]
T = TypeVar("T")


class TokenError(Exception):
    """A key can't be used now, or not at all. The text is a sentence without secrets, which may be logged."""


class Signer(Protocol):
    """A signing key that is elsewhere. Its methods block, for CALL_SECONDS_MAX at most, and raise TokenError."""

    @property
    def algorithm(self) -> Algorithm: ...

    def public_key(self) -> bytes:
        """ed25519: 32 raw bytes. ecdsa-p256-sha256: SubjectPublicKeyInfo in DER (RFC 5480)."""
        ...

    def sign(self, message: bytes) -> bytes:
        """ed25519: 64 bytes (RFC 8032). ecdsa-p256-sha256: r and s in DER (RFC 3279)."""
        ...

    def close(self) -> None:
        """Ends the session. A later call opens another one."""
        ...


class TimedCalls:
    """Calls that may block, one at a time and with a time limit. `what`: how errors name the other side."""

    seconds_max = CALL_SECONDS_MAX
    error = TokenError
    """The class of the errors that are raised here."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None

    def call(self, act: Callable[[], T]) -> T:
        """The value of `act`, which runs in another thread. Raises its TokenError, or one if it takes too long."""
        done: list[T] = []
        failed: list[TokenError] = []

        def run() -> None:
            try:
                done.append(act())
            except TokenError as error:
                failed.append(error)
            except Exception as error:  # noqa: BLE001  whatever a library raises, its text is not for a log
                failed.append(self.error(f"{self._what} failed: {type(error).__name__}"))

        with self._lock:
            if self._running is not None and self._running.is_alive():
                raise self.error(f"{self._what} has not answered an earlier call yet")
            self._running = threading.Thread(target=run, name="token", daemon=True)
            self._running.start()
            self._running.join(self.seconds_max)
        if done:
            return done[0]
        raise failed[0] if failed else self.error(f"{self._what} did not answer in {self.seconds_max:g} s")


def check_signature(algorithm: Algorithm, public_key: bytes, signature: bytes, message: bytes) -> None:
    """Checks that `signature` is valid: a token may fail in any way, and its key may be replaced. Raises TokenError."""
    try:
        if algorithm == "ed25519":
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        else:
            _p256(public_key).verify(signature, message, ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        raise TokenError("the signature does not verify under the public key of the key that made it") from None


def check_p256(public_key: bytes) -> None:
    """Checks that this is a SubjectPublicKeyInfo of a P-256 key. Raises TokenError."""
    try:
        _p256(public_key)
    except ValueError:
        raise TokenError("the key is not an elliptic-curve key on P-256") from None


def _p256(public_key: bytes) -> EllipticCurvePublicKey:
    key = load_der_public_key(public_key)
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise ValueError("another kind of key")  # noqa: TRY004  the caller has one error for all of these
    return key
