"""The bench counts only what was answered well, and its table says where a figure stands."""

import base64
import contextlib
import http.client
import json
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from bench import __main__ as program
from bench import encrypt, growth_keys, keys, load, messages, million, pairs, plots, programs, report, unencrypted
from bench.programs import BenchError, progressdb, workplace, workplaces_kept
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


@pytest.mark.parametrize(("value", "verdict"), [(-0.1, "floor met"), (4, "floor met"), (4.1, "**below the floor**")])
def test_a_budget_without_a_goal_is_met_or_not(value: float, verdict: str) -> None:
    assert Row("a", value, "ms", 4, less_is_better=True).verdict() == verdict
    assert Row("a", value, "ms").verdict() == ""


def test_the_table_says_what_was_not_measured() -> None:
    text = report.table([Row("speed", 2.0, "×", 1.2, 1.5, note="how"), Missing("other", "needs go")])
    assert "| speed | 2.00 × | 1.20 | 1.50 | goal met | how |" in text
    assert "| other | not measured | | | | needs go |" in text


def test_saving_changes_only_what_is_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    begin, end = report.markers("bench")
    others = "\n".join(report.markers("keys"))
    document.write_text(f"above\n{begin}\nold\n{end}\nbelow\n{others}\n")
    report.save("new", document)
    assert document.read_text() == f"above\n{begin}\nnew\n{end}\nbelow\n{others}\n"
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


def test_the_benches_measure_the_programs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run of those that need nothing but Python: real processes, checked answers, no judgement of speed."""
    for module, name, value in (
        (encrypt, "BATCH_SECONDS", 0.05),
        (encrypt, "BATCH_TURNS", 1),
        (messages, "CONNECTIONS", 4),
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
    assert len(rows) == 5
    assert all(row.value > 0 for row in rows)
    [added] = messages.append_added()
    assert added.unit == "ms" and added.less_is_better and added.floor == 4


def test_the_server_without_encryption_stores_what_was_typed() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as made:  # a short path: a socket lies in it
        directory = Path(made)
        with progressdb(directory, encrypting=False) as (host, port):
            body = json.dumps({"author": "ann", "thread": "t", "body": "typed"})
            for method, target in (("POST", "/v1/messages"), ("GET", "/v1/messages?thread=t")):
                connection = http.client.HTTPConnection(host, port, timeout=60)
                connection.request(
                    method, target, body if method == "POST" else None, {"X-API-Key": programs.BACKEND_KEY}
                )
                answer = connection.getresponse()
                assert (answer.status, b'"body":"typed"' in answer.read()) == (200, True)
                connection.close()
        stored = b"".join(path.read_bytes() for path in (directory / "unencrypted-db" / "store").iterdir())
        assert unencrypted.MARK in stored and b"typed" in stored


def test_several_runs_give_the_run_of_the_median_and_the_range() -> None:
    runs = [[Row("speed", value, "/s", 10, 20, note=f"run {value}")] for value in (30.0, 5.0, 15.0)]
    [row] = report.merged(runs)
    assert row == Row("speed", 15.0, "/s", 10, 20, note="run 15.0", lowest=5.0, highest=30.0)
    assert "| speed | 15.0 /s (5.00 to 30.0) | 10.0 | 20.0 | floor met | run 15.0 |" in report.table([row])


def test_a_figure_that_a_run_lacks_is_not_measured() -> None:
    runs: list[list[Row | Missing]] = [
        [Row("a", 1.0, "s"), Row("b", 1.0, "s")],
        [Row("a", 2.0, "s"), Missing("c", "x")],
    ]
    a, b, c = report.merged(runs)
    assert isinstance(a, Row) and (a.lowest, a.highest) == (1.0, 2.0)
    assert b == Missing("b", "measured in 1 of 2 runs")
    assert c == Missing("c", "x")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str, **benches: Callable[[], list[Row]]) -> int:
    monkeypatch.setattr(program, "BENCHES", {name: bench for name, bench in benches.items() if name != "million"})
    monkeypatch.setattr(program, "LONG", {name: bench for name, bench in benches.items() if name == "million"})
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=1e15))
    return program.main()


def test_every_bench_runs_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter((7.0, 9.0, 8.0))
    assert run_main(monkeypatch, "--runs", "3", one=lambda: [Row("one", next(values), "s")]) == 0
    assert "| one | 8.00 s (7.00 to 9.00) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        ((), ["one", "two"]),
        (("two",), ["two"]),
        (("--million",), ["one", "two", "million"]),
        (("two", "--million"), ["two", "million"]),
        (("million",), ["million"]),
    ],
)
def test_a_million_keys_are_measured_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], ran: list[str]
) -> None:
    done: list[str] = []

    def bench(name: str) -> Callable[[], list[Row]]:
        def measured() -> list[Row]:
            done.append(name)
            return []

        return measured

    assert run_main(monkeypatch, *arguments, one=bench("one"), two=bench("two"), million=bench("million")) == 0
    assert done == ran


@pytest.mark.parametrize(
    "arguments",
    [("--runs", "0"), ("--runs", "100"), ("nothing",), ("one", "--save"), ("--peer", "unix:/x", "--million")],
)
def test_options_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, *arguments, one=list)


def test_a_service_with_a_million_keys_is_started_and_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer of them; every one has to be under the new version."""
    monkeypatch.setattr(keys, "STARTS", 1)
    monkeypatch.setattr(million, "KEYS", 41)
    start, rotation, memory = million.million()
    assert start.what == "encrypt and decrypt answer, 41 DEKs on disk, after start" and start.value > 0
    assert rotation.what == "KEK rotation of 41 DEKs, idle otherwise" and rotation.value > 0
    assert (start.floor, start.goal) == (0.5, 0.25) and (rotation.floor, rotation.goal) == (90, 45)
    assert memory.value >= 0


