"""The configuration file of the gateway.

Owns: the format of `gateway.toml` (docs/spec/gateway.md), and what its values may be. Invariant: a member that is
unknown or of another type is refused. It must never open a socket, or keep what a file held.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

import msgspec

from minikms.api.errors import InvalidRequestError, StartError
from minikms.policy.names import parse_name
from minikms.processes.config_file import ConfigFiles, Uid, address, check_socket, parse_toml

CRL_BYTES_MAX: Final = 8 * 1024 * 1024
JWKS_BYTES_MAX: Final = 256 * 1024
CLIENT_CAS_COUNT_MAX: Final = 16
ISSUERS_COUNT_MAX: Final = 16
NAMES_COUNT_MAX: Final = 64
"""Trust domains, or DNS suffixes, of one CA."""

_MOUNT: Final = re.compile(r"(?!(?:sys|auth)\Z)[A-Za-z0-9_-]{1,64}", re.ASCII)

Algorithm = Literal["ES256", "ES384", "ES512", "EdDSA", "Ed25519", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
"""Never one with a shared secret: a verifier of such a token could make one."""
SVID_ALGORITHMS: Final = frozenset({"ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
"""The algorithms that a JWT-SVID may have."""


class Tls(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    cert: str
    key: str


class ClientCa(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A CA whose certificates prove identities: SPIFFE ids of `trust_domains`, and DNS names at or below one of
    `dns_suffixes`. With `crl`, each certificate below the CA needs a valid list of its issuer in that file.
    """

    file: str
    crl: str = ""
    trust_domains: tuple[str, ...] = ()
    dns_suffixes: tuple[str, ...] = ()


class Issuer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who signs tokens. The keys come from `jwks_file`, or from the discovery document of `issuer`, whose TLS
    certificate must lead to `ca`, or to a CA of the machine.
    """

    kind: Literal["oidc", "jwt-svid"]
    audience: str
    algorithms: tuple[Algorithm, ...]
    issuer: str = ""
    trust_domain: str = ""
    ca: str = ""
    jwks_file: str = ""


class TransitSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The transit API of Vault, below `/v1/` and this mount (docs/spec/transit.md)."""

    mount: str = "transit"


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: Literal[1]
    listen: str
    kms_socket: str
    tls: Tls
    kms_server_uids: tuple[Uid, ...] = (0,)
    metrics: str = ""
    client_ca: tuple[ClientCa, ...] = ()
    issuer: tuple[Issuer, ...] = ()
    transit: TransitSection | None = None

    @property
    def fetches_keys(self) -> bool:
        """Whether it opens connections to issuers."""
        return any(not issuer.jwks_file for issuer in self.issuer)

    def fixed(self) -> tuple[object, ...]:
        """The settings that need a restart: its sockets, and whether it may open connections."""
        return self.listen, self.kms_socket, self.kms_server_uids, self.metrics, self.fetches_keys


class GatewayFiles(ConfigFiles):
    """The configuration of the gateway, and the files that it names."""

    def config(self) -> Config:
        return parse_config(self.content(), str(self.config_path))

    def named(self, config: Config) -> list[Path]:
        """Every file that the gateway reads, the configuration itself included."""
        texts = [config.tls.cert, config.tls.key]
        texts += [name for ca in config.client_ca for name in (ca.file, ca.crl) if name]
        texts += [name for issuer in config.issuer for name in (issuer.ca, issuer.jwks_file) if name]
        return [self.config_path, *(self.path(text) for text in texts)]


def parse_config(content: bytes, place: str) -> Config:
    """Parses the configuration; errors call the file `place`."""
    return parse_toml(content, Config, place, _check)


def _check(config: Config) -> None:
    address(config.listen)
    if config.metrics:
        address(config.metrics)
    check_socket(config.kms_socket)
    if not config.kms_server_uids:
        raise StartError("kms_server_uids must name a user")
    if not config.client_ca and not config.issuer:
        raise StartError("without a [[client_ca]] or an [[issuer]] nobody could use the gateway")
    if len(config.client_ca) > CLIENT_CAS_COUNT_MAX or len(config.issuer) > ISSUERS_COUNT_MAX:
        raise StartError(f"there are more than {CLIENT_CAS_COUNT_MAX} CAs or {ISSUERS_COUNT_MAX} issuers")
    if config.transit is not None and _MOUNT.fullmatch(config.transit.mount) is None:
        raise StartError("mount is 1 to 64 of A-Z, a-z, 0-9, '_' and '-', and neither sys nor auth")
    for ca in config.client_ca:
        if not ca.trust_domains and not ca.dns_suffixes:
            raise StartError(f"the CA {ca.file} needs trust_domains or dns_suffixes: it proves nobody")
        if len(ca.trust_domains) > NAMES_COUNT_MAX or len(ca.dns_suffixes) > NAMES_COUNT_MAX:
            raise StartError(f"the CA {ca.file} has more than {NAMES_COUNT_MAX} trust domains or suffixes")
        for domain in ca.trust_domains:
            _check_name(f"spiffe://{domain}/x", "trust_domains", domain)
        for suffix in ca.dns_suffixes:
            _check_name(f"dns:{suffix}", "dns_suffixes", suffix)
    for issuer in config.issuer:
        _check_issuer(issuer)
    names = [issuer.trust_domain or issuer.issuer for issuer in config.issuer]
    if len(set(names)) != len(names):
        raise StartError("two [[issuer]] have the same name")


def _check_issuer(issuer: Issuer) -> None:
    if not issuer.audience or not issuer.algorithms:
        raise StartError("an [[issuer]] needs audience and algorithms")
    if issuer.kind == "oidc":
        if issuer.trust_domain or not issuer.issuer:
            raise StartError("an [[issuer]] of the kind oidc has issuer, and no trust_domain")
    elif not issuer.trust_domain or not (issuer.issuer or issuer.jwks_file):
        raise StartError("an [[issuer]] of the kind jwt-svid has trust_domain, and jwks_file or issuer")
    elif not SVID_ALGORITHMS.issuperset(issuer.algorithms):
        raise StartError(f"a JWT-SVID has one of the algorithms {', '.join(sorted(SVID_ALGORITHMS))}")
    if issuer.trust_domain:
        _check_name(f"spiffe://{issuer.trust_domain}/x", "trust_domain", issuer.trust_domain)
    if issuer.issuer:
        _check_name(f"oidc:{issuer.issuer}|x", "issuer", issuer.issuer)
    if issuer.jwks_file and issuer.ca:
        raise StartError("with jwks_file nothing is fetched, so remove ca")


def _check_name(name: str, member: str, value: str) -> None:
    try:
        parse_name(name)
    except InvalidRequestError as error:
        raise StartError(f"{member}, {value!r}: {error}") from None
