"""The auditor and its witnesses: quorums, faults, and copies of an earlier state of the machine."""

import contextlib
import http.server
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms.audit.note import WitnessPolicy, open_checkpoint, parse_vkey
from minikms.processes.http_client import ANSWER_BYTES_MAX
from minikms_auditor import witnesses as submitting
from tests.harness.waiting import wait_until
from tests.harness.witness import STOP_CHECK_S
from tests.minikms_auditor.rig import Rig, root_of

W1, W2, W3 = (f"witness.example/w{number}" for number in (1, 2, 3))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, witnesses=3, quorum=2) as rig:
        yield rig


def policy(rig: Rig, quorum: int) -> WitnessPolicy:
    keys = tuple(parse_vkey(rig.witness(name)[1]) for name in (W1, W2, W3))
    return WitnessPolicy((parse_vkey(rig.vkey()),), keys, quorum)


def test_all_witnesses_cosign_every_tree_checkpoint(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "GRACE_SECONDS", 30.0)  # the disk of the third may be slow
    for count in (20, 300, 1):
        rig.write(count)
        began = int(time.time())
        status = rig.steps()
        assert not status.alarm and not status.errors, status
        lines = rig.lines()
        assert rig.published() == (len(lines), root_of(lines))
        opened = open_checkpoint((rig.state_dir / "tree" / "checkpoint").read_bytes(), policy(rig, 3))
        assert status.witnessed_at >= began
        assert opened.quorum_time(2) == status.witnessed_at
        assert rig.daemon.reports[-1] == len(lines)


def test_one_witness_may_be_away(rig: Rig) -> None:
    rig.write(20)
    rig.stop_witness(W2)
    status = rig.steps()
    assert status.published_size == len(rig.lines())
    assert [bool(witness.error) for witness in status.witnesses] == [False, True, False]


