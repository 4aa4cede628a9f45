"""The principal of a client's certificate, and whether the certificate still counts.

Owns: the TLS contexts, and the rules for certificates:
1. OpenSSL verifies the chain up to a CA of the configuration, its validity and its purpose, in the handshake, in TLS
   1.3 only, without tickets, so that no session outlives its certificate. Its strict rules for CAs (RFC 5280) hold.
2. The CA is the one nearest to the client's certificate in the verified chain. It limits the identity.
3. The certificate is an end-entity's and signs (digital signature); it is neither a CA's nor signs certificates.
4. Its identity is its only URI SAN, a SPIFFE id of a trust domain of the CA. Without a URI SAN it is its only DNS SAN,
   at or below a suffix of the CA. Anything else is no identity, and nothing falls back to another field.
5. If the CA has a CRL file, each certificate below the CA needs a list there of its issuer, signed by it and in force.
   An expired list refuses all certificates of its issuer.
CRLs are checked here and not by OpenSSL, because OpenSSL checks them in the handshake only, and wants one for each CA
or for none. `CertificateTrust` is one state of the configuration; a session keeps the chain, and is checked again with
each new one. Time is passed in, but for that of the handshake.
"""

from __future__ import annotations

import hashlib
import itertools
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from minikms.api.errors import InvalidRequestError, StartError
from minikms.policy.names import parse_name
from minikms.processes.config_file import PEM_BYTES_MAX
from minikms.processes.tls_files import load_pair
from minikms_gateway.config import CRL_BYTES_MAX, ClientCa, Config, GatewayFiles
from minikms_gateway.reasons import RefusedCertificateError

CRL_ISSUERS_COUNT_MAX: Final = 64
"""Issuers whose list is remembered with its signature verified."""
_SPIFFE: Final = "spiffe://"
_CRL_END: Final = b"-----END X509 CRL-----"
_PARTIAL_CRL_EXTENSIONS: Final = frozenset({ExtensionOID.DELTA_CRL_INDICATOR, ExtensionOID.ISSUING_DISTRIBUTION_POINT})
_KNOWN_CRL_EXTENSIONS: Final = frozenset({ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER})


class Identity(NamedTuple):
    """What a chain proves: a name, until a time in Unix seconds."""

    name: str
    until: float


class CertificateChain(NamedTuple):
    """The certificates of a peer as OpenSSL verified them, DER, the peer's first. `thumbprint`: SHA-256 of that one."""

    certificates: tuple[bytes, ...]
    thumbprint: bytes


class _Crl(NamedTuple):
    """One revocation list, and the serial numbers in it: a search in the list takes time for each of its entries."""

    crl: x509.CertificateRevocationList
    revoked: frozenset[int]


class _Crls:
    """The revocation lists of one CA, by the name of their issuer. A check takes no time for their size, but for the
    first of an issuer, which verifies the signature.
    """

    def __init__(self, content: bytes, place: str) -> None:
        self._by_issuer: dict[bytes, list[_Crl]] = {}
        self._newest = lru_cache(CRL_ISSUERS_COUNT_MAX)(self._find_newest)
        try:
            blocks = [part + _CRL_END for part in content.split(_CRL_END)[:-1]]
            lists = [x509.load_pem_x509_crl(block) for block in blocks]
        except ValueError:
            raise StartError(f"{place} is no file of CRLs in PEM") from None
        if not lists:
            raise StartError(f"{place} holds no CRL in PEM")
        for one in lists:
            if any(_restricts(extension) for extension in _extensions(one, place)):
                raise StartError(f"{place} holds a CRL of a part or of changes; give the whole list")
            self._by_issuer.setdefault(one.issuer.public_bytes(), []).append(
                _Crl(one, frozenset(entry.serial_number for entry in one))
            )

    def _find_newest(self, issuer: x509.Certificate) -> _Crl | None:
        """The newest list that the issuer has signed."""
        signed = [one for one in self._by_issuer.get(issuer.subject.public_bytes(), ()) if _signed(one.crl, issuer)]
        return max(signed, key=lambda one: one.crl.last_update_utc, default=None)

    def check(self, certificate: x509.Certificate, issuer: x509.Certificate, now: float) -> float:
        """Until when the list of the issuer is in force. Raises RefusedCertificateError."""
        newest = self._newest(issuer)
        if newest is None:
            raise RefusedCertificateError("crl_missing")
        if certificate.serial_number in newest.revoked:
            raise RefusedCertificateError("revoked")
        until = newest.crl.next_update_utc
        if until is None or not newest.crl.last_update_utc.timestamp() <= now < until.timestamp():
            raise RefusedCertificateError("crl_expired")
        return until.timestamp()

    def until(self) -> float:
        """When the first of the lists expires; 0 if one says not when."""
        ends = [one.crl.next_update_utc for lists in self._by_issuer.values() for one in lists]
        return min(0.0 if end is None else end.timestamp() for end in ends)


class _Authority(NamedTuple):
    trust_domains: frozenset[str]
    dns_suffixes: tuple[str, ...]
    crls: _Crls | None


