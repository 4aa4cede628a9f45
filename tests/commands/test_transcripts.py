"""The commands say, word for word, what their transcripts say, and end as they end there."""

import pytest

from tests import needs
from tests.commands.transcript import DIRECTORY, replayed

NAMES = sorted(path.stem for path in DIRECTORY.glob("*.txt"))


def test_there_are_transcripts() -> None:
    assert "first-steps" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_transcript_is_what_happens(name: str) -> None:
    needs.program("openssl")
    text = (DIRECTORY / f"{name}.txt").read_text("utf-8")
    assert replayed(text) == text
