"""Connecting to a gateway: TLS 1.3, the check of its certificate, and what the client proves itself with.

Owns: `TlsEndpoint`; the form of a gateway's URL; what the failures of TLS mean. Rules:

1. TLS 1.3 only. The gateway's certificate must be signed by a CA of `ca` and name the host of the URL. Nothing turns
   this off, and the system's CAs are not used.
2. The files are read again when they have changed: certificate, key and CAs for new connections, the token for new
   requests. A changed file that can't be used (missing, half-written, of another key) leaves the earlier content in
   use; `warnings` say why, and so does the error once the gateway refuses the earlier one.
3. A certificate that is valid for more than `CERT_DAYS_MAX` days is refused unless allowed: nobody notices its theft.
4. With TLS 1.3 the handshake of a client ends before the gateway has judged its certificate. A refusal is an alert,
   which the first read finds. It is a KmsCredentialsError and not repeated.

It must never import asyncio at the top, log a token, or show one in an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import stat
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from minikms.api.errors import (
    KmsCredentialsError,
    KmsError,
    KmsProtocolError,
    KmsUnavailableError,
    KmsUntrustedServerError,
)
from minikms.client.connecting import Endpoint, ReadToTheEnd

if TYPE_CHECKING:
    import asyncio

    from cryptography import x509

CERT_DAYS_MAX: Final = 30
CERT_DAYS_WARNED: Final = 7
CERT_FILE_BYTES_MAX: Final = 64 * 1024
CA_FILE_BYTES_MAX: Final = 1024 * 1024
AGAIN_S: Final = 1.0
"""After which files that can't be used are read again though they have not changed: descriptors may have run out."""
TOKEN_BYTES_MAX: Final = 8192
"""Half of a request's head."""
HTTPS_PORT: Final = 443

_URL: Final = re.compile(r"https://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?/?", re.ASCII)
_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
"""b64token of RFC 6750."""
_CERTIFICATE_ALERTS: Final = (
    "CERTIFICATE_REQUIRED",
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
    "DECRYPT_ERROR",
)
"""The alerts of RFC 8446, section 6.2, with which a server refuses the certificate of its client."""

Path = str | os.PathLike[str]
_Signature = tuple[int, int, int, int, int]