class CertificateTrust:
    """The CAs whose certificates are accepted, in one state of the configuration. `cas`: their certificates in PEM."""

    def __init__(self, config: Config, files: GatewayFiles) -> None:
        """Blocks on the disk. Raises StartError."""
        self._authorities: dict[bytes, _Authority] = {}
        self.cas = ""
        for ca in config.client_ca:
            self._add(ca, files)

    def _add(self, ca: ClientCa, files: GatewayFiles) -> None:
        try:
            certificates = x509.load_pem_x509_certificates(files.read(ca.file, "file of CAs", PEM_BYTES_MAX))
        except ValueError:
            raise StartError(f"{files.path(ca.file)} is no file of certificates in PEM") from None
        crls = None
        if ca.crl:
            crls = _Crls(files.read(ca.crl, "file of CRLs", CRL_BYTES_MAX), str(files.path(ca.crl)))
        authority = _Authority(frozenset(ca.trust_domains), ca.dns_suffixes, crls)
        for certificate in certificates:
            der = certificate.public_bytes(Encoding.DER)
            if der in self._authorities:
                raise StartError(f"a certificate in {files.path(ca.file)} is in two places: name each CA once")
            self._authorities[der] = authority
            self.cas += certificate.public_bytes(Encoding.PEM).decode("ascii")

    def crl_until(self) -> float | None:
        """When the first CRL expires, in Unix seconds; None without one."""
        ends = [one.crls.until() for one in self._authorities.values() if one.crls is not None]
        return min(ends) if ends else None

    def identity(self, chain: CertificateChain, now: float) -> Identity:
        certificates = chain.certificates
        index = next((i for i, der in enumerate(certificates) if i and der in self._authorities), None)
        if index is None:
            raise RefusedCertificateError("unknown_ca")
        authority = self._authorities[certificates[index]]
        try:
            path = [x509.load_der_x509_certificate(der) for der in certificates[: index + 1]]
        except (ValueError, x509.InvalidVersion):  # OpenSSL reads what is not quite DER
            raise RefusedCertificateError("certificate") from None
        until = min(one.not_valid_after_utc.timestamp() for one in path)
        if not now < until:
            raise RefusedCertificateError("expired")
        if now < max(one.not_valid_before_utc.timestamp() for one in path):
            raise RefusedCertificateError("not_yet_valid")
        if authority.crls is not None:
            for certificate, issuer in itertools.pairwise(path):
                until = min(until, authority.crls.check(certificate, issuer, now))
        return Identity(_name(path[0], authority), until)


def chain_of(tls: ssl.SSLObject) -> CertificateChain | None:
    """The verified chain of a peer after the handshake; None if it showed no certificate."""
    own = tls.getpeercert(binary_form=True)
    if own is None:
        return None
    verified = getattr(tls, "get_verified_chain", None)
    if verified is not None:
        certificates = tuple(cast("Callable[[], list[bytes]]", verified)())
    else:  # before Python 3.13 the method has no public name
        chain = cast("ssl.SSLSocket", tls)._sslobj.get_verified_chain()  # type: ignore[attr-defined]  # as said
        certificates = tuple(ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in chain)
    return CertificateChain(certificates, hashlib.sha256(own).digest())


def server_context(config: Config, files: GatewayFiles, trust: CertificateTrust) -> tuple[ssl.SSLContext, float]:
    """A context with the gateway's own certificate, for clients of `trust`, and when that certificate expires. Blocks
    on the disk. Raises StartError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    if trust.cas:
        # Without a certificate a token must prove the caller: where there are no issuers, it ends in the handshake.
        context.verify_mode = ssl.CERT_OPTIONAL if config.issuer else ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=trust.cas)
    own = load_pair(context, files, config.tls.cert, config.tls.key)
    return context, own.not_valid_after_utc.timestamp()


def _extensions(crl: x509.CertificateRevocationList, place: str) -> x509.Extensions:
    try:
        return crl.extensions
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise StartError(f"{place} holds a CRL with a damaged extension") from None


def _restricts(extension: x509.Extension[x509.ExtensionType]) -> bool:
    """Whether a list with this extension is not known to be whole: RFC 5280 wants it critical, some CAs do not."""
    if extension.oid in _PARTIAL_CRL_EXTENSIONS:
        return True
    return extension.critical and extension.oid not in _KNOWN_CRL_EXTENSIONS


def _signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Whether the issuer signed the list, and may."""
    try:
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        return usage.crl_sign and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # refused below
    except x509.ExtensionNotFound:
        return False
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False


def _name(certificate: x509.Certificate, authority: _Authority) -> str:
    """The principal. Raises RefusedCertificateError."""
    try:
        extensions = certificate.extensions
        _check_usage(extensions)
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        hosts = names.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        raise RefusedCertificateError("name") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise RefusedCertificateError("name") from None
    if uris:
        if len(uris) != 1:
            raise RefusedCertificateError("uri_sans")
        name = _checked(uris[0], "spiffe")
        if name[len(_SPIFFE) :].partition("/")[0] not in authority.trust_domains:
            raise RefusedCertificateError("trust_domain")
        return name
    if len(hosts) != 1:
        raise RefusedCertificateError("dns_sans" if hosts else "name")
    name = _checked(f"dns:{hosts[0]}", "dns")
    if not any(hosts[0] == suffix or hosts[0].endswith(f".{suffix}") for suffix in authority.dns_suffixes):
        raise RefusedCertificateError("dns_suffix")
    return name


def _checked(text: str, scheme: str) -> str:
    try:
        name = parse_name(text)
    except InvalidRequestError:
        raise RefusedCertificateError("name") from None
    if name.scheme != scheme:
        raise RefusedCertificateError("name")
    return name.text


def _check_usage(extensions: x509.Extensions) -> None:
    """Checks the extensions as an X509-SVID needs them, for every client certificate. Raises RefusedCertificateError,
    and ExtensionNotFound.
    """
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise RefusedCertificateError("usage")
    except x509.ExtensionNotFound:
        pass
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise RefusedCertificateError("usage") from None
    if not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
        raise RefusedCertificateError("usage")
