"""Which commands run again with their symbols bound."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pytest

from minikms.cli import rootkey


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
