"""Signed notes, tree checkpoints and cosignatures, by the C2SP texts signed-note, tlog-checkpoint and tlog-cosignature.

Owns: the bytes of a note, the text of a verifier key (vkey), what each type of signature covers, and the text of a tree
checkpoint. A tree checkpoint says which root the tree has at a size; the signed lines of an audit log, which are called
checkpoints too, are `minikms.audit.chain`'s. Invariants: sizes and counts are bounded before anything is decoded; a
signature by an unknown key is ignored, and a signature by a known key that does not verify refuses the whole note; a
text has one encoding, so that what was parsed is made again with the same bytes. It must never hold a private key, read
a clock or do I/O.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from hashlib import sha256
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from minikms.api.base64 import decode_exact, encode_text
from minikms.api.errors import KmsRefusedError
from minikms.audit.chain import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, signature_is_valid
from minikms.audit.tree import HASH_BYTES, SIZE_MAX

NOTE_BYTES_MAX: Final = 128 * 1024
"""Signatures by keys of other types, which are ignored, may have 5 KiB each."""
SIGNATURES_COUNT_MAX: Final = 64
SIGNATURE_CHARS_MAX: Final = 16 * 1024
NAME_CHARS_MAX: Final = 256
"""The length of the name of a key, and of an origin."""
VKEY_CHARS_MAX: Final = 1024
KEY_ID_BYTES: Final = 4
EXTENSION_LINES_MAX: Final = 16

TYPE_ED25519: Final = 0x01
TYPE_ECDSA: Final = 0x02
"""P-256 with SHA-256, the signature in DER. The key id is that of the key alone, not of name and type."""
TYPE_COSIGNATURE: Final = 0x04
"""An Ed25519 signature with a time, by a witness."""

COSIGNATURE_LABEL: Final = "cosignature/v1"
_TIME_BYTES: Final = 8
TIME_MAX: Final = 2**63 - 1

_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f]")
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}", re.ASCII)
_SIGNATURE_PREFIX: Final = "\u2014 "


class NoteError(KmsRefusedError):
    """Bytes are no note or tree checkpoint, or a signature that they need is missing or wrong."""

    code = "audit_note"


class Signature(msgspec.Struct, frozen=True):
    """One signature line. value: what follows the key id."""

    name: str
    key_id: bytes
    value: bytes

    def line(self) -> str:
        return f"{_SIGNATURE_PREFIX}{self.name} {encode_text(self.key_id + self.value)}\n"


class VerifierKey(msgspec.Struct, frozen=True):
    """A public key with its name. type: a TYPE_ constant. public_key: 32 raw bytes, for ECDSA SubjectPublicKeyInfo in
    DER.
    """

    name: str
    type: int
    public_key: bytes

    @property
    def key_id(self) -> bytes:
        if self.type == TYPE_ECDSA:
            return sha256(self.public_key).digest()[:KEY_ID_BYTES]
        named = self.name.encode() + b"\n" + bytes([self.type]) + self.public_key
        return sha256(named).digest()[:KEY_ID_BYTES]

    def text(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{encode_text(bytes([self.type]) + self.public_key)}"

    def is_named_by(self, signature: Signature) -> bool:
        """Whether the signature names this key."""
        return (signature.name, signature.key_id) == (self.name, self.key_id)

    def verifies(self, text: str, signature: Signature) -> bool:
        """Whether the signature is one of this key over the text of a note."""
        if self.type == TYPE_ECDSA:
            return _ecdsa_is_valid(self.public_key, signature.value, text.encode())
        if self.type == TYPE_ED25519:
            return signature_is_valid(self.public_key, signature.value, text.encode())
        time = cosigned_at(signature)
        return time is not None and signature_is_valid(
            self.public_key, signature.value[_TIME_BYTES:], cosigned_message(text, time)
        )


def parse_vkey(text: str, types: Collection[int] = (TYPE_ED25519, TYPE_ECDSA, TYPE_COSIGNATURE)) -> VerifierKey:
    """The verifier key that `text` is. Raises NoteError, also for a type that is not in `types`."""
    name, plus, rest = text.partition("+")
    key_id, second, data = rest.partition("+")
    if len(text) > VKEY_CHARS_MAX or not (plus and second and is_name(name) and _BASE64.fullmatch(data)):
        raise NoteError("a verifier key is NAME+ID+KEY: a name, 8 hexadecimal characters, and base64")
    decoded = _decoded(data)
    if not decoded or decoded[0] not in types:
        raise NoteError(f"the verifier key of {name} has a type that is not expected here")
    key = VerifierKey(name, decoded[0], decoded[1:])
    if key.type == TYPE_ECDSA:
        _p256(key.public_key)
    elif len(key.public_key) != PUBLIC_KEY_BYTES:
        raise NoteError(f"the verifier key of {name} does not have {PUBLIC_KEY_BYTES} bytes")
    if key.key_id.hex() != key_id:
        raise NoteError(f"the id in the verifier key of {name} is not that of its name and key: a character is wrong")
    return key


def is_name(name: str) -> bool:
    """Whether a key or an origin may have this name. Stricter than the text: printable ASCII only."""
    return 0 < len(name) <= NAME_CHARS_MAX and all("!" <= char <= "~" and char != "+" for char in name)


def sign(key: VerifierKey, value: bytes) -> Signature:
    """The signature line of `value`, which the private key of `key` made over the text of a note."""
    return Signature(key.name, key.key_id, value)


def cosigned_message(text: str, time: int) -> bytes:
    """What a cosignature at `time`, in Unix seconds, covers."""
    return f"{COSIGNATURE_LABEL}\ntime {time}\n{text}".encode()


def cosigned_at(signature: Signature) -> int | None:
    """The Unix seconds in a cosignature; None if it can't be one."""
    if len(signature.value) != _TIME_BYTES + SIGNATURE_BYTES:
        return None
    time = int.from_bytes(signature.value[:_TIME_BYTES], "big")
    return time if time <= TIME_MAX else None


