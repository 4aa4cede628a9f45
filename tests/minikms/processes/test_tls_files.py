"""The files of a certificate and its key: one sentence for each way in which they do not fit."""

import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from minikms.api.errors import StartError
from minikms.processes.config_file import ConfigFiles
from minikms.processes.tls_files import client_context, load_pair
from tests.harness.certificates import SERVER, Authority, Issued

AUTHORITY = Authority("test root").below("test CA")
GOOD, OTHER = (AUTHORITY.issue(dns=["here.example"], extended=[SERVER]) for _ in range(2))


def with_passphrase(issued: Issued, form: PrivateFormat) -> bytes:
    key = load_pem_private_key(issued.key, None)
    return key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"passphrase"))


BAD = {
    "another key": (GOOD.chain, OTHER.key, "key is not the private key of the certificate"),
    "passphrase, PKCS#8": (GOOD.chain, with_passphrase(GOOD, PrivateFormat.PKCS8), "has a passphrase"),
    "passphrase, OpenSSL": (GOOD.chain, with_passphrase(GOOD, PrivateFormat.TraditionalOpenSSL), "has a passphrase"),
    "no certificate": (b"", GOOD.key, "cert is no certificate in PEM"),
    "a part of a certificate": (GOOD.chain[:200], GOOD.key, "cert is no certificate in PEM, or a part of one"),
    "a part of the chain": (GOOD.chain[:-60], GOOD.key, "cert"),
    "a damaged chain": (GOOD.chain.replace(b"\nMII", b"\nNII"), GOOD.key, "cert"),
    "no key": (GOOD.chain, b"", "key is no private key in PEM"),
    "a part of a key": (GOOD.chain, GOOD.key[:100], "key is no private key in PEM, or a part of one"),
    "exchanged": (GOOD.key, GOOD.chain, "cert is no certificate in PEM"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_pair_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    cert, key, said = BAD[kind]
    (tmp_path / "cert").write_bytes(cert)
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(StartError, match=said):
        load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ConfigFiles(tmp_path / "c"), "cert", "key")


@pytest.mark.parametrize("content", [b"", b"\xff", b"no certificate"])
def test_a_file_without_cas_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ca").write_bytes(content)
    with pytest.raises(StartError, match="is no file of certificates in PEM"):
        client_context(ConfigFiles(tmp_path / "c"), ca="ca")
