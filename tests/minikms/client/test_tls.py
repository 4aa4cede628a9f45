"""The clients over TLS: who answers, what they prove themselves with, and changed files."""

import contextlib
import datetime
import errno
import os
import socket
import ssl
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization

from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, Client, tls
from minikms.client.tls import CA_FILE_BYTES_MAX, TOKEN_BYTES_MAX, TlsEndpoint, parse_url
from tests.harness.certificates import SERVER, Authority, Issued, replace
from tests.minikms.client.hostile import CLOSE, SILENT, answer, hostile_tls
from tests.minikms.client.using import CREATE_CALL, CREATED, ENCRYPT_CALL, KEY, SEALED, WAIT_S, Use, use_blocking

HEALTH_CALL: tuple[str, dict[str, Any]] = ("health", {})
HEALTHY = answer(b"ok")
DAY = datetime.timedelta(days=1)


class Place(NamedTuple):
    """Files of a test: the CAs of gateways and clients, the certificate and the token of a client."""

    directory: Path
    servers: Authority
    clients: Authority
    cert: Path
    key: Path
    token: Path

    @property
    def ca(self) -> Path:
        return self.directory / "servers-ca.pem"

    @property
    def options(self) -> dict[str, Any]:
        return {"ca": self.ca, "cert": self.cert, "key": self.key, "timeout_s": WAIT_S}

    def issue(self, authority: Authority | None = None, **how: Any) -> None:
        """A new certificate of the client."""
        (authority or self.clients).issue(uris=["spiffe://prod/chat"], **how).write(self.directory)

    def tls(self, server: Issued | None = None, *, clients: Authority | None = None) -> ssl.SSLContext:
        """Of a gateway that needs a certificate of the clients' CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown = server or self.servers.issue(dns=["localhost"], extended=[SERVER])
        context.load_cert_chain(*shown.write(self.directory, "server"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=(clients or self.clients).pem.decode())
        return context

    def anybody(self) -> ssl.SSLContext:
        """Of a gateway for tokens."""
        context = self.tls()
        context.verify_mode = ssl.CERT_NONE
        return context


@pytest.fixture
def place(tmp_path: Path) -> Place:
    token = tmp_path / "token"
    token.write_text("first.token\n")
    made = Place(
        tmp_path, Authority("servers"), Authority("clients"), tmp_path / "client.pem", tmp_path / "client.key", token
    )
    made.ca.write_bytes(made.servers.pem)
    made.issue(made.clients.below("intermediate"))
    return made


def headers(request: bytes) -> dict[bytes, bytes]:
    lines = request.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://kms.internal", "kms.internal", 443),
        ("https://kms.internal:8443/", "kms.internal", 8443),
        ("https://10.0.0.1:8443", "10.0.0.1", 8443),
        ("https://[::1]:8443", "::1", 8443),
    ],
)
def test_a_url_names_host_and_port(url: str, host: str, port: int) -> None:
    assert parse_url(url) == (host, port)


@pytest.mark.parametrize(
    "url",
    [
        "http://kms.internal:8443",
        "https://",
        "https://host:0",
        "https://host:65536",
        "https://host/keys",
        "https://user:word@host",
        "https://host?x",
        "https://ho st",
        "https://host\r\nX: y",
        "https://höst",
        "unix:///run/minikms.sock",
    ],
)
def test_another_url_is_refused_with_the_form_of_a_good_one(url: str) -> None:
    with pytest.raises(ValueError, match="https://"):
        Client(url, ca="ca.pem", token_file="token")


@pytest.mark.parametrize(
    ("address", "arguments"),
    [
        ("https://host", {"token_file": "token"}),
        ("https://host", {"ca": "ca.pem"}),
        ("https://host", {"ca": "ca.pem", "cert": "cert.pem"}),
        ("https://host", {"ca": "ca.pem", "key": "cert.key"}),
        ("https://host", {"ca": "ca.pem", "token_file": "token", "server_uids": {0}}),
        ("/run/s", {"ca": "ca.pem"}),
        ("/run/s", {"token_file": "token"}),
        ("/run/s", {"long_lived_cert": True}),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_arguments_that_do_not_fit_together_are_refused(kind: Any, address: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`"):
        kind(address, **arguments)


def test_calls_share_a_connection_with_the_clients_certificate(place: Place, use: Use) -> None:
    """The chain of the certificate has an intermediate CA that the gateway does not know."""
    with hostile_tls(place.tls(), [HEALTHY, HEALTHY]) as server:
        assert use(server.url, HEALTH_CALL, HEALTH_CALL, **place.options) == [True, True]
        assert server.connections == 1
        assert headers(server.requests[1])[b"host"] == server.url.removeprefix("https://").encode()
        assert b"authorization" not in headers(server.requests[1])


def test_a_large_value_travels_both_ways(place: Place, use: Use) -> None:
    """Many records of TLS in each direction."""
    big = os.urandom(api.PLAINTEXT_BYTES_MAX)
    with hostile_tls(place.tls(), [answer(b'{"ciphertext":"%b"}' % (b"eHh4" * 1_000_000))]) as server:
        [sealed] = use(server.url, ("encrypt", {"key_id": KEY, "plaintext": big}), **place.options)
        assert sealed == b"xxx" * 1_000_000
        assert len(server.requests[0]) > len(big)


def test_the_next_request_has_the_new_token(place: Place, use: Use) -> None:
    options = {"ca": place.ca, "token_file": place.token, "timeout_s": WAIT_S}
    tokens = iter([b"second.token", b"not a token", b"x" * (TOKEN_BYTES_MAX + 1), b"third.token="])
    with hostile_tls(place.anybody(), [HEALTHY] * 5) as server:
        results = use(
            server.url,
            *[HEALTH_CALL] * 5,
            between=lambda: replace(place.token, next(tokens, b"last")),
            **options,
        )
        assert results == [True] * 5
        sent = [headers(request)[b"authorization"].removeprefix(b"Bearer ") for request in server.requests]
        assert sent == [b"first.token", b"second.token", b"second.token", b"second.token", b"third.token="]
        assert server.connections == 1


@pytest.mark.parametrize("content", [None, b"", b"two words\n", b"line\nX-MiniKMS-Principal: x", b"\xff", b"x" * 8193])
def test_a_file_without_a_token_is_an_error_that_does_not_show_it(
    place: Place, use: Use, content: bytes | None
) -> None:
    place.token.unlink()
    if content is not None:
        place.token.write_bytes(content)
    with hostile_tls(place.anybody(), [HEALTHY]) as server:
        [error] = use(server.url, HEALTH_CALL, ca=place.ca, token_file=place.token)
        assert isinstance(error, errors.KmsCredentialsError)
        assert str(place.token) in str(error)
        assert "words" not in str(error) and "xxx" not in str(error)
        assert not server.requests


def other_ca(place: Place) -> Issued:
    return Authority("others").issue(dns=["localhost"], extended=[SERVER])


def other_name(place: Place) -> Issued:
    return place.servers.issue(dns=["localhost.internal", "host"], extended=[SERVER])


def no_name(place: Place) -> Issued:
    return place.servers.issue(extended=[SERVER])


def expired(place: Place) -> Issued:
    return place.servers.issue(dns=["localhost"], extended=[SERVER], starts=-2 * DAY, ends=-DAY)


def of_a_client(place: Place) -> Issued:
    return place.servers.issue(dns=["localhost"])


@pytest.mark.parametrize("pair", [other_ca, other_name, no_name, expired, of_a_client])
def test_a_server_that_does_not_prove_to_be_the_gateway_gets_nothing(place: Place, use: Use, pair: Any) -> None:
    with hostile_tls(place.tls(pair(place)), [HEALTHY]) as server:
        [error] = use(server.url, HEALTH_CALL, **place.options)
        assert isinstance(error, errors.KmsUntrustedServerError)
        assert "nothing was sent" in str(error)
        assert not server.requests
        assert server.connections == 1, "not tried again"


def test_nothing_older_than_tls_1_3_is_spoken(place: Place, use: Use) -> None:
    context = place.tls()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with hostile_tls(context, [HEALTHY]) as server:
        [error] = use(server.url, HEALTH_CALL, **place.options)
        assert isinstance(error, errors.KmsProtocolError)
        assert "TLS 1.3" in str(error)
        assert server.connections == 1


def test_a_port_without_tls_is_named_so(place: Place, use: Use) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        [error] = use(f"https://127.0.0.1:{listener.getsockname()[1]}", HEALTH_CALL, **place.options)
        assert isinstance(error, errors.KmsProtocolError)
        assert "gateway's port" in str(error)
        thread.join(WAIT_S)


BIG_CALL = ("encrypt", {"key_id": KEY, "plaintext": bytes(api.PLAINTEXT_BYTES_MAX)})


@pytest.mark.parametrize("call", [CREATE_CALL, BIG_CALL], ids=["small", "large"])
@pytest.mark.parametrize("own", ["none", "of another CA", "expired"])
def test_a_refused_certificate_is_not_tried_again(place: Place, use: Use, own: str, call: Any) -> None:
    """The alert is found also if the gateway has closed the connection while a request was being sent."""
    options = place.options
    if own == "none":
        options = {"ca": place.ca, "token_file": place.token}
    elif own == "expired":
        place.issue(starts=-2 * DAY, ends=-DAY)
    else:
        place.issue(Authority("others"))
    with hostile_tls(place.tls(), [CREATED], [CREATED]) as server:
        [error] = use(server.url, call, **options)
        assert isinstance(error, errors.KmsCredentialsError), error
        assert "refuses this client" in str(error)
        assert ("give `cert` and `key`" if own == "none" else str(place.cert)) in str(error)
        assert not server.requests
        assert server.connections == 1


@pytest.mark.parametrize(("days", "refused", "warned"), [(31, True, False), (30, False, True), (7, False, False)])
def test_a_certificate_of_more_than_30_days_is_refused(place: Place, days: int, refused: bool, warned: bool) -> None:
    place.issue(starts=-DAY, ends=(days - 1) * DAY)
    with hostile_tls(place.tls(), [HEALTHY]) as server, Client(server.url, **place.options) as client:
        if refused:
            with pytest.raises(errors.KmsCredentialsError, match=r"valid for 31 days.*long_lived_cert"):
                client.health()
            assert server.connections == 0
        else:
            client.health()
        assert any("valid for" in text for text in client.warnings) == (warned or refused)


def test_a_certificate_of_more_than_30_days_can_be_allowed(place: Place, use: Use) -> None:
    place.issue(ends=365 * DAY)
    with hostile_tls(place.tls(), [HEALTHY]) as server:
        assert use(server.url, HEALTH_CALL, long_lived_cert=True, **place.options) == [True]


def test_a_changed_certificate_has_a_connection_of_its_own(place: Place, use: Use) -> None:
    """So that no request is sent on a connection that the gateway closes because its certificate has ended."""
    calls_made = 0

    def change() -> None:
        nonlocal calls_made
        calls_made += 1
        if calls_made == 2:
            place.issue()

    scripts = [[HEALTHY, SEALED], [HEALTHY, SEALED]] if use is use_blocking else [[HEALTHY], [SEALED]] * 2
    with hostile_tls(place.tls(), *scripts) as server:
        calls = [HEALTH_CALL, ENCRYPT_CALL, HEALTH_CALL, ENCRYPT_CALL]
        results = use(server.url, *calls, between=change, **place.options)
        assert [type(result) for result in results] == [bool, bytes, bool, bytes]


def test_a_changed_file_that_can_not_be_used_leaves_the_earlier_one(place: Place) -> None:
    with hostile_tls(place.tls(), [HEALTHY] * 3, [HEALTHY]) as server, Client(server.url, **place.options) as client:
        client.health()
        key = place.key.read_bytes()
        for content in (b"half", None):
            replace(place.key, content or b"")
            if content is None:
                place.key.unlink()
            client.health()
            assert str(place.key) in client.warnings[0]
        assert server.connections == 1
        replace(place.key, key)
        client.health()
        assert (client.warnings, server.connections) == ([], 2)


def test_a_refusal_names_the_changed_file_that_was_not_taken_up(place: Place) -> None:
    with hostile_tls(place.tls(), [HEALTHY, CLOSE], []) as server, Client(server.url, **place.options) as client:
        client.health()
        place.cert.unlink()
        server.tls = place.tls(clients=place.servers)
        with pytest.raises(errors.KmsCredentialsError, match="No such file"):
            client.health()


def test_files_are_read_again_when_a_descriptor_is_free_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although they have not changed."""
    monkeypatch.setattr(tls, "AGAIN_S", 0.0)
    with hostile_tls(place.tls(), [HEALTHY]) as server, Client(server.url, **place.options) as client:
        with monkeypatch.context() as none_left, pytest.raises(errors.KmsCredentialsError, match="Too many open files"):
            none_left.setattr(os, "open", refuse_to_open)
            client.health()
        assert client.health()


