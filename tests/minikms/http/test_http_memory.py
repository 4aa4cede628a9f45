"""A body leaves no copy in the daemon's memory: root scans a live process after each way of receiving a body."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.minikms.http.http_harness import chunked, post, request

SERVER = Path(__file__).with_name("wiping_server.py")
CLOSE = "Connection: close"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """(pid, socket path)"""
    path = str(tmp_path_factory.mktemp("wiping") / "socket")
    with subprocess.Popen([sys.executable, str(SERVER), path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid, path
        process.kill()


def marker() -> bytes:
    """32 bytes that occur nowhere else, as text: what a new KEK looks like in a request."""
    return os.urandom(16).hex().encode()


def copies_in_memory(pid: int, needle: bytes) -> int:
    """How often either half of `needle` occurs in the writable memory of a process."""
    halves = (needle[:16], needle[16:])
    found = 0
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in maps:
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if match is None:
                    continue
                start, end = (int(bound, 16) for bound in match.groups())
                memory.seek(start)
                with contextlib.suppress(OSError):  # freed meanwhile, so nothing is left there
                    content = memory.read(end - start)
                    found += sum(content.count(half) for half in halves)
    except PermissionError:
        needs.root()
        raise
    return found


def send(path: str, *parts: bytes) -> bytes:
    """Send the parts with pauses, so that each is received alone. Returns all answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        for part in parts:
            client.sendall(part)
            time.sleep(0.02)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(65536):
            answer += data
    return answer


def test_the_scan_finds_an_existing_copy(server: tuple[int, str]) -> None:
    pid, path = server
    needle = marker()
    assert b"200 OK" in send(path, post("/copy", needle))
    assert copies_in_memory(pid, needle) >= 2


@pytest.mark.parametrize("padding", [0, 1000, 100_000, 600_000])
@pytest.mark.parametrize(
    "how", ["whole", "head first", "split in the body", "in many parts", "chunked", "small chunks"]
)
def test_no_copy_of_a_body_remains_after_its_answer(server: tuple[int, str], how: str, padding: int) -> None:
    """However it arrives: at once, in parts, carried over from block to block, or chunked."""
    pid, path = server
    needle = marker()
    body = b'{"new_kek_hex":"' + needle + b'"}' + b" " * padding
    data = post("/rotate", body, CLOSE)
    half = len(data) - padding - 20
    parts = {
        "whole": [data],
        "head first": [data[: -len(body)], body],
        "split in the body": [data[:half], data[half:]],
        "in many parts": [data[: half - 8], *(data[half - 8 + n : half - 7 + n] for n in range(16)), data[half + 8 :]],
        "chunked": [chunked("/rotate", body)],
        "small chunks": [chunked("/rotate", *(body[n : n + 200] for n in range(0, len(body), 200)))],
    }[how]
    answer = send(path, *parts)
    assert b"200 OK" in answer
    assert answer.endswith(b"%d" % sum(body))
    assert copies_in_memory(pid, needle) == 0


@pytest.mark.parametrize(
    "parts",
    [
        [b"POST /rotate HTTP/1.1\nHost: x\nContent-Length: 50\n\n", b'{"new_kek_hex":"%b"}'],
        [request("POST", "/rotate", "Content-Length: 0") + b'{"new_kek_hex":"%b"}'],
        [request("POST", "/rotate", "Transfer-Encoding: chunked") + b'32\n{"new_kek_hex":"%b"}'],
        [request("POST", "/rotate", "Transfer-Encoding: chunked") + b'32\r\n{"new_kek_hex":"%b"}\r\n0;x\r\n\r\n'],
        [request("POST", "/rotate", "Content-Length: 500") + b'{"new_kek_hex":"%b"}'],
        [b'{"new_kek_hex":"%b"}'],
    ],
    ids=["bare LF", "wrong length", "bad size", "bad end", "cut off", "no head"],
)
def test_no_copy_of_a_refused_body_remains(server: tuple[int, str], parts: list[bytes]) -> None:
    """Refused input is wiped like any other."""
    pid, path = server
    needle = marker()
    answer = send(path, b"".join(parts).replace(b"%b", needle))
    assert b" 400 " in answer
    assert copies_in_memory(pid, needle) == 0
