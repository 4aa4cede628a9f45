"""Every answer that docs/minikms-openapi.yaml describes is got from a live daemon, by its code, and no other is got."""

import contextlib
import http.client
import json
import os
import re
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from minikms import api
from minikms.cli.serve import UNSHIPPED_LINES_MIN
from minikms_daemon.server.admission import UID_CONNECTIONS_SHARE
from tests import needs
from tests.harness import documented
from tests.harness.documented import Pair
from tests.harness.live_daemon import LiveDaemon
from tests.harness.unix_http import UnixConnection
from tests.harness.verb_requests import example
from tests.harness.waiting import WAIT_S_MAX, receive_more, wait_until
from tests.minikms_daemon.service import faulty_daemon
from tests.minikms_daemon.service.asking import NO_KEY, b64

DOCUMENT = documented.read((Path(__file__).parents[3] / "docs" / "minikms-openapi.yaml").read_text())
LAUNCHER = ("-m", faulty_daemon.__name__)
REFUSED_UID = "45678"
POLICY = f"""
version = 1
[[grant]]
principals = ["uid:{os.geteuid()}"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy"]
threads = ["*"]
limits = {{ requests_per_second = 1 }}
"""


class Refusal(NamedTuple):
    operation: str
    status: int
    code: str


def _response(pair: Pair) -> Any:
    method, path = pair.operation.split(" ", 1)
    return DOCUMENT["paths"][path][method.lower()]["responses"][str(pair.status)]


VERB_OF = {f"{verb.method} {verb.path}": verb for verb in api.VERBS}
SEALING = {"GET /ready", "POST /seal", "GET /unseal", "POST /unseal", "POST /audit/position"} | {
    f"{verb.method} {verb.path}" for verb in api.REPLICA_VERBS
}
"""tests/minikms_daemon/seal/test_seal.py provokes their answers: a sealed daemon would refuse all others. Those of the
others need an auditor or a replicator: tests/minikms_daemon/server/test_auditor.py, tests/minikms_daemon/replica.
"""
PAIRS = sorted(pair for pair in documented.pairs(DOCUMENT) if pair.operation not in SEALING)
REFUSALS = sorted(
    (
        Refusal(pair.operation, pair.status, code)
        for pair in PAIRS
        if pair.status >= 400
        for code in re.findall(r"`([a-z_]+)`", _response(pair)["description"])
        if code != api.CODE_STANDBY  # of one host of several: tests/minikms_daemon/replica
    ),
    key=lambda one: (one.code, one.status, one.operation),
)
"""Refusals of one kind follow each other: they share one damaged key, or one restart."""
VERBS = sorted({pair.operation for pair in PAIRS} - {"GET /health"})
CROWDED = (503, api.CODE_TOO_MANY)
"""Of a connection, whatever it asks."""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body).get("code", self.body))


class Ask(NamedTuple):
    method: str
    target: str
    body: Any = None
    """Bytes as they are, anything else as JSON."""


ROOTS_MAX = 8
"""Beyond them the world removes one."""