def refuse_to_open(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_an_encrypted_key_is_refused_and_no_passphrase_is_asked_for(place: Place, use: Use) -> None:
    key = serialization.load_pem_private_key(place.key.read_bytes(), None)
    cipher = serialization.BestAvailableEncryption(b"secret")
    replace(place.key, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher))
    [error] = use("https://127.0.0.1:1", HEALTH_CALL, **place.options)
    assert isinstance(error, errors.KmsCredentialsError)
    assert "encrypted" in str(error)


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_a_file_that_is_missing_or_no_pem_is_named(place: Place, use: Use, name: str) -> None:
    for content in (None, b"no certificate", b"x" * (CA_FILE_BYTES_MAX + 1)):
        file = place.directory / "wrong"
        if content is not None:
            file.write_bytes(content)
        [error] = use("https://127.0.0.1:1", HEALTH_CALL, **place.options | {name: file})
        assert isinstance(error, errors.KmsCredentialsError)
        assert str(file) in str(error)


def test_a_gateway_that_is_away_is_unavailable_with_what_to_check(place: Place, use: Use) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    [error] = use(f"https://127.0.0.1:{port}", CREATE_CALL, wait_s=0.1, **place.options)
    assert isinstance(error, errors.KmsUnavailableError)
    assert not error.sent
    assert "minikms-gateway" in str(error)


