"""The message server never holds a key: root scans it too, however the root key was given to it."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import live_daemon
from tests.harness.descriptors import open_files
from tests.harness.ports import free_port
from tests.harness.waiting import wait_for_start
from tests.minikms.memory import scanner

pytestmark = pytest.mark.usefixtures("as_root")

API_KEY = "a-key-of-the-test"


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"X-API-Key": API_KEY, "X-User-ID": "user", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextlib.contextmanager
def server(base: Path, environ: dict[str, str], *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The real server with a miniKMS of its own, answering; and its port."""
    port = free_port()
    command = [sys.executable, "-m", "progressdb_server", "--addr", f"127.0.0.1:{port}", "--db", str(base / "db")]
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **environ, "PROGRESSDB_API_BACKEND_KEYS": API_KEY},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_start(process, lambda: call(port, "GET", "/healthz")[0] == 200, base / "log")
        yield process, port
    finally:
        process.terminate()
        process.wait(60)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def readable_descriptors(pid: int, key_file: Path) -> list[Path]:
    """The memory files and regular files that the process has open. None of them is the key file."""
    links = open_files(pid)
    assert str(key_file) not in links.values()
    return [path for path, target in links.items() if target.startswith("/memfd:") or os.path.isfile(target)]


@pytest.mark.parametrize("given", ["environment", pytest.param("file", marks=pytest.mark.torture)])
def test_root_finds_no_key_in_the_server_or_its_key_service(tmp_path: Path, given: str) -> None:
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text(os.urandom(32).hex() + "\n")
    environ = {"PROGRESSDB_MINIKMS_MASTER_KEY": key_file.read_text().strip()} if given == "environment" else {}
    flags = ["--master-key-file", str(key_file)] if given == "file" else []
    with server(tmp_path, environ, *flags) as (process, port):
        for number in range(20):
            status, answer = call(port, "POST", "/v1/threads", {"title": f"thread {number}", "author": "user"})
            assert status in (200, 201), answer
            thread = json.loads(answer)["id"]
            for _ in range(5):
                message = {"thread": thread, "author": "user", "role": "user", "body": {"text": "text"}}
                status, answer = call(port, "POST", "/v1/messages", message)
                assert status in (200, 201), answer
            assert call(port, "GET", f"/v1/messages?thread={thread}")[0] == 200
        keys = live_daemon.keys_in(tmp_path / "db" / "kms", bytes.fromhex(key_file.read_text()))
        assert len(keys) >= 25
        needles = [needle for name, key in keys.items() for needle in scanner.forms_of(name, key)]
        kms_pids = [pid for pid in children_of(process.pid) if b"minikms" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(kms_pids) == 1
        for pid in (process.pid, *kms_pids):
            assert scanner.scan_process(pid, needles).hits == []
            for file in ("environ", "cmdline"):
                assert scanner.scan_file(f"/proc/{pid}/{file}", needles).hits == [], file
            for path in readable_descriptors(pid, key_file):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    assert scanner.scan_file(str(path), needles).hits == [], path
    assert scanner.scan_file(str(tmp_path / "log"), needles).hits == []
