"""Reaching the running server from a command, as an administrator.

Owns: where the server answers and which key is shown to it: both from the configuration, so that no key is ever in
argv. Invariant: no proxy of the environment stands between, for the server is on this machine. It must never print a
key.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any, Final

from progressdb_server.config import Config

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
