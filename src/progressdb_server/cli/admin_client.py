"""HTTP client of the commands that administer a running server.

Owns: the server's address, the admin key, and how an error becomes a sentence and an exit status. Invariants: the key
is never an argument of a command, which other users could read, and is in no text; no proxy of the environment is used;
text of the server is printed without control characters.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cyclopts import Parameter

from minikms.api.printable import clean
from minikms.commands.usage import EXIT_FAILED, EXIT_MISSING, CommandError
from progressdb_server.cli.flags import KeyFile, Url
from progressdb_server.config import Config, split_address

TIMEOUT_S: Final = 60.0
TIMEOUT_ON_THIS_MACHINE_S: Final = 10.0
RESPONSE_BYTES_MAX: Final = 256 * 1024 * 1024
ERROR_BYTES_MAX: Final = 64 * 1024
KEY_FILE_BYTES_MAX: Final = 4096
DEFAULT_URL: Final = "http://127.0.0.1:8080"
_REACHABLE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - an address of every interface, and one to connect to
_NO_RESPONSE: Final = 0


class AdminError(CommandError):
    """The server refused. The text is the server's sentence, with a hint if one helps."""


class UnreachableError(AdminError):
    """The server did not respond."""


class AdminClient:
    """One server. Each call is a connection of its own."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        trusted: str | None = None,
        timeout_s: float = TIMEOUT_S,
        missing: frozenset[int] = frozenset({_NO_RESPONSE, 404}),
    ) -> None:
        """`key`: empty for none. `trusted`: file of the certificate to trust; None for those of the system.

        `missing`: statuses of the server that give the exit status 2 instead of 1; 0 stands for no response. Raises
        CommandError if `url` is not one of a server.
        """
        self.url = url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandError(f"{url} is no address of a server: use http://HOST:PORT")
        self._tls = ssl.create_default_context(cafile=trusted) if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"X-API-Key": key} if key else {}
        self._timeout_s = timeout_s
        self._missing = missing

    @classmethod
    def from_flags(cls, url: str | None, api_key_file: Path | None) -> AdminClient:
        """The server at `url` (default: PROGRESSDB_URL, or that of PROGRESSDB_ADDR) and the first key of the file
        (default: of PROGRESSDB_API_ADMIN_KEYS). Raises CommandError.
        """
        address = os.environ.get("PROGRESSDB_ADDR", "")
        return cls(url or os.environ.get("PROGRESSDB_URL") or _url_of(address), _admin_key(api_key_file))

    @classmethod
    def from_config(cls, config: Config, url: str | None = None) -> AdminClient:
        """The server that runs with this configuration, at `url` (default: on this machine). Without
        an admin key it refuses.
        """
        certificate = config.server.tls.cert_file
        host = _REACHABLE.get(config.server.address, config.server.address)
        scheme = "https" if certificate else "http"
        return cls(
            url or f"{scheme}://{_bracketed(host)}:{config.server.port}",
            next(iter(config.security.api_keys.admin), ""),
            trusted=certificate or None,
            timeout_s=TIMEOUT_ON_THIS_MACHINE_S,
            missing=frozenset({_NO_RESPONSE}),
        )

    def call(self, method: str, target: str, body: object = None, *, timeout_s: float | None = None) -> Any:
        """The decoded response. Raises AdminError, UnreachableError."""
        with self._response(method, target, body, timeout_s) as response:
            raw = response.read(RESPONSE_BYTES_MAX + 1)
            if len(raw) > RESPONSE_BYTES_MAX:
                raise AdminError(f"the server at {self.url} sent more than {RESPONSE_BYTES_MAX} bytes", EXIT_FAILED)
            return json.loads(raw)

    def events(self, target: str) -> Iterator[Any]:
        """The data of each server-sent event. Raises AdminError, UnreachableError."""
        with self._response("GET", target, None, None) as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    @contextmanager
    def _response(
        self, method: str, target: str, body: object, timeout_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(timeout_s or self._timeout_s)
        try:
            connection.request(method, target, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise self._refusal(response.status, response.read(ERROR_BYTES_MAX))
            yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreachableError(
                f"the server at {self.url} did not answer: {reason}; check that it runs and listens there",
                self._exit_status(_NO_RESPONSE),
            ) from None
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def _refusal(self, status: int, body: bytes) -> AdminError:
        try:
            sentence = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            sentence = f"status {status}"
        sentence = clean(sentence)
        hint = ""
        if status == 401:
            sentence = sentence.partition(":")[0]  # the rest is for programs that send the header themselves
        if status in (401, 403) and not self._headers:
            hint = ": give the server's configuration (--config), or its PROGRESSDB_API_ADMIN_KEYS"
        elif status == 401:
            hint = " (is the key one of the server's admin keys?)"
        elif status == 403:
            hint = " (an admin key is needed)"
        return AdminError(f"the server refused: {sentence}{hint}", self._exit_status(status))

    def _exit_status(self, status: int) -> int:
        return EXIT_MISSING if status in self._missing else EXIT_FAILED


@Parameter(name="*")
@dataclass(frozen=True)
class AdminFlags:
    """The flags for a running server and the file of its admin key."""

    url: Url = None
    api_key_file: KeyFile = None

    def client(self) -> AdminClient:
        """The client, from `AdminClient.from_flags`."""
        return AdminClient.from_flags(self.url, self.api_key_file)


def _url_of(address: str) -> str:
    """The URL of a server that listens on `host:port`. Raises CommandError."""
    if not address:
        return DEFAULT_URL
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise CommandError(f"PROGRESSDB_ADDR {error}") from None
    return f"http://{_bracketed(_REACHABLE.get(host, host))}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _admin_key(file: Path | None) -> str:
    """The first key of the file, or of the environment. Raises CommandError."""
    if file is None:
        listed = os.environ.get("PROGRESSDB_API_ADMIN_KEYS", "")
    else:
        try:
            with file.open("rb") as opened:
                listed = opened.read(KEY_FILE_BYTES_MAX).decode("ascii")
        except FileNotFoundError:
            raise CommandError(f"the key file {file} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"the key file {file} cannot be read: {type(error).__name__}") from None
    key = listed.split(",")[0].strip()
    if not key or not all("!" <= char <= "~" for char in key):
        raise CommandError("no admin key: set PROGRESSDB_API_ADMIN_KEYS or give --api-key-file FILE")
    return key
