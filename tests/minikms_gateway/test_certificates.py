"""What a check of a certificate costs, and one that OpenSSL reads and cryptography does not."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from minikms.api.errors import StartError
from minikms_gateway import certificates
from minikms_gateway.certificates import CertificateChain, CertificateTrust
from minikms_gateway.config import GatewayFiles, parse_config
from minikms_gateway.reasons import RefusedCertificateError
from tests.harness.certificates import Authority

ROOT = Authority("test root")


class CountedList:
    """A list of revocations that counts how often its signature is verified."""

    def __init__(self, content: bytes) -> None:
        self.crl = x509.load_pem_x509_crl(content)
        self.verified = 0

    def __getattr__(self, name: str) -> Any:
        self.verified += name == "is_signature_valid"
        return getattr(self.crl, name)

    def __iter__(self) -> Iterator[x509.RevokedCertificate]:
        return iter(self.crl)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[CountedList]:
    """Those that were read."""
    read: list[CountedList] = []

    class Reader:
        """In the place of the module."""

        def __getattr__(self, name: str) -> Any:
            return getattr(x509, name)

        def load_pem_x509_crl(self, content: bytes) -> CountedList:
            read.append(CountedList(content))
            return read[-1]

    monkeypatch.setattr(certificates, "x509", Reader())
    return read


CONFIG = b"""
version = 1
listen = "127.0.0.1:1"
kms_socket = "/s"
tls = { cert = "a", key = "b" }
[[client_ca]]
file = "ca.pem"
crl = "ca.crl"
trust_domains = ["prod"]
"""


@pytest.fixture
def trust(tmp_path: Path, lists: list[CountedList]) -> CertificateTrust:
    (tmp_path / "ca.pem").write_bytes(ROOT.pem)
    (tmp_path / "ca.crl").write_bytes(ROOT.crl())
    return CertificateTrust(parse_config(CONFIG, "test"), GatewayFiles(tmp_path / "gateway.toml"))


def chain(name: str) -> CertificateChain:
    issued = ROOT.issue(uris=[name])
    return CertificateChain(
        tuple(one.public_bytes(Encoding.DER) for one in (issued.certificate, ROOT.certificate)), b""
    )


def test_the_signature_of_a_list_is_verified_once(trust: CertificateTrust, lists: list[CountedList]) -> None:
    """That and a search took 70 ms for a list of 8 MB. After new files one turn of the loop checks all connections."""
    for number in range(10):
        assert trust.identity(chain(f"spiffe://prod/{number}"), time.time()).name == f"spiffe://prod/{number}"
    assert [one.verified for one in lists] == [1]


@pytest.mark.parametrize("critical", [True, False])
@pytest.mark.parametrize(
    "partial",
    [x509.DeltaCRLIndicator(1), x509.IssuingDistributionPoint(None, None, False, True, None, False, False)],
    ids=["changes", "CAs only"],
)
def test_a_list_of_a_part_or_of_changes_is_refused(
    tmp_path: Path, partial: x509.ExtensionType, *, critical: bool
) -> None:
    """Also if its CA has not made the extension critical."""
    crl = x509.load_pem_x509_crl(ROOT.crl())
    builder = x509.CertificateRevocationListBuilder(crl.issuer, crl.last_update_utc, crl.next_update_utc).add_extension(
        partial, critical
    )
    (tmp_path / "ca.crl").write_bytes(builder.sign(ROOT.key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (tmp_path / "ca.pem").write_bytes(ROOT.pem)
    with pytest.raises(StartError, match="of a part or of changes"):
        CertificateTrust(parse_config(CONFIG, "test"), GatewayFiles(tmp_path / "gateway.toml"))


def test_a_certificate_that_is_not_der_is_refused(trust: CertificateTrust) -> None:
    good = chain("spiffe://prod/x")
    with pytest.raises(RefusedCertificateError) as refused:
        trust.identity(CertificateChain((b"\x30\x80", *good.certificates[1:]), b""), time.time())
    assert refused.value.reason == "certificate"
