"""What the commands that steer a running server have in common: its address, an admin key, and one call.

Owns: where they come from, and how a refusal becomes a sentence. Invariants: the key is never an argument, which other
users could read, nor in any text; a proxy of the environment is not used.

Reaching the running server from a command, as an administrator.

Owns: where the server answers and which key is shown to it: both from the configuration, so that no key is ever in
argv. Invariant: no proxy of the environment stands between, for the server is on this machine. It must never print a
key.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from progressdb_server.config import Config, split_address

CALL_TIMEOUT_S: Final = 60.0
KEY_FILE_BYTES_MAX: Final = 4096
DEFAULT_URL: Final = "http://127.0.0.1:8080"


class AdminError(Exception):
    """The server can't be asked, or refused; the text says what to do. `missing`: what was named is not there."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class AdminClient:
    """`url` of the server (default: PROGRESSDB_URL, or that of PROGRESSDB_ADDR); the key is the first one of the file,
    or of PROGRESSDB_API_ADMIN_KEYS. Raises AdminError."""

    def __init__(self, url: str | None, api_key_file: Path | None) -> None:
        self.url = url or os.environ.get("PROGRESSDB_URL") or _url_of_address(os.environ.get("PROGRESSDB_ADDR", ""))
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AdminError(f"{self.url} is no address of a server: use http://HOST:PORT")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._key = _key(api_key_file)

    def call(self, method: str, target: str, body: object = None, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The decoded answer. Raises AdminError unless it is 2xx."""
        with self._answered(method, target, body, timeout_s) as answered:
            return json.loads(answered.read())

    def events(self, target: str) -> Iterator[Any]:
        """The data of each server-sent event. Raises AdminError."""
        with self._answered("GET", target, None, CALL_TIMEOUT_S) as answered:
            for line in answered:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    @contextmanager
    def _answered(self, method: str, target: str, body: object, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(timeout_s)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, target, sent, {"X-API-Key": self._key})
            answered = connection.getresponse()
            if not 200 <= answered.status < 300:
                raise _refused(answered.status, answered.read())
            yield answered
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AdminError(f"the server at {self.url} did not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)


def _refused(status: int, body: bytes) -> AdminError:
    try:
        said = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = f"status {status}"
    hints = {401: " (is the key one of the server's admin keys?)", 403: " (an admin key is needed)"}
    return AdminError(f"the server refused: {said}{hints.get(status, '')}", missing=status == 404)


def _url_of_address(address: str) -> str:
    if not address:
        return DEFAULT_URL
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise AdminError(f"PROGRESSDB_ADDR {error}") from None
    here = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - where a server on every interface is reached
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def _key(file: Path | None) -> str:
    if file is None:
        listed = os.environ.get("PROGRESSDB_API_ADMIN_KEYS", "")
    else:
        try:
            with file.open("rb") as opened:
                listed = opened.read(KEY_FILE_BYTES_MAX).decode("ascii")
        except FileNotFoundError:
            raise AdminError(f"the key file {file} does not exist", missing=True) from None
        except (OSError, UnicodeDecodeError) as error:
            raise AdminError(f"the key file {file} can't be read: {type(error).__name__}") from None
    key = listed.split(",")[0].strip()
    if not key or not all("!" <= char <= "~" for char in key):
        raise AdminError("no admin key: set PROGRESSDB_API_ADMIN_KEYS or give --api-key-file FILE")
    return key


TIMEOUT_S: Final = 10.0
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  what is listened on, and how to reach it


class ServerAwayError(Exception):
    """Nothing answers where the configuration says; the text says what to do."""


class ServerRefusedError(Exception):
    """The server answered with a refusal, which is the text."""


class Administrator:
    """Calls of one server. `url` is what it is reached by."""

    def __init__(self, config: Config) -> None:
        host = _EVERYWHERE.get(config.server.address, config.server.address)
        scheme = "https" if config.server.tls.cert_file else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}"
        keys = config.security.api_keys.admin
        self._headers = {"X-API-Key": keys[0]} if keys else {}
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if config.server.tls.cert_file:
            trusted = ssl.create_default_context(cafile=config.server.tls.cert_file)
            handlers.append(urllib.request.HTTPSHandler(context=trusted))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, method: str, target: str, body: object = None, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The answer's object. Raises ServerAwayError, ServerRefusedError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310  http or https only, from the configuration
            self.url + target, data, self._headers, method=method
        )
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                told: dict[str, Any] = json.loads(answer.read(ANSWER_BYTES_MAX))
                return told
        except urllib.error.HTTPError as error:
            raise ServerRefusedError(self._refusal(error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerAwayError(
                f"no server answers at {self.url} ({error}); is it running, and is this its configuration?"
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        try:
            said = str(json.loads(error.read(65536))["error"])
        except (ValueError, KeyError, TypeError, OSError):
            said = f"status {error.code}"
        said = "".join(char if char.isprintable() else "?" for char in said)
        if error.code in (401, 403) and not self._headers:
            return f"{said}: give the server's configuration (--config), or its PROGRESSDB_API_ADMIN_KEYS"
        return said
