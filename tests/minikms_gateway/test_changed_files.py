"""A file that changes while it is read, or right after a start, is read again."""

from datetime import timedelta
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms_gateway import process
from minikms_gateway.certificates import CertificateTrust
from minikms_gateway.config import Config, GatewayFiles
from minikms_gateway.process import Loader
from tests.harness.certificates import SERVER, Authority, replace

CONFIG = """
version = 1
listen = "127.0.0.1:1"
kms_socket = "/s"
tls = { cert = "server.pem", key = "server.key" }
[[client_ca]]
file = "clients.pem"
trust_domains = ["prod"]
"""


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    authority = Authority("root")
    authority.issue(dns=["gateway.internal"], extended=[SERVER]).write(tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(authority.pem)
    (tmp_path / "gateway.toml").write_text(CONFIG)
    return Loader(tmp_path / "gateway.toml", lambda issuer, why: None)


def test_a_file_that_only_a_changed_configuration_names_is_watched(loader: Loader, tmp_path: Path) -> None:
    """It was refused because of that file, which is mended later."""
    loaded = loader.load()
    replace(tmp_path / "gateway.toml", CONFIG.replace("clients.pem", "others.pem").encode())
    with pytest.raises(StartError):
        loader.load_beside(loaded)
    before = loader.signature(loaded.config)
    replace(tmp_path / "others.pem", Authority("another root").pem)
    assert loader.signature(loaded.config) != before


def test_a_file_that_changes_during_a_load_is_noticed_afterwards(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loader.load()
    assert loader.signature(loaded.config) == loaded.signature

    def read_and_replace(config: Config, files: GatewayFiles) -> CertificateTrust:
        trust = CertificateTrust(config, files)
        replace(tmp_path / "clients.pem", Authority("another root").pem)
        return trust

    monkeypatch.setattr(process, "CertificateTrust", read_and_replace)
    loaded = loader.load()
    assert loader.signature(loaded.config) != loaded.signature


def test_beside_an_expired_certificate_a_revocation_is_taken_up(loader: Loader, tmp_path: Path) -> None:
    """The certificate itself only once the one in use has expired too."""
    running = loader.load()
    Authority("other").issue(dns=["gateway.internal"], ends=-timedelta(seconds=1)).write(tmp_path, "server")
    changed = loader.load_beside(running)
    assert changed.trust is not running.trust
    assert (changed.context, changed.has_expired()) == (running.context, False)
    again = loader.load_beside(changed)
    assert again.context is running.context
    assert loader.load_beside(running._replace(certificate_until=0)).has_expired()
