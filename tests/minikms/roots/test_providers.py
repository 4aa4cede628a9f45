"""Sources of root keys as text: which provider each stands for, and that an error never quotes the text."""

import os
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.memory.arena import SecretArena
from minikms.roots.providers import (
    CREDENTIALS_VARIABLE,
    Credential,
    DevelopmentKey,
    KeyDescriptor,
    KeyFile,
    provider_of,
)
from minikms.roots.sources import parse_source


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


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o640])
def test_a_credential_has_the_modes_that_systemd_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """0440 is the mask of an ACL where owner and group are root, so for this test only as root."""
    monkeypatch.setenv(CREDENTIALS_VARIABLE, str(tmp_path))
    (tmp_path / "root.key").write_text("ab" * 32)
    (tmp_path / "root.key").chmod(mode)
    found = provider_of(parse_source("systemd-credential:root.key"))
    assert found == Credential(tmp_path / "root.key") and found.read_paths == (str(tmp_path / "root.key"),)
    own = (tmp_path / "root.key").stat()
    with SecretArena(8) as arena:
        if mode == 0o400 or (mode & 0o437 == 0o400 and (own.st_uid, own.st_gid) == (0, 0)):
            found.read(arena).release()
        else:
            with pytest.raises(StartError, match="can read the root key file"):
                found.read(arena)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/key", "a\0b", "a\nb", "ü", "a" * 256])
def test_a_credential_is_named_without_a_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CREDENTIALS_VARIABLE, "/")
    with pytest.raises(StartError, match="without a path"):
        provider_of(parse_source(f"systemd-credential:{name}"))


def test_without_a_service_manager_there_is_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CREDENTIALS_VARIABLE, raising=False)
    with pytest.raises(StartError, match="set in a service of systemd only"):
        provider_of(parse_source("systemd-credential:root.key"))


@pytest.mark.parametrize("text", ["shares:", "passphrase:", "dev:", "unlock:/s"])
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