class World:
    """A daemon with faults on demand, one that does not know us, one for which we have no role, a sealed one, one whose
    policy file allows us a request a second, and one whose auditor is away.
    """

    def __init__(
        self,
        directory: Path,
        daemon: LiveDaemon,
        *,
        refusing: LiveDaemon,
        roleless: LiveDaemon,
        keyless: LiveDaemon,
        limited: LiveDaemon,
        lagging: LiveDaemon,
    ) -> None:
        self.daemon, self.refusing, self.roleless, self.keyless = daemon, refusing, roleless, keyless
        self.limited, self.lagging = limited, lagging
        assert self(Ask("POST", "/seal"), keyless).status == 200
        self._fault = directory / "fault"
        self._damaged: tuple[Path, bytes] | None = None
        self._prepared: dict[tuple[str, str], Ask] = {}
        self.destroyed = self.key()
        self(Ask("POST", f"/keys/{self.destroyed}/retire"))
        assert self(Ask("POST", f"/keys/{self.destroyed}/destroy", {"key_id": self.destroyed})).status == 200

    def __call__(self, ask: Ask, daemon: LiveDaemon | None = None) -> Reply:
        sent = ask.body if isinstance(ask.body, bytes) or ask.body is None else json.dumps(ask.body).encode()
        with contextlib.closing(UnixConnection((daemon or self.daemon).socket)) as connection:
            connection.request(ask.method, ask.target, sent)
            answered = connection.getresponse()
            return Reply(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())

    def pipelined(self, *asks: Ask, daemon: LiveDaemon) -> Reply:
        """The last answer of requests that are sent at once, so that the daemon begins them in one turn."""
        wire = b""
        for ask in asks:
            sent = b"" if ask.body is None else json.dumps(ask.body).encode()
            length = f"Content-Length: {len(sent)}\r\n" if ask.method == "POST" else ""
            wire += f"{ask.method} {ask.target} HTTP/1.1\r\nHost: kms\r\n{length}\r\n".encode() + sent
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(daemon.socket))
            connection.sendall(wire)
            data = b""
            while data.count(b"HTTP/1.1 ") < len(asks):
                data += receive_more(connection)
            head, _, body = data[data.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            while len(body) < int(headers["content-length"]):
                body += receive_more(connection)
            return Reply(int(lines[0].split()[1]), headers, body)

    def reloaded(self, text: str) -> Reply:
        """The answer to a reload of a policy file with this content, once the limit admits it."""
        file = self.limited.data_dir.parent / "policy" / "policy.toml"
        before = file.read_text()
        file.write_text(text or before)
        try:
            reply = self(Ask("POST", "/policy/reload", {}), self.limited)
            deadline = time.monotonic() + WAIT_S_MAX
            while reply.status == 429:
                assert time.monotonic() < deadline
                time.sleep(0.1)
                reply = self(Ask("POST", "/policy/reload", {}), self.limited)
        finally:
            file.write_text(before)
        return reply

    def raw(self, request: bytes, daemon: LiveDaemon | None = None) -> Reply:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str((daemon or self.daemon).socket))
            with contextlib.suppress(BrokenPipeError):  # a refusal may come before the request
                connection.sendall(request)
            answered = http.client.HTTPResponse(connection)
            answered.begin()
            return Reply(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())

    @contextlib.contextmanager
    def fault(self, word: str) -> Iterator[None]:
        self._fault.write_text(word)
        try:
            yield
        finally:
            self._fault.unlink()

    @contextlib.contextmanager
    def full_log(self) -> Iterator[None]:
        """The kernel lets the daemon write no file any more."""
        before = resource.prlimit(self.daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.daemon.pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.prlimit(self.daemon.pid, resource.RLIMIT_FSIZE, before)
            wait_until(lambda: self(Ask("GET", "/status")).status == 200)

    def crowded(self) -> Reply:
        """The answer to a connection before its request, when the limit of connections is reached by those that wait
        for an answer.
        """
        found: list[Reply] = []

        def refused() -> bool:
            found.append(self.raw(b"?\r\n\r\n"))
            return found[-1].status == 503

        def served() -> bool:
            with contextlib.suppress(ConnectionError):  # one more is refused, and closed before its request is sent
                return self(Ask("GET", "/health")).status == 200
            return False

        with needs.descriptors(api.CONNECTIONS_MAX + 256), contextlib.ExitStack() as opened:
            opened.enter_context(self.fault(faulty_daemon.HELD))
            for _ in range(api.CONNECTIONS_MAX // UID_CONNECTIONS_SHARE + 64):
                one = opened.enter_context(socket.socket(socket.AF_UNIX))
                one.connect(str(self.daemon.socket))
                with contextlib.suppress(BrokenPipeError):
                    one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(refused)
            reply = found[-1]
        wait_until(served)
        return reply

    # --- what there is --------------------------------------------------------------------------------------------
    def key(self, thread_id: str = "t", **more: str) -> str:
        made = self(Ask("POST", "/create_dek_for_thread", {"thread_id": thread_id, **more}))
        return str(json.loads(made.body)["key_id"])

    def retired(self, **more: str) -> str:
        key_id = self.key(**more)
        assert self(Ask("POST", f"/keys/{key_id}/retire")).status == 200
        return key_id

    def kept_frames(self) -> list[str]:
        """Places of frames that outlived the requests to a daemon that runs and that only the collector would free."""
        if self.daemon.process.poll() is not None:
            return []
        with self.fault(faulty_daemon.GARBAGE):
            return self(Ask("GET", "/health")).body.decode().splitlines()

    def restart(self) -> None:
        assert self.kept_frames() == []
        self.daemon.kill()
        self.daemon.start()
        self.settle()

    def settle(self) -> None:
        """Wait for the end of a rotation, also of one that is due and has not begun: a start would go on with it."""
        wait_until(lambda: self.rotation is None and all(root["state"] == "active" for root in self.listed_roots()))

    @property
    def rotation(self) -> Any:
        return json.loads(self(Ask("GET", "/status")).body)["rotation"]

    def unreadable(self) -> str:
        """A key whose file is damaged, and that is not open."""
        if self._damaged is None:
            file = self.daemon.data_dir / "kms-deks" / f"{self.key()}.json"
            self._damaged = file, file.read_bytes()
            file.write_bytes(b"{}")
            (self.daemon.data_dir / "kms-journal").unlink(missing_ok=True)  # else a start mends the file
            self.restart()
        return self._damaged[0].stem

    def mend(self) -> None:
        """Put the file of the damaged key right again, for it keeps its KEK from being destroyed."""
        if self._damaged is not None:
            file, content = self._damaged
            self._damaged = None
            file.write_bytes(content)
            self.restart()

    def prepared(self, word: str, operation: str, operations: Iterable[str]) -> Ask:
        """A good request of `operation` to a daemon that has opened no key since its start, and has reserved no uses.

        `operations`: all that are asked one after another while `word` is in force; one restart serves them.
        """
        if (word, operation) not in self._prepared:
            self._prepared.update({(word, each): self.good(each) for each in operations})
            self.settle()  # a rotation that a start goes on with would reserve wraps
            self.restart()
        return self._prepared.pop((word, operation))

    def sealed(self, key_id: str) -> str:
        made = self(Ask("POST", "/encrypt", {"key_id": key_id, "plaintext": b64(b"text")}))
        return str(json.loads(made.body)["ciphertext"])

    def listed_roots(self) -> list[dict[str, Any]]:
        """Also those that were removed and are still to be rotated away."""
        listed: list[dict[str, Any]] = json.loads(self(Ask("GET", "/roots")).body)["roots"]
        return listed

    def roots(self) -> list[dict[str, Any]]:
        """Those that open the keyring."""
        return [root for root in self.listed_roots() if root["state"] == "active"]

    def add_root(self, provider: str = "file") -> tuple[str, str]:
        """Another root key, and its slot."""
        while len(found := self.roots()) > ROOTS_MAX:
            self.remove_root(next(each["slot_id"] for each in found if not each["in_use"]))
        root = os.urandom(32).hex()
        added = self(Ask("POST", "/roots", {"provider": provider, "root_hex": root}))
        assert added.status == 200, added
        return root, json.loads(added.body)["slot_id"]

    def remove_root(self, slot_id: str) -> None:
        removed = self(Ask("POST", f"/roots/{slot_id}/remove"))
        assert removed.status == 200, removed
        self.settle()

    # --- good requests --------------------------------------------------------------------------------------------
    def good(self, operation: str, key_id: str = "") -> Ask:
        """Of `key_id`, whatever that is, or of a key that is made for it."""
        self._prepared.clear()  # other tests open keys, whichever test is the next
        method, path = operation.split(" ", 1)
        given = bool(key_id)
        if path in ("/health", "/status", "/metrics", "/keys") or operation == "GET /roots":
            return Ask(method, path)
        if "/roots" in path:
            root, slot_id = self.add_root()
            if path == "/roots":
                self.remove_root(slot_id)
                return Ask(method, path, {"provider": "file", "root_hex": os.urandom(32).hex()})
            return Ask(method, path.format(slot_id=slot_id), {"root_hex": root} if path.endswith("/test") else None)
        if path == "/random":
            return Ask(method, path, {"count": 16})
        if path == "/policy/reload":
            return Ask(method, path, {})
        if path == "/kek/prune":
            self(Ask("POST", "/rotate_kek", {}))  # there is a version to destroy then
            return Ask(method, path, {"backups": True})
        if path == "/create_dek_for_thread":
            return Ask(method, path, {"thread_id": "t", **({"replaces": key_id} if key_id else {})})
        if path == "/get_or_create_dek_for_thread":
            return Ask(method, path, {"thread_id": os.urandom(8).hex()})  # it has no key
        if path == "/rotate_kek":
            sample = {"key_id": key_id, "ciphertext": b64(bytes(40))}
            return Ask(method, path, {"verify": [sample]} if key_id else {})
        if path == "/generate_data_key":
            return Ask(method, path, {"key_id": key_id or self.key(purpose="data")})
        if path == "/mac":
            return Ask(method, path, msgspec.to_builtins(example(api.MAC, key_id or self.key(purpose="mac"))))
        if path.endswith("/destroy"):
            key_id = key_id or self.retired()
            return Ask(method, path.format(key_id=key_id), {"key_id": key_id})
        key_id = key_id or self.key()
        if path == "/get_wrapped":
            return Ask(method, f"{path}?key_id={key_id}")
        verb = VERB_OF[operation]
        body: Any = msgspec.to_builtins(example(verb, key_id)) if verb.has_body else None
        if given:
            return Ask(method, path.format(key_id=key_id), body)
        if path in ("/decrypt", "/decrypt_batch"):
            item = body if path == "/decrypt" else body["items"][0]
            item["ciphertext"] = self.sealed(key_id)
        elif path == "/reencrypt_batch":
            body["items"][0]["ciphertext"] = self.sealed(key_id)
            body["to_key_id"] = self.key()
        elif path == "/check_batch":
            body["items"].append({"ciphertext": self.sealed(key_id)})
        return Ask(method, path.format(key_id=key_id), body)


def _purpose(operation: str) -> dict[str, str]:
    return {"purpose": "data"} if "data_key" in operation else {"purpose": "mac"} if "mac" in operation else {}


_JUNK = b64(bytes(40))


# --- provocations -----------------------------------------------------------------------------------------------------
def malformed(world: World, operation: str) -> Reply:
    """No JSON, a parameter that the verb does not take, or, where it takes nothing, no HTTP."""
    method, path = operation.split(" ", 1)
    if path in ("/status", "/metrics") or operation == "GET /roots":
        return world.raw(b"GET %b HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" % path.encode())
    ask = world.good(operation)
    if path == "/keys/{key_id}":
        return world(ask._replace(target="/keys/nothing"))
    return world(ask._replace(body=b"{") if method == "POST" else ask._replace(target=f"{path}?other=1"))


def unopened(world: World, operation: str) -> Reply:
    return world(world.good(operation, world.key())._replace(body=_with_junk(operation, world.key())))


def _with_junk(operation: str, key_id: str) -> Any:
    item = {"key_id": key_id, "ciphertext": _JUNK}
    return {"verify": [item]} if operation.endswith("rotate_kek") else item


def of_unreadable_key(world: World, operation: str) -> Reply:
    if operation == "POST /get_or_create_dek_for_thread":
        ask = world.good(operation)
        key_id = json.loads(world(ask).body)["key_id"]  # not opened yet
        (world.daemon.data_dir / "kms-deks" / f"{key_id}.json").unlink()
        return world(ask)
    return world(world.good(operation, world.unreadable()))


def of_other_thread(world: World, operation: str) -> Reply:
    other = world.key("other")
    ask = world.good(operation, other if "create" in operation else "")
    if operation == "POST /reencrypt_batch":
        return world(ask._replace(body={**ask.body, "to_key_id": other}))
    return world(ask._replace(body={**ask.body, "thread_id": "not-its"}))


def of_retired_key(world: World, operation: str) -> Reply:
    retired = world.retired(**_purpose(operation))
    ask = world.good(operation)
    name = "to_key_id" if "reencrypt" in operation else "replaces" if "create" in operation else "key_id"
    return world(ask._replace(body={**ask.body, name: retired}))


def of_another_purpose(world: World, operation: str) -> Reply:
    if operation == "POST /reencrypt_batch":
        ask = world.good(operation)
        return world(ask._replace(body={**ask.body, "to_key_id": world.key(purpose="data")}))
    own = operation in ("POST /generate_data_key", "POST /mac")
    return world(world.good(operation, world.key(purpose="thread" if own else "mac")))


def forbidden(world: World, operation: str) -> Reply:
    """Without the role, each item of a batch is refused by itself. Without a policy no principal may be named."""
    if operation not in ("POST /encrypt_batch", "POST /decrypt_batch"):
        return world(world.good(operation), world.roleless)
    return world.raw(
        b"POST %b HTTP/1.1\r\nHost: kms\r\nX-MiniKMS-Principal: dns:a\r\nContent-Length: 2\r\n\r\n{}"
        % operation.split()[1].encode()
    )


def beyond_a_limit(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    if operation == "GET /metrics":
        return world.pipelined(Ask("GET", "/status"), ask, daemon=world.limited)
    return world.pipelined(Ask("GET", "/metrics"), ask, daemon=world.limited)


def conflicting(world: World, operation: str) -> Reply:
    if operation == "POST /policy/reload":
        return world(world.good(operation))  # it has no policy file
    if operation == "POST /roots":
        root, _ = world.add_root()
        return world(Ask("POST", "/roots", {"provider": "file", "root_hex": root}))
    if operation == "POST /create_dek_for_thread":
        return world(world.good(operation, world.key(purpose="data")))
    if operation.endswith("/destroy"):
        return world(world.good(operation, world.key()))  # it is active
    reply = None
    while reply is None:
        world.settle()
        replaced = {root["slot_id"] for root in world.roots() if root["in_use"]}
        with world.fault(faulty_daemon.STUCK):
            begun = world(Ask("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex(), "wait": False}))
            if begun.status == 202:  # otherwise the removal of a root key had just begun
                reply = world(world.good(operation))
    wait_until(lambda: not replaced & {root["slot_id"] for root in world.listed_roots()})
    world.settle()
    return reply


def of_another_slot(world: World, operation: str) -> Reply:
    if operation == "POST /rotate_kek":
        file = world.daemon.root_file
        before = file.read_text()
        file.write_text(world.add_root("token")[0] + "\n")
        world.restart()
        reply = world(Ask("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}))
        file.write_text(before)
        world.restart()
        return reply
    return world(world.good(operation)._replace(body={"root_hex": os.urandom(32).hex()}))


def of_the_last_root(world: World, operation: str) -> Reply:
    for root in world.roots():
        if not root["in_use"]:
            world.remove_root(root["slot_id"])
    return world(Ask("POST", f"/roots/{world.roots()[0]['slot_id']}/remove"))


def too_large(world: World, operation: str) -> Reply:
    path = world.good(operation).target
    length = api.BODY_BYTES_MAX + 1
    return world.raw(b"POST %b HTTP/1.1\r\nHost: kms\r\nContent-Length: %d\r\n\r\n" % (path.encode(), length))


def too_many(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    if operation == "POST /rotate_kek":
        return world(ask._replace(body={"verify": [{"key_id": NO_KEY, "ciphertext": _JUNK}] * 65}))
    return world(ask._replace(body={**ask.body, "items": ask.body["items"] * (api.BATCH_ITEMS_MAX + 1)}))


_USES_ONE_KEY = re.compile(r"(?!.*(/create|_create|/kek|/roots|/rotate))").match
"""Other operations change what every operation needs: each gets a restart of its own."""


def under(word: str, status: int, code: str) -> Callable[[World, str], Reply]:
    def asked(world: World, operation: str) -> Reply:
        if word == faulty_daemon.DEFECT:
            ask = world.good(operation)
        else:
            alike = [one.operation for one in REFUSALS if one[1:] == (status, code) and _USES_ONE_KEY(one.operation)]
            ask = world.prepared(word, operation, alike if operation in alike else [operation])
        with world.fault(word):
            return world(ask)

    return asked


def unwritten(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    with world.full_log():
        return world(ask)


def while_stopping(world: World, operation: str) -> Reply:
    ask = world.good(operation)
    try:
        with ThreadPoolExecutor(1) as other, world.fault(faulty_daemon.STUCK):
            waiting = other.submit(world, ask)
            wait_until(lambda: world.rotation is not None)
            world.daemon.process.terminate()
            return waiting.result()
    finally:
        world.daemon.process.wait(WAIT_S_MAX)
        world.restart()


PROVOKED: dict[str, Callable[[World, str], Reply]] = {
    api.CODE_INVALID_REQUEST: malformed,
    api.CODE_DECRYPTION_FAILED: unopened,
    api.CODE_UNAUTHORIZED: lambda world, operation: world(world.good(operation), world.refusing),
    api.CODE_FORBIDDEN: forbidden,
    api.CODE_LIMIT_EXCEEDED: beyond_a_limit,
    api.CODE_INVALID_POLICY: lambda world, operation: world.reloaded("version = 3"),
    api.CODE_SEALED: lambda world, operation: world(world.good(operation), world.keyless),
    api.CODE_WRONG_THREAD: of_other_thread,
    api.CODE_KEY_NOT_FOUND: lambda world, operation: world(world.good(operation, NO_KEY)),
    api.CODE_KEY_DESTROYED: lambda world, operation: world(world.good(operation, world.destroyed)),
    api.CODE_KEY_UNREADABLE: of_unreadable_key,
    api.CODE_KEY_RETIRED: of_retired_key,
    api.CODE_WRONG_PURPOSE: of_another_purpose,
    api.CODE_CONFLICT: conflicting,
    api.CODE_WRONG_SLOT: of_another_slot,
    api.CODE_LAST_ROOT: of_the_last_root,
    api.CODE_NOT_FOUND: lambda world, operation: world(
        world.good(operation)._replace(target=operation.split()[1].format(slot_id="s99999"))
    ),
    api.CODE_TOO_LARGE: too_large,
    api.CODE_TOO_MANY: too_many,
    api.CODE_AUDIT_UNAVAILABLE: unwritten,
    api.CODE_AUDIT_LAGGING: lambda world, operation: world(world.good(operation), world.lagging),
    api.CODE_STORAGE_UNAVAILABLE: under(faulty_daemon.DISK, 503, api.CODE_STORAGE_UNAVAILABLE),
    api.CODE_INTERRUPTED: while_stopping,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    at = tmp_path_factory.mktemp("every")
    places = [at / name for name in ("daemon", "refusing", "roleless", "keyless", "limited", "lagging")]
    for place in places:
        place.mkdir()
    policy = places[4] / "policy" / "policy.toml"
    policy.parent.mkdir()
    policy.write_text(POLICY)
    run = places[4] / "run"  # of the socket, where the daemon may write
    run.mkdir()
    shipped = places[5] / "audit"
    shipped.mkdir(mode=0o700)
    unshipped = ("--audit-dir", str(shipped), "--refuse-when-unshipped", str(UNSHIPPED_LINES_MIN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faulty_daemon.FAULT_FILE, str(places[0] / "fault"))
        with (
            LiveDaemon(places[0], "file", "--rewrite-master-key-file", launcher=LAUNCHER) as daemon,
            LiveDaemon(places[1], "file", "--allowed-uids", REFUSED_UID) as refusing,
            LiveDaemon(places[3]) as keyless,
            LiveDaemon(places[4], "file", "--policy", str(policy), socket=run / "s") as limited,
            LiveDaemon(places[5], "file", *unshipped) as lagging,
        ):
            patch.setenv(faulty_daemon.ROLELESS, "1")
            with LiveDaemon(places[2], "file", "--admin-uids", REFUSED_UID, launcher=LAUNCHER) as roleless:
                patch.delenv(faulty_daemon.ROLELESS)
                made = World(
                    places[0],
                    daemon,
                    refusing=refusing,
                    roleless=roleless,
                    keyless=keyless,
                    limited=limited,
                    lagging=lagging,
                )
                for _ in range(UNSHIPPED_LINES_MIN):
                    made(Ask("GET", "/status"), lagging)
                wait_until(lambda: made(Ask("POST", "/random", {"count": 1}), lagging).status == 503)
                yield made
                assert made.kept_frames() == []


LEFT_OUT = {
    **{
        Refusal(f"POST /{name}", 503, api.CODE_INTERRUPTED): "told or cut off, by which of two timers is first; it is "
        "provoked of rotate_kek, which is stopped by the same lines"
        for name in (
            "create_dek_for_thread",
            "get_or_create_dek_for_thread",
            "kek/prune",
            "policy/reload",
            "keys/{key_id}/retire",
            "keys/{key_id}/destroy",
            "roots",
            "roots/{slot_id}/test",
            "roots/{slot_id}/remove",
        )
    },
    Refusal(
        "POST /roots/{slot_id}/remove", 409, api.CODE_CONFLICT
    ): "answered where the keyring has no room for another KEK version; see tests/minikms/keys/test_keyring.py",
    Refusal("POST /roots/{slot_id}/remove", 409, api.CODE_NOT_TESTED): "answered after 90 days; see test_roots.py",
    **{
        Refusal(f"POST /{name}", 409, api.CODE_NOT_PINNED): "answered where there is a pin file; test_roots.py has one"
        for name in ("roots", "rotate_kek")
    },
    **{
        Refusal(
            verb, 503, api.CODE_SHUTTING_DOWN
        ): "told to a connection that was made in the moment of the stop, before "
        "it is read; tests/minikms/http/test_http_deadlines.py holds that moment"
        for verb in VERBS
    },
}
"""What is not provoked, and why."""


def check(operation: str, reply: Reply) -> None:
    documented.check(DOCUMENT, operation, reply.status, reply.headers, reply.body)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.status < 400], ids=str)
def test_every_good_answer_appears(world: World, pair: Pair) -> None:
    if pair.operation == "POST /policy/reload":
        reply = world.reloaded("")
    else:
        ask = world.good(pair.operation)
        reply = world(ask._replace(body={"wait": False}) if pair.status == 202 else ask)
    assert reply.status == pair.status, reply
    check(pair.operation, reply)


def test_at_the_limit_of_connections_every_call_gets_that_error(world: World) -> None:
    """Before it has been read: whatever it would have been, this is documented of it."""
    reply = world.crowded()
    assert (reply.status, reply.code) == CROWDED
    for operation in VERBS:
        assert (operation, *CROWDED) in REFUSALS
        check(operation, reply)


@pytest.mark.parametrize(
    ("operation", "status", "code"), [one for one in REFUSALS if one[1:] != CROWDED and one not in LEFT_OUT]
)
def test_every_refusal_appears(world: World, operation: str, status: int, code: str) -> None:
    provoke = PROVOKED.get(code)
    if code == api.CODE_INTERNAL:
        provoke = under(faulty_daemon.DEFECT if status == 500 else faulty_daemon.ARENA, status, code)
    assert provoke is not None, code
    if code != api.CODE_KEY_UNREADABLE:
        world.mend()
    reply = provoke(world, operation)
    assert (reply.status, reply.code) == (status, code), reply
    check(operation, reply)


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_another_method_than_the_described_one_is_a_405_that_names_it(world: World, path: str) -> None:
    described = {method.upper() for method in DOCUMENT["paths"][path]}
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"} - described:
        reply = world(Ask(method, path.format(key_id=NO_KEY, slot_id="s1", member_id="m2")))
        known = method not in ("TRACE", "QUERY")
        allowed = ", ".join(sorted(described)) if known else "GET, POST"
        assert (reply.status, reply.headers["allow"]) == (405, allowed), (method, reply)


def test_each_pair_left_out_is_documented_and_provoked_otherwise() -> None:
    """Its status is provoked with another refusal of the same operation."""
    assert set(LEFT_OUT) <= set(REFUSALS)
    for operation, status, _ in LEFT_OUT:
        assert any(one not in LEFT_OUT for one in REFUSALS if one[:2] == (operation, status))


def test_every_pair_of_operation_and_status_is_walked() -> None:
    assert {pair for pair in PAIRS if pair.status >= 400} == {Pair(one.operation, one.status) for one in REFUSALS}
