"""The log of a real daemon: its flags, its maintenance, and refused requests while the log can't be written."""

import errno
import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import StartError
from minikms_daemon.server.settings import expected_head
from tests.harness import forked
from tests.harness.forked import Forked
from tests.harness.unix_http import answers
from tests.harness.waiting import wait_until
from tests.minikms.audit.logmaker import events_of

LOG = "minikms-audit.log"


class Daemon:
    def __init__(self, directory: Path) -> None:
        self.data_dir = directory / "data"
        self.socket = directory / "s"
        self.pid = 0
        self.places = ("--dev", "--socket", str(self.socket), "--data-dir", str(self.data_dir))

    def text(self, method: str, path: str) -> str:
        return self._exchange(method, path, b"")[1].decode()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        content = b"" if body is None else json.dumps(body).encode()
        code, answered = self._exchange(method, path, content)
        return code, json.loads(answered)

    def _exchange(self, method: str, path: str, content: bytes) -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self.socket))
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        head_bytes, _, answered = answer.partition(b"\r\n\r\n")
        return int(head_bytes.split()[1]), answered

    def verify(self) -> tuple[int, str]:
        done = forked.run("minikms", "audit", "verify", "--data-dir", self.data_dir)
        return done.returncode, done.stdout + done.stderr


@contextmanager
def serving(directory: Path, *flags: object) -> Iterator[Daemon]:
    daemon = Daemon(directory)
    words = ["minikms", *daemon.places, *map(str, flags)]
    with (directory / "log").open("ab") as log:
        process = Forked(words, None, log.fileno(), log.fileno())
    daemon.pid = process.pid
    try:
        wait_until(lambda: answers(daemon.socket))
        yield daemon
    finally:
        process.terminate()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_the_log_of_a_daemon_is_intact_and_hides_threads(tmp_path: Path) -> None:
    with serving(tmp_path, "--audit-hash-thread-ids") as daemon:
        status, made = daemon.ask("POST", "/create_dek_for_thread", {"thread_id": "payroll"})
        assert status == 200
        daemon.ask("POST", "/encrypt", {"key_id": made["key_id"], "plaintext": "AAAA"})
        status, told = daemon.ask("GET", "/status")
        assert status == 200 and told["audit"]["writable"] is True
        assert told["audit"]["upkeep"]["faults"] == {}
        assert daemon.verify()[0] == 0, "beside the daemon"
    assert daemon.verify()[0] == 0
    types = [event.type for event in events_of(daemon.data_dir / LOG)]
    assert types == ["genesis", "start", "create_dek", "encrypt", "status", "stop", "checkpoint"]
    assert b"payroll" not in (daemon.data_dir / LOG).read_bytes()


def test_only_status_and_metrics_answer_while_the_log_is_not_writable(tmp_path: Path) -> None:
    """Both say so. RLIMIT_FSIZE of the daemon makes the kernel refuse each write that extends the log."""
    with serving(tmp_path) as daemon:
        _, made = daemon.ask("POST", "/create_dek_for_thread", {"thread_id": "t"})

        def encrypt() -> tuple[int, dict[str, Any]]:
            return daemon.ask("POST", "/encrypt", {"key_id": made["key_id"], "plaintext": "AAAA"})

        answers = [encrypt()]
        unlimited = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        size = (daemon.data_dir / LOG).stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))
        answers += [encrypt() for _ in range(4)]
        code, status = daemon.ask("GET", "/status")
        assert (code, status["status"]) == (200, "audit_unavailable")
        assert status["reason"] == f"the audit log can't be written: {os.strerror(errno.EFBIG)}"
        shown = forked.run("minikms", "status", "--socket", daemon.socket)
        assert shown.returncode == 1
        assert status["reason"] in shown.stdout
        page = daemon.text("GET", "/metrics")
        assert "minikms_up 0\n" in page
        assert "minikms_audit_writable 0\n" in page
        for method, path in (("GET", "/keys"), ("GET", f"/keys/{made['key_id']}")):
            assert daemon.ask(method, path)[0] == 503
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, unlimited)
        answers += [encrypt() for _ in range(2)]
        codes = [answer.get("code", "ok") for _, answer in answers]
        assert codes == ["ok"] + ["audit_unavailable"] * 4 + ["ok"] * 2
        assert all((status == 503) == ("ciphertext" not in answer) for status, answer in answers)
        dropped = daemon.ask("GET", "/status")[1]["audit"]["events_dropped"]
        assert dropped >= codes.count("audit_unavailable")
    assert daemon.verify()[0] == 0
    told = [event for event in events_of(daemon.data_dir / LOG) if event.type == "resumed"]
    assert sum(int(event.facts["dropped"]) for event in told) == dropped


def test_files_are_closed_and_compressed_while_serving(tmp_path: Path) -> None:
    with serving(tmp_path, "--audit-segment-mib", 1) as daemon:
        _, made = daemon.ask("POST", "/create_dek_for_thread", {"thread_id": "t"})
        items = [{"key_id": made["key_id"], "plaintext": "", "request_id": f"{n:0128}"} for n in range(1024)]
        for _ in range(12):
            assert daemon.ask("POST", "/encrypt_batch", {"items": items})[0] == 200
        wait_until(lambda: list(daemon.data_dir.glob(f"{LOG}.*.zst")))
        assert daemon.verify()[0] == 0
    assert daemon.verify()[0] == 0


SIG = "A" * 43 + "="


@pytest.mark.parametrize("text", ["", "5", "5:", f"5:{SIG}=", f"0:{SIG}", f"-1:{SIG}", f"{'9' * 30}:{SIG}"])
def test_a_malformed_expected_line_is_refused(text: str) -> None:
    with pytest.raises(StartError, match="--expect-audit-head is SEQ:SIG"):
        expected_head(text)
