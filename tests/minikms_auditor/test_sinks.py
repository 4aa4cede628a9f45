"""Sinks: every line of the tree arrives, in order, whatever receivers answer; a line that does not arrive is named."""

import functools
import hashlib
import json
import ssl
import threading
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from prometheus_client import generate_latest

from minikms.audit.log import CHORES_NS, LogLimits
from minikms_auditor import command, sinks
from minikms_auditor.collectors import Collector as HttpTransport
from minikms_auditor.collectors import SplunkCollector
from minikms_auditor.config import AuditorFiles, FileSink, HttpSink, SplunkSink
from minikms_auditor.metrics import AuditorCollector
from minikms_auditor.sinks import REFUSED_IN_A_ROW_MAX, BatchRefusedError, FileTransport, SinkMessage, Transport
from minikms_auditor.store import skip_line
from tests.harness.certificates import SERVER, Authority
from tests.minikms.audit.logmaker import KEY1, KEY2, Clock
from tests.minikms_auditor.receivers import TOKEN, Collector, ShippingRig


def http_rig(base: Path, url: str, *, required: bool = False, splunk: bool = False, witnesses: int = 0) -> ShippingRig:
    base.chmod(0o700)
    (base / "token").write_text(f"{TOKEN}\n")
    (base / "token").chmod(0o600)
    if splunk:
        hec = SplunkSink(name="siem", url=url, token="token", required=required)
        return ShippingRig(base, hec, lambda files: SplunkCollector(hec, files, acknowledged_seconds=0, poll_seconds=0))
    sink = HttpSink(name="siem", url=url + "/in?x=1", token="token", required=required)
    return ShippingRig(base, sink, lambda files: HttpTransport(sink, files), witnesses=witnesses, quorum=witnesses)


def seqs(lines: list[bytes]) -> list[int]:
    return [json.loads(line)["seq"] for line in lines]


class _Kept(Transport):
    """Keeps what it gets. `refuses`: numbers of lines."""

    def __init__(self, *refuses: int) -> None:
        self.got: list[int] = []
        self.batches: list[int] = []
        """Bytes of each."""
        self.refuses = refuses

    def deliver(self, messages: list[SinkMessage]) -> None:  # type: ignore[override]  # it gets one
        if any(each.event.seq in self.refuses for each in messages):
            raise BatchRefusedError("it answers 400")
        self.got += [each.event.seq for each in messages]
        self.batches.append(sum(len(each.body) for each in messages))


def kept_rig(base: Path, *refuses: int, required: bool = False) -> tuple[ShippingRig, _Kept]:
    transport = _Kept(*refuses)
    sink = HttpSink(name="siem", url="http://127.0.0.1:1", required=required)
    return ShippingRig(base, sink, lambda _: transport), transport


def test_a_collector_gets_each_line_once_with_its_log_id(tmp_path: Path) -> None:
    """In compressed batches of JSON lines, with its token. Nothing is sent twice after a restart."""
    with Collector() as receiver, http_rig(tmp_path, receiver.url) as rig:
        for count in (30, 5):
            rig.write(count)
            status = rig.ship()
            assert receiver.lines == rig.bodies()
            assert (status.seq, status.lag_lines, status.error) == (len(rig.lines()), 0, "")
            rig.stop()
        path, headers = receiver.requests[0]
        assert (path, headers["Authorization"]) == ("/in?x=1", f"Bearer {TOKEN}")
        assert headers["Content-Type"] == "application/x-ndjson"
        assert len(receiver.requests) == 2


@pytest.mark.parametrize(("status", "headers", "pause"), [(500, {}, 1), (429, {"Retry-After": "7"}, 7), (401, {}, 1)])
def test_what_a_receiver_does_not_take_now_is_sent_later(
    tmp_path: Path, status: int, headers: dict[str, str], pause: int
) -> None:
    with Collector() as receiver, http_rig(tmp_path, receiver.url) as rig:
        receiver.answer = lambda _: (status, headers, b"busy")
        rig.write(10)
        found = rig.ship()
        assert (found.seq, found.failures, found.lag_lines) == (0, 1, len(rig.lines()))
        assert found.error == f"it answers {status}"
        assert rig.sinks[0].attempt() >= pause
        receiver.answer = lambda _: None
        assert rig.ship().error == ""
        assert receiver.lines == rig.bodies()
        assert TOKEN not in repr(rig.logged) + (rig.state_dir / "status.json").read_text()


