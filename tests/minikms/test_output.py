"""How commands show results."""

from __future__ import annotations

import json

import pytest

from minikms import output


def test_a_result_that_names_a_file_whose_name_is_no_text_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Python has such a name with lone surrogates (PEP 383)."""
    output.print_json({"backup": "/backups/\udcff", "key": b"\x00"})
    assert json.loads(capsys.readouterr().out) == {"backup": "/backups/\udcff", "key": "AA=="}


def test_a_result_in_text_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """`progressdb check` names keys that somebody else may have written into the database."""
    output.print_result({}, ("damaged: job:\x1b[2J\udcff: why", "two\nlines"), json=False)
    assert capsys.readouterr().out == "damaged: job:?[2J?: why\ntwo\nlines\n"
