"""Transcripts of the real commands: what was typed, what was said, how it ended.

A transcript is a text file. `$ ` begins a line that is run in a shell, in a directory of the transcript's own; what it
said (both streams, as a terminal shows them) follows, then `[exit N]` unless N is 0. `#` begins a remark. Three lines
are more than a shell's: one that ends in ` &` starts a program and waits for its socket or port, `kill %1` ends the
newest one, `make-key THREAD` makes a thread's key, as a program that uses the library does, and `post-message TEXT`
stores a message, as a backend does.

What differs from run to run is replaced: `<key-1>` is the first key id that was seen, `<time>` a time. In a command
they stand for what was seen. `python -m tests.commands.transcript FILE…` runs files and writes down what was said.
"""

import http.client
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from minikms.api.errors import KmsError
from minikms.client import Client
from tests.harness import forked
from tests.harness.ports import free_port

READY_SECONDS_MAX = 60.0
RUN_SECONDS_MAX = 60.0
DIRECTORY = Path(__file__).parent / "transcripts"

_NUMBERED = {
    "key": re.compile(r"\bk_[0-7][0-9a-hjkmnp-tv-z]{25}\b"),
    "archive": re.compile(r"\ba_[0-9a-f]{16}\b"),
    "keyring": re.compile(r"\bkr_[0-9a-f]{16}\b"),
    "base64": re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}="),
    "fingerprint": re.compile(r"\b[0-9a-f]{16}\b"),
    "thread": re.compile(r"\bthread-[0-9]{19}-[0-9]{6}\b"),
    "message": re.compile(r"\bmsg-[0-9]{19}-[0-9]{6}\b"),
}


def _numbered(kind: str, names: dict[str, str], found: re.Match[str]) -> str:
    """The name of what was found: the kind, and its number in order of appearance."""
    return names.setdefault(found[0], f"<{kind}-{len(names) + 1}>")


_PLAIN = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "<time>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<log>"),
    (re.compile(r"\b\d+:<base64-\d+>"), "<head>"),
    (re.compile(r"\bline [\d,]+, head"), "line <n>, head"),
    (re.compile(r"(process |pid |pid=|kill |\"pid\": )\d+"), r"\1<pid>"),
    (re.compile(r"\bup (\d+ (s|min) ?)+"), "up <n> s"),
    (re.compile(rf"\b(uid|uid:) ?{os.geteuid()}\b"), r"\1 <uid>"),
    (re.compile(r"[\d,.]+ [KM]iB locked \(\S+\)"), "<n> locked"),
    (re.compile(r"(hardening  +).*"), r"\1<measures>"),
    (re.compile(r"[\d,]+, \d+ connections"), "<n>, <n> connections"),  # a slow start is asked more than once
    (re.compile(r" \(still counting\)"), ""),  # until the scan of a start has ended
    (re.compile(r"\d+ (piece\(s\) of advice|lines)"), r"<n> \1"),
    (re.compile(r"(?m)^ +\w+: (hardening_missing|disk_low): .*\n"), ""),
    (re.compile(r"(?m)^advice: (memory|hardening_missing|disk|disk_low): .*\n  do: .*\n"), ""),
    (re.compile(r"\d+ files, [\d,]+ bytes"), "<n> files, <n> bytes"),
    (re.compile(r"\b127\.0\.0\.1:\d{4,5}\b"), "<address>"),
    (re.compile(r"urlopen error .Errno \d+. [^>]*"), "urlopen error"),
)


class Session:
    """One transcript's directory and what runs in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        programs = place / "bin"
        programs.mkdir()
        for name, module in {
            "minikms": "minikms",
            "progressdb": "progressdb_server",
            "make-key": "tests.commands.make_key",
            "post-message": "tests.commands.post_message",
        }.items():
            program = programs / name
            program.write_text(f"#!/bin/sh\n{forked.script(module)}\n")
            program.chmod(0o700)
        (place / "work").mkdir(mode=0o700)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        variables, self._inherited = forked.for_shells()
        self._environ = kept | variables | {"PATH": f"{programs}:{kept.get('PATH', os.defpath)}", "NO_COLOR": "1"}
        self.port = free_port()
        self._environ["PORT"] = str(self.port)
        self._started: list[subprocess.Popen[bytes]] = []
        self._seen: dict[str, dict[str, str]] = {kind: {} for kind in _NUMBERED}

    def close(self) -> None:
        while self._started:
            self._stop()

    def run(self, command: str) -> str:
        """What a command says and how it ends, as a transcript has it."""
        for names in self._seen.values():
            for value, name in names.items():
                command = command.replace(name, value)
        if command == "kill %1":
            self._stop()
            return ""
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self._environ[name] = value
            return ""
        if command.endswith(" &"):
            return self._start(command.removesuffix(" &"))
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.place / "work",
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=self._inherited,
            timeout=RUN_SECONDS_MAX,
            check=False,
        )
        said = self.normal(done.stdout.decode())
        if said and not said.endswith("\n"):
            said += "\n"
        return said + (f"[exit {done.returncode}]\n" if done.returncode else "")

    def normal(self, text: str) -> str:
        """The text without what differs from run to run."""
        text = text.replace(str(self.place / "work"), "<dir>")
        for kind, pattern in _NUMBERED.items():
            text = pattern.sub(partial(_numbered, kind, self._seen[kind]), text)
        for pattern, name in _PLAIN:
            text = pattern.sub(name, text)
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    def _start(self, command: str) -> str:
        with (self.place / "log").open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=self.place / "work",
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._inherited,
            )
        self._started.append(process)
        end = time.monotonic() + READY_SECONDS_MAX
        while not self._answers(command):
            if process.poll() is not None or time.monotonic() > end:
                self._started.remove(process)
                process.kill()
                log_text = (self.place / "log").read_text().splitlines()[-1:]
                return self.normal("\n".join(log_text)) + f"[exit {process.wait()}]\n"
            time.sleep(0.02)
        return ""

    def _answers(self, command: str) -> bool:
        if command.startswith("progressdb"):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
            try:  # its port accepts connections before it knows whether it can serve
                connection.request("GET", "/healthz")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()
        words = shlex.split(command)
        named = words[words.index("--socket") + 1] if "--socket" in words else self._environ["PROGRESSDB_KMS_SOCKET"]
        try:  # its socket is there before it knows whether it can serve
            with Client(self.place / "work" / named, wait_s=0, timeout_s=1) as kms:
                return kms.health()
        except KmsError:
            return False

    def _stop(self) -> None:
        process = self._started.pop()
        process.send_signal(signal.SIGTERM)
        process.wait(READY_SECONDS_MAX)


def replayed(text: str) -> str:
    """The transcript as it comes out when its commands are run now."""
    with tempfile.TemporaryDirectory(prefix="cli-") as place:
        session = Session(Path(place))
        try:
            told = []
            for line in text.splitlines():
                if line.startswith("$ "):
                    told.append(f"{line}\n{session.run(line[2:])}")
                elif line.startswith("#") or (not line and (not told or told[-1] != "\n")):
                    told.append(line + "\n")
            return "".join(told)
        finally:
            session.close()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(replayed(Path(name).read_text("utf-8")), "utf-8")
