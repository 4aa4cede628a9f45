"""Auditor and receivers are killed at random, and connections are cut, while the log is written, rotated, compressed
and pruned: what arrives is, repeats removed, exactly the log.
"""

import contextlib
import itertools
import json
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms.audit import record
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.reader import each_segment
from minikms_auditor.collectors import Collector as HttpTransport
from minikms_auditor.config import HttpSink, SyslogSink
from minikms_auditor.syslog import Syslog
from tests.minikms.audit.logmaker import Clock
from tests.minikms_auditor.killing import forked
from tests.minikms_auditor.receivers import Collector, Rsyslog, ShippingRig

ROUNDS = 40
SETTLE_S = 1.0
LIMITS = LogLimits(segment_bytes=20_000, reserve_bytes=0)


class Cutter:
    """Passes bytes on to a port, and cuts each connection after a random number of them."""

    def __init__(self, port: int, bytes_max: int) -> None:
        self._to, self._bytes_max = port, bytes_max
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._server.accept()[0],), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        left = random.randrange(self._bytes_max) if random.random() < 0.5 else 1 << 40
        with near:
            try:
                with socket.create_connection(("127.0.0.1", self._to), 10) as far:
                    try:
                        _relay(near, far, left)
                    except OSError:  # also of a receiver that was killed
                        _reset_at_close(far)
                        raise
            except OSError:
                _reset_at_close(near)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def _relay(near: socket.socket, far: socket.socket, left: int) -> None:
    """Until both have ended. Raises OSError, also after `left` bytes."""
    to = {near: far, far: near}
    while to:
        for source in select.select(list(to), [], [])[0]:
            part = source.recv(4096)
            if part:
                to[source].sendall(part[:left] if source is near else part)
                left -= len(part) if source is near else 0
                if left < 0:
                    raise ConnectionResetError
            else:
                to.pop(source).shutdown(socket.SHUT_WR)


def _reset_at_close(connection: socket.socket) -> None:
    """As a network does that was cut, or a kernel with bytes that nobody has read: no orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def auditor_in_child(rig: ShippingRig) -> Iterator[None]:
    """Steps and attempts in a child, which is killed at the end."""
    rig.stop()

    def run() -> None:
        rig.begin_in_child()
        while True:
            rig.steps()
            rig.attempt()

    pid = forked(run)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the auditor ended by itself"


def survive(rig: ShippingRig, disturb: Callable[[], None], received: Callable[[], list[bytes]]) -> None:
    """Writes, kills and removes shipped segments for some rounds, and compares what arrived with what was written."""
    rig.clock = Clock(step=CHORES_NS)
    written: dict[int, bytes] = {}
    for _ in range(ROUNDS):
        rig.write(random.randrange(1, 60), limits=LIMITS)
        written.update((json.loads(line)["event"]["seq"], line) for line in rig.lines())
        with auditor_in_child(rig):
            time.sleep(random.uniform(0, 1.5))
            disturb()
            time.sleep(random.uniform(0, 0.5))
        prune(rig)
    while (status := rig.ship()).error or status.lag_lines:
        assert not status.waits_at, status
        time.sleep(0.1)
    assert status.rejected == 0
    bodies = [b'"seq":%d,' % seq + line[1:] for seq, line in sorted(written.items())]
    found: dict[bytes, None] = {}
    for line in received():
        with contextlib.suppress(ValueError):  # a frame that a kill has cut
            found[b'"seq":%d,' % json.loads(line)["seq"] + line[line.index(b'"event"') :]] = None
    assert list(found) == bodies


def prune(rig: ShippingRig) -> None:
    """Remove what the sink certainly has, as retention does once the auditor has reported it."""
    cursor = rig.state_dir / "sinks" / "siem" / "cursor.json"
    seq = json.loads(cursor.read_text())["seq"] if cursor.exists() else 0
    files = [(file.name, record.peek_seq(file.first_line())) for file in each_segment(str(rig.log_dir))]
    for (name, _), (_, following) in itertools.pairwise(files):
        if following <= seq + 1:
            (rig.log_dir / name).unlink()


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_a_collector_gets_exactly_the_log(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with Collector() as receiver:
        receiver.answer = lambda _: random.choice([None, None, (500, {}, b""), (429, {}, b"")])
        cutter = Cutter(int(receiver.url.rpartition(":")[2]), 3000)
        sink = HttpSink(name="siem", url=f"http://127.0.0.1:{cutter.port}", required=True)
        with ShippingRig(tmp_path, sink, lambda files: HttpTransport(sink, files)) as rig:
            survive(rig, lambda: None, lambda: receiver.lines)
        cutter.close()


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_rsyslog_gets_exactly_the_log(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with Rsyslog(tmp_path / "rsyslog") as receiver:
        cutter = Cutter(receiver.port, 20_000)
        sink = SyslogSink(name="siem", url=f"tcp://127.0.0.1:{cutter.port}")

        def disturb() -> None:
            if random.random() < 0.6:
                receiver.kill()
                receiver.start()

        with ShippingRig(tmp_path, sink, lambda files: Syslog(sink, files, settle_seconds=SETTLE_S)) as rig:
            survive(rig, disturb, receiver.lines)
        cutter.close()
