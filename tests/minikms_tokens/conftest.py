"""A token in this process, and behind p11-kit's server, which can be away."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.harness.hsm import Remote, Token


@pytest.fixture(scope="session")
def token_of_all(tmp_path_factory: pytest.TempPathFactory) -> Token:
    """Only for copies."""
    return Token(tmp_path_factory.mktemp("token"))


@pytest.fixture
def token(tmp_path: Path, token_of_all: Token, monkeypatch: pytest.MonkeyPatch) -> Iterator[Token]:
    pkcs11 = needs.library("pkcs11")

    made = Token(tmp_path, token_of_all)
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    yield made
    pkcs11.unload(made.module)


@pytest.fixture
def remote(token: Token, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    pkcs11 = needs.library("pkcs11")

    made = Remote(token)
    monkeypatch.setenv("P11_KIT_SERVER_ADDRESS", f"unix:path={made.socket}")
    yield made
    made.kill()
    with contextlib.suppress(pkcs11.PKCS11Error):
        pkcs11.unload(made.module)
