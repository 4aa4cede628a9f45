"""What a check of a certificate costs, and one that OpenSSL reads and cryptography does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from minikms_gateway import certificates
from minikms_gateway.certificates import Chain, Trust
from minikms_gateway.config import Files, parse_config
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


@pytest.fixture
def trust(tmp_path: Path, lists: list[CountedList]) -> Trust:
    (tmp_path / "ca.pem").write_bytes(ROOT.pem)
    (tmp_path / "ca.crl").write_bytes(ROOT.crl())
    config = parse_config(
        b'version = 1\nlisten = "127.0.0.1:1"\nkms_socket = "/s"\ntls = { cert = "a", key = "b" }\n'
        b'[[client_ca]]\nfile = "ca.pem"\ncrl = "ca.crl"\ntrust_domains = ["prod"]\n',
        "test",
    )
    return Trust(config, Files(tmp_path / "gateway.toml"))


def chain(name: str) -> Chain:
    issued = ROOT.issue(uris=[name])
    return Chain(tuple(one.public_bytes(Encoding.DER) for one in (issued.certificate, ROOT.certificate)), b"")


def test_the_signature_of_a_list_is_verified_once(trust: Trust, lists: list[CountedList]) -> None:
    """That and a search took 70 ms for a list of 8 MB. After new files one turn of the loop checks all connections."""
    for number in range(10):
        assert trust.identity(chain(f"spiffe://prod/{number}"), time.time()).name == f"spiffe://prod/{number}"
    assert [one.verified for one in lists] == [1]


def test_a_certificate_that_is_not_der_is_refused(trust: Trust) -> None:
    good = chain("spiffe://prod/x")
    with pytest.raises(RefusedCertificateError) as refused:
        trust.identity(Chain((b"\x30\x80", *good.certificates[1:]), b""), time.time())
    assert refused.value.reason == "certificate"
