"""The configuration file of the auditor.

Owns: the format of `auditor.toml` (docs/spec/tree.md), and what its values may be. Invariant: a member that is unknown
or of another type is refused. It must never open a socket.
"""

from __future__ import annotations

import re
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec

from minikms import api
from minikms.api.errors import StartError
from minikms.audit.chain import PUBLIC_KEY_BYTES
from minikms.audit.note import TYPE_COSIGNATURE, NoteError, VerifierKey, is_name, parse_vkey
from minikms.base64 import decode_exact
from minikms.config_file import ConfigFiles, check_metrics, parse_toml

WITNESSES_COUNT_MAX: Final = 16
SIGNERS_COUNT_MAX: Final = 2
RESUBMIT_SECONDS: Final = 300
RESUBMIT_SECONDS_MAX: Final = 24 * 3600
FILE_SCHEME: Final = "file:"
_SIGNER_SCHEMES: Final = (FILE_SCHEME, "pkcs11:", "aws-kms:")
TOKEN_PATHS_COUNT_MAX: Final = 16
_URL: Final = re.compile(r"https?://[!-~]+", re.ASCII)


class Witness(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """url: its submission prefix. key: its verifier key. ca: of its TLS certificate, if not one of the machine."""

    url: str
    key: str
    ca: str = ""

    @property
    def verifier(self) -> VerifierKey:
        """Raises NoteError."""
        return parse_vkey(self.key, (TYPE_COSIGNATURE,))


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """token_paths: what the library of a token or a cloud reads and writes while the auditor runs."""

    version: Literal[1]
    origin: str
    kms_socket: str
    log_dir: str
    state_dir: str
    signers: tuple[str, ...]
    token_paths: tuple[str, ...] = ()
    public_keys: tuple[str, ...] = ()
    kms_server_uids: tuple[int, ...] = (0,)
    metrics: str = ""
    witness: tuple[Witness, ...] = ()
    quorum: int = 0
    resubmit_seconds: int = RESUBMIT_SECONDS

    @property
    def trusted_keys(self) -> frozenset[bytes]:
        """The public keys that a log may begin with."""
        return frozenset(decode_exact(text, PUBLIC_KEY_BYTES) or b"" for text in self.public_keys)


class Files(ConfigFiles):
    """The configuration of the auditor, and the files that it names."""

    def config(self) -> Config:
        """With absolute paths of what the auditor opens. Raises StartError."""
        config = parse_config(self.content(), str(self.config_path))
        places = {name: str(self.path(getattr(config, name))) for name in ("kms_socket", "log_dir", "state_dir")}
        tokens = tuple(str(self.path(each)) for each in config.token_paths)
        return msgspec.structs.replace(config, **places, token_paths=tokens)


def parse_config(content: bytes, place: str) -> Config:
    """Raises StartError, which calls the file `place`."""
    config = parse_toml(content, Config, place)
    try:
        _check(config)
    except (StartError, NoteError) as error:
        raise StartError(f"{place}: {error}") from None
    return config


def _check(config: Config) -> None:
    if api.ORIGIN_PATTERN.fullmatch(config.origin) is None or not is_name(config.origin):
        raise StartError("origin is 1 to 128 characters of A-Z, a-z, 0-9 and ._/:-, such as kms.example.com/audit")
    check_metrics(config.metrics)
    if not config.kms_server_uids:
        raise StartError("kms_server_uids must name a user")
    if not 0 < len(config.signers) <= SIGNERS_COUNT_MAX:
        raise StartError("signers has the signer of every tree checkpoint (Ed25519), and may have a second one")
    if not all(uri.startswith(_SIGNER_SCHEMES) for uri in config.signers):
        raise StartError("a signer is file:PATH, pkcs11:… or aws-kms:ARN")
    if len(config.token_paths) > TOKEN_PATHS_COUNT_MAX:
        raise StartError(f"there are more than {TOKEN_PATHS_COUNT_MAX} token_paths")
    if b"" in config.trusted_keys:
        raise StartError(
            "public_keys are those of the audit log: 44 characters of base64, as `minikms init` shows them"
        )
    if not 1 <= config.resubmit_seconds <= RESUBMIT_SECONDS_MAX:
        raise StartError(f"resubmit_seconds is 1 to {RESUBMIT_SECONDS_MAX}")
    if len(config.witness) > WITNESSES_COUNT_MAX:
        raise StartError(f"there are more than {WITNESSES_COUNT_MAX} witnesses")
    keys = {witness.verifier.public_key for witness in config.witness}
    if len(keys) != len(config.witness):
        raise StartError("two witnesses have the same key, so one would count twice")
    if not (1 if config.witness else 0) <= config.quorum <= len(config.witness):
        raise StartError(f"quorum is 1 to the number of witnesses, {len(config.witness)}; 0 without any")
    for witness in config.witness:
        if not _is_prefix(witness.url):
            raise StartError(f"{witness.url!r} is no URL of a witness, such as https://witness.example.com/w1")
        if witness.ca and not witness.url.startswith("https:"):
            raise StartError(f"the witness {witness.url} has no TLS, so remove ca")


def _is_prefix(url: str) -> bool:
    """Whether this can be the submission prefix of a witness."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    more = parts.username is not None or parts.query or parts.fragment
    return _URL.fullmatch(url) is not None and bool(parts.hostname) and port != 0 and not more
