"""`minikms-unlock serve` as systemd runs it: a listener that starts the program for a connection, as another user.

Owns: the files of the service in a directory of its own, its socket, each process that it starts, and the side of the
key service. Invariants: the listener is root's, as under systemd; one process runs at a time, and a connection that
waits starts the next one. It asserts nothing about answers.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from minikms.processes.handover import TEXT_BYTES_MAX, Purpose, Question
from tests import needs
from tests.harness.waiting import wait_until

UID = 45_680
"""Of the unlock service: belongs to nobody on the machine."""
ANSWER_S_MAX = 60.0
PASSES = 'n=$1; shift; exec 3<&$n; [ $n = 3 ] || eval "exec $n<&-"; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
"""A script: what sd_listen_fds(3) needs, with the socket in the descriptor of its first argument."""


class UnlockService:
    """In `base`, below directories of root that every user can enter. `daemon_uid`: the only one that it answers.

    `environ`: for the provider's library. `uid`: its user. `under`: what replaces itself by the program. Nothing is
    configured yet: see `write_config`.
    """

    def __init__(
        self,
        base: Path,
        *,
        daemon_uid: int = 0,
        environ: Mapping[str, str] | None = None,
        uid: int = UID,
        under: Sequence[str] = (),
    ) -> None:
        needs.interpreter_for(uid)
        self.base = base
        self.config = base / "etc" / "unlock.toml"
        self.pin = base / "etc" / "minikms.pin"
        self.directory = base / "state"
        self.wrapped = self.directory / "root.json"
        self.socket = base / "unlock.sock"
        self.log = base / "unlock.log"
        self.daemon_uid = daemon_uid
        self.statuses: list[int] = []
        """Of the processes that have ended, in order."""
        self.process: subprocess.Popen[bytes] | None = None
        self._uid, self._under = uid, under
        self._environ = {**os.environ, **(environ or {})}
        base.chmod(0o755)
        self.config.parent.mkdir(mode=0o755)
        self.directory.mkdir(mode=0o700)
        os.chown(self.directory, uid, uid)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self.socket.chmod(0o666)
        self._listener.listen(64)
        self._stopping, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run)

    def write_config(self, source: str, **members: object) -> None:
        values = {
            "version": 1,
            "source": source,
            "user": self.daemon_uid,
            "pin": str(self.pin),
            "directory": str(self.directory),
        } | members
        self.config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        self.config.chmod(0o644)

    def write_wrapped(self, **members: object) -> None:
        values = {"format": "minikms-unlock", "version": 1} | members
        self.wrapped.write_text(json.dumps(values))
        os.chown(self.wrapped, self._uid, self._uid)
        self.wrapped.chmod(0o640)

    def proc(self, name: str) -> str:
        """Files of the running process in /proc."""
        found = Path(f"/proc/{self.process.pid}").glob(name) if self.process is not None else ()
        return "".join(path.read_text() for path in found)

    def ask(self, keyring_id: str, purpose: Purpose = "start") -> tuple[bytes, bytes]:
        """The kind of the answer, and what follows it; both empty for a connection that was closed without one."""
        return self.exchange(Question(purpose, keyring_id).encode())

    def exchange(self, question: bytes) -> tuple[bytes, bytes]:
        with self.connected() as connection:
            with contextlib.suppress(BrokenPipeError):  # it was closed before it was asked
                connection.sendall(question)
            return read_answer(connection)

    def connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER_S_MAX)
        connection.connect(str(self.socket))
        return connection

    def wait_for_end(self, count: int = 1) -> None:
        """Returns when `count` processes have ended."""
        wait_until(lambda: len(self.statuses) >= count)

    def events(self) -> list[dict[str, object]]:
        """The lines of its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopping, selectors.EVENT_READ)
            while all(key.fileobj is not self._stopping for key, _ in selector.select()):
                number = self._listener.fileno()
                command = [
                    "bash",
                    "-c",
                    PASSES,
                    "bash",
                    str(number),
                    *self._under,
                    sys.executable,
                    "-m",
                    "minikms_unlock",
                ]
                with self.log.open("ab") as log:
                    self.process = subprocess.Popen(
                        [*command, "serve", "--config", str(self.config), "--log-format", "json"],
                        pass_fds=(number,),
                        env=self._environ,
                        cwd="/",
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        user=self._uid,
                        group=self._uid,
                        extra_groups=(),
                        start_new_session=True,
                    )
                self.statuses.append(self.process.wait())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self._thread.join()
        self._listener.close()
        self._stopping.close()


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it was closed before all that was sent was read
        while part := connection.recv(TEXT_BYTES_MAX):
            data += part
    return data[:1], data[1:]