class Note(msgspec.Struct, frozen=True):
    """text: ends with a newline. signatures: in the order of their lines, each key once."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        return (self.text + "\n" + "".join(signature.line() for signature in self.signatures)).encode()

    def with_signatures(self, added: Iterable[Signature]) -> Note:
        """A newer signature takes the place of one by the same key."""
        by_key = {(signature.name, signature.key_id): signature for signature in (*self.signatures, *added)}
        return Note(self.text, tuple(by_key.values()))

    def signed_by(self, keys: Iterable[VerifierKey]) -> dict[VerifierKey, Signature]:
        """The signatures by these keys, all of them valid. Raises NoteError if one is not."""
        signatures: dict[VerifierKey, Signature] = {}
        for key in keys:
            for signature in self.signatures:
                if key.is_named_by(signature):
                    if not key.verifies(self.text, signature):
                        raise NoteError(f"the signature by {key.name} is not valid")
                    signatures[key] = signature
        return signatures


def parse_note(content: bytes) -> Note:
    if len(content) > NOTE_BYTES_MAX:
        raise NoteError(f"a note has at most {NOTE_BYTES_MAX} bytes")
    try:
        whole = content.decode("utf-8")
    except UnicodeDecodeError:
        raise NoteError("the note is not UTF-8") from None
    if _CONTROL.search(whole):
        raise NoteError("the note holds a control character")
    text, separator, lines = whole.rpartition("\n\n")
    if not separator or not text:
        raise NoteError("the note has no text, or no empty line before its signatures")
    return Note(text + "\n", parse_signatures(lines))


def parse_signatures(lines: str) -> tuple[Signature, ...]:
    """Signature lines, at least one, each ending with a newline. Raises NoteError."""
    if not lines.endswith("\n"):
        raise NoteError("the note does not end with a newline")
    parts = lines[:-1].split("\n")
    if len(parts) > SIGNATURES_COUNT_MAX:
        raise NoteError(f"a note has at most {SIGNATURES_COUNT_MAX} signatures")
    signatures: dict[tuple[str, bytes], Signature] = {}
    for part in parts:
        name, space, data = part.removeprefix(_SIGNATURE_PREFIX).partition(" ")
        decoded = _decoded(data) if len(data) <= SIGNATURE_CHARS_MAX else b""
        if not (part.startswith(_SIGNATURE_PREFIX) and space and _may_name_a_key(name)) or len(decoded) <= KEY_ID_BYTES:
            raise NoteError("a line after the text of the note is no signature")
        signature = Signature(name, decoded[:KEY_ID_BYTES], decoded[KEY_ID_BYTES:])
        signatures.setdefault((name, signature.key_id), signature)  # of several by one key, the first counts
    return tuple(signatures.values())


class Checkpoint(msgspec.Struct, frozen=True):
    """A tree checkpoint. extensions: further lines, which this project neither makes nor reads."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def text(self) -> str:
        """The text of its note."""
        return "".join(f"{line}\n" for line in (self.origin, self.size, encode_text(self.root), *self.extensions))


