"""How commands show results."""

import json

import pytest

from minikms.commands import output, usage


def test_a_result_that_names_a_file_whose_name_is_no_text_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Python has such a name with lone surrogates (PEP 383)."""
    output.print_json({"backup": "/backups/\udcff", "key": b"\x00"})
    assert json.loads(capsys.readouterr().out) == {"backup": "/backups/\udcff", "key": "AA=="}


def test_a_result_in_text_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """`progressdb check` names keys that somebody else may have written into the database."""
    output.print_result({}, ("damaged: job:\x1b[2J\udcff: why", "job:\nall is well"), json=False)
    output.print_result({}, "two\nlines", json=False)
    assert capsys.readouterr().out == "damaged: job:?[2J?: why\njob:?all is well\ntwo\nlines\n"


def test_the_sentence_of_an_error_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """It may name a file, or quote a peer."""

    def command() -> None:
        raise OSError(2, "No such file", "\x1b]0;owned\x07\r")

    with pytest.raises(SystemExit):
        usage.run("minikms", command, lambda error: (usage.explained_system(error, "minikms"), 2))
    assert capsys.readouterr().err == "minikms: No such file: ?]0;owned??\n"
