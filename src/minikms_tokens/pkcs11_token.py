"""Keys in a PKCS#11 token. To sign: Ed25519 (CKM_EDDSA), ECDSA on P-256 (CKM_ECDSA). To wrap: AES-256 (CKM_AES_GCM),
RSA (CKM_RSA_PKCS_OAEP with SHA-256).

Owns: the URI of a key (RFC 7512), the PIN file, the session, and which outcomes are refusals of the token. Invariants:
exactly one token and one key match the URI; a signing key stays the same one over reconnections; a wrapping key can't
leave its token; a PIN that the token refused is not tried again until its file changes, since a token locks itself
after a few wrong ones, and no PIN is tried if the next wrong one would lock it: a process that is started again does
not know what the one before has tried. PIN and root key are Python objects for the time of a call: the library takes
and gives nothing else. It must never put them into an error, nor what the token says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from minikms_tokens.signing import Algorithm, TimedCalls, TokenError, check_signature
from minikms_tokens.wrapping import KEY_BYTES, AwayError, ProviderCalls, UnwrapRefusedError, give

try:
    import pkcs11
    from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass, TokenFlag
    from pkcs11.exceptions import (
        AttributeTypeInvalid,
        EncryptedDataInvalid,
        EncryptedDataLenRange,
        FunctionRejected,
        PinExpired,
        PinIncorrect,
        PinLenRange,
        PinLocked,
        PKCS11Error,
        TokenNotPresent,
        UserAlreadyLoggedIn,
        UserPinNotInitialized,
    )
    from pkcs11.mechanisms import GCMParams
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
_PIN_REFUSALS: Final = (PinIncorrect, PinLocked, PinExpired, PinLenRange, UserPinNotInitialized)
_REFUSALS: Final = (*_PIN_REFUSALS, EncryptedDataInvalid, EncryptedDataLenRange, FunctionRejected)
"""What only the token itself says. A refusal too: it has no key of the URI, or one that may not decrypt. Every other
return code can come from a module that has lost its token.
"""
_CLASSES: Final = {"private": ObjectClass.PRIVATE_KEY, "secret-key": ObjectClass.SECRET_KEY}
BLOB_VERSION: Final = 1
_AES_GCM: Final = 1
_RSA_OAEP: Final = 2
_IV_BYTES: Final = 12
_TAG_BYTES: Final = 16
_RSA_BITS_MIN: Final = 2048
_OAEP_PADDING: Final = OAEP(MGF1(SHA256()), SHA256(), None)
_OAEP_PARAMETERS: Final = (Mechanism.SHA256, MGF.SHA256, None)
K = TypeVar("K")
T = TypeVar("T")


class KeyUri(NamedTuple):
    """A parsed URI. `token`, `label` and `key_id`: what has to match. `kinds`: of objects, by the names of the URI."""

    token: dict[str, str]
    kinds: tuple[str, ...]
    label: str | None
    key_id: bytes | None
    module: str
    pin_file: str


def parse_uri(uri: str, kinds: tuple[str, ...] = ("private",)) -> KeyUri:
    """`kinds`: of keys that the caller can use. Raises TokenError without the URI, which might hold a PIN."""
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    if len(uri) > URI_CHARS_MAX:
        raise TokenError(f"a pkcs11: URI has at most {URI_CHARS_MAX} characters")
    if "pin-value=" in query:
        raise TokenError("pin-value shows the PIN to everyone who sees the URI: write pin-source=file:/PATH")
    named, query_attributes = _attributes(path, ";", _PATH), _attributes(query, "&", _QUERY)
    wanted = named.pop("type", b"")
    if wanted and os.fsdecode(wanted) not in kinds:
        raise TokenError(f"the key of a pkcs11: URI has type={' or type='.join(kinds)} here")
    label, key_id = named.pop("object", None), named.pop("id", None)
    if (label is None and key_id is None) or not named.keys() & {"token", "serial"}:
        raise TokenError("a pkcs11: URI names its token with token= or serial=, and its key with object= or id=")
    if query_attributes.keys() != set(_QUERY):
        raise TokenError("a pkcs11: URI ends with ?module-path=/PATH&pin-source=file:/PATH")
    module, source = os.fsdecode(query_attributes["module-path"]), os.fsdecode(query_attributes["pin-source"])
    pin_file = source.removeprefix("file:").removeprefix("//") if source.startswith("file:") else ""
    if not (os.path.isabs(module) and os.path.isabs(pin_file)) or "\0" in module + pin_file:
        raise TokenError("module-path is an absolute path, and pin-source is file: with an absolute path")
    try:
        token = {name: value.decode() for name, value in named.items()}
        return KeyUri(
            token,
            (os.fsdecode(wanted),) if wanted else kinds,
            None if label is None else label.decode(),
            key_id,
            module,
            pin_file,
        )
    except UnicodeDecodeError:
        raise TokenError("the names in a pkcs11: URI are UTF-8") from None


def _attributes(text: str, separator: str, known: tuple[str, ...]) -> dict[str, bytes]:
    attributes: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if name not in known or not equals or name in attributes or _VALUE.fullmatch(value) is None:
            raise TokenError(f"the attributes of a pkcs11: URI are {', '.join(known)}: each once, percent-encoded")
        attributes[name] = urllib.parse.unquote_to_bytes(value)
    return attributes


class _PinFile(NamedTuple):
    """A version of the PIN file, by what changes when it is written."""

    inode: int
    written_ns: int
    bytes: int


class _Token(Generic[K]):
    """The session with a token, and what `find` has found in it. All of it runs in the thread of a call."""

    def __init__(self, uri: KeyUri, find: Callable[[Any], K]) -> None:
        self._uri, self._find = uri, find
        self._session: Any = None
        self._found: K | None = None
        self._refused: _PinFile | None = None
        self._was_closed = False

    def use(self, act: Callable[[K], T], failing: str) -> T:
        """A session may have ended since the last call: then another one is opened. Raises TokenError."""
        why: type[PKCS11Error] = PKCS11Error
        for _ in range(2):
            key = self.found()
            try:
                return act(key)
            except PKCS11Error as error:
                why = type(error)
                self.drop()
        kind = UnwrapRefusedError if issubclass(why, _REFUSALS) else AwayError
        raise kind(f"the PKCS#11 token {failing}: {why.__name__}")

    def found(self) -> K:
        if self._found is None:
            why = ""
            for again in (self._was_closed, True):
                try:
                    self._found = self._open(initialize=again)
                    self._was_closed = False
                    break
                except PKCS11Error as error:
                    why = type(error).__name__
            if self._found is None:
                raise AwayError(f"the PKCS#11 token is away: {why}")
        return self._found

    def drop(self) -> None:
        session, self._session, self._found = self._session, None, None
        if session is not None:
            with contextlib.suppress(PKCS11Error):
                session.close()

    def close(self) -> None:
        self.drop()
        self._was_closed = True

    def _open(self, *, initialize: bool) -> K:
        """Opens a session. A token that is away is a PKCS11Error; anything else is a TokenError."""
        if not os.path.isfile(self._uri.module):
            raise AwayError(f"there is no PKCS#11 module {self._uri.module}")
        library = pkcs11.lib(self._uri.module)
        if initialize:  # a module that lost its connection keeps failing until then; other sessions of it end
            library.reinitialize()
        tokens = [token for token in library.get_tokens() if self._is_ours(token)]
        if not tokens and not initialize:
            raise TokenNotPresent
        if len(tokens) != 1:
            raise AwayError(f"{len(tokens) or 'no'} PKCS#11 tokens match the URI, and one has to")
        self._session = self._log_in(tokens[0])
        try:
            return self._find(self._session)
        except BaseException:
            self.drop()
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
            raise UnwrapRefusedError("the PKCS#11 token refused the PIN: correct its file, and it is tried again")
        if token.flags & _LAST_TRY:
            raise AwayError("one more wrong PIN would lock the PKCS#11 token: log in to it with another program first")
        try:
            return token.open(user_pin=pin)
        except UserAlreadyLoggedIn:  # by another session of this process
            return token.open()
        except _PIN_REFUSALS as error:
            self._refused, why = version, type(error).__name__
        finally:
            del pin
        raise UnwrapRefusedError(f"the PKCS#11 token refused the PIN ({why}): correct its file, and it is tried again")


def _only_key(session: Any, uri: KeyUri, noun: str) -> Any:
    """The one key that `uri` names. Raises TokenError, PKCS11Error."""
    wanted: dict[Any, Any] = {}
    if uri.label is not None:
        wanted[Attribute.LABEL] = uri.label
    if uri.key_id is not None:
        wanted[Attribute.ID] = uri.key_id
    keys = [key for kind in uri.kinds for key in session.get_objects({Attribute.CLASS: _CLASSES[kind], **wanted})]
    if not keys:
        raise UnwrapRefusedError(f"no {noun} of the PKCS#11 token match the URI, and one has to")
    if len(keys) > 1:
        raise AwayError(f"{len(keys)} {noun} of the PKCS#11 token match the URI, and one has to")
    return keys[0]


class _SigningKey(NamedTuple):
    key: Any
    algorithm: Algorithm
    public_key: bytes


class Pkcs11Signer:
    """A key in a token. `public_key` and `algorithm` ask the token when they are first used."""

    def __init__(self, uri: str) -> None:
        self._uri = parse_uri(uri)
        self._calls = TimedCalls("the PKCS#11 token")
        self._token = _Token(self._uri, self._find)
        self._known: tuple[Algorithm, bytes] | None = None

    def __repr__(self) -> str:
        return "<Pkcs11Signer>"

    @property
    def algorithm(self) -> Algorithm:
        return (self._known or self._calls.call(self._learn))[0]

    def public_key(self) -> bytes:
        return (self._known or self._calls.call(self._learn))[1]

    def sign(self, message: bytes) -> bytes:
        return self._calls.call(lambda: self._token.use(lambda key: _sign(key, message), "does not sign"))

    def close(self) -> None:
        """A later call initializes the library anew: a process that was hardened since learns at once whether it can
        read its configuration still.
        """
        self._calls.call(self._token.close)

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _learn(self) -> tuple[Algorithm, bytes]:
        return self._token.found()[1:]

    def _find(self, session: Any) -> _SigningKey:
        key = _only_key(session, self._uri, "private keys")
        same = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.ID: key.id}
        public = [other for other in session.get_objects(same) if other.key_type == key.key_type]
        if len(public) != 1:
            raise TokenError("the PKCS#11 token has no public key with the id of the private key")
        algorithm, encoded = _public_key(public[0])
        if self._known is not None and self._known != (algorithm, encoded):
            raise TokenError("the PKCS#11 token has another key than before under the same name")
        self._known = algorithm, encoded
        return _SigningKey(key, algorithm, encoded)


def _sign(key: _SigningKey, message: bytes) -> bytes:
    if key.algorithm == "ed25519":
        signature = bytes(key.key.sign(message, mechanism=Mechanism.EDDSA))
    else:
        both = bytes(key.key.sign(hashlib.sha256(message).digest(), mechanism=Mechanism.ECDSA))
        half = len(both) // 2
        signature = encode_dss_signature(int.from_bytes(both[:half]), int.from_bytes(both[half:]))
    check_signature(key.algorithm, key.public_key, signature, message)
    return signature


class WrappingKey(NamedTuple):
    """`kind`: the second byte of what it wraps."""

    key: Any
    kind: int


class Pkcs11Wrapper:
    """An AES or RSA key in a token. RSA binds no context: the pin of the root key does."""

    def __init__(self, uri: str) -> None:
        self._uri = parse_uri(uri, ("secret-key", "private"))
        self._calls = ProviderCalls("the PKCS#11 token")
        self._token = _Token(self._uri, self._find)

    def __repr__(self) -> str:
        return "<Pkcs11Wrapper>"

    def wrap(self, key: memoryview, context: str) -> bytes:
        return self._calls.call(
            lambda: self._token.use(lambda wrapping: make_blob(wrapping, key, context), "does not wrap")
        )

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        plain = self._calls.call(
            lambda: self._token.use(
                lambda wrapping: open_blob(wrapping, blob, context), "does not decrypt this wrapped key"
            )
        )
        give(plain, into, "the PKCS#11 token")

    def _find(self, session: Any) -> WrappingKey:
        """A key that could be copied out of its token, whose owner then can't take it back, is not used."""
        key = _only_key(session, self._uri, "keys")
        is_aes = key.key_type == KeyType.AES and key[Attribute.VALUE_LEN] == KEY_BYTES
        if not is_aes and not (key.key_type == KeyType.RSA and _modulus(key).bit_length() >= _RSA_BITS_MIN):
            raise AwayError(f"the key of the PKCS#11 token is neither AES-256 nor RSA of {_RSA_BITS_MIN} bits or more")
        if not _says(key, Attribute.EXTRACTABLE, False):
            raise AwayError("the key of the PKCS#11 token is extractable: use one that can't leave its token")
        if not _says(key, Attribute.SENSITIVE, True):
            raise AwayError("the key of the PKCS#11 token is not sensitive: use one that the token never shows")
        if is_aes and not _says(key, Attribute.NEVER_EXTRACTABLE, True):
            raise AwayError("the key of the PKCS#11 token was extractable once: use one that was made in its token")
        if not _says(key, Attribute.DECRYPT, True):
            raise UnwrapRefusedError("the key of the PKCS#11 token is not permitted to decrypt")
        return WrappingKey(key, _AES_GCM if is_aes else _RSA_OAEP)