def parse_checkpoint(text: str) -> Checkpoint:
    """The tree checkpoint that the text of a note is. Raises NoteError."""
    lines = text.removesuffix("\n").split("\n")
    if not 3 <= len(lines) <= 3 + EXTENSION_LINES_MAX or "" in lines:
        raise NoteError("a tree checkpoint has an origin, a size and a root, each in a line")
    origin, size, root64, *extensions = lines
    root = decode_exact(root64, HASH_BYTES)
    if _DECIMAL.fullmatch(size) is None or int(size) > SIZE_MAX or root is None:
        raise NoteError("the size or the root of the tree checkpoint is not one")
    return Checkpoint(origin, int(size), root, tuple(extensions))


class WitnessPolicy(msgspec.Struct, frozen=True):
    """Who must have signed a tree checkpoint: the log, and a quorum of witnesses.

    log_keys: every one of them; their name is the origin. witnesses: keys of the type `TYPE_COSIGNATURE`.
    """

    log_keys: tuple[VerifierKey, ...]
    witnesses: tuple[VerifierKey, ...] = ()
    quorum: int = 0

    def check(self) -> None:
        """Checks that a tree checkpoint can satisfy the policy. Raises NoteError."""
        if not self.log_keys or len({key.name for key in self.log_keys}) != 1:
            raise NoteError("give the verifier keys of one log, which have its origin as their name")
        keys = [key.public_key for key in (*self.log_keys, *self.witnesses)]
        if len(set(keys)) != len(keys):
            raise NoteError("a public key is given twice: its signature would count twice")
        if not 0 <= self.quorum <= len(self.witnesses):
            raise NoteError(f"a quorum of {self.quorum} needs as many witnesses")
        if self.witnesses and not self.quorum:
            raise NoteError("with witnesses, a quorum is at least 1")

    @property
    def origin(self) -> str:
        return self.log_keys[0].name


class VerifiedCheckpoint(msgspec.Struct, frozen=True):
    """A tree checkpoint whose signatures were checked. cosigned: witnesses' names, with their times in Unix seconds."""

    checkpoint: Checkpoint
    note: Note
    cosigned: tuple[tuple[str, int], ...]

    def quorum_time(self, quorum: int) -> int | None:
        """The latest Unix seconds at which `quorum` witnesses knew no larger tree; None if that many did not cosign."""
        times = sorted((time for _, time in self.cosigned), reverse=True)
        return times[quorum - 1] if 0 < quorum <= len(times) else None


def open_checkpoint(content: bytes, policy: WitnessPolicy) -> VerifiedCheckpoint:
    """The tree checkpoint in a note, if all keys of the log have signed it, and a quorum has cosigned it.

    Raises NoteError.
    """
    note = parse_note(content)
    checkpoint = parse_checkpoint(note.text)
    if checkpoint.origin != policy.origin:
        raise NoteError(f"the tree checkpoint is one of {shown(checkpoint.origin)}, not of {policy.origin}")
    by_log = note.signed_by(policy.log_keys)
    if missing := [key for key in policy.log_keys if key not in by_log]:
        raise NoteError(f"the tree checkpoint has no signature by the log's key {missing[0].text()}")
    cosigned = note.signed_by(policy.witnesses)
    if len(cosigned) < policy.quorum:
        raise NoteError(f"the tree checkpoint has {len(cosigned)} cosignatures of the {policy.quorum} that are needed")
    times = ((key.name, cosigned_at(signature) or 0) for key, signature in cosigned.items())
    return VerifiedCheckpoint(checkpoint, note, tuple(times))


def shown(text: str) -> str:
    """A text of unknown origin, printable and short, for an error."""
    return ascii(text[:NAME_CHARS_MAX])


def _may_name_a_key(name: str) -> bool:
    return bool(name) and len(name) <= NAME_CHARS_MAX and "+" not in name and not any(map(str.isspace, name))


def _decoded(text: str) -> bytes:
    """The bytes of canonical base64; empty for anything else."""
    size = len(text) // 4 * 3 - text[-2:].count("=")
    return decode_exact(text, size) or b""


def _p256(der: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise NoteError("an ECDSA key is not a SubjectPublicKeyInfo in DER") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise NoteError("an ECDSA key is on the curve P-256")
    return key


def _ecdsa_is_valid(der: bytes, signature: bytes, message: bytes) -> bool:
    try:
        _p256(der).verify(signature, message, ec.ECDSA(SHA256()))
    except (InvalidSignature, NoteError):
        return False
    return True