@pytest.mark.torture
def test_the_growth_of_keys_is_measured_size_by_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keys, "STARTS", 1)
    monkeypatch.setattr(growth_keys, "CACHED_SECONDS", 0.05)
    monkeypatch.setattr(growth_keys, "MADE_MAX", 70)
    kept: list[tuple[str, list[list[float]]]] = []
    monkeypatch.setattr(plots, "keep", lambda table, columns, rows, load_before: kept.append((table.stem, rows)))
    monkeypatch.setattr(sys, "argv", ["growth_keys", "70", "150", "--save"])
    growth_keys.main()
    [(table, rows)] = kept
    assert table == "keys" and [row[0] for row in rows] == [70, 150]
    assert all(value > 0 for row in rows for value in row)
    assert capsys.readouterr().out.count("\n| ") == 2


def test_figures_of_growth_are_kept_as_table_file_and_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document, table = tmp_path / "benchmarks.md", tmp_path / "plots" / "keys.csv"
    document.write_text("\n".join(report.markers("keys")))
    monkeypatch.setattr(report, "DOCUMENT", document)
    monkeypatch.setattr(plots, "PLOTS", (plots.Plot("one", table, "One", ("a/s",)), plots.PLOTS[-1]))
    plots.keep(table, ("keys", "a/s"), [[1_000, 5.0], [10_000, 0.0123]], 0.5)
    assert "| keys | a/s |\n|---|---|\n| 1,000 | 5.00 |\n| 10,000 | 0.012 |" in document.read_text()
    assert "Load average before the start: 0.50." in document.read_text()
    assert plots.read_csv(table) == {"keys": [1_000, 10_000], "a/s": [5.0, 0.0123]}
    assert [picture.name for picture in table.parent.glob("*.svg")] == ["one.svg"]


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.name)
def test_every_plot_shows_the_figures_of_its_table(plot: plots.Plot) -> None:
    picture = plots.svg(plot)
    assert picture == plot.file.read_text(encoding="utf-8"), "run python -m bench.plots"
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert picture.count("<polyline") == len(plot.columns)
    assert f"(plots/{plot.file.name})" in report.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.torture
def test_appends_are_compared_with_those_of_another_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.setattr(messages, "CONNECTIONS", 4)
    monkeypatch.setattr(messages, "FEW_CONNECTIONS", 2)
    monkeypatch.setattr(messages, "AGAINST_TURNS", 1)
    monkeypatch.setattr(messages, "AGAINST_REQUESTS", 100)
    monkeypatch.setattr(messages, "AGAINST_SECONDS", 0.05)
    many, few = messages.append_against(tmp_path)
    assert many.value > 0 and few.value > 0
    assert (few.unit, few.floor) == ("×", 1.2)


def test_the_key_service_is_compared_with_that_of_another_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name, value in {"TURNS": 1, "SECONDS": 0.01, "RUNS": 130, "ROTATION_TURNS": 1, "ROTATED_KEYS": 100}.items():
        monkeypatch.setattr(pairs, name, value)
    rows = [*pairs.verbs(tmp_path), *pairs.rotation(tmp_path)]
    monkeypatch.setattr(pairs, "SECONDS", 0.5)  # in which a busy machine makes a key
    rows += pairs.creates(tmp_path)
    assert all(row.value > 0 for row in rows)
    assert {row.floor for row in rows} == {pairs.FLOOR, pairs.FOREIGN_FLOOR, pairs.FOREIGN_BATCH_FLOOR}


def test_the_files_of_a_run_stay_until_all_runs_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To remove them would slow the next one's creates. An interrupt removes them too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), workplaces_kept():
        for count in (1, 2):
            with workplace() as directory:
                (directory / "kms").mkdir()
            assert len(list(tmp_path.iterdir())) == count
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with workplace() as directory:
        assert directory.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_bench_is_refused_when_the_disk_has_no_room_for_all_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--runs", "3"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=23e9))
    with pytest.raises(SystemExit) as refused:
        program.main()
    assert refused.value.code == 2
    assert "24 GB, and 23 GB are free" in capsys.readouterr().err
