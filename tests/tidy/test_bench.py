"""The bench counts only what was answered well, and its table says where a figure stands."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import encrypt, load, messages, report
from bench.programs import BenchError, MissingProgramError, need
from bench.report import Missing, Row


@contextlib.contextmanager
def server(directory: Path, *answers: bytes) -> Iterator[str]:
    """Answers the requests of one connection with these bytes, in turn, then with the last one for ever."""
    path = str(directory / "server.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                remaining = list(answers)
                while connection.recv(65536):
                    connection.sendall(remaining.pop(0) if len(remaining) > 1 else remaining[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        thread.join(10)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"
REQUEST = load.post("/encrypt", b"{}")


def test_the_generator_counts_answers_and_their_time(tmp_path: Path) -> None:
    with server(tmp_path, OK) as path:
        done = load.generate(path, [REQUEST], 0.05)
    assert done.answers[0] >= 1
    assert len(done.latencies_ms) == done.answers[0]
    assert done.seconds >= 0.05
    assert done.per_second == done.answers[0] / done.seconds


def test_a_refused_request_fails_the_run(tmp_path: Path) -> None:
    refused = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    with server(tmp_path, OK, OK, refused) as path, pytest.raises(BenchError, match="503"):
        load.generate(path, [REQUEST], 5)


def test_an_answer_of_unknown_length_fails_the_run(tmp_path: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with server(tmp_path, chunked) as path, pytest.raises(BenchError, match="Content-Length"):
        load.generate(path, [REQUEST], 5)


def test_a_request_says_its_length() -> None:
    head, _, body = load.post("/x", b'{"a": 1}', {"X-API-Key": "k"}).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /x HTTP/1.1"
    assert b"Content-Length: 8" in head and b"X-API-Key: k" in head
    assert body == b'{"a": 1}'


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (1.5, "goal met"),
        (1.2, "floor met"),
        (1.19, "**below the floor**"),
    ],
)
def test_a_figure_is_set_against_its_budget(value: float, verdict: str) -> None:
    assert Row("a", value, "×", 1.2, 1.5).verdict() == verdict


@pytest.mark.parametrize(("value", "verdict"), [(8, "goal met"), (8.1, "floor met"), (20.1, "**below the floor**")])
def test_of_a_time_less_is_better(value: float, verdict: str) -> None:
    assert Row("a", value, "ms", 20, 8, less_is_better=True).verdict() == verdict


@pytest.mark.parametrize(("value", "verdict"), [(-0.1, "floor met"), (4, "floor met"), (4.1, "**below the floor**")])
def test_a_budget_without_a_goal_is_met_or_not(value: float, verdict: str) -> None:
    assert Row("a", value, "ms", 4, less_is_better=True).verdict() == verdict
    assert Row("a", value, "ms").verdict() == ""


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (45.67, "45.7"), (789.4, "789"), (12345.6, "12,346")])
def test_a_figure_keeps_three_digits(value: float, text: str) -> None:
    assert report.figure(value) == text


def test_the_table_says_what_was_not_measured() -> None:
    text = report.table([Row("speed", 2.0, "×", 1.2, 1.5, note="how"), Missing("other", "needs go")])
    assert "| speed | 2.00 × | 1.20 | 1.50 | goal met | how |" in text
    assert "| other | not measured | | | | needs go |" in text


def test_saving_changes_only_what_is_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.save("new", document)
    assert document.read_text() == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        report.save("new", document)
    assert document.read_text() == "no markers"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:/run/other.sock", "/run/other.sock"),
        ("http://127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("http://kms.example/", ("kms.example", 80)),
        ("http://[::1]:80", ("::1", 80)),
    ],
)
def test_a_peer_is_a_socket_or_a_plain_http_address(url: str, address: object) -> None:
    assert encrypt.peer_address(url) == address


@pytest.mark.parametrize("url", ["", "unix:", "/run/x.sock", "https://x", "http://", "http://x/encrypt", "http://a@x"])
def test_another_address_of_a_peer_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="unix:PATH or http://HOST:PORT"):
        encrypt.peer_address(url)


def answer(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


NO_KEYS = answer("404 Not Found", "404 page not found")


def test_a_peer_without_keys_is_measured_with_any_key_id(tmp_path: Path) -> None:
    sealed = base64.b64encode(bytes(encrypt.PLAINTEXT_BYTES + encrypt.SEAL_BYTES)).decode()
    with server(tmp_path, NO_KEYS, answer("200 OK", json.dumps({"ciphertext": sealed}))) as path:
        assert json.loads(encrypt.target("peer", path, tmp_path).body.read_text())["key_id"] == "bench"


@pytest.mark.parametrize("said", ['{"ciphertext": "AAAA"}', '{"ciphertext": 1}', "{}", "[]", "not JSON"])
def test_a_peer_that_does_not_encrypt_has_no_figure(tmp_path: Path, said: str) -> None:
    with server(tmp_path, NO_KEYS, answer("200 OK", said)) as path, pytest.raises(BenchError, match="answer"):
        encrypt.target("peer", path, tmp_path)


def test_a_peer_that_refuses_to_make_a_key_has_no_figure(tmp_path: Path) -> None:
    with server(tmp_path, answer("403 Forbidden", "{}")) as path, pytest.raises(BenchError, match="403"):
        encrypt.target("peer", path, tmp_path)


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(MissingProgramError, match="no-such-program"):
        need("sh", "no-such-program")


def test_the_benches_measure_the_programs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run of those that need nothing but Python: real processes, checked answers, no judgement of speed."""
    for module, name, value in (
        (encrypt, "BATCH_SECONDS", 0.05),
        (encrypt, "BATCH_TURNS", 1),
        (messages, "APPEND_REQUESTS", 200),
        (messages, "WARM_UP_REQUESTS", 100),
        (messages, "APPEND_SECONDS", 0.05),
        (messages, "APPEND_TURNS", 1),
        (messages, "WARM_UP_SECONDS", 0.05),
        (messages, "ADDED_REQUESTS", 100),
        (messages, "ADDED_SECONDS", 0.05),
        (messages, "ADDED_TURNS", 1),
        (messages, "LIST_MESSAGES", 30),
        (messages, "LIST_TURNS", 2),
    ):
        monkeypatch.setattr(module, name, value)
    rows = [*encrypt.encrypt_batch(), *messages.append(), *messages.listing()]
    assert len(rows) == 3
    assert all(row.value > 0 for row in rows)
    [added] = messages.append_added()
    assert added.unit == "ms" and added.less_is_better and added.floor == 4
