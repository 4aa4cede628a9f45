"""`progressdb demo`: the guided tour.

Owns: the order of the steps, and what each prints. Each step runs against the real server, started as a process of its
own with its own miniKMS, and is printed with the command that a user would type for it. Invariants: every printed claim
was checked in this run, and one failed check makes the exit status 1; the search of the disk first proves that it finds
a text that is there (the thread's id, which is not secret); the processes that it starts are stopped. It must never use
the configuration of the user, nor touch data outside its directory.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from minikms import api
from minikms.api.errors import KmsError
from minikms.client import Client
from progressdb_server.cli.disksearch import hexdump, search
from progressdb_server.config import UNIX_PATH_BYTES_MAX
from progressdb_server.store.record import unpack_sealed

READY_S_MAX: Final = 60.0
STOP_S_MAX: Final = 15.0
CALL_TIMEOUT_S: Final = 10.0
PORTS: Final = range(20_000, 32_000)
"""Below the ports that the kernel gives to connections."""
PORT_TRIES: Final = 100
AUTHOR: Final = "ada"
TITLE: Final = "The guided tour"
KEY_CHARS_SHOWN: Final = 46
DUMPED_BYTES_MAX: Final = 128
CIPHERTEXT_BYTES_SHOWN: Final = 20
OTHER_DIRECTORY: Final = "name another directory: progressdb demo --dir DIRECTORY, or make run ARGS='--dir DIRECTORY'"


class DemoError(Exception):
    """The tour cannot continue; the text says why and what to do."""


@dataclass(frozen=True)
class TourPaths:
    """The paths of the tour. Relative paths stay relative: they are printed in commands."""

    directory: Path
    socket: Path

    @property
    def server_log(self) -> Path:
        return self.directory / "server.log"

    @property
    def kms_data(self) -> Path:
        return self.directory / "kms"


@dataclass(frozen=True)
class TourServer:
    """A running server, and its API keys for this run."""

    address: str
    backend_key: str
    admin_key: str

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def call(self, method: str, target: str, body: object = None, *, admin: bool = False) -> bytes:
        """The body of the response. Raises DemoError unless its status is 2xx."""
        headers = {"X-API-Key": self.admin_key if admin else self.backend_key, "X-User-ID": AUTHOR}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + target, data, headers, method=method)  # noqa: S310 - http, loopback
        # The server is on this machine: the proxies of the environment are not used.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=CALL_TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise DemoError(f"{method} {target} was answered {error.code}: {error.read().decode()}") from None
        except OSError as error:
            raise DemoError(f"{method} {target} was not answered: {error}") from None


class Tour:
    """Prints the steps, and counts the checks that failed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0
        self.failed = 0

    def step(self, title: str, *commands: str) -> None:
        self._steps += 1
        self._console.print(f"\n[bold]{self._steps}. {escape(title)}[/bold]", soft_wrap=True)
        for command in commands:
            self.line(f"$ {command}", style="cyan")

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(f"   {text}", style=style), soft_wrap=True)

    def check(self, holds: bool, claim: str) -> None:
        """Print a claim with the result of its check."""
        self.failed += not holds
        self.line(f"{'ok    ' if holds else 'FAILED'} {claim}", style="green" if holds else "bold red")

    def close(self, server_command: str, directory: Path) -> None:
        if self.failed:
            log = f"The server's log is in {directory}."
            self._console.print(f"\n[bold red]{self.failed} checks failed.[/bold red] {log}")
            return
        self._console.print("\n[bold green]Every check held.[/bold green] Run it again: it continues with this data.")
        self._console.print("The same server, to try the commands above:")
        self.line(f"$ {server_command}", style="cyan")


