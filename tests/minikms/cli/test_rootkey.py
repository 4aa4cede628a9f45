"""Which commands get the root key of the environment."""

import os
import sys
from collections.abc import Sequence

import pytest

from minikms.cli import command, rootkey


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
