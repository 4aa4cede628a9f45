"""A certificate authority of the tests: a root, an intermediate CA below it, and what they issue.

Owns: making certificates and revocation lists of every kind, good and bad. Everything is valid from an hour ago unless
a test says otherwise.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = datetime.timedelta(hours=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def replace(path: Path, content: bytes, mode: int = 0o644, group: int = -1) -> None:
    """Write a file as an operator should: beside it, then renamed."""
    new = path.with_name(f"{path.name}.new")
    new.touch(0o600)
    new.write_bytes(content)
    os.chown(new, -1, group)
    new.chmod(mode)
    new.rename(path)


class Issued(NamedTuple):
    """A certificate with its chain, and its key, in PEM."""

    certificate: x509.Certificate
    chain: bytes
    key: bytes

    @property
    def thumbprint(self) -> bytes:
        return hashlib.sha256(self.certificate.public_bytes(Encoding.DER)).digest()

    def write(self, directory: Path, name: str = "client") -> tuple[Path, Path]:
        """The files of certificate and key."""
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        replace(cert, self.chain)
        replace(key, self.key, 0o600)
        return cert, key


class Authority:
    """A CA. `path`: its own certificate and those above it, without the root."""

    def __init__(self, name: str, parent: Authority | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer, issuer = (self.key, self.name) if parent is None else (parent.key, parent.name)
        builder = (
            _builder(self.name, issuer, self.key, now() - HOUR, now() + 24 * HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
        )
        if parent is not None:
            builder = builder.add_extension(_issued_by(parent.key), critical=False)
        self.certificate = builder.sign(signer, hashes.SHA256())
        self.path: list[x509.Certificate] = [] if parent is None else [self.certificate, *parent.path]

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def below(self, name: str) -> Authority:
        return Authority(name, self)

    def issue(
        self,
        *,
        uris: Iterable[str] = (),
        dns: Iterable[str] = (),
        starts: datetime.timedelta = -HOUR,
        ends: datetime.timedelta = 12 * HOUR,
        extended: Sequence[x509.ObjectIdentifier] = (CLIENT,),
        usage: Sequence[str] = ("digital_signature",),
    ) -> Issued:
        """A certificate of an end-entity. `starts` and `ends` count from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(name) for name in dns]
        builder = (
            _builder(x509.Name([]), self.name, key, now() + starts, now() + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(*usage), critical=True)
            .add_extension(_issued_by(self.key), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        if extended:
            builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        chain = b"".join(one.public_bytes(Encoding.PEM) for one in (certificate, *self.path))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Issued(certificate, chain, pem)

    def crl(self, *revoked: Issued | Self, ends: datetime.timedelta = 12 * HOUR) -> bytes:
        """A revocation list in PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now() - HOUR)
            .next_update(now() + ends)
            .add_extension(_issued_by(self.key), critical=False)
            .add_extension(x509.CRLNumber(1), critical=False)
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(one.certificate.serial_number)
                .revocation_date(now() - HOUR)
                .build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    starts: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
    )


def _issued_by(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(*named: str) -> x509.KeyUsage:
    kinds = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{kind: kind in named for kind in kinds})
