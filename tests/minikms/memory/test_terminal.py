"""Secrets that are typed: without echo, bounded, and only on a terminal."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.terminal import OnTerminal
from tests.harness.waiting import wait_until

READS = """
import sys
from minikms.api.errors import InvalidRequestError, StartError
from minikms.memory import SecretArena
from minikms.memory.terminal import typed_secret
with SecretArena(4, force_fallback=True) as arena:
    for number in range(int(sys.argv[1])):
        try:
            with typed_secret("Secret: ", 100, arena) as text:
                kept = [part[:] for part in text]
                print("got", len(b"".join(map(bytes, text))), sum(map(sum, text)), flush=True)
            assert not any(map(any, kept)), "the text is zeroed"
        except (InvalidRequestError, StartError) as error:
            print("refused:", error, flush=True)
    assert arena.in_use == 0
"""


def reading(count: int = 1) -> OnTerminal:
    return OnTerminal([sys.executable, "-c", READS, str(count)])


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 99, 100])
def test_a_line_of_any_length_is_read_and_not_shown(size: int) -> None:
    secret = os.urandom(50).hex()[:size]
    with reading() as program:
        program.wait_for("Secret: ")
        program.type(secret)
        assert program.wait() == 0
    assert f"got {size} {sum(secret.encode())}".encode() in program.shown
    assert size < 4 or secret.encode() not in program.shown


def test_a_line_that_is_too_long_is_refused_whole() -> None:
    """Its rest does not reach the next prompt."""
    with reading(3) as program:
        for number, size in enumerate((101, 3_000, 100), start=1):
            program.wait_for("Secret: ", times=number)
            program.type("x" * size)
        assert program.wait() == 0
    assert program.shown.count(b"refused: the line is longer than 100 bytes") == 2
    assert b"got 100 12000" in program.shown
    assert b"xx" not in program.shown


@pytest.mark.parametrize("typed", [b"\x04", b"half\x04\x04"])
def test_a_line_without_its_end_is_refused(typed: bytes) -> None:
    """Ctrl-D ends the input, or sends what was typed so far."""
    with reading() as program:
        program.wait_for("Secret: ")
        program.type(typed, end=b"")
        assert program.wait() == 0
    assert b"refused: the line was cut off: end it with Enter" in program.shown


PROMPT = "of the shell> "


def in_a_shell(tmp_path: Path) -> OnTerminal:
    """A shell with job control, which leaves the modes of the terminal as the program does, and a prompt in it. It does
    not ignore SIGHUP, also under nohup(1).
    """
    (tmp_path / "reads.py").write_text(READS)
    shell = OnTerminal(["env", "--default-signal=HUP", "sh", "-i"], env={**os.environ, "PS1": PROMPT, "ENV": ""})
    shell.wait_for(PROMPT)
    shell.type(f"{shlex.quote(sys.executable)} {tmp_path / 'reads.py'} 1")
    shell.wait_for("Secret: ")
    assert not shell.echoes()
    shell.type_unfinished(b"half-typed")
    return shell


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_a_signal_that_ends_the_prompt_restores_the_terminal(tmp_path: Path, number: signal.Signals) -> None:
    """The shell gets its echo back and nothing of the secret, and sees that the signal ended the program."""
    with in_a_shell(tmp_path) as shell:
        shell.signal_foreground(number)
        shell.wait_for(PROMPT, times=2)
        assert shell.echoes()
        shell.type("echo status-$?")
        shell.wait_for(f"status-{128 + number}")
    assert b"half-typed" not in shell.shown


@pytest.mark.parametrize("way", ["Ctrl-Z", "SIGTSTP", "SIGSTOP"])
def test_after_a_stop_the_prompt_comes_again_without_echo(tmp_path: Path, way: str) -> None:
    with in_a_shell(tmp_path) as shell:
        if way == "Ctrl-Z":
            shell.type(b"\x1a", end=b"")
        else:
            shell.signal_foreground(signal.Signals[way])
        shell.wait_for("Stopped")
        if way == "SIGSTOP":  # no program can do something before it: the person drops the line, and sets the mode
            shell.type("\x15stty echo")
            shell.wait_for(PROMPT, times=3)
        assert shell.echoes()
        shell.type("fg")
        shell.wait_for("Secret: ", times=2)
        assert not shell.echoes()
        shell.type("whole-secret")
        shell.wait_for(f"got 12 {sum(b'whole-secret')}")
        shell.wait_for(PROMPT, times=3)
        assert shell.echoes()
    assert b"half-typed" not in shell.shown
    assert b"whole-secret" not in shell.shown


def test_a_prompt_in_the_background_waits_for_the_foreground(tmp_path: Path) -> None:
    """The terminal's driver stops it where it would change the modes. The signal that goes on interrupts that call."""
    with in_a_shell(tmp_path) as shell:
        shell.type(b"\x1a", end=b"")
        shell.wait_for(PROMPT, times=2)
        shell.type("bg")
        prompts = itertools.count(4)

        def is_stopped_by_the_driver() -> bool:
            shell.type("jobs")
            shell.wait_for(PROMPT, times=next(prompts))
            return b"tty output" in shell.shown

        shell.wait_for(PROMPT, times=3)
        wait_until(is_stopped_by_the_driver)
        shell.type("fg")
        shell.wait_for("Secret: ", times=2)
        assert not shell.echoes()
        shell.type("whole-secret")
        shell.wait_for(f"got 12 {sum(b'whole-secret')}")
    assert b"whole-secret" not in shell.shown


def test_without_a_terminal_nothing_is_asked() -> None:
    """A pipe as standard input does not replace the terminal."""
    done = subprocess.run(
        [sys.executable, "-c", READS, "1"],
        input="secret\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert "refused: secrets are typed and shown on a terminal only" in done.stdout
    assert "Secret" not in done.stdout
