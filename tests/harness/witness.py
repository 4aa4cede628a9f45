"""A small witness of transparency logs, for the tests: it cosigns a checkpoint only if it extends the one before it.

Owns: the witness's half of C2SP tlog-witness (`add-checkpoint`) with Ed25519 cosignatures (C2SP tlog-cosignature). The
code follows those texts, and RFC 9162 section 2.1.4.2 for consistency proofs. It shares nothing with `minikms`, so that
it refuses a wrong proof or note of ours. Invariants: the newest checkpoint is durable before its cosignature leaves;
check and update are one step under a lock. It must never cosign a smaller or another tree.
"""

import base64
import hashlib
import http.server
import json
import os
import threading
import time
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

BODY_BYTES_MAX: Final = 64 * 1024
PROOF_LINES_MAX: Final = 63
STOP_CHECK_S: Final = 0.01
"""How often a server looks whether it is to stop. The default is half a second, for each witness of each test."""

_LOG_TYPE: Final = 0x01
_COSIGNATURE_TYPE: Final = 0x04


class Refusal(Exception):
    """The answer to a request that gets no cosignature."""

    def __init__(self, status: int, body: str, content_type: str = "text/plain; charset=utf-8") -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.content_type = content_type


class Submission(NamedTuple):
    """A request: the size that the client thinks is the newest, the proof, and the checkpoint's text and fields."""

    old_size: int
    proof: list[bytes]
    text: str
    origin: str
    size: int
    root: bytes
    signatures: list[tuple[str, bytes]]


