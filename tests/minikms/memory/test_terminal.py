"""Secrets that are typed: without echo, bounded, and only on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.terminal import OnTerminal

READS = """
import sys
from minikms.errors import InvalidRequestError, StartError
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


def test_an_interrupted_prompt_restores_the_echo() -> None:
    """The shell that started the program goes on with its terminal."""
    shell = f"{sys.executable} -c '{READS}' 1; stty -a | tr ' ;' '\\n\\n' | grep -x -e -echo -e echo"
    with OnTerminal(["sh", "-c", "trap true INT; " + shell]) as program:
        program.wait_for("Secret: ")
        program.type(b"half\x03", end=b"")
        program.wait()
    assert program.shown.split()[-1] == b"echo"
    assert b"half" not in program.shown


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