def test_without_a_quorum_nothing_is_published_and_nothing_is_skipped(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    size = len(rig.lines())
    rig.stop_witness(W1)
    rig.stop_witness(W2)
    rig.write(300)
    status = rig.steps()
    assert (status.published_size, status.position_seq) == (size, size)
    assert status.lag_lines == len(rig.lines()) - size
    assert rig.daemon.reports[-1] == size
    rig.start_witness(W1)
    status = rig.start().steps()
    assert status.published_size == len(rig.lines())


def test_a_witness_that_was_away_gets_one_proof_for_all(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    rig.stop_witness(W2)
    for _ in range(3):
        rig.write(50)
        rig.steps()
    rig.start_witness(W2)
    rig.start().steps()
    assert rig.known_size(W2) == len(rig.lines())


def test_a_tree_that_does_not_change_is_cosigned_again(tmp_path: Path) -> None:
    """Also while the daemon is sealed or away, and so adds no line."""
    with Rig(tmp_path, witnesses=1, resubmit_seconds=1) as rig:
        check_cosigned_again(rig)


def check_cosigned_again(rig: Rig) -> None:
    rig.write(20)
    first = rig.steps().witnessed_at
    rig.daemon.away = True
    wait_until(lambda: rig.steps().witnessed_at > first)
    assert rig.steps().published_size == len(rig.lines())


def test_after_a_start_the_last_tree_checkpoint_is_submitted_first(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    size = len(rig.lines())
    rig.write(20)
    for name in (W1, W2):
        rig.stop_witness(name)
    status = rig.start().steps(2)
    assert status.size == size, "nothing is added before a quorum has cosigned what there is"
    rig.start_witness(W1)
    assert rig.start().steps().size == len(rig.lines())


# --- copies of an earlier state ---------------------------------------------------------------------------------------


def test_an_older_copy_of_the_whole_machine_stops_the_signer(rig: Rig, tmp_path: Path) -> None:
    """Log, state and tree checkpoint are put back, and the log goes on: only the witnesses know better."""
    rig.write(20)
    rig.steps()
    copies = [shutil.copytree(place, tmp_path / f"{place.name}-copy") for place in (rig.log_dir, rig.state_dir)]
    rig.write(50)
    rig.steps()
    size = len(rig.lines())
    rig.stop()
    for place, copy in zip((rig.log_dir, rig.state_dir), copies, strict=True):
        shutil.rmtree(place)
        copy.rename(place)
    before = rig.published()
    rig.write(90)
    status = rig.start().steps(3)
    assert f"knows a tree of {size} leaves" in status.alarm
    assert (status.size, rig.published()) == (before[0], before)
    assert rig.known_size(W1) == size


@pytest.mark.parametrize(("count", "said"), [(90, "a tree that this one does not extend"), (20, "another tree")])
def test_a_fork_from_an_empty_state_stops_the_signer(rig: Rig, count: int, said: str) -> None:
    """The state is removed, and the log was replaced by a longer one, or one of the same size."""
    rig.write(20)
    rig.steps()
    rig.stop()
    shutil.rmtree(rig.state_dir)
    for file in rig.log_dir.iterdir():
        file.unlink()
    rig.write(count)
    status = rig.start().steps(3)
    assert said in status.alarm
    assert rig.published()[0] == 0


def test_a_state_that_was_lost_is_made_again_from_the_whole_log(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    rig.stop()
    shutil.rmtree(rig.state_dir)
    rig.write(5)
    status = rig.start().steps()
    lines = rig.lines()
    assert (status.alarm, rig.published()) == ("", (len(lines), root_of(lines)))


def test_the_alarm_of_one_witness_is_enough(rig: Rig, tmp_path: Path) -> None:
    """A quorum of two would cosign: the one that was away, and the one that lost its state."""
    rig.write(20)
    rig.steps()
    copy = shutil.copytree(rig.state_dir, tmp_path / "copy")
    rig.stop_witness(W3)
    rig.write(20)
    rig.steps()
    rig.stop()
    rig.start_witness(W3)
    rig.stop_witness(W2)
    shutil.rmtree(tmp_path / "w2")
    shutil.rmtree(rig.state_dir)
    copy.rename(rig.state_dir)
    rig.start_witness(W2)
    assert "knows a tree of" in rig.start().steps().alarm


# --- what a witness may answer ----------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers each request with what `answer` writes."""

    answer: Callable[[http.server.BaseHTTPRequestHandler], None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def respond(status: int, body: bytes = b"") -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def write(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", "http://127.0.0.1:1/")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return write


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A byte of the head at a time, for ever."""
    try:
        while True:
            handler.wfile.write(b"H")
            time.sleep(0.05)
    except OSError:
        return


def draw(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x1b[2J\x1b]0;owned\x07\x1b[31m all is well\r\n")


@contextlib.contextmanager
def answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[http.server.BaseHTTPRequestHandler], None]
) -> Iterator[None]:
    """The witness `name` answers so meanwhile, after the auditor's next start."""
    handler = type("Handler", (Answers,), {"answer": staticmethod(answer)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, monkeypatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=(STOP_CHECK_S,), daemon=True).start()
        genuine = rig.witness
        url = f"http://127.0.0.1:{server.server_address[1]}"
        patch.setattr(rig, "witness", lambda each: (url if each == name else genuine(each)[0], genuine(each)[1]))
        yield
        server.shutdown()


def test_a_witness_that_hangs_does_not_delay_a_publication(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers late is heeded: another tree that it knows stops the auditor."""
    monkeypatch.setattr(submitting, "ROUND_SECONDS_MAX", 300.0)
    monkeypatch.setattr(submitting, "GRACE_SECONDS", 0.0)
    released = threading.Event()

    def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
        released.wait()
        respond(409, b"1000000\n")(handler)

    with answered(rig, monkeypatch, W1, hang):
        for _ in range(3):
            rig.write(20)
            status = rig.steps()
            assert (status.published_size, status.alarm) == (len(rig.lines()), "")
        released.set()
        wait_until(lambda: "knows a tree of 1000000 leaves" in rig.steps().alarm)


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b"-5\n", b"9" * 5000 + b"\n", b"13"])
def test_a_conflict_that_names_no_size_is_an_error_of_that_witness(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    """A proxy may answer so. A witness that knows another tree of this size names it when it is asked again."""
    rig.write(20)
    rig.steps()
    with answered(rig, monkeypatch, W1, respond(409, body)):
        status = rig.start().steps()
        assert status.alarm == ""
        wait_until(lambda: rig.steps().witnesses[0].error)
        assert rig.steps().witnesses[0].error == f"the witness {W1}: it answers 409"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (respond(500), "it answers 500"),
        (respond(404), "it answers 404"),
        (respond(301), "it answers 301"),
        (respond(409, b"x\n"), "it answers 409"),
        (respond(200), "no cosignature"),
        (respond(200, b"\xff\n"), "no cosignature"),
        (respond(200, "— witness.example/w1 AAAAAAAA\n".encode()), "no valid cosignature"),
        (respond(200, b"x" * (ANSWER_BYTES_MAX + 1)), "is larger than"),
        (draw, "does not speak HTTP (BadStatusLine)"),
        (drip, ""),
    ],
)
def test_a_faulty_witness_is_a_failure_with_a_bound(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[http.server.BaseHTTPRequestHandler], None],
    said: str,
) -> None:
    if answer is drip:
        monkeypatch.setattr(submitting, "ROUND_SECONDS_MAX", 2.0)
    with Rig(tmp_path, witnesses=1) as rig, answered(rig, monkeypatch, W1, answer):
        rig.write(20)
        status = rig.steps()
        assert (status.alarm, status.published_size) == ("", 0)
        wait_until(lambda: rig.steps().witnesses[0].error)
        error = rig.steps().witnesses[0].error
        assert error.startswith("the witness witness.example/w1: ") and said in error, error