def key_id(name: str, kind: int, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def parse_vkey(text: str) -> tuple[str, bytes]:
    """The name and the Ed25519 key of a log's verifier key. Raises ValueError."""
    name, identifier, key = text.split("+", 2)
    raw = base64.b64decode(key, validate=True)
    if len(raw) != 33 or raw[0] != _LOG_TYPE or bytes.fromhex(identifier) != key_id(name, _LOG_TYPE, raw[1:]):
        raise ValueError("not the verifier key of a log with Ed25519")
    return name, raw[1:]


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or (text != "0" and text.startswith("0")):
        raise ValueError(f"not a decimal number: {text!r}")
    return int(text)


def _hash(text: str) -> bytes:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 32:
        raise ValueError("not a hash of 32 bytes")
    return raw


def parse(body: bytes) -> Submission:
    """The parts of a request. Raises ValueError."""
    head, empty, note = body.decode().partition("\n\n")
    if not empty:
        raise ValueError("no empty line after the proof")
    old, *lines = head.split("\n")
    if not old.startswith("old ") or len(lines) > PROOF_LINES_MAX:
        raise ValueError("no line with the old size, or too many lines of proof")
    if any(ord(character) < 0x20 and character != "\n" for character in note):
        raise ValueError("a control character in the checkpoint")
    text, empty, signed = note.rpartition("\n\n")
    if not empty or not signed.endswith("\n"):
        raise ValueError("the checkpoint has no signatures, or does not end with a newline")
    origin, size, root, *extensions = text.split("\n")
    if not origin or not all(extensions):
        raise ValueError("an empty line in the checkpoint")
    signatures = []
    for line in signed[:-1].split("\n"):
        dash, name, signature = line.split(" ")
        if dash != "\u2014":
            raise ValueError("not a signature line")
        signatures.append((name, base64.b64decode(signature, validate=True)))
    return Submission(
        _decimal(old.removeprefix("old ")),
        [_hash(line) for line in lines],
        text + "\n",
        origin,
        _decimal(size),
        _hash(root),
        signatures,
    )


def consistent(first: int, second: int, first_root: bytes, second_root: bytes, proof: list[bytes]) -> bool:
    """RFC 9162, section 2.1.4.2, for trees of `first` and `second` leaves, 0 < first < second."""
    if not proof:
        return False
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = path[0]
    for node in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr = hashlib.sha256(b"\x01" + node + fr).digest()
            sr = hashlib.sha256(b"\x01" + node + sr).digest()
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = hashlib.sha256(b"\x01" + sr + node).digest()
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and fr == first_root and sr == second_root


class Witness:
    """Cosigns the checkpoints of the logs that it knows. Its key and its state are files of `directory`."""

    def __init__(self, directory: str, name: str, logs: dict[str, bytes]) -> None:
        self._directory = directory
        self._name = name
        self._logs = logs
        self._lock = threading.Lock()
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, "key")
        if not os.path.exists(path):
            self._store(path, Ed25519PrivateKey.generate().private_bytes_raw())
        with open(path, "rb") as file:
            self._key = Ed25519PrivateKey.from_private_bytes(file.read())
        self._id = key_id(name, _COSIGNATURE_TYPE, self._key.public_key().public_bytes_raw())

    @property
    def vkey(self) -> str:
        public = bytes([_COSIGNATURE_TYPE]) + self._key.public_key().public_bytes_raw()
        return f"{self._name}+{self._id.hex()}+{base64.b64encode(public).decode()}"

    def add_checkpoint(self, body: bytes) -> str:
        """The answer's body: a signature line. Raises Refusal."""
        try:
            asked = parse(body)
        except ValueError as error:
            raise Refusal(400, f"{error}\n") from None
        self._authenticate(asked)
        if asked.old_size > asked.size:
            raise Refusal(400, "the old size is larger than the checkpoint\n")
        with self._lock:
            size, root = self._newest(asked.origin)
            conflict = Refusal(409, f"{size}\n", "text/x.tlog.size")
            if asked.old_size != size or (asked.size == size and size and asked.root != root):
                raise conflict
            if size in {0, asked.size}:
                proved = not asked.proof and (asked.size > 0 or asked.root == hashlib.sha256().digest())
            else:
                proved = consistent(size, asked.size, root, asked.root, asked.proof)
            if not proved:
                raise Refusal(422, "the consistency proof does not verify\n")
            newest = {"size": asked.size, "root": asked.root.hex()}
            self._store(self._path(asked.origin), json.dumps(newest).encode())
        return self._cosign(asked.text)

    def _authenticate(self, asked: Submission) -> None:
        public_key = self._logs.get(asked.origin)
        if public_key is None:
            raise Refusal(404, "unknown log\n")
        wanted = key_id(asked.origin, _LOG_TYPE, public_key)
        for name, signature in asked.signatures:
            if name == asked.origin and signature[:4] == wanted:
                try:
                    Ed25519PublicKey.from_public_bytes(public_key).verify(signature[4:], asked.text.encode())
                except InvalidSignature:
                    break
                return
        raise Refusal(403, "no signature of a known key\n")

    def _cosign(self, text: str) -> str:
        now = int(time.time())
        signature = self._key.sign(f"cosignature/v1\ntime {now}\n{text}".encode())
        return f"\u2014 {self._name} {base64.b64encode(self._id + now.to_bytes(8, 'big') + signature).decode()}\n"

    def _path(self, origin: str) -> str:
        return os.path.join(self._directory, hashlib.sha256(origin.encode()).hexdigest())

    def _newest(self, origin: str) -> tuple[int, bytes]:
        try:
            with open(self._path(origin), "rb") as file:
                newest = json.load(file)
        except FileNotFoundError:
            return 0, b""
        return newest["size"], bytes.fromhex(newest["root"])

    def _store(self, path: str, content: bytes) -> None:
        with open(path + ".new", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(path + ".new", path)
        directory = os.open(self._directory, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def serve(witness: Witness) -> http.server.ThreadingHTTPServer:
    """A server on a port of the loopback interface that the kernel chose, which serves until its `shutdown`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_POST(self) -> None:
            try:
                self._answer(200, witness.add_checkpoint(self._body()), "text/plain; charset=utf-8")
            except Refusal as refusal:
                self._answer(refusal.status, refusal.body, refusal.content_type)

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > BODY_BYTES_MAX:
                self.close_connection = True
                raise Refusal(400, "the request needs a length, of at most 64 KiB\n")
            body = self.rfile.read(int(length))
            if self.path != "/add-checkpoint":
                raise Refusal(404, "only /add-checkpoint is here\n")
            return body

        def _answer(self, status: int, body: str, content_type: str) -> None:
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(STOP_CHECK_S,), daemon=True).start()
    return server