def make_blob(wrapping: WrappingKey, key: memoryview, context: str) -> bytes:
    """Wraps `key`. The public operation of RSA needs no token."""
    if wrapping.kind == _RSA_OAEP:
        exponent = int.from_bytes(wrapping.key[Attribute.PUBLIC_EXPONENT])
        sealed = RSAPublicNumbers(exponent, _modulus(wrapping.key)).public_key().encrypt(bytes(key), _OAEP_PADDING)
        return bytes((BLOB_VERSION, _RSA_OAEP)) + sealed
    iv = os.urandom(_IV_BYTES)
    parameters = GCMParams(iv, context.encode("ascii"), _TAG_BYTES * 8)
    sealed = wrapping.key.encrypt(bytes(key), mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
    return bytes((BLOB_VERSION, _AES_GCM)) + iv + bytes(sealed)


def open_blob(wrapping: WrappingKey, blob: bytes, context: str) -> bytes:
    if blob[:2] != bytes((BLOB_VERSION, wrapping.kind)):
        raise AwayError("the wrapped key is not one of this version and of this kind of PKCS#11 key")
    if wrapping.kind == _RSA_OAEP:
        return bytes(
            wrapping.key.decrypt(blob[2:], mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=_OAEP_PARAMETERS)
        )
    iv, sealed = blob[2 : 2 + _IV_BYTES], blob[2 + _IV_BYTES :]
    if len(sealed) != KEY_BYTES + _TAG_BYTES:
        raise AwayError("the wrapped key is cut off, or longer than one is")
    parameters = GCMParams(iv, context.encode("ascii"), _TAG_BYTES * 8)
    return bytes(wrapping.key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))


def _modulus(key: Any) -> int:
    return int.from_bytes(key[Attribute.MODULUS])


def _says(key: Any, attribute: Attribute, value: bool) -> bool:
    """Whether an attribute is there and has this value. Raises PKCS11Error."""
    try:
        return key[attribute] is value
    except AttributeTypeInvalid:
        return False


def _text(value: bytes | str) -> str:
    """The text of a field that a token pads."""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else value).rstrip(" \0")


def _public_key(key: Any) -> tuple[Algorithm, bytes]:
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
    """The PIN, without the newline at its end. Raises AwayError."""
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
    raise AwayError(f"the PIN file {path} {why}")
