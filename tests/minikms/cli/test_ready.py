"""`minikms ready`, the probe of a container."""

import os
from pathlib import Path

from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon

OTHER_UID = 54321


def ready(socket: Path, *words: str, uid: int | None = None) -> tuple[int, str]:
    done = forked.run(
        *("minikms", "ready", "--socket", socket, *words),
        env={**os.environ, "PROGRESSDB_KMS_SERVER_UIDS": str(os.geteuid())},
        user=None if uid is None else (uid, os.getegid(), ()),
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_daemon_that_serves_is_ready_without_a_word(public: Path) -> None:
    with LiveDaemon(public) as daemon:
        assert ready(daemon.socket) == (0, "")
        assert ready(daemon.socket, "--live") == (0, "")


def test_a_sealed_daemon_lives_and_is_not_ready(public: Path) -> None:
    with LiveDaemon(public) as daemon, daemon.client() as client:
        client.seal()
        status, said = ready(daemon.socket)
        assert (status, "sealed" in said) == (1, True), said
        assert ready(daemon.socket, "--live") == (0, "")


def test_a_daemon_that_does_not_answer_is_neither(tmp_path: Path) -> None:
    for words in ((), ("--live",)):
        status, said = ready(tmp_path / "s", *words)
        assert (status, "Is the daemon running?" in said) == (2, True), said


def test_any_user_who_reaches_the_socket_may_ask_whether_it_lives(public: Path) -> None:
    needs.interpreter_for(OTHER_UID)
    with LiveDaemon(public, "file", "--socket-mode", "0666") as daemon:
        assert ready(daemon.socket, "--live", uid=OTHER_UID) == (0, "")
        assert ready(daemon.socket, uid=OTHER_UID)[0] == 1
