"""Keys in tokens, devices and clouds that sign, or wrap a root key, behind two interfaces.

Owns: the choice of a kind of key by its URI, sessions with tokens and cloud services, their time limits, and how they
are opened again. Invariants: a signature is verified before it is given out; a token that is away raises TokenError,
and a later call connects again; no call waits longer than its limit; a PIN is read from a file, and is in no error,
log, argument or repr. A library of a provider is loaded here and nowhere else of the project, and never in the key
process: `minikms` imports nothing of this package. It must never make, export or delete a key.

    open_signer("pkcs11:token=log;object=tree?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/pin")
    open_signer("aws-kms:arn:aws:kms:eu-central-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab")
"""

from __future__ import annotations

from minikms_tokens.signing import Algorithm, Signer, TokenError
from minikms_tokens.wrapping import AwayError, UnwrapRefusedError, Wrapper

__all__ = [
    "Algorithm",
    "AwayError",
    "Signer",
    "TokenError",
    "UnwrapRefusedError",
    "Wrapper",
    "open_signer",
    "open_wrapper",
]


def open_signer(uri: str) -> Signer:
    """The key that `uri` names: `pkcs11:…` (RFC 7512) or `aws-kms:ARN`. Nothing is connected before the first call.

    Raises TokenError for a URI of another form, and where the library for it is not installed.
    """
    scheme = uri.partition(":")[0]
    if scheme == "pkcs11":
        from minikms_tokens.pkcs11_token import Pkcs11Signer

        return Pkcs11Signer(uri)
    if scheme == "aws-kms":
        from minikms_tokens.aws_kms import AwsKmsSigner

        return AwsKmsSigner(uri)
    raise TokenError("a signing key is named by pkcs11:… or aws-kms:ARN")


def open_wrapper(source: str) -> Wrapper:
    """The wrapping key that `source` names. Nothing is connected before the first call.

    Raises TokenError for a source of another form, and where a library or program for it is not installed.
    """
    scheme = source.partition(":")[0]
    if scheme == "pkcs11":
        from minikms_tokens.pkcs11_token import Pkcs11Wrapper

        return Pkcs11Wrapper(source)
    if scheme == "tpm2":
        from minikms_tokens.tpm2 import Tpm2Wrapper

        return Tpm2Wrapper(source)
    if scheme == "aws-kms":
        from minikms_tokens.aws_kms import AwsKmsWrapper

        return AwsKmsWrapper(source)
    if scheme == "vault-transit":
        from minikms_tokens.vault_transit import VaultTransitWrapper

        return VaultTransitWrapper(source)
    if scheme == "clevis":
        from minikms_tokens.clevis import ClevisWrapper

        return ClevisWrapper(source)
    raise TokenError("a wrapping key is named by pkcs11:…, tpm2:, aws-kms:ARN, vault-transit:https://… or clevis:FILE")
