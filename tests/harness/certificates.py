"""A certificate authority of the tests: CAs, intermediate CAs, and certificates of servers and clients.

Owns: keys and certificates in PEM files. Invariants: a pair of files is replaced as a rename for each file, the
certificate last; a name, a time or a use is wrong only where a test asks for it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

HOUR = datetime.timedelta(hours=1)


class Pair(NamedTuple):
    """The files of a certificate (with the intermediate CAs that it needs) and of its key."""

    cert: Path
    key: Path


def server_names(*names: str) -> list[x509.GeneralName]:
    """DNS names, and IP addresses."""
    return [x509.IPAddress(ipaddress.ip_address(name)) if name[-1].isdigit() else x509.DNSName(name) for name in names]


class Authority:
    """A CA. Its own certificate is in the file `file`."""

    def __init__(self, directory: Path, name: str, *, signed_by: Authority | None = None) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        signer = signed_by or self
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            _builder(self._name, signer._name, self._key, now - HOUR, now + 24 * HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(_key_of(signer._key), critical=False)
            .sign(signer._key, hashes.SHA256())
        )
        self._chain: list[x509.Certificate] = [] if signed_by is None else [self.certificate, *signed_by._chain]
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(_pem(self.certificate))

    def issue(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        *,
        begins: datetime.timedelta = -HOUR,
        ends: datetime.timedelta = HOUR,
    ) -> Pair:
        """A certificate for TLS, in NAME.pem and NAME.key; both replace what was there. Times are from now on."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        made = (
            _builder(_name(name), self._name, key, now + begins, now + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_key_of(self._key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        replace(
            pair.key,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        replace(pair.cert, b"".join(_pem(certificate) for certificate in (made, *self._chain)))
        return pair


def replace(path: Path, content: bytes) -> None:
    """As programs replace a file: a new file takes its name."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_of(signer: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
