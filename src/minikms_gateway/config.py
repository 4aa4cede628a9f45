"""The configuration file of the gateway.

Owns: the format of `gateway.toml` (docs/spec/gateway.md), what its values may be, and how it and the files that it
names are read: as policy files are, so that nobody but root and the gateway's own user can have written them.
Invariants: a member that is unknown or of another type is refused; paths are relative to the directory of the file. It
must never open a socket, or keep what a file held.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Final, Literal

import msgspec

from minikms.api.errors import InvalidRequestError, StartError
from minikms.policy.names import parse_name
from minikms.trusted_file import ROOT_UID, read_trusted

CONFIG_BYTES_MAX: Final = 64 * 1024
LINE_DOTS_MAX: Final = 256
"""As in a policy file: for a key of n parts the parser takes n^2 steps."""
PEM_BYTES_MAX: Final = 256 * 1024
CRL_BYTES_MAX: Final = 8 * 1024 * 1024
JWKS_BYTES_MAX: Final = 256 * 1024
CLIENT_CAS_COUNT_MAX: Final = 16
ISSUERS_COUNT_MAX: Final = 16
NAMES_COUNT_MAX: Final = 64
"""Trust domains, or DNS suffixes, of one CA."""

Algorithm = Literal["ES256", "ES384", "ES512", "EdDSA", "Ed25519", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
"""Never one with a shared secret: whoever can verify such a token could make one."""
SVID_ALGORITHMS: Final = frozenset({"ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
"""Those that a JWT-SVID may have."""
_ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", re.ASCII)


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


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    version: Literal[1]
    listen: str
    kms_socket: str
    tls: Tls
    kms_server_uids: tuple[int, ...] = (0,)
    metrics: str = ""
    client_ca: tuple[ClientCa, ...] = ()
    issuer: tuple[Issuer, ...] = ()

    @property
    def fetches_keys(self) -> bool:
        """Whether it opens connections to issuers."""
        return any(not issuer.jwks_file for issuer in self.issuer)

    def fixed(self) -> tuple[object, ...]:
        """What a running process can't take up: its sockets, and whether it may open connections."""
        return self.listen, self.kms_socket, self.kms_server_uids, self.metrics, self.fetches_keys


class Files:
    """The files of a configuration. All paths are made absolute by `path`."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path.absolute()

    def path(self, text: str) -> Path:
        return self.config_path.parent / text

    def config(self) -> Config:
        """Raises StartError."""
        return parse_config(self._read(self.config_path, "configuration", CONFIG_BYTES_MAX), str(self.config_path))

    def read(self, text: str, what: str, bytes_max: int) -> bytes:
        """The content of a file that the configuration names. Raises StartError."""
        return self._read(self.path(text), what, bytes_max)

    def check_private(self, text: str) -> None:
        """Raises StartError unless only its owner, root or the gateway's group can read the file of the private key."""
        path = self.path(text)
        self._read(path, "private key", PEM_BYTES_MAX)
        if path.stat().st_mode & stat.S_IRWXO:
            raise StartError(f"other users can read the private key {path}: chmod o-rwx it")

    def named(self, config: Config) -> list[Path]:
        """Every file that the gateway reads, the configuration itself included."""
        texts = [config.tls.cert, config.tls.key]
        texts += [name for ca in config.client_ca for name in (ca.file, ca.crl) if name]
        texts += [name for issuer in config.issuer for name in (issuer.ca, issuer.jwks_file) if name]
        return [self.config_path, *(self.path(text) for text in texts)]

    def _read(self, path: Path, what: str, bytes_max: int) -> bytes:
        content = read_trusted(path, (ROOT_UID, os.geteuid()), what=what, bytes_max=bytes_max)
        if len(content) > bytes_max:
            raise StartError(f"the {what} {path} is larger than {bytes_max} bytes")
        return content


