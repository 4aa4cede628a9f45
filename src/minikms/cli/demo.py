"""`minikms demo`: runs the commands against a daemon of its own, in a temporary directory.

Owns: which commands are shown in which order. Invariants: each line shown is a command that is run, and its real output
is below it; a command with an unexpected exit status or output ends the demo with exit status 1; nothing of the user's
configuration is used, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minikms.output import terminal
from minikms.usage import EXIT_FAILED, EXIT_GOOD, CommandError

if TYPE_CHECKING:
    from rich.console import Console

READY_SECONDS_MAX: Final = 60.0
RUN_SECONDS_MAX: Final = 60.0
NOTE: Final = "the door code is 4711"
SERVE: Final = "minikms --socket kms.sock --data-dir keys --master-key-file root.key"


def demo() -> int:
    """Run the commands on example data in a temporary directory, then remove it. Exit status: 0 all succeeded."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that the daemon is stopped too
    with tempfile.TemporaryDirectory(prefix="minikms-demo-") as place:
        tour = Shell(terminal(), Path(place))
        tour.say("Make a data directory, and a root key to lock it with")
        tour.run("minikms init --data-dir keys --master-key-file root.key")
        tour.say("Serve it on a Unix socket, to this user only")
        with tour.serving():
            tour.say("Encrypt a file. Its key is made, wrapped and kept by the daemon")
            tour.run(f"echo {shlex.quote(NOTE)} > note")
            tour.run("minikms encrypt note")
            tour.run("grep -c 'door code' note.kms", status=1)
            tour.run("minikms decrypt note.kms --output -", must_say=NOTE)
            tour.say("Rotate the key-encryption key while it serves; what was encrypted stays readable")
            tour.run("minikms rotate-kek --yes")
            tour.run("minikms decrypt note.kms --output -", must_say=NOTE)
            tour.say("Back up what is needed to decrypt, without the root key")
            tour.run("minikms backup create monday.backup")
            tour.say("Every use of a key is in the audit log, each line chained to the one before it")
            tour.run("minikms audit tail --lines 4")
            tour.run("minikms audit verify")
            tour.say("An altered file does not open")
            tour.run("printf alter | dd of=note.kms bs=1 seek=115 conv=notrunc status=none")
            tour.run("minikms decrypt note.kms --output -", status=EXIT_FAILED)
        return tour.close()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Shell:
    """Prints and runs lines, and serves."""

    def __init__(self, console: Console, place: Path) -> None:
        self._console = console
        self._place = place
        # A directory of programs that holds this very installation's `minikms`, under its plain name.
        programs = place / "bin"
        programs.mkdir()
        launcher = programs / "minikms"
        launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m minikms "$@"\n')
        launcher.chmod(0o700)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        self._environ = kept | {
            "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
            "PROGRESSDB_KMS_SOCKET": "kms.sock",
            "PROGRESSDB_KMS_DATA_DIR": "keys",
            "PROGRESSDB_MINIKMS_MASTER_KEY_FILE": "root.key",
        }

    def say(self, text: str) -> None:
        self._console.print(f"\n# {text}", style="bold", soft_wrap=True)

    def run(self, command: str, *, status: int = EXIT_GOOD, must_say: str = "") -> None:
        """Runs a line in a shell. Raises CommandError when the exit status or the output is not the expected one."""
        self._console.print(f"$ {command}", style="cyan", soft_wrap=True)
        done = subprocess.run(  # noqa: S602  the lines are those above; a shell is what a reader has
            command,
            shell=True,
            cwd=self._place,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS_MAX,
            check=False,
        )
        for line in done.stdout.splitlines():
            self._console.print(line, soft_wrap=True)
        if done.returncode != status or must_say not in done.stdout:
            raise CommandError(
                f"that ended with exit status {done.returncode}, {status} was expected; please report it", EXIT_FAILED
            )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        self._console.print(f"$ {SERVE} &", style="cyan", soft_wrap=True)
        words = [sys.executable, "-P", "-m", "minikms", *shlex.split(SERVE)[1:]]
        with (self._place / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  our own program, our own arguments
                words, cwd=self._place, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait(process)
            self.run("minikms status", must_say="well")
            yield
        finally:
            process.terminate()
            process.wait()

    def _wait(self, process: subprocess.Popen[Any]) -> None:
        end = time.monotonic() + READY_SECONDS_MAX
        while not (self._place / "kms.sock").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise CommandError(f"the daemon did not start: {(self._place / 'log').read_text()}", EXIT_FAILED)
            time.sleep(0.02)

    def close(self) -> int:
        self._console.print("\nAll went as it should. `minikms --help` lists what else there is.", style="bold green")
        return EXIT_GOOD
