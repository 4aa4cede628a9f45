"""A signing key in a PKCS#11 token: Ed25519 (CKM_EDDSA) or ECDSA on P-256 (CKM_ECDSA).

Owns: the URI of a key (RFC 7512), the PIN file, and the session. Invariants: exactly one token and one key match the
URI; the key stays the same one over reconnections; a PIN that the token refused is not tried again until its file
changes, since a token locks itself after a few wrong ones, and no PIN is tried if the next wrong one would lock it: a
process that is started again does not know what the one before has tried. The PIN is a Python string for the time of
the login: the library takes nothing else. It must never put it into an error, nor what the token says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import urllib.parse
from typing import Any, Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from minikms_tokens.signing import Algorithm, TimedCalls, TokenError, check_signature

try:
    import pkcs11
    from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass, TokenFlag
    from pkcs11.exceptions import (
        PinExpired,
        PinIncorrect,
        PinLenRange,
        PinLocked,
        PKCS11Error,
        TokenNotPresent,
        UserAlreadyLoggedIn,
    )
except ImportError:
    raise TokenError(
        "pkcs11: keys need a library: install the wheel of progressdb-minikms with its extra `pkcs11`"
    ) from None

URI_CHARS_MAX: Final = 2048
PIN_BYTES_MAX: Final = 256
_PATH: Final = ("token", "serial", "manufacturer", "model", "object", "id", "type")
_QUERY: Final = ("module-path", "pin-source")
_VALUE: Final = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?|&]|%[0-9A-Fa-f]{2})*", re.ASCII)
"""RFC 7512, section 2.3, and the characters that some modules put into paths."""
_P256_PARAMETERS: Final = bytes.fromhex("06082a8648ce3d030107")
_P256_POINT_BYTES: Final = 65
_ED25519_BYTES: Final = 32
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OTHERS_READ: Final = stat.S_IRWXG | stat.S_IRWXO
_LAST_TRY: Final = TokenFlag.USER_PIN_FINAL_TRY


class KeyUri(NamedTuple):
    """A parsed URI. `token` and `key`: what has to match, by the names of the URI."""

    token: dict[str, str]
    label: str | None
    key_id: bytes | None
    module: str
    pin_file: str


def parse_uri(uri: str) -> KeyUri:
    """Raises TokenError, whose text does not quote the URI: it might hold a PIN."""
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    if len(uri) > URI_CHARS_MAX:
        raise TokenError(f"a pkcs11: URI has at most {URI_CHARS_MAX} characters")
    if "pin-value=" in query:
        raise TokenError("pin-value shows the PIN to everyone who sees the URI: write pin-source=file:/PATH")
    named, asked = _attributes(path, ";", _PATH), _attributes(query, "&", _QUERY)
    if named.pop("type", b"private") != b"private":
        raise TokenError("a pkcs11: URI for signing names a key with type=private")
    label, key_id = named.pop("object", None), named.pop("id", None)
    if (label is None and key_id is None) or not named.keys() & {"token", "serial"}:
        raise TokenError("a pkcs11: URI names its token with token= or serial=, and its key with object= or id=")
    if asked.keys() != set(_QUERY):
        raise TokenError("a pkcs11: URI ends with ?module-path=/PATH&pin-source=file:/PATH")
    module, source = os.fsdecode(asked["module-path"]), os.fsdecode(asked["pin-source"])
    pin_file = source.removeprefix("file:").removeprefix("//") if source.startswith("file:") else ""
    if not (os.path.isabs(module) and os.path.isabs(pin_file)) or "\0" in module + pin_file:
        raise TokenError("module-path is an absolute path, and pin-source is file: with an absolute path")
    try:
        token = {name: value.decode() for name, value in named.items()}
        return KeyUri(token, None if label is None else label.decode(), key_id, module, pin_file)
    except UnicodeDecodeError:
        raise TokenError("the names in a pkcs11: URI are UTF-8") from None


def _attributes(text: str, separator: str, known: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if name not in known or not equals or name in found or _VALUE.fullmatch(value) is None:
            raise TokenError(f"the attributes of a pkcs11: URI are {', '.join(known)}: each once, percent-encoded")
        found[name] = urllib.parse.unquote_to_bytes(value)
    return found


class _Session(NamedTuple):
    session: Any
    key: Any
    algorithm: Algorithm
    public_key: bytes


class _PinFile(NamedTuple):
    """A version of the PIN file, by what changes when it is written."""

    inode: int
    written_ns: int
    bytes: int


class Pkcs11Signer:
    """A key in a token. `public_key` and `algorithm` ask the token when they are first used."""

    def __init__(self, uri: str) -> None:
        self._uri = parse_uri(uri)
        self._calls = TimedCalls("the PKCS#11 token")
        self._session: _Session | None = None
        self._known: tuple[Algorithm, bytes] | None = None
        self._refused: _PinFile | None = None
        self._was_closed = False

    def __repr__(self) -> str:
        return "<Pkcs11Signer>"

    @property
    def algorithm(self) -> Algorithm:
        return (self._known or self._calls.call(self._learn))[0]

    def public_key(self) -> bytes:
        return (self._known or self._calls.call(self._learn))[1]

    def sign(self, message: bytes) -> bytes:
        return self._calls.call(lambda: self._sign(message))

    def close(self) -> None:
        """A later call initializes the library anew: a process that was hardened since learns at once whether it can
        read its configuration still.
        """
        self._calls.call(self._drop)
        self._was_closed = True

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _learn(self) -> tuple[Algorithm, bytes]:
        self._connected()
        if self._known is None:
            raise TokenError("the PKCS#11 token has no such key")
        return self._known

    def _sign(self, message: bytes) -> bytes:
        """A session may have ended since the last call: then another one is opened."""
        why = ""
        for attempt in range(2):
            one = self._connected()
            try:
                if one.algorithm == "ed25519":
                    signature = bytes(one.key.sign(message, mechanism=Mechanism.EDDSA))
                else:
                    both = bytes(one.key.sign(hashlib.sha256(message).digest(), mechanism=Mechanism.ECDSA))
                    half = len(both) // 2
                    signature = encode_dss_signature(int.from_bytes(both[:half]), int.from_bytes(both[half:]))
            except PKCS11Error as error:
                why = type(error).__name__
                self._drop()
                if attempt == 0:
                    continue
                break
            check_signature(one.algorithm, one.public_key, signature, message)
            return signature
        raise TokenError(f"the PKCS#11 token does not sign: {why}")

    def _connected(self) -> _Session:
        if self._session is None:
            why = ""
            for again in (self._was_closed, True):
                try:
                    self._session = self._open(initialize=again)
                    self._was_closed = False
                    break
                except PKCS11Error as error:
                    why = type(error).__name__
            if self._session is None:
                raise TokenError(f"the PKCS#11 token is away: {why}")
        return self._session

    def _open(self, *, initialize: bool) -> _Session:
        """Raises TokenError, and PKCS11Error where the token is away."""
        if not os.path.isfile(self._uri.module):
            raise TokenError(f"there is no PKCS#11 module {self._uri.module}")
        library = pkcs11.lib(self._uri.module)
        if initialize:  # a module that lost its connection keeps failing until then; other sessions of it end
            library.reinitialize()
        tokens = [token for token in library.get_tokens() if self._is_ours(token)]
        if not tokens and not initialize:
            raise TokenNotPresent
        if len(tokens) != 1:
            raise TokenError(f"{len(tokens) or 'no'} PKCS#11 tokens match the URI, and one has to")
        session = self._log_in(tokens[0])
        try:
            return self._find(session)
        except BaseException:
            with contextlib.suppress(PKCS11Error):
                session.close()
            raise

    def _is_ours(self, token: Any) -> bool:
        has = {
            "token": token.label,
            "serial": token.serial,
            "manufacturer": token.manufacturer_id,
            "model": token.model,
        }
        return all(_text(has[name]) == wanted for name, wanted in self._uri.token.items())

    def _log_in(self, token: Any) -> Any:
        pin, version = _read_pin(self._uri.pin_file)
        if version == self._refused:
            raise TokenError("the PKCS#11 token refused the PIN: correct its file, and it is tried again")
        if token.flags & _LAST_TRY:
            raise TokenError("one more wrong PIN would lock the PKCS#11 token: log in to it with another program first")
        try:
            return token.open(user_pin=pin)
        except UserAlreadyLoggedIn:  # by another session of this process
            return token.open()
        except (PinIncorrect, PinLocked, PinExpired, PinLenRange) as error:
            self._refused, why = version, type(error).__name__
        finally:
            del pin
        raise TokenError(f"the PKCS#11 token refused the PIN ({why}): correct its file, and it is tried again")

    def _find(self, session: Any) -> _Session:
        wanted: dict[Any, Any] = {}
        if self._uri.label is not None:
            wanted[Attribute.LABEL] = self._uri.label
        if self._uri.key_id is not None:
            wanted[Attribute.ID] = self._uri.key_id
        keys = list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY, **wanted}))
        if len(keys) != 1:
            raise TokenError(f"{len(keys) or 'no'} private keys of the PKCS#11 token match the URI, and one has to")
        same = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.ID: keys[0].id}
        public = [key for key in session.get_objects(same) if key.key_type == keys[0].key_type]
        if len(public) != 1:
            raise TokenError("the PKCS#11 token has no public key with the id of the private key")
        algorithm, encoded = _public_key(public[0])
        if self._known is not None and self._known != (algorithm, encoded):
            raise TokenError("the PKCS#11 token has another key than before under the same name")
        self._known = algorithm, encoded
        return _Session(session, keys[0], algorithm, encoded)

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(PKCS11Error):
                session.session.close()


def _text(value: bytes | str) -> str:
    """Of a field that a token pads."""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else value).rstrip(" \0")


def _public_key(key: Any) -> tuple[Algorithm, bytes]:
    """Raises TokenError, PKCS11Error."""
    point = bytes(key[Attribute.EC_POINT])
    if key.key_type == KeyType.EC_EDWARDS:
        raw = point[2:] if point[:2] == b"\x04\x20" and len(point) == _ED25519_BYTES + 2 else point
        if len(raw) == _ED25519_BYTES:
            return "ed25519", raw
    elif key.key_type == KeyType.EC and bytes(key[Attribute.EC_PARAMS]) == _P256_PARAMETERS:
        raw = point[2:] if len(point) == _P256_POINT_BYTES + 2 else point
        with contextlib.suppress(ValueError):
            decoded = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), raw)
            return "ecdsa-p256-sha256", decoded.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    raise TokenError("the key of the PKCS#11 token is neither Ed25519 nor ECDSA on P-256")


def _read_pin(path: str) -> tuple[str, _PinFile]:
    """The PIN, without the newline at its end. Raises TokenError."""
    why = "can't be read"
    with contextlib.suppress(OSError, UnicodeDecodeError), open(os.open(path, _READ_FLAGS), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & _OTHERS_READ:
            why = "must be a regular file that only its owner may read (chmod 0400)"
        elif status.st_size > PIN_BYTES_MAX:
            why = f"has more than {PIN_BYTES_MAX} bytes"
        else:
            pin = file.read(PIN_BYTES_MAX).decode().rstrip("\n")
            return pin, _PinFile(status.st_ino, status.st_mtime_ns, status.st_size)
    raise TokenError(f"the PIN file {path} {why}")