def test_one_refused_line_is_kept_and_the_others_arrive(tmp_path: Path) -> None:
    """The receiver refuses the whole batch that has the line, as most do."""
    with Collector() as receiver, http_rig(tmp_path, receiver.url) as rig:
        receiver.answer = lambda lines: (400, {}, b"") if 7 in seqs(lines) else None
        rig.write(40)
        status = rig.ship()
        assert receiver.lines == [body for body in rig.bodies() if json.loads(body)["seq"] != 7]
        assert (status.rejected, status.lag_lines, status.error) == (1, 0, "")
        (kept,) = rig.rejected()
        log_id = json.loads(rig.bodies()[0])["log_id"]
        assert (kept["log_id"], kept["seq"], kept["last_seq"]) == (log_id, 7, 7)
        assert kept["line"] == json.loads(rig.lines()[6]) and "400" in kept["why"]


def test_a_required_sink_stops_at_a_refused_line_until_it_is_skipped(tmp_path: Path) -> None:
    """Meanwhile the auditor reports no line beyond it as taken, so the key service keeps them."""
    rig, transport = kept_rig(tmp_path, 7, required=True)
    with rig:
        rig.write(20)
        status = rig.ship()
        assert (status.seq, status.waits_at, status.rejected) == (6, 7, 0)
        assert "skip 7" in status.error and not rig.rejected()
        rig.steps()
        assert rig.daemon.reports[-1] == 6
        rig.stop()
        assert rig.ship().waits_at == 7
        skip_line(str(rig.state_dir), status.waits_log_id, 8)
        assert rig.ship().waits_at == 7
        skip_line(str(rig.state_dir), status.waits_log_id, 7)
        status = rig.ship()
        assert (status.waits_at, status.rejected, status.error) == (0, 1, "")
        assert transport.got == [n + 1 for n in range(len(rig.lines())) if n != 6]
        rig.steps()
        assert rig.daemon.reports[-1] == len(rig.lines())


def test_the_commands_of_an_operator_whose_sink_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rig, _ = kept_rig(tmp_path, 7, required=True)
    with rig:
        config = tmp_path / "auditor.toml"
        config.write_bytes(
            rig.config() + b'[[sink]]\ntype = "http"\nname = "siem"\nurl = "https://siem.example:8088"\n'
        )
        assert command.check_config(config=config) == 0
        assert "siem: line; its receiver must take messages of 4 MiB" in capsys.readouterr().out
        rig.write(20)
        rig.ship()
        rig.steps()
        assert command.status(config=config) == 1
        assert "FAILS: the sink siem, which is required: line 7: it answers 400" in capsys.readouterr().out
        metrics = generate_latest(AuditorCollector(rig.steps)).decode()
        assert 'minikms_auditor_sink_waits{sink="siem"} 1.0' in metrics
        assert command.skip(8, config=config) == 1
        assert command.skip(7, config=config) == 0
        rig.ship()
        rig.steps()
        capsys.readouterr()
        assert command.status(config=config) == 0
        assert "1 line rejected: sinks/siem/rejected" in capsys.readouterr().out


def test_a_receiver_that_refuses_every_line_is_another_fault(tmp_path: Path) -> None:
    """Otherwise a mistake in its configuration would move the whole log into the file of rejected lines."""
    rig, transport = kept_rig(tmp_path, *range(1, 31))
    with rig:
        rig.write(40)
        status = rig.ship()
        assert status.rejected == REFUSED_IN_A_ROW_MAX == len(rig.rejected())
        assert f"{REFUSED_IN_A_ROW_MAX} lines before it were refused too" in status.error
        transport.refuses = ()
        assert rig.ship().error == ""
        assert transport.got == list(range(REFUSED_IN_A_ROW_MAX + 1, len(rig.lines()) + 1))


def test_splunk_has_a_line_once_it_has_acknowledged_it(tmp_path: Path) -> None:
    with Collector() as receiver, http_rig(tmp_path, receiver.url, splunk=True) as rig:
        receiver.acknowledges = lambda _: False
        rig.write(10)
        status = rig.ship()
        assert (status.seq, status.error) == (0, "it has not acknowledged what it was sent")
        receiver.acknowledges = lambda number: number > 1
        assert rig.ship().lag_lines == 0
        assert receiver.lines == rig.bodies()
        path, headers = receiver.requests[0]
        assert path == "/services/collector/event" and headers["Authorization"] == f"Splunk {TOKEN}"
        assert len({headers["X-Splunk-Request-Channel"] for _, headers in receiver.requests}) == 1


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b'{"text":"Success","code":0}', "useACK"),
        (400, b'{"text":"Incorrect index","code":7}', "400 with the code 7"),
        (503, b'{"text":"Server is busy","code":9}', "503 with the code 9"),
        (200, b"<html>", "useACK"),
        (200, b'{"acks":{"\xff":true}}', "useACK"),
    ],
)
def test_splunk_refuses_no_line_by_a_fault_of_the_request(tmp_path: Path, status: int, body: bytes, said: str) -> None:
    with Collector() as receiver, http_rig(tmp_path, receiver.url, splunk=True) as rig:
        receiver.answer = lambda _: (status, {}, body)
        rig.write(3)
        found = rig.ship()
        assert said in found.error and (found.seq, found.rejected) == (0, 0)
        receiver.answer = lambda lines: (400, {}, b'{"code":6}') if len(lines) > 1 or b'"seq":2,' in lines[0] else None
        found = rig.ship()
        assert (found.rejected, found.lag_lines) == (1, 0)


