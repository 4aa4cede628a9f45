"""A file that changes while it is read, or right after a start, is read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from minikms_gateway import process
from minikms_gateway.certificates import Trust
from minikms_gateway.config import Config, Files
from minikms_gateway.process import Loader
from tests.harness.certificates import SERVER, Authority, replace


def test_a_file_that_changes_during_a_load_is_noticed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority("root")
    authority.issue(dns=["gateway.internal"], extended=[SERVER]).write(tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(authority.pem)
    (tmp_path / "gateway.toml").write_text(
        'version = 1\nlisten = "127.0.0.1:1"\nkms_socket = "/s"\ntls = { cert = "server.pem", key = "server.key" }\n'
        '[[client_ca]]\nfile = "clients.pem"\ntrust_domains = ["prod"]\n'
    )
    loader = Loader(tmp_path / "gateway.toml", lambda issuer, why: None)
    loaded = loader.load()
    assert loader.signature(loaded.config) == loaded.signature

    def read_and_replace(config: Config, files: Files) -> Trust:
        trust = Trust(config, files)
        replace(tmp_path / "clients.pem", Authority("another root").pem)
        return trust

    monkeypatch.setattr(process, "Trust", read_and_replace)
    loaded = loader.load()
    assert loader.signature(loaded.config) != loaded.signature
