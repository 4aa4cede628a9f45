"""Sources of root keys as text: which provider each stands for, and that an error never quotes the text."""

import os
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.roots.providers import DevelopmentKey, KeyDescriptor, KeyFile, parse_source, provider_of


def test_each_source_stands_for_its_provider() -> None:
    assert provider_of(parse_source("file:/a/b:c")) == KeyFile(Path("/a/b:c"))
    assert provider_of(parse_source("fd:7")) == KeyDescriptor(7)
    assert provider_of(parse_source("dev:"), data_dir="/d") == DevelopmentKey("/d")


@pytest.mark.parametrize("text", ["", "ab" * 32, "file", "vault:x", "FILE:/a", ":", "/etc/key"])
def test_a_text_that_is_no_source_is_never_quoted(text: str) -> None:
    """It could be a key that was given by mistake."""
    with pytest.raises(StartError, match="never given on the command line") as refused:
        parse_source(text)
    assert len(text) < 5 or text not in str(refused.value)


@pytest.mark.parametrize("text", ["file:", "fd:", "fd:x", "fd:-1", "fd:²", "fd:99999999999999999999", "dev:x"])
def test_an_incomplete_source_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(StartError, match="is not complete"):
        provider_of(parse_source(text))


def test_a_descriptor_with_thousands_of_digits_is_refused_like_any_other() -> None:
    with pytest.raises(StartError, match="is not complete"):
        provider_of(parse_source("fd:" + "1" * 5000))


@pytest.mark.parametrize("text", ["shares:", "passphrase:", "dev:"])
def test_a_source_that_asks_people_is_refused_where_nobody_is_asked(text: str) -> None:
    with pytest.raises(StartError, match="takes no root key from"):
        provider_of(parse_source(text))


def test_a_descriptor_that_is_discarded_is_closed() -> None:
    """Nobody can read the root key from it after that."""
    reads, writes = os.pipe()
    try:
        KeyDescriptor(reads).discard()
        with pytest.raises(BrokenPipeError):
            os.write(writes, b"0")
        KeyDescriptor(reads).discard()
    finally:
        os.close(writes)
