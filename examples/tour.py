"""The guided tour: `make run`, or `python examples/tour.py --dir DIRECTORY`.

It starts the real server, which starts miniKMS, as processes of their own, and prints each step with the command that a
user would type. Every printed claim was checked in this run, and one failed check makes the exit status 1. It uses no
configuration of the user and touches no data outside its directory.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minikms

READY_S_MAX = 60.0
AUTHOR, TITLE = "ada", "The guided tour"
SOCKET_PATH_BYTES_MAX = 107
PROGRAMS = Path(sys.executable).parent
OTHER = "name another one: make run ARGS='--dir DIRECTORY'"


class Server:
    """A running server, its API keys for this run, and the checks that failed."""

    def __init__(self, directory: Path, kms_socket: Path) -> None:
        self.directory, self.kms_socket = directory, kms_socket
        self.backend_key, self.admin_key = secrets.token_urlsafe(12), secrets.token_urlsafe(12)
        self.address = f"127.0.0.1:{free_port()}"
        self.steps = self.failed = 0

    def step(self, title: str, *commands: str) -> None:
        self.steps += 1
        print(f"\n{self.steps}. {title}")
        for command in commands:
            print(f"   $ {command}")

    def check(self, holds: bool, claim: str) -> None:
        self.failed += not holds
        print(f"   {'ok    ' if holds else 'FAILED'} {claim}", flush=True)

    @property
    def variables(self) -> dict[str, str]:
        keys = {"PROGRESSDB_API_BACKEND_KEYS": self.backend_key, "PROGRESSDB_API_ADMIN_KEYS": self.admin_key}
        usual = self.kms_socket.is_relative_to(self.directory)
        return keys if usual else {**keys, "PROGRESSDB_KMS_SOCKET": str(self.kms_socket)}

    @property
    def flags(self) -> list[str]:
        return ["--dev", "--addr", self.address, "--db", str(self.directory)]

    @property
    def command(self) -> str:
        named = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*named, shlex.join([program("progressdb"), *self.flags])])

    def curl(self, target: str, body: object = None, *, admin: bool = False) -> str:
        """What a user would type for `call`."""
        words = ["curl", "-s", "-H", f"X-API-Key: {self.admin_key if admin else self.backend_key}"]
        return shlex.join([*words, *(["-d", json.dumps(body)] if body else []), f"http://{self.address}{target}"])

    def call(self, target: str, body: object = None, *, admin: bool = False) -> bytes:
        headers = {"X-API-Key": self.admin_key if admin else self.backend_key, "X-User-ID": AUTHOR}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://{self.address}{target}", data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine: no proxy
        with opener.open(request, timeout=10) as answer:
            content: bytes = answer.read()
            return content

    def messages(self, thread: str) -> Any:
        return json.loads(self.call(f"/v1/messages?thread={thread}"))["messages"]


def tour(server: Server) -> tuple[str, list[str], str]:
    """Returns the thread, the texts that were stored, and the head of the audit log."""
    query = urllib.parse.urlencode({"author": AUTHOR, "title": TITLE})
    threads = json.loads(server.call(f"/v1/threads?{query}"))["threads"]
    if threads:
        thread = threads[0]["id"]
        server.step("A conversation from earlier runs is there", server.curl(f"/v1/threads?{query}"))
        earlier = server.messages(thread)
        server.check(bool(earlier), f"{len(earlier)} messages of earlier runs in {thread}, readable again")
    else:
        made = {"title": TITLE, "author": AUTHOR}
        server.step("Make a conversation", server.curl("/v1/threads", made))
        thread, earlier = json.loads(server.call("/v1/threads", made))["id"], []
        server.check(True, f"{thread}, with an encryption key of its own that only miniKMS has")

    planted = [f"violet-heron-{secrets.token_hex(8)}", f"copper-otter-{secrets.token_hex(8)}"]
    said = [(AUTHOR, "user", f"The door code is {planted[0]}."), ("assistant", "assistant", f"Noted: {planted[1]}.")]
    bodies = [{"thread": thread, "author": author, "role": role, "body": {"text": text}} for author, role, text in said]
    server.step("Store two messages with planted texts", *(server.curl("/v1/messages", body) for body in bodies))
    for body in bodies:
        server.check(True, f"{json.loads(server.call('/v1/messages', body))['id']} is encrypted and synced to disk")

    server.step("Read the conversation back", server.curl(f"/v1/messages?thread={thread}"))
    messages = server.messages(thread)
    for message in messages[len(earlier) :]:
        print(f"   {message['author']}: {message['body']['text']}")
    came_back = [message["body"] for message in messages] == [one["body"] for one in [*earlier, *bodies]]
    server.check(came_back, f"{len(messages)} messages came back as they were written")

    keys = json.loads(server.call(f"/admin/keys?prefix=thread:{thread}:msg:", admin=True))["keys"]
    record = f"/admin/keys/{urllib.parse.quote(keys[0], safe=':')}"
    server.step("Look at a message as it is on disk", f"{server.curl(record, admin=True)} | xxd")
    before = server.call(record, admin=True)
    for start in range(0, min(len(before), 128), 16):
        line = before[start : start + 16]
        print(f"   {start:04x}  {line.hex(' '):<48} {''.join(chr(n) if 32 <= n < 127 else '.' for n in line)}")
    print("   Readable: a version, the key's id, the author. Then nonce, ciphertext, tag.")

    kms_curl = f"curl -s --unix-socket {shlex.quote(str(server.kms_socket))}"
    server.step("Rotate the key-encryption key", f"{kms_curl} -d '{{}}' http://kms/rotate_kek")
    with minikms.Client(server.kms_socket) as kms:
        rotated = kms.rotate_kek()
    server.check(rotated.status == "ok", f"KEK version {rotated.kek_version}; rewrapped keys: {rotated.rewrapped}")

    target, named = "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}
    server.step(
        "Rotate the conversation's own key: its messages are re-encrypted", server.curl(target, named, admin=True)
    )
    new_key = json.loads(server.call(target, named, admin=True))["new_key"]
    after = server.call(record, admin=True)
    server.check(
        new_key.encode() in after and new_key.encode() not in before, f"the message is under the new key, {new_key}"
    )
    again = server.messages(thread)
    server.check(again == messages, f"all {len(again)} messages read as before")

    server.step("Ask the key service for its status", f"{kms_curl} http://kms/status")
    with minikms.Client(server.kms_socket) as kms:
        status = kms.status()
    in_force = [measure.measure for measure in status.hardening if measure.in_force]
    print(f"   keys in memory: {status.memory.arena}; in force: {', '.join(in_force)}")
    for warning in status.warnings:
        print(f"   warning: {warning}")
    head = status.audit.head
    server.check(status.status == "ok", f"process {status.pid}, audit log at line {head.seq}")
    return thread, [TITLE, *planted, *(message["body"]["text"] for message in messages)], f"{head.seq}:{head.sig}"


def after_the_stop(server: Server, thread: str, texts: list[str], head: str) -> None:
    """The store has written its memory to disk."""
    directory = server.directory
    server.step(
        "Stop the server, and search every byte on disk: store, keys, audit log and the server's log",
        f"grep --recursive --text --count '{texts[1]}' {shlex.quote(str(directory))}",
    )
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    contents = {path: path.read_bytes() for path in files}
    known = [path for path, content in contents.items() if thread.encode() in content]
    server.check(bool(known), f"the search can find: the thread's id, which is not secret, is in {len(known)} files")
    sought = {form: text for text in texts for form in forms(text)}
    found = {
        (path, text): None for path, content in contents.items() for form, text in sought.items() if form in content
    }
    for path, text in list(found)[:3]:
        print(f"   found in {path}: {text[:46]}")
    claim = f"{len(texts)} texts, as text, hex or base64: nowhere in {len(files)} files"
    server.check(not found, f"{claim}, {sum(map(len, contents.values())):,} bytes")

    words = ["audit", "verify", "--data-dir", str(directory / "kms"), "--expect-head", head]
    server.step("Verify the audit log: who did what with which key", shlex.join([program("minikms"), *words]))
    done = subprocess.run(  # noqa: S603 - our own program, our own arguments
        [PROGRAMS / "minikms", *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    print("".join(f"   {line}\n" for line in (done.stdout + done.stderr).splitlines()), end="")
    server.check(done.returncode == 0, "every line is there, unaltered and in order, the head that /status named too")


def forms(text: str) -> list[bytes]:
    """The text, its hex, and its base64 after 0 to 2 unknown bytes, without what depends on neighbouring bytes."""
    raw = text.encode()
    encoded = [base64.b64encode(b"\0" * before + raw) for before in range(3)]
    cut = [one[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6] for before, one in enumerate(encoded)]
    return [raw, raw.hex().encode(), raw.hex().upper().encode(), *cut]


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    directory, log_path = server.directory, server.directory / "server.log"
    server.step("Start the server, which starts miniKMS, the key service", server.command)
    with log_path.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own program, our own arguments
            [PROGRAMS / "progressdb", *server.flags],
            env=environment() | server.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_ready(server, process, log_path)
        server.check(True, f"http://{server.address} answers; data in {directory}, log in {log_path}")
        print(f"   --dev made the root key, {directory / 'kms.master-key'}. Elsewhere, keep it apart from the data.")
        yield
    finally:
        process.terminate()
        status = process.wait(READY_S_MAX)
    if status != 0:
        sys.exit(f"the server ended with status {status}; its log: {log_path}")


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S_MAX
    while True:
        try:
            server.call("/healthz")
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                sys.exit(f"the server did not come up. Its last words:\n{last}")
            time.sleep(0.05)
        else:
            return


def own_directory(directory: Path) -> None:
    """Made, or all of it belongs to this user."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        owners = {path: path.lstat().st_uid for path in (directory, *directory.rglob("*"))}
    except OSError as error:
        sys.exit(f"cannot use {directory}: {error.strerror}; {OTHER}")
    for path, owner in owners.items():
        if owner != os.geteuid():
            sys.exit(f"{path} belongs to uid {owner}, and you are uid {os.geteuid()}; {OTHER}")