def test_an_unknown_host_is_named(place: Place, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    [error] = use("https://no-such-host.invalid", HEALTH_CALL, wait_s=0.0, **place.options)
    assert isinstance(error, errors.KmsUnavailableError)
    assert "no-such-host.invalid is not known" in str(error)


def test_a_handshake_that_never_ends_is_unavailable_after_the_timeout(place: Place, use: Use) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        [error] = use(url, CREATE_CALL, wait_s=0.0, **place.options | {"timeout_s": 0.2})
    assert isinstance(error, errors.KmsUnavailableError)
    assert not error.sent


class SlowPeer:
    """A socket that sends a byte in 0.3 s."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timeouts: list[float] = [1.0]

    def gettimeout(self) -> float:
        return self.timeouts[-1]

    def settimeout(self, seconds: float) -> None:
        self.timeouts.append(round(seconds, 3))

    def send(self, view: memoryview) -> int:
        self.now_s += 0.3
        return 1


def test_a_gateway_that_reads_slowly_does_not_lengthen_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout of a send over TLS is that of one record by default."""
    peer = SlowPeer()
    monkeypatch.setattr("minikms.client.tls.time.monotonic", lambda: peer.now_s)
    with pytest.raises(TimeoutError):
        tls.TlsSocket.sendall(peer, b"12345678")  # type: ignore[arg-type]  # all of a socket that it asks
    assert peer.timeouts == [1.0, 0.7, 0.4, 0.1]


def test_a_silent_gateway_is_a_timeout(place: Place, use: Use) -> None:
    with hostile_tls(place.tls(), [SILENT]) as server:
        [error] = use(server.url, CREATE_CALL, **place.options | {"timeout_s": 0.2})
    assert isinstance(error, errors.KmsTimeoutError | errors.KmsUnavailableError)
    assert isinstance(error, errors.KmsTimeoutError) or not error.sent, "a busy machine was slow to connect"


def test_a_restarted_gateway_is_found_again(place: Place, use: Use) -> None:
    with hostile_tls(place.tls(), [HEALTHY, CLOSE], [CLOSE], [HEALTHY]) as server:
        assert use(server.url, HEALTH_CALL, HEALTH_CALL, **place.options) == [True, True]


def test_a_create_is_not_made_again_once_it_may_have_arrived(place: Place, use: Use) -> None:
    with hostile_tls(place.tls(), [b"", CLOSE], [CREATED]) as server:
        [error] = use(server.url, CREATE_CALL, **place.options)
        assert isinstance(error, errors.KmsUnavailableError)
        assert error.sent


@pytest.mark.parametrize("name", ["rotate_kek", "add_root", "seal", "unseal", "destroy_key", "reload_policy"])
def test_a_verb_that_no_gateway_takes_is_refused_before_anything_is_sent(place: Place, use: Use, name: str) -> None:
    """It may hold a root key."""
    arguments: dict[str, Any] = {
        "rotate_kek": {"new_kek_hex": "ab" * 32},
        "add_root": {"root_hex": "ab" * 32, "provider": "file"},
        "destroy_key": {"key_id": KEY},
    }.get(name, {})
    with hostile_tls(place.tls(), [HEALTHY]) as server:
        [error] = use(server.url, (name, arguments), **place.options)
        assert isinstance(error, errors.ForbiddenError)
        assert "own socket" in str(error)
        assert server.connections == 0


def test_the_keys_of_tls_are_never_logged(place: Place, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    log = place.directory / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    with hostile_tls(place.tls(), [HEALTHY]) as server:
        assert use(server.url, HEALTH_CALL, **place.options) == [True]
    assert not log.exists()


def test_no_repr_shows_a_token(place: Place) -> None:
    endpoint = TlsEndpoint("https://host", ca=place.ca, token_file=place.token)
    assert b"first.token" in endpoint.origin
    assert "first.token" not in repr(endpoint) + repr(Client("https://host", ca="ca", token_file=place.token))
