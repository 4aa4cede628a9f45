"""The issuers of tokens: their keys, when they are fetched, and the tokens that were verified lately.

Owns: the keys of each issuer, from a file or by OpenID Connect discovery over TLS. Invariants: an issuer is asked at
most once in FETCH_SECONDS_MIN, however many tokens name a key that nobody knows. A request waits for an issuer for at
most FETCH_SECONDS_MAX; a stop of the process, and the fetch from another issuer, do not wait for it. A redirect is not
followed, and a damaged answer leaves the keys as they were. Keys that could not be fetched again for KEYS_SECONDS_MAX
are forgotten. A token is remembered by its SHA-256 only, at most TOKENS_COUNT_MAX of them, and forgotten with the key
that signed it. It must never send a token anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StartError
from minikms.processes.http_client import ExchangeError, HttpClient
from minikms.processes.tls_files import client_context
from minikms_gateway.config import JWKS_BYTES_MAX, Config, GatewayFiles, Issuer
from minikms_gateway.reasons import IssuerUnavailableError, RefusedTokenError
from minikms_gateway.tokens import Key, Verified, bearer, check_binding, parse_keys, read, verify

FETCH_SECONDS_MIN: Final = 60.0
"""Between two requests to one issuer that tokens can cause."""
REFRESH_SECONDS: Final = 300.0
KEYS_SECONDS_MAX: Final = 3600.0
FETCH_SECONDS_MAX: Final = 10.0
"""The time for discovery and keys together."""
DISCOVERY_BYTES_MAX: Final = 64 * 1024
TOKENS_COUNT_MAX: Final = 4096
_DISCOVERY: Final = "/.well-known/openid-configuration"


class _Discovery(msgspec.Struct):
    issuer: str
    jwks_uri: str


class _Source:
    """One issuer, and what is known of its keys. `fetch` blocks; everything else is used in the loop's thread."""

    def __init__(self, issuer: Issuer, files: GatewayFiles) -> None:
        """Blocks on the disk. Raises StartError."""
        self.issuer = issuer
        self.keys: dict[str, Key] = {}
        self.fetched_s = float("-inf")
        self.asked_s = float("-inf")
        self.running: asyncio.Future[None] | None = None
        self.asking = False
        """A thread asks it. It can outlive the fetch: only the resolver knows when it gives up."""
        self._context: ssl.SSLContext | None = None
        if issuer.jwks_file:
            try:
                self.keys = parse_keys(files.read(issuer.jwks_file, "JWK set", JWKS_BYTES_MAX))
            except StartError as error:
                raise StartError(f"{files.path(issuer.jwks_file)}: {error}") from None
            return
        self._context = client_context(files, ca=issuer.ca)

    @property
    def fetches(self) -> bool:
        return self._context is not None

    def may_ask(self, pause_s: float) -> bool:
        """Whether it may be asked now, which it was not in the last `pause_s`."""
        return not self.asking and time.monotonic() - self.asked_s >= pause_s

    def take_over(self, other: _Source) -> None:
        """Keeps the keys that another source of the same issuer has, after the configuration was read again. With other
        CAs, they prove nothing.
        """
        if self._cas() != other._cas():
            return
        self.keys, self.fetched_s = other.keys, other.fetched_s
        if other.running is None:  # otherwise the answer goes to `other`
            self.asked_s = other.asked_s

    def _cas(self) -> list[bytes]:
        return [] if self._context is None else self._context.get_ca_certs(binary_form=True)

    def fetch(self) -> dict[str, Key]:
        """The keys that the issuer publishes. Raises StartError, ExchangeError, OSError."""
        ends_s = time.monotonic() + FETCH_SECONDS_MAX
        document = self._get(self.issuer.issuer.rstrip("/") + _DISCOVERY, DISCOVERY_BYTES_MAX, ends_s)
        try:
            discovery = msgspec.json.decode(document, type=_Discovery)
        except UNDECODABLE:
            raise StartError("its discovery document is none") from None
        if discovery.issuer != self.issuer.issuer:
            raise StartError("its discovery document is another issuer's")
        return parse_keys(self._get(discovery.jwks_uri, JWKS_BYTES_MAX, ends_s))

    def _get(self, url: str, bytes_max: int, ends_s: float) -> bytes:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise StartError("its keys are not at an https URL")
        try:
            client = HttpClient(url, self._context, agent="minikms-gateway")
        except ValueError:
            raise StartError("it names a URL that can't be asked for") from None
        answer = client.get({"Accept": "application/json"}, ends_s, bytes_max=bytes_max)
        if answer.status != 200:
            raise StartError(f"it answers {answer.status}")
        return answer.body


