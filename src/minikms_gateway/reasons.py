"""Why a peer or a request is refused, and how often.

Owns: the reasons, their counts, and the lines of the log, of which there is at most one a second for each reason.
Invariants: a reason is a word of this module, so that labels of metrics are bounded; a line holds the address of
the last peer, and nothing that it sent. It must never decide what is refused.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final, Literal, get_args

from minikms import api
from minikms.api.errors import ForbiddenError, KmsRefusedError, UnauthorizedError

HandshakeReason = Literal[
    "no_certificate",
    "unknown_ca",
    "expired",
    "not_yet_valid",
    "usage",
    "certificate",
    "tls_version",
    "not_tls",
    "handshake",
    "handshake_timeout",
    "handshake_closed",
]
CertificateReason = Literal[
    "expired", "not_yet_valid", "usage", "unknown_ca", "revoked", "crl_expired", "crl_missing", "uri_sans", "dns_sans",
    "name", "trust_domain", "dns_suffix", "certificate",
]  # fmt: skip
TokenReason = Literal[
    "token_malformed",
    "token_size",
    "token_algorithm",
    "token_crit",
    "token_type",
    "token_key",
    "token_signature",
    "token_issuer",
    "token_audience",
    "token_expired",
    "token_not_yet_valid",
    "token_lifetime",
    "token_name",
    "token_unbound",
    "token_binding",
    "token_cnf",
    "token_issuer_unavailable",
]
RequestReason = Literal["no_identity", "reserved_header", "verb", "connections", "kms_unavailable"]
Reason = HandshakeReason | CertificateReason | TokenReason | RequestReason

REASONS: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        reason for kind in (HandshakeReason, CertificateReason, TokenReason, RequestReason) for reason in get_args(kind)
    )
)
LINE_SECONDS: Final = 1.0
ADVICE: Final = {
    "usage": "issue the client's certificate as an end-entity's, with the key usage digitalSignature, without "
    "keyCertSign and cRLSign, and with clientAuth if it has an extended key usage"
}
"""What to change, for the reasons that do not say it themselves."""

# x509_vfy.h of OpenSSL: X509_V_ERR_*
_BY_VERIFY_CODE: Final[dict[int, HandshakeReason]] = {
    2: "unknown_ca",  # UNABLE_TO_GET_ISSUER_CERT
    9: "not_yet_valid",
    10: "expired",
    18: "unknown_ca",  # DEPTH_ZERO_SELF_SIGNED_CERT
    19: "unknown_ca",  # SELF_SIGNED_CERT_IN_CHAIN
    20: "unknown_ca",  # UNABLE_TO_GET_ISSUER_CERT_LOCALLY
    21: "unknown_ca",  # UNABLE_TO_VERIFY_LEAF_SIGNATURE
    26: "usage",  # INVALID_PURPOSE
}
_BY_TLS_REASON: Final[dict[str, HandshakeReason]] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "UNSUPPORTED_PROTOCOL": "tls_version",
    "HTTP_REQUEST": "not_tls",
    "HTTPS_PROXY_REQUEST": "not_tls",
    "WRONG_VERSION_NUMBER": "not_tls",
    "CERTIFICATE_VERIFY_FAILED": "certificate",
}


class RefusedCertificateError(UnauthorizedError):
    """The certificate proves no identity here. `reason` is for log and metrics; the peer learns only that it failed."""

    def __init__(self, reason: CertificateReason) -> None:
        super().__init__("the certificate is not accepted here; the log of the gateway says why")
        self.reason: Final = reason


class RefusedTokenError(UnauthorizedError):
    """The token proves no identity here."""

    def __init__(self, reason: TokenReason) -> None:
        super().__init__("the token is not accepted here; the log of the gateway says why")
        self.reason: Final = reason


class TooManyConnectionsError(KmsRefusedError):
    """The principal of the token has all the connections that it may have."""

    status = 503
    code = api.CODE_TOO_MANY
    retry_after_s = api.FULL_RETRY_SECONDS
    reason: Final = "connections"


class IssuerUnavailableError(KmsRefusedError):
    """The keys of the token's issuer could not be fetched."""

    status = 503
    code = api.CODE_SHUTTING_DOWN  # the request was not begun, and may be made again
    retry_after_s = 2
    reason: Final = "token_issuer_unavailable"


class RefusedRequestError(ForbiddenError):
    """The request is not for this process."""

    def __init__(self, reason: RequestReason, text: str) -> None:
        super().__init__(text)
        self.reason: Final = reason


def reason_of(error: KmsRefusedError) -> Reason:
    """The reason of an error that answers a request."""
    without: Reason = "no_identity" if isinstance(error, UnauthorizedError) else "kms_unavailable"
    reason: Reason = getattr(error, "reason", without)
    return reason


def of_handshake(error: Exception | None) -> HandshakeReason:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BY_VERIFY_CODE.get(error.verify_code, "certificate")
    if isinstance(error, ssl.SSLError):
        return _BY_TLS_REASON.get(error.reason or "", "handshake")
    if isinstance(error, TimeoutError):
        return "handshake_timeout"
    return "handshake_closed" if error is None else "handshake"


class Refusals:
    """Counts refusals, and logs them by `log(reason, count, peer)`: the first at once, those of the next second
    together, with the address of the last peer.
    """

    def __init__(self, log: Callable[[str, int, str], None]) -> None:
        self.counts = dict.fromkeys(REASONS, 0)
        self._log = log
        self._waiting: dict[str, tuple[int, str]] = {}
        """Refusals since the last line, of the reasons that had a line in the last LINE_SECONDS."""

    def add(self, reason: Reason, peer: str) -> None:
        self.counts[reason] += 1
        if reason in self._waiting:
            self._waiting[reason] = (self._waiting[reason][0] + 1, peer)
        else:
            self._waiting[reason] = (0, peer)
            self._log(reason, 1, peer)

    def write(self) -> None:
        """Called every LINE_SECONDS."""
        waiting, self._waiting = self._waiting, {}
        for reason, (count, peer) in waiting.items():
            if count:
                self._waiting[reason] = (0, peer)
                self._log(reason, count, peer)
