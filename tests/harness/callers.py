"""Callers of several users on one daemon, which runs under a policy file.

Owns: connections that belong to another user, though this process uses them (unix(7): the credentials are those of the
process that called connect(2)); the policy file of a daemon. It asserts nothing about the answers. Needs root.
"""

from __future__ import annotations

import array
import json
import os
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import receive_more, wait_until

USER, OTHER, PROXY, NOBODY = 45_678, 45_679, 45_680, 45_681
"""Uids that belong to nobody on the machine."""
ROOT_GRANT = """
[[grant]]
name = "operator"
principals = ["uid:0"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy", "unseal"]
threads = ["*"]
"""
WAIT_S = 60.0


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str:
        """Of an error; empty for any other answer."""
        return str(self.body.get("code", "")) if isinstance(self.body, dict) else ""


class Caller:
    """One connection. Requests are sent as they are given."""

    def __init__(self, sock: socket.socket, principal: str | None = None) -> None:
        self.sock = sock
        self.principal = principal
        self._data = b""
        sock.settimeout(WAIT_S)

    def send(self, method: str, target: str, body: object = None, *, headers: tuple[str, ...] = ()) -> None:
        """`body`: bytes as they are, anything else as JSON."""
        sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        named = [] if self.principal is None else [f"X-MiniKMS-Principal: {self.principal}"]
        lines = [f"{method} {target} HTTP/1.1", "Host: x", *named, *headers]
        if method == "POST":
            lines.append(f"Content-Length: {len(sent)}")
        self.sock.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + sent)

    def receive(self) -> Reply:
        while b"\r\n\r\n" not in self._data:
            self._data += receive_more(self.sock)
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"])
        while len(self._data) < length:
            self._data += receive_more(self.sock)
        body, self._data = self._data[:length], self._data[length:]
        return Reply(int(status_line.split()[1]), headers, json.loads(body) if body[:1] in (b"{", b"[") else body)

    def ask(self, method: str, target: str, body: object = None, *, headers: tuple[str, ...] = ()) -> Reply:
        self.send(method, target, body, headers=headers)
        return self.receive()

    def get(self, target: str) -> Reply:
        return self.ask("GET", target)

    def post(self, target: str, body: object) -> Reply:
        return self.ask("POST", target, body)

    def acting_for(self, principal: str | None) -> Caller:
        """The same connection, with another principal in the header."""
        return Caller(self.sock, principal)

    def close(self) -> None:
        self.sock.close()


def connected_as(uid: int, path: Path) -> socket.socket:
    """A connection whose peer is the user `uid`."""
    if uid == os.geteuid():
        own = socket.socket(socket.AF_UNIX)
        own.connect(str(path))
        return own
    needs.root()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(())
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            made = socket.socket(socket.AF_UNIX)
            made.connect(str(path))
            theirs.sendmsg([b"1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made.fileno()]))])
            ours.close()
            theirs.recv(1)  # until the parent has asked something: so the daemon sees a process that lives
        finally:
            os._exit(0)
    theirs.close()
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    [(_, _, data)] = ancillary
    received = socket.socket(fileno=int.from_bytes(data[:4], "little"))
    received.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    received.settimeout(WAIT_S)
    answer = b""
    while not answer.endswith(b"ok"):
        answer += receive_more(received)
    ours.close()
    os.waitpid(child, 0)
    return received


class PolicyDaemon(LiveDaemon):
    """A daemon under a policy file, in a directory of the file's own. Every user reaches its socket. All hourly limits
    are full at its first start. `uid`: its user, to whom its files then belong.
    """

    def __init__(self, base: Path, policy: str, *flags: str, uid: int = 0, **others: Any) -> None:
        needs.root()
        base.chmod(0o755)
        self.policy = base / "policy" / "policy.toml"
        self.policy.parent.mkdir(mode=0o755)
        self.write_policy(policy)
        run = base / "run"  # of the socket, where the daemon may write
        run.mkdir(mode=0o755)
        others.setdefault("socket", run / "s")
        (base / "data").mkdir(mode=0o700)
        if uid:
            own = f"cd {base} && chown -R {uid} run data data.master-key && cd / && exec setpriv --reuid={uid}"
            others["program"] = ("sh", "-c", f'{own} --clear-groups "$@"', "sh")
        super().__init__(
            base, "file", "--socket-mode", "0666", "--policy", str(self.policy), *flags, server_uids=[uid], **others
        )
        self._callers: list[Caller] = []

    def write_policy(self, text: str) -> None:
        """Replaces the file, as an operator should: by a rename."""
        new = self.policy.with_name("new")
        new.write_text("version = 1\n" + text)
        new.chmod(0o644)
        new.rename(self.policy)

    def caller(self, uid: int = 0, principal: str | None = None) -> Caller:
        made = Caller(connected_as(uid, self.socket), principal)
        self._callers.append(made)
        return made

    def use_policy(self, text: str) -> None:
        """Takes another policy into force."""
        self.write_policy(text)
        generation = self.status()["policy"]["generation"]
        os.kill(self.pid, 1)
        wait_until(lambda: self.status()["policy"]["generation"] != generation)

    def status(self) -> Any:
        """As root reads it, which has to be granted `monitor`."""
        caller = Caller(connected_as(0, self.socket))
        try:
            answer = caller.get("/status")
        finally:
            caller.close()
        assert answer.status == 200, answer
        return answer.body

    def metric(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`."""
        caller = Caller(connected_as(0, self.socket))
        try:
            text = caller.get("/metrics").body.decode()
        finally:
            caller.close()
        label = "".join(f'{{{key}="{value}"}}' for key, value in labels.items())
        found = re.search(rf"(?m)^{re.escape(name + label)} (\S+)$", text)
        assert found is not None, text
        return float(found[1])

    def new_key(self, thread_id: str, *, purpose: str = "thread") -> str:
        caller = Caller(connected_as(0, self.socket))
        try:
            answer = caller.post("/create_dek_for_thread", {"thread_id": thread_id, "purpose": purpose})
        finally:
            caller.close()
        assert answer.status == 200, answer
        return str(answer.body["key_id"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        for caller in self._callers:
            caller.close()
        super().__exit__(*details)
