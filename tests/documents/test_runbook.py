"""The runbook's commands do what it says, section by section, on a machine where just that has happened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.commands.transcript import Session

RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"
PLACES = {
    "/run/minikms/minikms.sock": "kms.sock",
    "/var/lib/progressdb/minikms": "kms",
    "/etc/progressdb/": "./",
    "/var/lib/progressdb/db": "db",
    "/backup/": "backup/",
}
SECTIONS = {
    title: [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for title, text in re.findall(r"(?m)^## (.+)\n((?:(?!## ).*\n?)*)", RUNBOOK.read_text("utf-8"))
}


class Machine:
    """Both services with a message and a backup, and `systemctl` for them."""

    def __init__(self, session: Session, *, server: bool) -> None:
        self.session = session
        self.work = session.place / "work"
        self._running: list[str] = []
        for name, value in {
            "PROGRESSDB_KMS_SOCKET": "kms.sock",
            "PROGRESSDB_KMS_DATA_DIR": "kms",
            "PROGRESSDB_MINIKMS_MASTER_KEY_FILE": "minikms.key",
            "PROGRESSDB_DB_PATH": "db",
            "PROGRESSDB_KMS_SPAWN": "0",
            "PROGRESSDB_API_ADMIN_KEYS": "admin-key",
            "PROGRESSDB_API_BACKEND_KEYS": "backend-key",
        }.items():
            session.run(f"export {name}={value}")
        session.run(f"export PROGRESSDB_ADDR=127.0.0.1:{session.port}")
        (self.work / "backup").mkdir()
        self.do("minikms init")
        self.systemctl("start", "minikms")
        if server:
            self.systemctl("start", "progressdb")
            self.do("post-message hello")
        else:
            self.do("make-key thread-1")
        self.do("minikms backup create backup/monday.minikms")

    def do(self, command: str) -> None:
        """Runs a line of the runbook; it must end as the runbook says."""
        expected = re.search(r"# ends with (\d)", command)
        said = self.session.run(command)
        ended = re.search(r"\[exit (\d+)\]\n\Z", said)
        assert (ended[1] if ended else "0") == (expected[1] if expected else "0"), f"{command}\n{said}"

    def systemctl(self, verb: str, unit: str) -> None:
        if verb == "start":
            said = self.session.run(f"{unit} &")
            assert "[exit" not in said, said
            self._running.append(unit)
            return
        assert verb == "stop"
        # the newest is stopped first, as sessions do; the other one is started again
        stopped = []
        while self._running:
            stopped.append(self._running.pop())
            self.session.run("kill %1")
            if stopped[-1] == unit:
                break
        for other in stopped[-2::-1]:
            self.systemctl("start", other)

    def follow(self, title: str) -> None:
        for line in SECTIONS[title]:
            typed = line
            for place, here in PLACES.items():
                typed = typed.replace(place, here)
            match = re.fullmatch(r"systemctl (start|stop) (\w+)", typed)
            if match:
                self.systemctl(match[1], match[2])
            else:
                self.do(typed)


@contextmanager
def machine(place: Path, *, server: bool) -> Iterator[Machine]:
    session = Session(place)
    try:
        yield Machine(session, server=server)
    finally:
        session.close()


def as_it_is(made: Machine) -> None:
    """Nothing has happened."""


def the_use_counts_are_gone(made: Machine) -> None:
    (made.work / "kms" / "kms-leases").unlink()


def a_line_was_edited(made: Machine) -> None:
    log = made.work / "kms" / "minikms-audit.log"
    text = log.read_bytes()
    log.write_bytes(text.replace(b'"create_dek"', b'"create_dok"', 1))


HAPPENED: dict[str, Callable[[Machine], None]] = {
    "Use counts are lost": the_use_counts_are_gone,
    "The audit log was altered": a_line_was_edited,
}


ALWAYS = {"Change the root key", "A key has leaked", "Restore"}
"""The sections that do most; `make torture` runs the others too, whose commands have transcripts of their own."""


def test_every_section_of_the_runbook_has_commands() -> None:
    assert len(SECTIONS) >= 11
    assert all(SECTIONS.values())


@pytest.mark.parametrize(
    "title", [title if title in ALWAYS else pytest.param(title, marks=pytest.mark.torture) for title in SECTIONS]
)
def test_the_commands_of_a_section_do_what_they_should(title: str, tmp_path: Path) -> None:
    needs.program("openssl")
    server = any("progressdb " in line or " progressdb" in line for line in SECTIONS[title])
    with machine(tmp_path, server=server) as made:
        HAPPENED.get(title, as_it_is)(made)
        made.follow(title)