class TlsEndpoint(Endpoint):
    """A gateway at `url`. Raises ValueError; files are not read before the first call."""

    proxied = True

    def __init__(
        self,
        url: str,
        *,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        token_file: Path | None = None,
        long_lived_cert: bool = False,
    ) -> None:
        self.address = url
        self._host, self._port = parse_url(url)
        if ca is None:
            raise ValueError("a URL needs `ca`, the file of the CAs that sign the gateway's certificate")
        if (cert is None) != (key is None):
            raise ValueError("`cert` and `key` belong together")
        if cert is None and token_file is None:
            raise ValueError("a gateway has to know its client: give `cert` and `key`, `token_file`, or all three")
        self._ca = os.fspath(ca)
        self._pair = None if cert is None or key is None else (os.fspath(cert), os.fspath(key))
        self._token_file = None if token_file is None else os.fspath(token_file)
        self._long_lived_cert = long_lived_cert
        self._context: ssl.SSLContext | None = None
        self._read: list[_Signature | None] = []
        self._cert_warning = self._cert_trouble = self._token_trouble = ""
        self._again_s = 0.0
        self._token_read: _Signature | None = None
        host = f"[{self._host}]" if ":" in self._host else self._host
        named = host if self._port == HTTPS_PORT else f"{host}:{self._port}"
        self._host_lines = f" HTTP/1.1\r\nHost: {named}\r\n".encode("ascii")
        self._origin = b"" if self._token_file else self._host_lines

    def __repr__(self) -> str:
        return f"TlsEndpoint({self.address!r})"

    @property
    def warnings(self) -> list[str]:  # type: ignore[override]  # of the socket there are none
        return [text for text in (self._cert_warning, *self._troubles()) if text]

    def _troubles(self) -> list[str]:
        """Why files that have changed are not in use."""
        return [text for text in (self._cert_trouble, self._token_trouble) if text]

    # --- files -------------------------------------------------------------------------------------------------------

    def is_current(self, sock: object) -> bool:
        return isinstance(sock, ssl.SSLSocket | ssl.SSLObject) and sock.context is self._take_up_files()

    @property
    def origin(self) -> bytes:  # type: ignore[override]  # of the socket it never changes
        """With the token as it is now. Raises KmsCredentialsError if it could never be used."""
        if self._token_file is not None:
            self._take_up_token(self._token_file)
        return self._origin

    def _take_up_files(self) -> ssl.SSLContext:
        signatures = [_signature(path) for path in (self._ca, *(self._pair or ()))]
        if signatures != self._read or (self._cert_trouble and time.monotonic() >= self._again_s):
            try:
                self._context = self._new_context()
                self._cert_trouble = ""
            except _UnusableFileError as error:
                self._cert_trouble = str(error)
                self._again_s = time.monotonic() + AGAIN_S
            self._read = signatures  # last: another thread must not take the earlier context for that of these files
        if self._context is None:
            raise KmsCredentialsError(self._cert_trouble)
        return self._context

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificate and name
        context.sslsocket_class = TlsSocket
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.hostname_checks_common_name = False
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            _check_size(self._ca, CA_FILE_BYTES_MAX)
            context.load_verify_locations(cafile=self._ca)
        except (OSError, ValueError) as error:
            raise _UnusableFileError(f"the CA file {self._ca} can't be used: {_reason(error)}") from None
        if self._pair is not None:
            cert, key = self._pair
            self._check_validity(cert)
            try:
                _check_size(key, CERT_FILE_BYTES_MAX)
                context.load_cert_chain(cert, key, password=_no_password)
            except (OSError, ValueError) as error:
                text = f"the certificate {cert} and the key {key} can't be used together: {_reason(error)}"
                raise _UnusableFileError(text) from None
        return context

    def _check_validity(self, path: str) -> None:
        from cryptography import x509

        content = _content(path, CERT_FILE_BYTES_MAX, "certificate")
        try:
            own = x509.load_pem_x509_certificate(content)
        except ValueError:
            raise _UnusableFileError(f"the file {path} does not begin with a certificate in PEM form") from None
        days = _validity_days(own)
        if days > CERT_DAYS_MAX and not self._long_lived_cert:
            raise _UnusableFileError(
                f"the certificate {path} is valid for {days} days, which is more than {CERT_DAYS_MAX}: issue one that "
                "is replaced more often, or allow it (`long_lived_cert`)"
            )
        self._cert_warning = (
            f"the certificate {path} is valid for {days} days: a stolen key serves its thief as long; issue "
            f"certificates for at most {CERT_DAYS_WARNED} days"
            if days > CERT_DAYS_WARNED
            else ""
        )

    def _take_up_token(self, path: str) -> None:
        signature = _signature(path)
        if signature == self._token_read and self._origin and not self._token_trouble:
            return
        try:
            self._origin = self._host_lines + b"Authorization: Bearer " + _token(path) + b"\r\n"
            self._token_trouble = ""
        except _UnusableFileError as error:
            self._token_trouble = str(error)
            if not self._origin:
                raise KmsCredentialsError(self._token_trouble) from None
        self._token_read = signature  # last, as above

    # --- connections -------------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float) -> socket.socket:
        context = self._take_up_files()
        until_s = time.monotonic() + timeout_s
        sock: socket.socket | None = None
        try:
            sock = socket.create_connection((self._host, self._port), timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(max(until_s - time.monotonic(), 0.001))
            return context.wrap_socket(sock, server_hostname=self._host)
        except OSError as error:
            raise self._not_connected(error, timeout_s) from error
        finally:
            if sock is not None:
                sock.close()  # wrap_socket has taken its descriptor over, if there is a connection

    async def attach(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, timeout_s: float) -> None:
        import asyncio

        context = self._take_up_files()
        try:
            async with asyncio.timeout(timeout_s):
                sock = await self._opened(loop)
                try:
                    await loop.create_connection(lambda: protocol, sock=sock, ssl=context, server_hostname=self._host)
                except BaseException:
                    sock.close()
                    raise
        except OSError as error:
            raise self._not_connected(error, timeout_s) from error

    async def _opened(self, loop: asyncio.AbstractEventLoop) -> socket.socket:
        """Opens a connection to one of the host's addresses. Raises OSError for the last of them."""
        failure = OSError("the host has no address")
        for family, kind, protocol, _, address in await loop.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM
        ):
            sock = ReadToTheEnd(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise failure

    def lost(self, error: Exception | None, *, sent: bool, sock: socket.socket | None = None) -> KmsError:
        refused = self._refused(error)
        if sock is not None and refused is None:
            with contextlib.suppress(OSError):
                sock.setblocking(False)
            try:  # the alert of a gateway that did not wait for the rest of the request
                sock.recv(1)
            except OSError as found:
                refused = self._refused(found)
        return refused or super().lost(error, sent=sent)

    def _not_connected(self, error: OSError, timeout_s: float) -> KmsError:
        refused = self._refused(error)
        if refused is not None:
            return refused
        if isinstance(error, ssl.SSLCertVerificationError):
            return KmsUntrustedServerError(
                f"{self.address} does not prove to be the gateway: {error.verify_message}; nothing was sent. The CA "
                f"file {self._ca} must hold the CA of its certificate, and the certificate must name {self._host}"
            )
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return KmsUnavailableError(f"{self.address} closed the connection before TLS was established")
        if isinstance(error, ssl.SSLError):
            return KmsProtocolError(
                f"{self.address} does not speak TLS 1.3: {_reason(error)}. Is it the gateway's port?"
            )
        if isinstance(error, socket.gaierror):
            text = f"the host {self._host} is not known ({error.strerror}): check the URL, and how this machine"
            return KmsUnavailableError(f"{text} resolves names")
        reason = f"no connection within {timeout_s:g} s" if isinstance(error, TimeoutError) else _reason(error)
        return KmsUnavailableError(
            f"no gateway answers at {self.address}: {reason}. Check the URL, and that minikms-gateway runs there"
        )

    def _refused(self, error: Exception | None) -> KmsCredentialsError | None:
        """The error if the gateway refused this client's certificate."""
        reason = error.reason or "" if isinstance(error, ssl.SSLError) else ""
        alert = next((alert for alert in _CERTIFICATE_ALERTS if reason.endswith(f"ALERT_{alert}")), None)
        if alert is None:
            return None
        if self._pair is None:
            what = "no certificate, and the gateway needs one: give `cert` and `key`"
        else:
            what = f"the certificate {self._pair[0]}: replace it, or have its CA added to the gateway's [[client_ca]]"
        also = "".join(f". Beside that, {trouble}" for trouble in self._troubles())
        meaning = alert.lower().replace("_", " ")
        return KmsCredentialsError(f"{self.address} refuses this client ({meaning}), which has {what}{also}")


class TlsSocket(ssl.SSLSocket):
    """The TLS socket of the synchronous client."""

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Within the timeout as a whole, as that of a plain socket; each record has its own otherwise."""
        until_s = time.monotonic() + (self.gettimeout() or 0.0)
        with memoryview(data) as view:
            sent = self.send(view)
            while sent < len(view):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                self.settimeout(left_s)
                sent += self.send(view[sent:])


class _UnusableFileError(Exception):
    """A file of a client can't be used; the text says which and why."""


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of a gateway's URL. Raises ValueError, which says what is wrong."""
    if url.startswith("http://"):
        raise ValueError(
            "http:// would send plaintext to anybody on the way: the URL of a gateway begins with https://"
        )
    match = _URL.fullmatch(url)
    port = HTTPS_PORT if match is None or match[2] is None else int(match[2])
    if match is None or not 0 < port < 1 << 16:
        raise ValueError("the URL of a gateway is https://HOST or https://HOST:PORT, without a path")
    return match[1].strip("[]"), port


def _signature(path: str) -> _Signature | None:
    """Status of a file that changes when it is replaced or written; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_size(path: str, bytes_max: int) -> None:
    """Checks the size of a file that OpenSSL reads. Raises ValueError, OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > bytes_max:
        raise ValueError(f"not a regular file of at most {bytes_max} bytes")


def _content(path: str, bytes_max: int, what: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _UnusableFileError(f"the {what} {path} is not a regular file")
            content = os.read(descriptor, bytes_max + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _UnusableFileError(f"the {what} {path} can't be read: {_reason(error)}") from None
    if len(content) > bytes_max:
        raise _UnusableFileError(f"the {what} {path} has more than {bytes_max} bytes")
    return content


def _token(path: str) -> bytes:
    """Reads the token of a file. Raises _UnusableFileError, whose text does not have the token."""
    token = _content(path, TOKEN_BYTES_MAX, "token").strip()
    if _TOKEN.fullmatch(token) is None:
        raise _UnusableFileError(f"the file {path} holds no token")
    return token


def _validity_days(certificate: x509.Certificate) -> int:
    """Days, rounded up."""
    valid = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return -(-int(valid.total_seconds()) // 86_400)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not known").lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or "not known"


def _no_password() -> NoReturn:
    raise ValueError("the key is encrypted, and this client asks for no passphrase")