class Issuers:
    """The issuers of one state of the configuration. Used in the loop's thread."""

    def __init__(self, config: Config, files: GatewayFiles, *, log: Callable[[str, str], None]) -> None:
        """Blocks on the disk. `log` gets an issuer, and why its keys could not be fetched. Raises StartError."""
        self._issuers = config.issuer
        self._sources = [_Source(issuer, files) for issuer in config.issuer]
        self._log = log
        self._verified: dict[bytes, Verified] = {}

    def take_over(self, other: Issuers) -> None:
        """Keep the keys of the same issuers that were fetched before."""
        known = {source.issuer: source for source in other._sources if source.fetches}
        for source in self._sources:
            if source.fetches and source.issuer in known:
                source.take_over(known[source.issuer])

    def principal(self, authorization: str, thumbprint: bytes | None, now: float) -> Verified | asyncio.Future[None]:
        """What the token in the header proves on a connection with a certificate of that thumbprint. A future: ask
        again when it is done, because the keys of the issuer are being fetched. Raises RefusedTokenError,
        IssuerUnavailableError.
        """
        text = bearer(authorization)
        digest = hashlib.sha256(text.encode("latin-1")).digest()
        known = self._verified.get(digest)
        if known is not None and now < known.until and known.kid in self._sources[known.issuer].keys:
            check_binding(known.thumbprint, thumbprint)
            return known
        self._verified.pop(digest, None)
        token = read(text, self._issuers)
        source = self._sources[token.issuer]
        key = source.keys.get(token.kid)
        if key is None:
            if source.fetches:
                if source.may_ask(FETCH_SECONDS_MIN):
                    self._fetch(source)
                if source.running is not None:
                    return source.running
                if not source.keys:
                    raise IssuerUnavailableError("the keys of the token's issuer can't be fetched now")
            raise RefusedTokenError("token_key")
        verified = verify(token, source.issuer, key, now=now, thumbprint=thumbprint)
        if len(self._verified) >= TOKENS_COUNT_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = verified
        return verified

    def refresh(self) -> None:
        """Called often: fetches keys that are due, and forgets those that are too old."""
        now_s = time.monotonic()
        for source in self._sources:
            if not source.fetches:
                continue
            if now_s - source.fetched_s > KEYS_SECONDS_MAX:
                source.keys = {}
            if source.may_ask(REFRESH_SECONDS if source.keys else FETCH_SECONDS_MIN):
                self._fetch(source)

    def _fetch(self, source: _Source) -> None:
        """Ask the issuer in a thread of its own, which nothing waits for."""
        loop = asyncio.get_running_loop()
        source.asked_s = time.monotonic()
        done: asyncio.Future[None] = loop.create_future()

        def settle(keys: dict[str, Key], why: str) -> None:
            if done.done():
                return
            late.cancel()
            source.running = None
            if why:
                self._log(source.issuer.issuer, why)
            else:
                if keys.keys() != source.keys.keys() or any(keys[kid] != key for kid, key in source.keys.items()):
                    self._verified.clear()
                source.keys, source.fetched_s = keys, time.monotonic()
            done.set_result(None)

        def answered(keys: dict[str, Key], why: str) -> None:
            source.asking = False
            settle(keys, why)

        def fetch() -> None:
            keys: dict[str, Key] = {}
            why = ""
            try:
                keys = source.fetch()
            except (StartError, ExchangeError, TimeoutError) as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001  whatever it is, nobody may wait for this thread
                why = getattr(error, "strerror", None) or type(error).__name__
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answered, keys, why)

        threading.Thread(target=fetch, name="fetch", daemon=True).start()
        source.asking, source.running = True, done
        late = loop.call_later(FETCH_SECONDS_MAX, settle, {}, "no answer in time")
