"""Clients of the three message servers, which record what they asked and what they were answered.

Owns: retries until an answer is certain, and the operations of a mixed load. Every choice is drawn from a seed. What
happens when depends on the machine.
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from tests.cluster.history import Operation
from tests.cluster.machines import ADMIN, BACKEND, FRONTEND, PORT

ATTEMPT_S_MAX: Final = 8.0
"""Then a client asks another server."""
RETRY_S: Final = 0.2
GIVE_UP_S: Final = 90.0
PAUSE_S_MAX: Final = 0.1
"""Between two operations of a client."""
MESSAGES_MAX: Final = 60
"""Of a thread. Then the load goes on in another one."""
OWNER: Final = "ada"


class Answer(NamedTuple):
    status: int
    """0 if there was none."""
    body: Any


class Asked(NamedTuple):
    """The last answer, and whether all attempts were answered for certain."""

    outcome: str
    answer: Answer
    sure: bool


class Client:
    """One thread of the load; asks any server, or the one that is named."""

    def __init__(self, load: Load, seed: str) -> None:
        self.load = load
        self.random = random.Random(seed)
        self._connections: dict[str, http.client.HTTPConnection] = {}
        self._server = self.random.choice(load.servers)

    def ask(self, method: str, path: str, body: object, headers: dict[str, str], *, server: str = "") -> Asked:
        """Until an answer is certain: at `server` alone if one is named."""
        end = time.monotonic() + GIVE_UP_S
        sure = True
        while True:
            answer = self._attempt(server or self._server, method, path, body, headers)
            self.load.count(answer.status)
            if 200 <= answer.status < 300:
                return Asked("ok", answer, sure)
            again = answer.status == 409 and "try again" in str(answer.body)  # another server has a job of this thread
            if 400 <= answer.status < 500 and not again:
                return Asked("refused", answer, sure)
            sure = False
            if time.monotonic() > end:
                return Asked("unknown", answer, sure)
            self._server = self.random.choice(self.load.servers)
            time.sleep(RETRY_S)

    def _attempt(self, server: str, method: str, path: str, body: object, headers: dict[str, str]) -> Answer:
        connection = self._connections.get(server)
        if connection is None:
            connection = self._connections[server] = http.client.HTTPConnection(server, PORT, timeout=ATTEMPT_S_MAX)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            content = answer.read()
            return Answer(answer.status, json.loads(content) if content[:1] == b"{" else content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connections.pop(server).close()
            return Answer(0, repr(error))

    def do(
        self, kind: str, thread: str, method: str, path: str, body: object = None, *, key: str = BACKEND,
        member: str = "", server: str = "", headers: dict[str, str] | None = None, **about: Any,
    ) -> Asked:  # fmt: skip
        """Ask, and record it."""
        sent = {"X-API-Key": key, **(headers or {})}
        if key == FRONTEND:
            signature = hmac.digest(BACKEND.encode(), member.encode(), "sha256").hex()
            sent |= {"X-User-ID": member, "X-User-Signature": signature}
        begin = time.monotonic()
        asked = self.ask(method, path, body, sent, server=server)
        note = "" if asked.outcome == "ok" else f"{asked.answer.status} {str(asked.answer.body)[:200]}"
        if kind == "list" and asked.outcome == "ok":
            about["listed"] = _listed(asked.answer.body)
        self.load.record(
            Operation(
                kind, thread, begin, time.monotonic(), asked.outcome, member=member, sure=asked.sure, note=note, **about
            )
        )
        return asked

    # --- operations -----------------------------------------------------------------------------------------------
    def append(self, thread: str, *, member: str = "", server: str = "") -> tuple[int, str]:
        """The number and the id of the message; an empty one if it was refused."""
        number = next(self.load.numbers)
        body = {"author": member or OWNER, "body": {"n": number, "v": 0}}
        asked = self.do(
            "write" if member else "append", thread, "POST", f"/v1/threads/{thread}/messages", body, member=member,
            key=FRONTEND if member else BACKEND, server=server, headers={"Idempotency-Key": f"key-{number}"},
            number=number,
        )  # fmt: skip
        return number, asked.answer.body["id"] if asked.outcome == "ok" else ""

    def list(self, thread: str, *, server: str = "") -> Asked:
        return self.do("list", thread, "GET", f"/v1/threads/{thread}/messages?author={OWNER}", server=server)

    def write(self) -> None:
        thread = self.load.thread()
        number, message = self.append(thread)
        if message:
            self.load.written.append((thread, number, message))

    def read(self) -> None:
        self.list(self.random.choice(self.load.threads[-3:]))

    def change(self) -> None:
        """Edit a message twice, then delete it, or not."""
        if not self.load.written:
            return
        thread, number, message = self.load.written.pop(self.random.randrange(len(self.load.written)))
        path = f"/v1/threads/{thread}/messages/{message}"
        for version in (1, 2):
            body = {"author": OWNER, "body": {"n": number, "v": version}}
            self.do("edit", thread, "PUT", path, body, number=number, version=version)
        if self.random.random() < 0.5:
            self.do("delete", thread, "DELETE", f"{path}?author={OWNER}", number=number)
        self.list(thread)

    def member(self) -> None:
        """One joins, reads and writes, is removed, and tries again at each server."""
        thread = self.random.choice(self.load.threads[-3:])
        member = f"member-{next(self.load.numbers)}"
        members, messages = f"/v1/threads/{thread}/members", f"/v1/threads/{thread}/messages"
        self.do("add", thread, "POST", members, {"members": [member]}, key=ADMIN, member=member)
        self.do("read", thread, "GET", messages, key=FRONTEND, member=member)
        for server in self.load.servers:  # each has had a reason to remember the member
            self.append(thread, member=member, server=server if self.random.random() < 0.5 else "")
        self.do("remove", thread, "DELETE", f"{members}?member={member}", key=ADMIN, member=member)
        for server in self.random.sample(self.load.servers, len(self.load.servers)):
            self.append(thread, member=member, server=server)
            self.do("read", thread, "GET", messages, key=FRONTEND, member=member, server=server)

    def rotate(self) -> None:
        """The key of a thread, and wait for the end of the job."""
        thread = self.random.choice(self.load.threads[-3:])
        asked = self.do("rotate", thread, "POST", "/admin/rotate_thread_dek", {"thread_id": thread}, key=ADMIN)
        end = time.monotonic() + GIVE_UP_S
        while asked.outcome == "ok":
            job = self.ask("GET", f"/admin/jobs/{asked.answer.body['job_id']}", None, {"X-API-Key": ADMIN})
            status = job.answer.body["status"] if job.outcome == "ok" else job.outcome
            if status == "done":
                self.load.rotations += 1
                return
            if status in ("failed", "refused") or time.monotonic() > end:
                now = time.monotonic()
                self.load.record(Operation("rotate", thread, now, now, "refused", note=f"the job is {job}"[:300]))
                return
            time.sleep(0.2)


def _listed(body: Any) -> tuple[tuple[int, int], ...]:
    """A message that can't be read has no body: it is not there."""
    bodies = [message.get("body") for message in body["messages"]]
    return tuple((one["n"], one["v"]) for one in bodies if isinstance(one, dict))


