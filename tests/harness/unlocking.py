"""A stand-in for the unlock service: it speaks `minikms.processes.handover`, with the answers of a test.

Owns: the listener, in a thread of the test, and a daemon whose root key comes from it. Invariant: one question and one
answer on each connection, as of the real service.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from minikms.processes import handover
from minikms.processes.handover import Question, parse_question
from tests.harness.live_daemon import LiveDaemon

Answer = Callable[[socket.socket], None]
AWAY = handover.AWAY + handover.sentence("the token is not plugged in")
LEASE_SECOND_NS = 100_000_000
REFUSED = handover.REFUSED + handover.sentence("AccessDeniedException")


class UnlockListener:
    """It listens at `path` from construction to the end of the block. `answer`: what it sends to each question from now
    on, or a function that gets the connection. `asked`: the questions so far; None for what is none.
    """

    def __init__(self, path: Path, answer: bytes | Answer = AWAY) -> None:
        self.path = path
        self.answer = answer
        self.asked: list[Question | None] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def purposes(self) -> list[str]:
        return [question.purpose for question in self.asked if question is not None]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            said = b""
            while not said.endswith(b"\n") and (part := connection.recv(handover.QUESTION_BYTES_MAX)):
                said += part
            answer = self.answer
            self.asked.append(parse_question(said))
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def half_sent(key: bytes, sent: threading.Event, rest: threading.Event) -> Answer:
    """The first half of the answer, and the second one once `rest` is set."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(handover.KEY + key[:16])
        sent.set()
        rest.wait()
        connection.sendall(key[16:])

    return answer


@contextlib.contextmanager
def daemon_asking(
    base: Path, *flags: str, unlock_uids: str = "", launcher: tuple[str, ...] = ()
) -> Iterator[tuple[LiveDaemon, UnlockListener]]:
    """A daemon with a keyring, whose root key comes from the listener, which is away at first. A second of its lease
    takes LEASE_SECOND_NS.
    """
    launcher = (*launcher, "-m", "tests.harness.unlocking")
    with UnlockListener(base / "unlock.sock") as listener, LiveDaemon(base, launcher=launcher) as daemon:
        daemon.stop()
        place = daemon.command.index("--master-key-file")
        source = ["--root", f"unlock:{listener.path}", "--unlock-uids", unlock_uids or str(os.geteuid()), *flags]
        daemon.command[place : place + 2] = source
        daemon.start()
        yield daemon, listener


def tried() -> str:
    """What becomes of things that a key service may not do, in its own process."""
    errors = []
    forbidden: tuple[Callable[[], object], ...] = (
        lambda: socket.socket(socket.AF_INET),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.listdir("/"),
        lambda: Path("/tmp/minikms-test-new").touch(),
    )
    for act in forbidden:
        try:
            act()
        except OSError as error:
            errors.append(type(error).__name__)
    return f"tried: {' '.join(errors)}"


TRIED = "tried: " + " ".join(["PermissionError"] * 4)


if __name__ == "__main__":
    from minikms.cli import main
    from minikms_daemon.seal.unlocking import Unlocking
    from minikms_daemon.server import lease
    from tests.harness import in_process

    served = Unlocking.served

    def served_and_tried(self: Unlocking, asked_ns: int) -> None:
        served(self, asked_ns)
        print(tried(), file=sys.stderr, flush=True)

    Unlocking.served = served_and_tried  # type: ignore[method-assign]  # in this process, which runs only for tests
    lease.SECOND_NS = LEASE_SECOND_NS  # type: ignore[misc]  # final in production
    in_process.install()
    sys.argv = ["minikms", *sys.argv[3:]]  # -m minikms, for which this stands
    main()