def demo(
    *, directory: Annotated[Path, Parameter(name="--dir", help="Where the tour keeps its data.")] = Path("demo-data")
) -> int:
    """Take a guided tour: store a conversation, read it back, search the disk for its text. Exit status: 0 every
    check passed."""
    tour = Tour(Console(highlight=False))
    signal.signal(signal.SIGTERM, _interrupt)  # otherwise the server would outlive the tour
    try:
        with _socket_place(directory) as socket_path:
            return _take(tour, TourPaths(directory, socket_path))
    except DemoError as error:
        print(f"progressdb demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _take(tour: Tour, place: TourPaths) -> int:
    with _running(tour, place) as server:
        thread, earlier = _conversation(tour, server)
        planted = _write(tour, server, thread)
        messages = _read_back(tour, server, thread, planted, earlier)
        record = _show_record(tour, server, thread)
        _rotate_kek(tour, place)
        _rotate_dek(tour, server, thread, record, messages)
        head = _show_status(tour, place)
    _search_disk(tour, place, thread, planted, [message["body"]["text"] for message in messages])
    _verify_audit(tour, place, head)
    tour.close(_server_command(place, server), place.directory)
    return 1 if tour.failed else 0


# --- the steps --------------------------------------------------------------------------------------------------
def _conversation(tour: Tour, server: TourServer) -> tuple[str, list[dict[str, Any]]]:
    """The tour's thread, and its messages of earlier runs."""
    query = urllib.parse.urlencode({"author": AUTHOR, "title": TITLE})
    threads = json.loads(server.call("GET", f"/v1/threads?{query}"))["threads"]
    if threads:
        thread: str = threads[0]["id"]
        tour.step("A conversation from earlier runs is there", _curl(server, f"/v1/threads?{query}"))
        messages = json.loads(server.call("GET", f"/v1/messages?thread={thread}"))["messages"]
        tour.check(bool(messages), f"{len(messages)} messages of earlier runs in {thread}, readable again")
        return thread, messages
    tour.step("Make a conversation", _curl(server, "/v1/threads", {"title": TITLE, "author": AUTHOR}))
    thread = json.loads(server.call("POST", "/v1/threads", {"title": TITLE, "author": AUTHOR}))["id"]
    tour.check(True, f"{thread}, with an encryption key of its own that only miniKMS has")
    return thread, []


def _write(tour: Tour, server: TourServer, thread: str) -> list[str]:
    """Append this run's messages, each with a planted text that exists nowhere else. Returns the planted texts."""
    planted = [f"violet-heron-{secrets.token_hex(8)}", f"copper-otter-{secrets.token_hex(8)}"]
    said = [(AUTHOR, "user", f"The door code is {planted[0]}."), ("assistant", "assistant", f"Noted: {planted[1]}.")]
    bodies = [{"thread": thread, "author": author, "role": role, "body": {"text": text}} for author, role, text in said]
    tour.step("Store two messages with planted texts", *(_curl(server, "/v1/messages", body) for body in bodies))
    for body in bodies:
        message = json.loads(server.call("POST", "/v1/messages", body))
        tour.check(message["thread"] == thread, f"{message['id']} is encrypted and synced to disk")
    return planted


def _read_back(
    tour: Tour, server: TourServer, thread: str, planted: list[str], earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    target = f"/v1/messages?thread={thread}"
    tour.step("Read the conversation back", _curl(server, target))
    messages: list[dict[str, Any]] = json.loads(server.call("GET", target))["messages"]
    for message in messages[-len(planted) :]:
        tour.line(f"{message['author']}: {message['body']['text']}")
    texts = " ".join(message["body"]["text"] for message in messages[len(earlier) :])
    tour.check(
        messages[: len(earlier)] == earlier and all(text in texts for text in planted),
        f"{len(messages)} messages came back as they were written",
    )
    return messages


def _show_record(tour: Tour, server: TourServer, thread: str) -> tuple[str, bytes]:
    """The record's storage key and bytes."""
    prefix = f"thread:{thread}:msg:"
    keys = json.loads(server.call("GET", f"/admin/keys?prefix={urllib.parse.quote(prefix)}", admin=True))["keys"]
    key = next(key for key in keys if key.startswith(prefix))
    target = f"/admin/keys/{urllib.parse.quote(key, safe=':')}"
    tour.step("Look at a message as it is on disk", f"{_curl(server, target, admin=True)} | xxd")
    raw = server.call("GET", target, admin=True)
    key_id, sealed = unpack_sealed(raw)
    for line in hexdump(raw[:DUMPED_BYTES_MAX], plain_bytes=len(raw) - len(sealed)):
        tour.line(line)
    tour.line(
        f"Readable: a version, the key's id ({key_id}), the author. Then nonce, ciphertext, tag: {len(sealed)} bytes."
    )
    return key, raw


def _rotate_kek(tour: Tour, place: TourPaths) -> None:
    socket_path = shlex.quote(str(place.socket))
    tour.step(
        "Rotate the key-encryption key: every conversation's key is wrapped under the new one",
        f"curl -s --unix-socket {socket_path} -d '{{}}' http://kms/rotate_kek",
    )
    try:
        with Client(place.socket) as kms:
            rotated = kms.rotate_kek()
    except KmsError as error:
        raise DemoError(f"miniKMS did not rotate its key: {error}") from None
    tour.check(rotated.status == "ok", f"KEK version {rotated.kek_version}; rewrapped keys: {rotated.rewrapped}")


def _rotate_dek(
    tour: Tour, server: TourServer, thread: str, record: tuple[str, bytes], messages: list[dict[str, Any]]
) -> None:
    """Give the conversation a new key, and show the same message under both."""
    stored_key, before = record
    target, body = "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}
    tour.step(
        "Rotate the conversation's own key: its messages are re-encrypted", _curl(server, target, body, admin=True)
    )
    new_key = json.loads(server.call("POST", target, body, admin=True))["new_key"]
    after = server.call("GET", f"/admin/keys/{urllib.parse.quote(stored_key, safe=':')}", admin=True)
    for when, raw in (("before", before), ("now", after)):
        key_id, sealed = unpack_sealed(raw)
        tour.line(f"{when + ':':7} {key_id}  {sealed[:CIPHERTEXT_BYTES_SHOWN].hex()}…")
    tour.check(
        unpack_sealed(after)[0] == new_key and unpack_sealed(before)[1] != unpack_sealed(after)[1],
        f"the message is under the new key, {new_key}; the old one only decrypts",
    )
    again = json.loads(server.call("GET", f"/v1/messages?thread={thread}"))["messages"]
    tour.check(again == messages, f"all {len(again)} messages read as before")


def _show_status(tour: Tour, place: TourPaths) -> str:
    """Print the main figures. Returns the current head of the audit log, `seq:sig`."""
    tour.step(
        "Ask the key service for its status",
        f"curl -s --unix-socket {shlex.quote(str(place.socket))} http://kms/status",
    )
    status = _kms_status(place.socket)
    measures = status.hardening
    in_force = [measure.measure for measure in measures if measure.in_force]
    tour.line(f"keys in memory: {status.memory.arena}; in force: {', '.join(in_force)}")
    for measure in measures:
        if not measure.in_force:
            tour.line(f"not in force: {measure.measure}, since {measure.why}")
    for warning in status.warnings:
        tour.line(f"warning: {warning}", style="yellow")
    tour.check(status.status == "ok", f"process {status.pid}, audit log at line {status.audit.head.seq}")
    return f"{status.audit.head.seq}:{status.audit.head.sig}"


def _search_disk(tour: Tour, place: TourPaths, thread: str, planted: list[str], texts: list[str]) -> None:
    """Search after the stop, when the store has written its memory to disk."""
    tour.step(
        "Stop the server, and search every byte on disk: store, keys, audit log and the server's log",
        f"grep --recursive --text --count '{planted[0]}' {shlex.quote(str(place.directory))}",
    )
    try:
        known = search(place.directory, [thread])
        found = search(place.directory, [TITLE, *planted, *texts])
    except OSError as error:
        raise DemoError(f"the search cannot read every file: {error}") from None
    tour.check(
        bool(known.hits), f"the search can find: the thread's id, which is not secret, is in {len(known.hits)} files"
    )
    for path, text in found.hits[:3]:
        tour.line(f"found in {path}: {text[:KEY_CHARS_SHOWN]}", style="red")
    tour.check(
        not found.hits,
        f"2 planted texts, {len(texts)} messages and the title, as text, hex or base64: nowhere in "
        f"{found.files} files, {found.size:,} bytes",
    )


def _verify_audit(tour: Tour, place: TourPaths, head: str) -> None:
    command = ["audit", "verify", "--data-dir", str(place.kms_data), "--expect-head", head]
    tour.step("Verify the audit log: who did what with which key", shlex.join([_program("minikms"), *command]))
    done = subprocess.run(  # noqa: S603 - our own program, our own arguments
        [sys.executable, "-P", "-m", "minikms", *command],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=READY_S_MAX,
        check=False,
    )
    for line in (done.stdout + done.stderr).splitlines():
        tour.line(line)
    tour.check(done.returncode == 0, "every line is there, unaltered and in order, the head that /status named too")


# --- the server -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _running(tour: Tour, place: TourPaths) -> Iterator[TourServer]:
    """The real server, as a process that is stopped at the end. Raises DemoError if it does not start or stop."""
    _make_own_directory(place.directory)
    server = TourServer(f"127.0.0.1:{_free_port()}", secrets.token_urlsafe(12), secrets.token_urlsafe(12))
    tour.step("Start the server, which starts miniKMS, the key service", _server_command(place, server))
    with place.server_log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own program, our own arguments
            [sys.executable, "-P", "-m", "progressdb_server", *_flags(place, server)],
            env=_environment() | _variables(place, server),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_until_ready(process, server, place)
        tour.check(True, f"{server.url} answers; data in {place.directory}, log in {place.server_log}")
        tour.line(f"--dev made the root key, {place.kms_data}.master-key. Elsewhere, keep it apart from the data.")
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    if status != 0:
        raise DemoError(f"the server ended with status {status}; its log: {place.server_log}")


def _make_own_directory(directory: Path) -> None:
    """Make it, or check that this user owns it and all that is in it. Raises DemoError."""
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        owners = {path: path.lstat().st_uid for path in (directory, *directory.rglob("*"))}
    except OSError as error:
        raise DemoError(f"cannot use {directory}: {error.strerror}; {OTHER_DIRECTORY}") from None
    for path, owner in owners.items():
        if owner != os.geteuid():
            raise DemoError(f"{path} belongs to uid {owner}, and you are uid {os.geteuid()}; {OTHER_DIRECTORY}")


def _wait_until_ready(process: subprocess.Popen[bytes], server: TourServer, place: TourPaths) -> None:
    end = time.monotonic() + READY_S_MAX
    while True:
        try:
            server.call("GET", "/healthz")
        except DemoError:
            if process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
                continue
            last = place.server_log.read_text(errors="replace").splitlines()[-5:]
            raise DemoError("the server did not come up. Its last words:\n" + "\n".join(last)) from None
        return


def _flags(place: TourPaths, server: TourServer) -> list[str]:
    return ["--dev", "--addr", server.address, "--db", str(place.directory)]


def _variables(place: TourPaths, server: TourServer) -> dict[str, str]:
    variables = {"PROGRESSDB_API_BACKEND_KEYS": server.backend_key, "PROGRESSDB_API_ADMIN_KEYS": server.admin_key}
    if not place.socket.is_relative_to(place.directory):
        variables["PROGRESSDB_KMS_SOCKET"] = str(place.socket)
    return variables


def _server_command(place: TourPaths, server: TourServer) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in _variables(place, server).items()]
    return " ".join([*variables, shlex.join([_program("progressdb"), *_flags(place, server)])])


def _program(name: str) -> str:
    """As the user would type it: the bare name if PATH finds it, otherwise the shortest path."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _environment() -> dict[str, str]:
    """The environment of the started processes, without the user's configuration of these programs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}


@contextlib.contextmanager
def _socket_place(directory: Path) -> Iterator[Path]:
    """The server's default path, or one in a short temporary directory if the default is too long for a socket."""
    usual = directory / "run" / "minikms.sock"
    if len(os.fsencode(usual.absolute())) <= UNIX_PATH_BYTES_MAX:
        yield usual
        return
    short = tempfile.mkdtemp(prefix="progressdb-demo-")
    try:
        yield Path(short) / "minikms.sock"
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _free_port() -> int:
    """One that no outgoing connection takes before the server has it. Raises DemoError."""
    for _ in range(PORT_TRIES):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise DemoError("no port of 127.0.0.1 is free for the server")


def _kms_status(path: Path) -> api.StatusAnswer:
    """The status that miniKMS reports over its socket. Raises DemoError."""
    try:
        with Client(path) as kms:
            return kms.status()
    except KmsError as error:
        raise DemoError(f"miniKMS did not say how it is: {error}") from None


def _curl(server: TourServer, target: str, body: object = None, *, admin: bool = False) -> str:
    words = ["curl", "-s", "-H", f"X-API-Key: {server.admin_key if admin else server.backend_key}"]
    if body is not None:
        words += ["-d", json.dumps(body)]
    return shlex.join([*words, server.url + target])