def test_nothing_is_sent_to_a_receiver_with_a_wrong_certificate(tmp_path: Path) -> None:
    ours, others = Authority("ours"), Authority("others")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*others.issue(dns=["localhost"], extended=[SERVER]).write(tmp_path, "server"))
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    with Collector(context) as receiver:
        url = receiver.url.replace("127.0.0.1", "localhost")
        for ca, said in ((ours, "unable to get local issuer"), (others, "")):
            (tmp_path / "ca.pem").write_bytes(ca.pem)
            sink = HttpSink(name="siem", url=url, ca="ca.pem")
            base = tmp_path / (said or "good")
            base.mkdir()
            base.chmod(0o700)
            (base / "ca.pem").write_bytes(ca.pem)
            with ShippingRig(base, sink, functools.partial(HttpTransport, sink)) as rig:
                rig.write(3)
                status = rig.ship()
                assert said in status.error
                assert receiver.lines == ([] if said else rig.bodies())


def test_a_sink_goes_on_with_a_log_that_was_begun_anew(tmp_path: Path) -> None:
    """Lines of the log before that it does not have are named: nobody can read them any more."""
    rig, transport = kept_rig(tmp_path)
    with rig:
        rig.public_keys = [KEY1, KEY2]
        rig.write(5)
        rig.ship()
        first = len(rig.lines())
        rig.write(4)
        rig.steps()
        last = len(rig.lines())
        for file in rig.log_dir.iterdir():
            file.unlink()
        rig.write(3, key=KEY2)
        status = rig.ship()
        assert status.error == "" and status.rejected == last - first
        assert transport.got == [*range(1, first + 1), *range(1, len(rig.lines()) + 1)]
        (kept,) = rig.rejected()
        assert (kept["seq"], kept["last_seq"], kept["line"]) == (first + 1, last, None)


def test_lines_that_retention_removed_before_they_were_sent_are_named(tmp_path: Path) -> None:
    rig, transport = kept_rig(tmp_path)
    with rig:
        rig.clock = Clock(step=CHORES_NS)
        small = LogLimits(segment_bytes=3000, reserve_bytes=0)
        rig.write(3, limits=small)
        sent = rig.ship().seq
        rig.write(60, limits=small)
        rig.steps()
        rig.stop()  # an open file is read to its end
        for number in (1, 2):
            (rig.log_dir / f"minikms-audit.log.{number}").unlink()
        first = json.loads(rig.lines()[0])["event"]["seq"]
        status = rig.ship()
        assert status.error == "" and status.rejected == first - sent - 1 > 0
        assert transport.got == [*range(1, sent + 1), *range(first, status.seq + 1)]
        (kept,) = rig.rejected()
        assert (kept["seq"], kept["last_seq"]) == (sent + 1, first - 1)


def test_a_new_sink_begins_with_the_first_line_that_the_log_has(tmp_path: Path) -> None:
    """Also a required one: what was removed before it was configured is not missing."""
    rig, transport = kept_rig(tmp_path, required=True)
    with rig:
        rig.clock = Clock(step=CHORES_NS)
        rig.write(60, limits=LogLimits(segment_bytes=3000, reserve_bytes=0))
        rig.steps()
        (rig.log_dir / "minikms-audit.log.1").unlink()
        first = json.loads(rig.lines()[0])["event"]["seq"]
        status = rig.ship()
        assert (status.error, status.rejected) == ("", 0)
        assert transport.got == list(range(first, status.seq + 1)) and first > 1


def test_a_receiver_that_is_far_behind_gets_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "BATCH_BYTES_MAX", 5000)
    rig, transport = kept_rig(tmp_path)
    with rig:
        for _ in range(3):
            rig.write(100)
        assert rig.ship().error == ""
        longest = max(map(len, rig.bodies()))
        assert len(transport.batches) > 10 and max(transport.batches) < 5000 + longest
        assert transport.got == list(range(1, len(rig.lines()) + 1))


