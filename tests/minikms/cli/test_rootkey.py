"""Which commands run again with their symbols bound, and which get the root key of the environment."""

import os
import sys
from collections.abc import Sequence

import pytest

from minikms.cli import command, rootkey


class RanAgainError(Exception):
    """The process would have been replaced."""


@pytest.mark.skipif(sys.platform != "linux", reason="only the linker of Linux has the variable")
@pytest.mark.parametrize(
    ("words", "again"),
    [
        ([], True),
        (["serve"], True),
        (["--dev"], True),
        (["status"], False),
        (["--help"], False),
        (["--version"], False),
    ],
)
def test_only_what_serves_runs_again(monkeypatch: pytest.MonkeyPatch, words: Sequence[str], again: bool) -> None:
    def replace(*given: object) -> None:
        raise RanAgainError

    monkeypatch.setattr(os, "execve", replace)
    monkeypatch.setattr(sys, "argv", ["minikms", *words])
    monkeypatch.delenv(rootkey.BIND_VARIABLE, raising=False)
    if again:
        with pytest.raises(RanAgainError):
            rootkey.bind_symbols()
    else:
        rootkey.bind_symbols()


@pytest.mark.parametrize(
    ("words", "status"),
    [(["completion", "bash"], 0), (["audit", "tail", "--data-dir", "none"], 2), (["encrypt", "none"], 2)],
)
def test_a_command_without_a_root_key_closes_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Sequence[str], status: int
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "argv", ["minikms", *words, rootkey.FLAG, str(reading)])
    try:
        with pytest.raises(SystemExit) as ended:
            command.run()
        assert (ended.value.code, rootkey.FLAG in capsys.readouterr().err) == (status, False)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(reading)
    finally:
        os.close(writing)