CLIENTS: Final[Sequence[tuple[Callable[[Client], None], int]]] = (
    (Client.write, 4), (Client.read, 2), (Client.change, 2), (Client.member, 1), (Client.rotate, 1),
)  # fmt: skip
"""The clients of each kind."""


class Load:
    """What the clients share."""

    def __init__(self, servers: Sequence[str], seed: int) -> None:
        self.servers = list(servers)
        self.numbers = itertools.count(1)
        self.threads: list[str] = []
        self.written: list[tuple[str, int, str]] = []
        self.history: list[Operation] = []
        self.statuses: dict[int, int] = {}
        self.rotations = 0
        self.errors: list[str] = []
        self._seed = seed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._left = 0

    def record(self, operation: Operation) -> None:
        self.history.append(operation)

    def count(self, status: int) -> None:
        with self._lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1

    def thread(self) -> str:
        """The one to write into."""
        with self._lock:
            self._left -= 1
            if self._left >= 0:
                return self.threads[-1]
            self._left = MESSAGES_MAX
            name = f"thread-{len(self.threads)}"
        client = Client(self, f"{self._seed} {name}")
        body = {"author": OWNER, "thread": name, "body": {"n": 0, "v": 0}}
        begin = time.monotonic()
        made = client.ask("POST", "/v1/messages", body, {"X-API-Key": BACKEND, "Idempotency-Key": name})
        thread: str = made.answer.body["thread"]
        self.record(Operation("append", thread, begin, time.monotonic(), "ok"))
        self.threads.append(thread)
        return thread

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The clients run during the block. Afterwards each thread is listed at each server."""
        self.thread()
        workers = [
            threading.Thread(target=self._work, args=(turn, f"{self._seed} {turn.__name__} {number}"))
            for turn, count in CLIENTS
            for number in range(count)
        ]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        last = Client(self, f"{self._seed} last")
        for server in self.servers:
            for thread in self.threads:
                if last.list(thread, server=server).outcome == "unknown":
                    break  # it answers nobody

    def _work(self, turn: Callable[[Client], None], seed: str) -> None:
        client = Client(self, seed)
        try:
            while not self._stop.is_set():
                turn(client)
                time.sleep(client.random.uniform(0, PAUSE_S_MAX))
        except Exception as error:  # noqa: BLE001  the thread would end unseen
            self.errors.append(f"{turn.__name__}: {error!r}")