def test_an_altered_line_is_never_sent(tmp_path: Path) -> None:
    """Its leaf is in the tree, so no receiver gets another line under its number."""
    rig, transport = kept_rig(tmp_path)
    with rig:
        rig.write(10)
        rig.steps()
        path = rig.log_dir / "minikms-audit.log"
        path.write_bytes(path.read_bytes().replace(b'"request_id":"r4"', b'"request_id":"r5"'))
        status = rig.ship()
        assert "is not the one in the tree" in status.error
        assert transport.got == []


def test_the_position_is_the_lowest_of_tree_and_required_sinks(tmp_path: Path) -> None:
    with Collector() as receiver, http_rig(tmp_path, receiver.url, required=True, witnesses=1) as rig:
        receiver.answer = lambda _: (500, {}, b"")
        rig.write(10)
        rig.ship()
        rig.steps()
        assert set(rig.daemon.reports) == {0}
        receiver.answer = lambda _: None
        sent = rig.ship().seq
        rig.steps()
        assert rig.daemon.reports[-1] == sent
        rig.stop_witness("witness.example/w1")
        rig.write(5)
        rig.ship()
        rig.steps()
        assert rig.daemon.reports[-1] == sent < len(receiver.lines)


# --- files ------------------------------------------------------------------------------------------------------------


def file_rig(base: Path, text: Literal["line", "ocsf"] = "line") -> ShippingRig:
    sink = FileSink(name="copy", path=str(base / "copy"), format=text)
    return ShippingRig(base, sink, lambda _: FileTransport(sink))


def test_a_file_gets_the_log_as_it_is(tmp_path: Path) -> None:
    """A line is not repeated after a crash between the file and the cursor; a later log has a file of its own."""
    with file_rig(tmp_path) as rig:
        rig.write(10)
        rig.ship()
        cursor = rig.state_dir / "sinks" / "copy" / "cursor.json"
        older = cursor.read_bytes()
        rig.write(5)
        rig.ship()
        rig.stop()
        cursor.write_bytes(older)
        with (tmp_path / "copy").open("ab") as file:
            file.write(b'{"event":{"seq":9')
        rig.write(5)
        assert rig.ship().error == ""
        first = rig.lines()
        assert (tmp_path / "copy").read_bytes() == b"".join(line + b"\n" for line in first)
        log_id = rig.sinks[0].status().log_id
        rig.public_keys = [KEY1, KEY2]
        rig.stop()
        for part in rig.log_dir.iterdir():
            part.unlink()
        rig.write(3, key=KEY2)
        rig.ship()
        assert (tmp_path / f"copy.{log_id}").read_bytes() == b"".join(line + b"\n" for line in first)
        assert (tmp_path / "copy").read_bytes() == b"".join(line + b"\n" for line in rig.lines())


def test_a_copy_that_is_longer_than_the_log_stops_its_sink(tmp_path: Path) -> None:
    with file_rig(tmp_path) as rig:
        (tmp_path / "copy").write_bytes(b'{"event":{"seq":900,"ts":1}}\n')
        rig.write(5)
        status = rig.ship()
        assert "the copy has line 900 and the audit log ends at line" in status.error
        (tmp_path / "copy").unlink()
        assert rig.ship().error == ""


def test_a_copy_of_another_log_stops_its_sink(tmp_path: Path) -> None:
    """The state directory was lost: the number of its last line alone would let the sink go on after it."""
    with file_rig(tmp_path) as rig:
        rig.write(5)
        (tmp_path / "copy").write_bytes(rig.lines()[2].replace(b'"r1"', b'"r9"') + b"\n")
        assert "last line of the copy, line 3, is not the one of the log" in rig.ship().error
        (tmp_path / "copy").write_bytes(b"".join(line + b"\n" for line in rig.lines()[:3]))
        assert rig.ship().error == ""
        assert (tmp_path / "copy").read_bytes() == b"".join(line + b"\n" for line in rig.lines())


