"""Where the keys of an issuer come from: discovery over TLS, its bounds, and how often an issuer is asked."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minikms_gateway import issuers
from minikms_gateway.config import JWKS_BYTES_MAX, Config, GatewayFiles, parse_config
from minikms_gateway.issuers import Issuers
from minikms_gateway.reasons import IssuerUnavailableError, RefusedTokenError
from tests.harness.certificates import SERVER, Authority
from tests.harness.gateways import Pair
from tests.harness.tokens import TokenIssuer
from tests.minikms.http.http_harness import get


class IssuerServer:
    """An issuer on loopback. `answers`: status, headers and body by path; a test may change them."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.authority = Authority("issuer root")
        handler = type("Handler", (_Handler,), {"issuer": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.authority.issue(dns=["localhost"], extended=[SERVER]).write(directory, "issuer"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}"
        self.tokens = TokenIssuer(self.url)
        (directory / "ca.pem").write_bytes(self.authority.pem)
        discovery = json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys", "more": [1]}).encode()
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {
            "/.well-known/openid-configuration": (200, {}, discovery),
            "/keys": (200, {}, self.tokens.jwks),
        }
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    issuer: IssuerServer

    def do_GET(self) -> None:
        self.issuer.asked.append(self.path)
        status, headers, body = self.issuer.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IssuerServer]:
    made = IssuerServer(tmp_path)
    yield made
    made.close()


def tables(*urls: str) -> str:
    return "".join(
        f'[[issuer]]\nkind = "oidc"\nissuer = "{url}"\naudience = "minikms"\nalgorithms = ["ES256"]\nca = "ca.pem"\n'
        for url in urls
    )


def configuration(server: IssuerServer, *others: str) -> Config:
    start = 'version = 1\nlisten = "127.0.0.1:1"\nkms_socket = "/s"\ntls = { cert = "a", key = "b" }\n'
    return parse_config((start + tables(server.url, *others)).encode(), "test")


@asynccontextmanager
async def issuers_of(server: IssuerServer, directory: Path, *others: str) -> AsyncIterator[tuple[Issuers, list[str]]]:
    """The issuers of a configuration, and the reasons why nothing was fetched."""
    why: list[str] = []
    files = GatewayFiles(directory / "gateway.toml")
    yield Issuers(configuration(server, *others), files, log=lambda issuer, reason: why.append(reason)), why


async def principal(made: Issuers, token: str) -> str:
    found = made.principal(f"Bearer {token}", None, time.time())
    if isinstance(found, asyncio.Future):
        await found
        found = made.principal(f"Bearer {token}", None, time.time())
    assert not isinstance(found, asyncio.Future)
    return found.name


@pytest.mark.parametrize("states_lengths", [True, False])
async def test_keys_are_discovered_for_the_first_token(
    server: IssuerServer, tmp_path: Path, *, states_lengths: bool
) -> None:
    """The issuer closes the connection after each answer, whose length it states or not."""
    if states_lengths:
        for _, headers, body in server.answers.values():
            headers["Content-Length"] = str(len(body))
    async with issuers_of(server, tmp_path) as (made, _):
        assert await principal(made, server.tokens.token()) == f"oidc:{server.url}|service-7"
        assert await principal(made, server.tokens.token()) == f"oidc:{server.url}|service-7"
        assert server.asked == ["/.well-known/openid-configuration", "/keys"]


@pytest.fixture
def hanging() -> Iterator[list[str]]:
    """Issuers that accept a connection, and never say a word."""
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        yield [f"https://localhost:{listener.getsockname()[1]}" for listener in listeners]


async def test_issuers_that_hang_hold_no_other_one_back(
    server: IssuerServer, tmp_path: Path, hanging: list[str]
) -> None:
    async with issuers_of(server, tmp_path, *hanging) as (made, _):
        waiting = [asyncio.ensure_future(principal(made, TokenIssuer(url).token())) for url in hanging]
        await asyncio.sleep(0)
        assert await principal(made, server.tokens.token()) == f"oidc:{server.url}|service-7"
        assert not any(each.done() for each in waiting)
        for each in waiting:
            each.cancel()


@pytest.mark.parametrize("hangs", ["issuer", "resolver"])
async def test_a_fetch_that_hangs_is_given_up(
    server: IssuerServer, tmp_path: Path, hanging: list[str], monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    """The issuer is asked again only when the thread has ended, which no time limit holds for in the resolver."""
    monkeypatch.setattr(issuers, "FETCH_SECONDS_MAX", 0.3)
    asked: list[str] = []
    resolved = threading.Event()

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        resolved.wait()
        return []

    if hangs == "resolver":
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
    async with issuers_of(server, tmp_path, hanging[0]) as (made, why):
        for _ in range(2):
            with pytest.raises(IssuerUnavailableError):
                await principal(made, TokenIssuer(hanging[0]).token())
            if hangs == "resolver":
                monkeypatch.setattr(issuers, "FETCH_SECONDS_MIN", 0.0)
        assert why == ["no answer in time"]
        assert len(asked) == (hangs == "resolver")
        resolved.set()


def test_a_stop_does_not_wait_for_an_issuer(hanging: list[str]) -> None:
    files = {"ca.pem": Authority("root").pem}
    with Pair(tables=tables(hanging[0]), files=files) as pair, pair.gateway.connect() as waiting:
        waiting.sendall(get("/ready", f"Authorization: Bearer {TokenIssuer(hanging[0]).token()}"))
        pair.gateway.stop()


async def test_a_flood_of_unknown_kids_asks_the_issuer_once(server: IssuerServer, tmp_path: Path) -> None:
    """Also if they come while the keys are being fetched."""
    async with issuers_of(server, tmp_path) as (made, _):
        tokens = [server.tokens.token(header={"kid": f"unknown-{number}"}) for number in range(200)]
        results = await asyncio.gather(*(principal(made, token) for token in tokens), return_exceptions=True)
        assert {getattr(result, "reason", None) for result in results} == {"token_key"}
        assert len(server.asked) == 2
        assert await principal(made, server.tokens.token()) == f"oidc:{server.url}|service-7"


async def test_a_new_key_is_fetched_for_an_unknown_kid_and_an_old_one_forgotten(
    server: IssuerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a token that was verified before."""
    monkeypatch.setattr(issuers, "FETCH_SECONDS_MIN", 0.0)
    async with issuers_of(server, tmp_path) as (made, _):
        old = server.tokens.token()
        await principal(made, old)
        new = TokenIssuer(server.url, "key-2")
        server.answers["/keys"] = (200, {}, new.jwks)
        assert await principal(made, new.token()) == f"oidc:{server.url}|service-7"
        monkeypatch.setattr(issuers, "FETCH_SECONDS_MIN", 60.0)
        with pytest.raises(RefusedTokenError):
            await principal(made, old)


BAD: dict[str, tuple[str, tuple[int, dict[str, str], bytes]]] = {
    "a redirect": ("/keys", (302, {"Location": "/other"}, b"")),
    "an error": ("/keys", (500, {}, b"")),
    "a large answer": ("/keys", (200, {}, b" " * (JWKS_BYTES_MAX + 1))),
    "no JSON": ("/keys", (200, {}, b"<html>")),
    "no keys": ("/keys", (200, {}, b'{"keys":[]}')),
    "too many keys": ("/keys", (200, {}, json.dumps({"keys": [{}] * 65}).encode())),
    "a shared secret": ("/keys", (200, {}, b'{"keys":[{"kty":"oct","kid":"key-1","k":"AAAA"}]}')),
    "deeply nested JSON": ("/keys", (200, {}, b"[" * 100_000)),
    "another issuer": (
        "/.well-known/openid-configuration",
        (200, {}, b'{"issuer":"https://other.example","jwks_uri":"https://other.example/keys"}'),
    ),
    "keys without TLS": ("/.well-known/openid-configuration", (200, {}, b'{"issuer":"%b","jwks_uri":"http://x/keys"}')),
    "keys in a file": ("/.well-known/openid-configuration", (200, {}, b'{"issuer":"%b","jwks_uri":"file:///keys"}')),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_answer_leaves_no_keys_and_says_why(server: IssuerServer, tmp_path: Path, kind: str) -> None:
    path, (status, headers, body) = BAD[kind]
    server.answers[path] = (status, headers, body.replace(b"%b", server.url.encode()))
    async with issuers_of(server, tmp_path) as (made, why):
        with pytest.raises(IssuerUnavailableError):
            await principal(made, server.tokens.token())
        assert len(why) == 1


async def test_an_issuer_with_another_ca_is_not_asked(server: IssuerServer, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(Authority("another root").pem)
    async with issuers_of(server, tmp_path) as (made, why):
        with pytest.raises(IssuerUnavailableError):
            await principal(made, server.tokens.token())
        assert (server.asked, len(why)) == ([], 1)


async def test_a_failed_refresh_leaves_the_keys_until_they_are_too_old(
    server: IssuerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with issuers_of(server, tmp_path) as (made, why):
        await principal(made, server.tokens.token())
        server.answers["/keys"] = (500, {}, b"")
        monkeypatch.setattr(issuers, "REFRESH_SECONDS", 0.0)
        made.refresh()
        while not why:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(issuers, "REFRESH_SECONDS", 3600.0)
        assert await principal(made, server.tokens.token()) == f"oidc:{server.url}|service-7"
        monkeypatch.setattr(issuers, "KEYS_SECONDS_MAX", 0.0)
        made.refresh()
        with pytest.raises(IssuerUnavailableError):
            await principal(made, server.tokens.token())


@pytest.mark.parametrize("when", ["fetched", "being fetched", "fetched, and now another CA"])
async def test_files_that_change_keep_the_keys_that_their_ca_vouches_for(
    server: IssuerServer, tmp_path: Path, when: str
) -> None:
    async with issuers_of(server, tmp_path) as (made, _):
        token = server.tokens.token()
        if when == "being fetched":
            made.refresh()
        else:
            await principal(made, token)
        if when == "fetched, and now another CA":
            (tmp_path / "ca.pem").write_bytes(Authority("another root").pem)
        new = Issuers(configuration(server), GatewayFiles(tmp_path / "gateway.toml"), log=lambda issuer, reason: None)
        new.take_over(made)
        if when == "fetched, and now another CA":
            with pytest.raises(IssuerUnavailableError):
                await principal(new, token)
        else:
            assert await principal(new, token) == f"oidc:{server.url}|service-7"
