"""TLS contexts from the files that a configuration names.

Owns: which CAs a client of the gateway's or the auditor's trusts, and the sentence for each way in which a certificate
and its private key do not fit. Invariants: a context of a client always verifies a certificate with its name; a private
key that other users can read, or that needs a passphrase, is refused.
"""

from __future__ import annotations

import ssl

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from minikms.api.errors import StartError
from minikms.processes.config_file import PEM_BYTES_MAX, ConfigFiles


def client_context(files: ConfigFiles, *, ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """The TLS context of a client: with the CAs of the file `ca`, else those of the machine, and with a certificate of
    its own if `cert` names one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if ca else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca:
        try:
            context.load_verify_locations(cadata=files.read(ca, "file of CAs", PEM_BYTES_MAX).decode("ascii"))
        except (ssl.SSLError, ValueError):  # ValueError: it is empty, or not ASCII
            raise StartError(f"{files.path(ca)} is no file of certificates in PEM") from None
    if cert:
        load_pair(context, files, cert, key)
    return context


def load_pair(context: ssl.SSLContext, files: ConfigFiles, cert: str, key: str) -> x509.Certificate:
    """Loads the certificate of this process with its chain, and its private key. Returns the certificate. Raises
    StartError.
    """
    cert_path, key_path = files.path(cert), files.path(key)
    try:
        certificate = x509.load_pem_x509_certificate(files.read(cert, "certificate", PEM_BYTES_MAX))
    except (ValueError, x509.InvalidVersion):
        raise StartError(f"{cert_path} is no certificate in PEM, or a part of one") from None
    files.check_private(key)
    try:
        load_pem_private_key(files.read(key, "private key", PEM_BYTES_MAX), None)
    except TypeError:
        raise StartError(f"the private key {key_path} has a passphrase: give it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise StartError(f"{key_path} is no private key in PEM, or a part of one") from None
    try:
        context.load_cert_chain(cert_path, key_path, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"{key_path} is not the private key of the certificate {cert_path}") from None
        reason = (error.reason or "a certificate of the chain is damaged").lower().replace("_", " ")
        raise StartError(f"OpenSSL does not take {cert_path} with {key_path}: {reason}") from None
    except (OSError, ValueError) as error:
        raise StartError(f"{cert_path} or {key_path}: {getattr(error, 'strerror', None) or error}") from None
    return certificate
