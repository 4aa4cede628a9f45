"""The search behind the demo's claim: it finds a text in whatever form it was written, or says that it could not."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.cli.disksearch import CHUNK_BYTES, TEXT_CHARS_MIN, forms, hexdump, search

SECRET = "violet-heron-0123456789abcdef"


@given(before=st.binary(max_size=50), text=st.text(min_size=TEXT_CHARS_MIN, max_size=40), after=st.binary(max_size=50))
def test_a_text_inside_base64_or_hex_is_found_whatever_surrounds_it(before: bytes, text: str, after: bytes) -> None:
    around = before + text.encode() + after
    for written in (around, around.hex().encode(), around.hex().upper().encode(), base64.b64encode(around)):
        assert any(form in written for form in forms(text))


@given(noise=st.binary(max_size=4000))
def test_noise_is_not_taken_for_the_text(noise: bytes) -> None:
    assert not any(form in written for form in forms(SECRET) for written in (noise, base64.b64encode(noise)))


def test_a_text_too_short_to_be_searched_for_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        forms("short")


@pytest.mark.parametrize(
    "offset", [0, CHUNK_BYTES - 1, CHUNK_BYTES - len(SECRET) + 1, CHUNK_BYTES, 2 * CHUNK_BYTES - 5]
)
def test_a_text_across_the_pieces_in_which_a_file_is_read_is_found(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    path.write_bytes(b"\0" * offset + SECRET.encode() + b"\0" * 3)
    found = search(tmp_path, [SECRET, "another text"])
    assert found.hits == [(path, SECRET)]
    assert (found.files, found.size) == (1, offset + len(SECRET) + 3)


def test_every_file_is_counted_once_and_links_are_not_followed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"nothing here")
    (tmp_path / "link").symlink_to("a")
    found = search(tmp_path, [SECRET])
    assert (found.files, found.size, found.hits) == (2, 24, [])


def test_a_directory_that_cannot_be_read_is_an_error_and_not_clean(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        search(tmp_path / "absent", [SECRET])


def test_a_dump_marks_where_the_sealed_part_begins() -> None:
    lines = list(hexdump(b"readable" + os.urandom(30), plain_bytes=8))
    assert lines[0].startswith("0000  72 65 61 64 61 62 6c 65")
    assert [("encrypted" in line) for line in lines] == [True, False, False]