def program(name: str) -> str:
    """As the user would type it."""
    path = PROGRAMS / name
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def environment() -> dict[str, str]:
    """Without the user's configuration of these programs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}


def free_port() -> int:
    """Below the ports that the kernel gives to connections."""
    for _ in range(100):
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    sys.exit("no port of 127.0.0.1 is free for the server")


@contextlib.contextmanager
def socket_place(directory: Path) -> Iterator[Path]:
    """The server's default path, or one in a short directory if the default is too long for a socket."""
    usual = directory / "run" / "minikms.sock"
    if len(os.fsencode(usual.absolute())) <= SOCKET_PATH_BYTES_MAX:
        yield usual
        return
    with tempfile.TemporaryDirectory(prefix="progressdb-tour-") as short:
        yield Path(short) / "minikms.sock"


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the guided tour. Exit status: 0 every check held.")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"), help="where the tour keeps its data")
    directory = parser.parse_args().dir
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped too
    own_directory(directory)
    try:
        with socket_place(directory) as kms_socket:
            server = Server(directory, kms_socket)
            with running(server):
                found = tour(server)
            after_the_stop(server, *found)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url} was answered {error.code}: {error.read().decode()}")
    except (OSError, minikms.KmsError) as error:
        sys.exit(f"the tour can't go on: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if server.failed:
        sys.exit(f"\n{server.failed} checks failed. The server's log is in {directory}.")
    print("\nEvery check held. Run it again: it continues with this data.")
    print(f"The same server, to try the commands above:\n   $ {server.command}")


if __name__ == "__main__":
    main()