def parse_config(content: bytes, place: str) -> Config:
    """Raises StartError, which calls the file `place`."""
    try:
        text = content.decode("utf-8")
        if any(line.count(".") > LINE_DOTS_MAX for line in text.splitlines()):
            raise StartError(f"{place}: a line has more than {LINE_DOTS_MAX} dots")
        config = msgspec.convert(tomllib.loads(text), Config, strict=True)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise StartError(f"{place} is not TOML in UTF-8: {error}") from None
    except msgspec.ValidationError as error:
        raise StartError(f"{place}: {error}") from None
    _check(config, place)
    return config


def address(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8443` or `[::1]:8443`. Raises StartError."""
    wrong = StartError(f"{text!r} is no address and port, such as 127.0.0.1:8443 or [::1]:8443")
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise wrong
    try:
        return str(ipaddress.ip_address(match[1] or match[2])), int(match[3])
    except ValueError:
        raise wrong from None


def _check(config: Config, place: str) -> None:
    address(config.listen)
    if config.metrics and not ipaddress.ip_address(address(config.metrics)[0]).is_loopback:
        raise StartError(f"{place}: metrics must be an address of this host, such as 127.0.0.1:9103")
    if not config.kms_server_uids:
        raise StartError(f"{place}: kms_server_uids must name a user")
    if not config.client_ca and not config.issuer:
        raise StartError(f"{place} has neither a [[client_ca]] nor an [[issuer]], so nobody could use the gateway")
    if len(config.client_ca) > CLIENT_CAS_COUNT_MAX or len(config.issuer) > ISSUERS_COUNT_MAX:
        raise StartError(f"{place} has more than {CLIENT_CAS_COUNT_MAX} CAs or {ISSUERS_COUNT_MAX} issuers")
    for ca in config.client_ca:
        if not ca.trust_domains and not ca.dns_suffixes:
            raise StartError(f"{place}: the CA {ca.file} needs trust_domains or dns_suffixes: it proves nobody")
        if len(ca.trust_domains) > NAMES_COUNT_MAX or len(ca.dns_suffixes) > NAMES_COUNT_MAX:
            raise StartError(f"{place}: the CA {ca.file} has more than {NAMES_COUNT_MAX} trust domains or suffixes")
        for domain in ca.trust_domains:
            _check_name(f"spiffe://{domain}/x", place, "trust_domains", domain)
        for suffix in ca.dns_suffixes:
            _check_name(f"dns:{suffix}", place, "dns_suffixes", suffix)
    for issuer in config.issuer:
        _check_issuer(issuer, place)
    names = [issuer.trust_domain or issuer.issuer for issuer in config.issuer]
    if len(set(names)) != len(names):
        raise StartError(f"{place}: two [[issuer]] have the same name")


def _check_issuer(issuer: Issuer, place: str) -> None:
    if not issuer.audience or not issuer.algorithms:
        raise StartError(f"{place}: an [[issuer]] needs audience and algorithms")
    if issuer.kind == "oidc":
        if issuer.trust_domain or not issuer.issuer:
            raise StartError(f"{place}: an [[issuer]] of the kind oidc has issuer, and no trust_domain")
    elif not issuer.trust_domain or not (issuer.issuer or issuer.jwks_file):
        raise StartError(f"{place}: an [[issuer]] of the kind jwt-svid has trust_domain, and jwks_file or issuer")
    elif not SVID_ALGORITHMS.issuperset(issuer.algorithms):
        raise StartError(f"{place}: a JWT-SVID has one of the algorithms {', '.join(sorted(SVID_ALGORITHMS))}")
    if issuer.trust_domain:
        _check_name(f"spiffe://{issuer.trust_domain}/x", place, "trust_domain", issuer.trust_domain)
    if issuer.issuer:
        _check_name(f"oidc:{issuer.issuer}|x", place, "issuer", issuer.issuer)
    if issuer.jwks_file and issuer.ca:
        raise StartError(f"{place}: with jwks_file nothing is fetched, so remove ca")


def _check_name(name: str, place: str, member: str, value: str) -> None:
    try:
        parse_name(name)
    except InvalidRequestError as error:
        raise StartError(f"{place}, {member}, {value!r}: {error}") from None
