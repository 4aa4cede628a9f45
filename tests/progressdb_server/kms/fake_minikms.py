"""A small stand-in for the daemon: real processes, real sockets, real AES-GCM, none of the guarantees.

It takes the flags of the daemon and answers the verbs that the message server needs. Keys lie in the clear in the data
directory. Files there change its behaviour: `refuse-start` (says why), `slow-start` (seconds before it binds).
"""

import argparse
import asyncio
import base64
import fcntl
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api

CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
BATCHES = {verb.path: verb for verb in api.VERBS if verb.is_batch}


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class Keys:
    """Every key is one file: `<key_id>` with JSON of thread, state and key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "kms-deks"
        self.directory.mkdir(exist_ok=True)
        self.calls: dict[str, int] = {}

    def create(self, thread_id: str, replaces: str | None) -> str:
        if replaces is not None:
            self.retire(replaces)
        key_id = "k_0" + "".join(secrets.choice(CROCKFORD) for _ in range(25))
        self._write(key_id, {"thread_id": thread_id, "state": "active", "key": secrets.token_hex(32)})
        return key_id

    def retire(self, key_id: str) -> None:
        self._write(key_id, {**self.read(key_id), "state": "retired"})

    def _write(self, key_id: str, record: dict[str, str]) -> None:
        path = self.directory / key_id
        path.with_suffix(".new").write_text(json.dumps(record))
        path.with_suffix(".new").rename(path)

    def read(self, key_id: str) -> dict[str, str]:
        try:
            record: dict[str, str] = json.loads((self.directory / Path(key_id).name).read_text())
        except OSError:
            raise Refused(404, "key_not_found") from None
        return record

    def cipher(self, item: dict[str, str], *, seal: bool) -> AESGCM:
        record = self.read(item["key_id"])
        if item.get("thread_id", record["thread_id"]) != record["thread_id"]:
            raise Refused(403, "wrong_thread")
        if seal and record["state"] != "active":
            raise Refused(409, "key_retired")
        return AESGCM(bytes.fromhex(record["key"]))

    def encrypt(self, item: dict[str, str]) -> dict[str, str]:
        nonce = os.urandom(24)
        aad = base64.b64decode(item.get("aad", ""))
        sealed = self.cipher(item, seal=True).encrypt(nonce, base64.b64decode(item["plaintext"]), aad)
        return {"ciphertext": base64.b64encode(nonce + sealed).decode()}

    def decrypt(self, item: dict[str, str]) -> dict[str, str]:
        sealed = base64.b64decode(item["ciphertext"])
        try:
            opened = self.cipher(item, seal=False).decrypt(
                sealed[:24], sealed[24:], base64.b64decode(item.get("aad", ""))
            )
        except InvalidTag:
            raise Refused(400, "decryption_failed") from None
        return {"plaintext": base64.b64encode(opened).decode()}

    def check(self, body: dict[str, Any]) -> dict[str, Any]:
        refused = []
        self.cipher(body, seal=False)
        for index, item in enumerate(body["items"]):
            try:
                self.decrypt({**item, "key_id": body["key_id"]})
            except Refused as error:
                refused.append({"item": index, "error": f"refused: {error.code}", "code": error.code})
        return {"opened": len(body["items"]) - len(refused), "refused": refused}

    def reencrypt(self, item: dict[str, str]) -> dict[str, str]:
        opened = self.decrypt({**item, "key_id": item["from"]})
        return self.encrypt({"key_id": item["to"], "plaintext": opened["plaintext"], "aad": item.get("aad", "")})


def each(verb: Callable[[dict[str, str]], dict[str, str]], items: list[dict[str, str]]) -> dict[str, Any]:
    answers = []
    for item in items:
        try:
            answers.append(verb(item))
        except Refused as error:
            answers.append({"error": f"refused: {error.code}", "code": error.code})
    return {"items": answers}


def answer(keys: Keys, target: str, body: dict[str, Any]) -> dict[str, Any]:
    path = target.partition("?")[0]
    keys.calls[path] = keys.calls.get(path, 0) + 1
    match path.split("/"):
        case ["", "status"]:
            return {"pid": os.getpid(), "calls": keys.calls, "arguments": sys.argv[1:], "environment": dict(os.environ)}
        case ["", "create_dek_for_thread"]:
            key_id = keys.create(body["thread_id"], body.get("replaces"))
            return {"key_id": key_id, "wrapped": base64.b64encode(key_id.encode()).decode()}
        case ["", "get_wrapped"]:
            key_id = target.partition("key_id=")[2]
            keys.read(key_id)
            return {"wrapped": base64.b64encode(key_id.encode()).decode()}
        case ["", "encrypt"]:
            return keys.encrypt(body)
        case ["", "decrypt"]:
            return keys.decrypt(body)
        case ["", "encrypt_batch"]:
            return each(keys.encrypt, body["items"])
        case ["", "decrypt_batch"]:
            return each(keys.decrypt, body["items"])
        case ["", "reencrypt_batch"]:
            ends = {"from": body["from_key_id"], "to": body["to_key_id"]}
            return each(keys.reencrypt, [{**item, **ends} for item in body["items"]])
        case ["", "check_batch"]:
            return keys.check(body)
        case ["", "keys", key_id, "retire"]:
            keys.retire(key_id)
            told = {"kek_version": 1, "created_at": "2026-01-01T00:00:00Z", "purpose": "thread"}
            return {"key_id": key_id, "state": "retired", "thread_id": keys.read(key_id)["thread_id"], **told}
    raise Refused(404, "not_found")


def read(target: str, body: bytes) -> dict[str, Any]:
    if target not in BATCHES:
        read: dict[str, Any] = json.loads(body or b"{}")
        return read
    batch = msgspec.msgpack.decode(body, type=api.array_form(BATCHES[target].request))
    return {**members(batch), "items": [members(item) for item in batch.items]}


def members(struct: msgspec.Struct) -> dict[str, Any]:
    """As JSON has them: base64 for bytes, nothing for what is absent."""
    present = {name: getattr(struct, name) for name in struct.__struct_fields__ if name != "items"}
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in present.items()
        if value is not None and value is not msgspec.UNSET
    }


def written(target: str, answer: dict[str, Any]) -> bytes:
    if target == "/check_batch":
        return msgspec.msgpack.encode([answer["opened"], [list(refused.values()) for refused in answer["refused"]]])
    if target in BATCHES:
        return msgspec.msgpack.encode(
            [
                [
                    [item["error"], item["code"]] if "error" in item else base64.b64decode(*item.values())
                    for item in answer["items"]
                ]
            ]
        )
    return json.dumps(answer).encode()


async def serve_one(keys: Keys, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            target = head.split(" ")[1]
            length = next(
                (int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
            )
            body = await reader.readexactly(length)
            status = 200
            if target == "/health":
                payload = b"ok"
            else:
                try:
                    payload = written(target, answer(keys, target, read(target, body)))
                except Refused as error:
                    status = error.status
                    payload = json.dumps({"error": f"refused: {error.code}", "code": error.code}).encode()
            writer.write(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n" % (status, len(payload)) + payload)
            await writer.drain()
    except (EOFError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve(options: argparse.Namespace, data_dir: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if options.parent_fd is not None:
        loop.add_reader(options.parent_fd, stop.set)
    keys = Keys(data_dir)
    Path(options.socket).unlink(missing_ok=True)
    server = await asyncio.start_unix_server(lambda r, w: serve_one(keys, r, w), options.socket, limit=2**25)
    print("fake daemon: serving", file=sys.stderr, flush=True)
    await stop.wait()
    server.close()
    print("fake daemon: stopped", file=sys.stderr, flush=True)
    os._exit(0)  # connections and all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--master-key-file")
    parser.add_argument("--master-key-fd", type=int)
    parser.add_argument("--parent-fd", type=int)
    parser.add_argument("--log-format", default="console")
    options = parser.parse_args()
    data_dir = Path(options.data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    if (data_dir / "refuse-start").exists():
        sys.exit("fake daemon: refused to start\nbecause of its file")
    if (data_dir / "slow-start").exists():
        time.sleep(float((data_dir / "slow-start").read_text()))
    if options.master_key_fd is not None:
        (data_dir / "seen-master-key").write_bytes(os.read(options.master_key_fd, 100))
    lock = os.open(data_dir / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("fake daemon: the data directory is locked")
    asyncio.run(serve(options, data_dir))


if __name__ == "__main__":
    main()
