"""Receivers of audit lines, and an auditor in the test's process that sends to them.

Owns: a collector over HTTP that also speaks Splunk's protocol, a receiver of syslog, the real `rsyslogd`, and
`ShippingRig`. Each receiver keeps what it took, in order, and answers as the test says. It asserts nothing by itself,
but that what arrives is framed.
"""

import contextlib
import gzip
import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import msgspec

from minikms_auditor.config import AuditorFiles, Config, Sink
from minikms_auditor.sinks import Shipper, SinkStatus, Transport
from minikms_auditor.store import AuditorStore, SinkFiles
from tests import needs
from tests.harness.ports import free_port
from tests.harness.waiting import listens, wait_until
from tests.minikms_auditor.rig import Rig

SIEM_PAGE = Path(__file__).resolve().parents[2] / "docs" / "siem.md"
RECIPE = re.compile(r"```\n(global\(.*?)```", re.DOTALL)
"""The configuration of rsyslog."""
TOKEN = "b4d-70k3n"


class ShippingRig(Rig):
    """A rig whose auditor has one sink. `connect` makes its transport anew at each start."""

    def __init__(
        self,
        base: Path,
        sink: Sink,
        connect: Callable[[AuditorFiles], Transport],
        *,
        witnesses: int = 0,
        quorum: int = 0,
    ) -> None:
        super().__init__(base, witnesses=witnesses, quorum=quorum)
        self.sink = sink
        self.connect = connect

    def shippers(self, config: Config, store: AuditorStore) -> Sequence[Shipper]:
        files = SinkFiles(config.state_dir, self.sink.name)
        transport = self.connect(AuditorFiles(self.base / "auditor.toml"))
        log = self.note
        shipper = Shipper(self.sink, transport, files, store, config.log_dir, log=log)
        self._opened.callback(shipper.rewind)
        return [shipper]

    def start_once(self) -> None:
        if self.auditor is None:
            self.start()

    def attempt(self) -> tuple[SinkStatus, bool]:
        """One attempt of the sink. Its status, and whether it asks for another one at once."""
        self.start_once()
        pause_s = self.sinks[0].attempt()
        return self.sinks[0].status(), pause_s == 0

    def ship(self) -> SinkStatus:
        """Attempts until one fails or has nothing left to do now. The tree grows before."""
        self.steps()
        again = True
        while again:
            status, again = self.attempt()
        return status

    def rejected(self) -> list[dict[str, Any]]:
        path = self.state_dir / "sinks" / self.sink.name / "rejected"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def bodies(self) -> list[bytes]:
        """What a receiver of the format `line` gets of the log, in order."""
        log_id = json.loads(self.lines()[0])["event"]["facts"]["log_id"]
        return [
            b'{"log_id":"%b","seq":%d,' % (log_id.encode(), n + 1) + line[1:] for n, line in enumerate(self.lines())
        ]


class Collector:
    """A collector over HTTP. `answer`: what it answers to a batch, instead of storing it; None: it stores it.
    `acknowledges`: whether it does so at Splunk's question.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.lines: list[bytes] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answer: Callable[[list[bytes]], tuple[int, dict[str, str], bytes] | None] = lambda _: None
        self.acknowledges: Callable[[int], bool] = lambda _: True
        self._batches = 0
        self._waiting: dict[int, list[bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._server.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Encoding"] == "gzip"
                collector.requests.append((self.path, dict(self.headers)))
                status, headers, content = collector.take(self.path, gzip.decompress(body))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        return Handler

    def take(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/services/collector/ack":
            asked = json.loads(body)["acks"]
            acks = {number: self.acknowledges(number) for number in asked}
            for number, is_stored in acks.items():
                self.lines += self._waiting.pop(number, []) if is_stored else []
            return 200, {}, json.dumps({"acks": acks}).encode()
        assert body.endswith(b"\n")
        lines = body[:-1].split(b"\n")
        other = self.answer(lines)
        if other is not None:
            return other
        if path == "/services/collector/event":
            self._batches += 1
            self._waiting[self._batches] = [bytes(msgspec.json.decode(each, type=_Hec).event) for each in lines]
            return 200, {}, b'{"text":"Success","code":0,"ackId":%d}' % self._batches
        self.lines += lines
        return 204, {}, b""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Hec(msgspec.Struct, forbid_unknown_fields=True):
    time: float
    source: str
    sourcetype: str
    event: msgspec.Raw


class Rsyslog:
    """`rsyslogd` in the foreground, as docs/siem.md configures it, with or without TLS."""

    def __init__(self, base: Path, *, tls: tuple[Path, Path, Path] | None = None, out: Path | None = None) -> None:
        """tls: CA, certificate and key of the receiver, who asks for the certificate of auditor.example.com. out: where
        it writes, if not below `base`.
        """
        self._program = needs.program("rsyslogd")
        base.mkdir(exist_ok=True)
        self.base, self.port = base, free_port()
        self.out = out or base / "out"
        text = RECIPE.findall(SIEM_PAGE.read_text("utf-8"))[0]
        if tls is None:
            text = re.sub(r"global\(default.*?\)\n|\n *streamDriver[^)]*", "", text, flags=re.DOTALL)
        else:
            for name, path in zip(("ca", "cert", "key"), tls, strict=True):
                text = text.replace(f"/etc/rsyslog/{name}.pem", str(path))
        text = text.replace("/var/log/minikms-audit.jsonl", str(self.out))
        text = text.replace('port="6514"', f'address="127.0.0.1" port="{self.port}"')
        self._config = base / "rsyslog.conf"
        self._config.write_text(f'global(workDirectory="{base}")\n{text}')
        self.start()

    def start(self) -> None:
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._program, "-n", "-f", str(self._config), "-i", str(self.base / "pid")], stdout=log, stderr=log
            )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.base / "log").read_text()
        return listens(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        (self.base / "pid").unlink(missing_ok=True)

    def lines(self) -> list[bytes]:
        """Whole lines that were written: a kill may leave the beginning of another one before the next line."""
        content = self.out.read_bytes() if self.out.exists() else b""
        return content.split(b"\n")[:-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Peer:
    """A receiver of syslog. taken: of how many bytes of the first connection it is killed; None: never. reads: whether
    it reads at all.
    """

    def __init__(self, *, taken: int | None = None, reads: bool = True) -> None:
        self.taken = taken
        self.received: list[bytearray] = []
        """Of each connection."""
        self._reads = reads
        self._opened: list[socket.socket] = []
        self._port = 0
        self.start()
        self.url = f"tcp://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                self._opened.append(connection)
                if server.fileno() < 0:  # killed since it was accepted
                    connection.close()
                elif self._reads:
                    threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        received = bytearray()
        self.received.append(received)
        with contextlib.suppress(OSError):
            while self.taken is None or len(received) < self.taken:
                part = connection.recv(1 << 16 if self.taken is None else min(self.taken - len(received), 1 << 16))
                received += part
                if not part:
                    break
            if self.taken is not None:
                self.kill()
            connection.close()

    def kill(self) -> None:
        """As the kernel does for a process that was killed: connections that nobody has accepted end too."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        opened, self._opened = self._opened, []
        for connection in opened:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def take_frames(received: bytes) -> list[bytes]:
    """The messages of a stream with octet counting (RFC 6587, 3.4.1), without one that was cut off."""
    found: list[bytes] = []
    while True:
        digits, space, rest = received.partition(b" ")
        if not space or len(rest) < int(digits):
            return found
        assert digits.isdigit() and digits[:1] != b"0"
        found.append(rest[: int(digits)])
        received = rest[int(digits) :]