@pytest.mark.parametrize("text", ["line", "ocsf"])
@pytest.mark.parametrize("kept", [-40, -1, -3000, 1], ids=["torn", "one gone", "many gone", "one left"])
def test_a_file_that_is_behind_its_cursor_gets_the_lines_again(
    tmp_path: Path, text: Literal["line", "ocsf"], kept: int
) -> None:
    """kept: how many bytes of it, up to a whole line but for the torn one."""
    with file_rig(tmp_path, text) as rig:
        rig.write(30)
        rig.ship()
        rig.stop()
        copy = tmp_path / "copy"
        whole = copy.read_bytes()
        end = kept if kept == -40 else whole[:kept].rfind(b"\n") + 1 if kept < 0 else whole.find(b"\n") + 1
        copy.write_bytes(whole[:end])
        assert rig.ship().error == ""
        assert copy.read_bytes() == whole
        rig.stop()
        copy.unlink()
        rig.write(5)
        assert rig.ship().error == "", "a log rotation moved it"
        assert copy.read_bytes().count(b"\n") == len(rig.lines()) - whole.count(b"\n")


@pytest.mark.parametrize("text", ["line", "ocsf"])
@pytest.mark.parametrize("change", ["forged", "foreign", "empty"])
def test_a_file_whose_last_line_was_changed_stops_its_sink(
    tmp_path: Path, text: Literal["line", "ocsf"], change: str
) -> None:
    with file_rig(tmp_path, text) as rig:
        rig.write(5)
        rig.ship()
        rig.stop()
        copy = tmp_path / "copy"
        before, last = copy.read_bytes()[:-1].rsplit(b"\n", 1)
        content = {
            "forged": before + b"\n" + last.replace(b"checkpoint", b"Checkpoint") + b"\n",
            "foreign": before + b"\n" + last + b"\nso long\n",
            "empty": before + b"\n" + last + b"\n\n",
        }[change]
        copy.write_bytes(content)
        rig.write(5)
        assert "is not the one of the log: forward to an empty copy" in rig.ship().error
        assert copy.read_bytes() == content


def test_lines_that_file_and_log_have_lost_are_named(tmp_path: Path) -> None:
    with file_rig(tmp_path) as rig:
        rig.clock = Clock(step=CHORES_NS)
        rig.write(60, limits=LogLimits(segment_bytes=3000, reserve_bytes=0))
        rig.ship()
        rig.stop()
        copy = tmp_path / "copy"
        copy.write_bytes(copy.read_bytes().partition(b"\n")[0] + b"\n")
        (rig.log_dir / "minikms-audit.log.1").unlink()
        first = json.loads(rig.lines()[0])["event"]["seq"]
        for _ in range(2):
            assert (rig.ship().error, rig.ship().rejected) == ("", first - 2)
            assert [(each["seq"], each["last_seq"]) for each in rig.rejected()] == [(2, first - 1)]
            assert copy.read_bytes().splitlines()[1:] == rig.lines()
            rig.stop()


def test_a_file_of_events_has_each_line(tmp_path: Path) -> None:
    with file_rig(tmp_path, "ocsf") as rig:
        rig.write(5)
        assert rig.ship().error == ""
        events = [json.loads(line) for line in (tmp_path / "copy").read_bytes().splitlines()]
        assert [event["raw_data"].encode() for event in events] == rig.lines()
        assert [event["metadata"]["sequence"] for event in events] == list(range(1, len(events) + 1))


# --- several at once --------------------------------------------------------------------------------------------------


def test_the_thread_of_a_sink_ends_while_it_pauses(tmp_path: Path) -> None:
    with Collector() as receiver, http_rig(tmp_path, receiver.url) as rig:
        receiver.answer = lambda _: (429, {"Retry-After": "100"}, b"")
        rig.write(3)
        rig.steps()
        halt = threading.Event()
        thread = threading.Thread(target=rig.sinks[0].run, args=(halt,))
        thread.start()
        while not rig.sinks[0].status().failures:
            halt.wait(0.01)
        halt.set()
        thread.join(30)
        assert not thread.is_alive()


def test_a_damaged_cursor_stops_the_start(tmp_path: Path) -> None:
    rig, _ = kept_rig(tmp_path)
    with rig:
        rig.write(3)
        rig.ship()
        rig.stop()
        cursor = rig.state_dir / "sinks" / "siem" / "cursor.json"
        assert msgspec.json.decode(cursor.read_bytes())["seq"] == len(rig.lines())
        cursor.write_bytes(hashlib.sha256().digest())
        with pytest.raises(Exception, match=r"cursor\.json is damaged"):
            rig.start()


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    sink = HttpSink(name="siem", url="http://127.0.0.1:1", token="token")
    tmp_path.chmod(0o700)
    (tmp_path / "token").write_text(TOKEN)
    for mode, content, said in ((0o644, TOKEN, "other users can read"), (0o600, "a b", "not one line")):
        (tmp_path / "token").write_text(content)
        (tmp_path / "token").chmod(mode)
        with pytest.raises(Exception, match=said):
            HttpTransport(sink, AuditorFiles(tmp_path / "auditor.toml"))
