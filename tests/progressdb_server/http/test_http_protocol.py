"""HTTP/1.1 byte by byte against a real server."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httptools
import pytest

from progressdb_server.api.gate.errors import AUTHOR_REQUIRED
from progressdb_server.http import framing, limits, listener, serving
from progressdb_server.http.protocol import Connection
from progressdb_server.store.model import MessageNotFoundError
from tests.harness.waiting import WAIT_S_MAX, receive_more, wait_until
from tests.minikms.http.http_inputs import REFUSED
from tests.progressdb_server.api.asgi_client import BACKEND, Api
from tests.progressdb_server.api.certificates import self_signed
from tests.progressdb_server.api.http_server import HttpServer, closed_within, read_response, read_responses, running
from tests.progressdb_server.api.real_server import Reply


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with running() as server:
        yield server


def request(
    method: str = "POST", path: str = "/v1/messages", body: bytes = b'{"author":"alice","body":"hello"}', more: str = ""
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\n{more}"
    return head.encode("latin-1") + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


GET = request("GET", "/healthz", b"")
READ_BYTES = 256 * 1024
"""The most that one read of the event loop takes."""


def error_of(response: Reply) -> str:
    assert list(response.json) == ["error"]
    return str(response.json["error"])


# --- what is served ---------------------------------------------------------------------------------------------
def test_a_request_split_at_every_offset_is_the_same_request(server: HttpServer) -> None:
    whole = b"\r\n" + request()
    for at in range(1, len(whole)):
        (response,) = server.exchange(whole[:at], whole[at:])
        assert (response.status, response.json["body"]) == (200, "hello")
    assert len(server.api.store.stored_versions) == len(whole) - 1


def test_a_request_in_single_bytes_is_a_request(server: HttpServer) -> None:
    (response,) = server.exchange(*(bytes([byte]) for byte in request()))
    assert response.status == 200


def test_pipelined_requests_are_answered_in_order(server: HttpServer) -> None:
    bodies = [b'{"author":"a","body":%d}' % number for number in range(20)]
    responses = server.exchange(b"".join(request(body=body) for body in bodies))
    assert [response.json["body"] for response in responses] == [*range(20)]


def test_a_connection_goes_on_after_a_refusal(server: HttpServer) -> None:
    bad = [request(path="/nowhere"), request(body=b"{"), request("GET", "/v1/messages", b"")]
    bad.append(request(body=b'{"body":1}', more="X-User-ID: \xff\r\n"))
    responses = server.exchange(*bad, GET)
    assert [response.status for response in responses] == [404, 400, 400, 400, 200]


def test_chunked_bodies_are_read(server: HttpServer) -> None:
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\nTransfer-Encoding: chunked\r\n\r\n"
    (response,) = server.exchange(
        head.encode(), b'9\r\n{"author"\r\n', b'16\r\n:"alice","body":"chk"}\r\n', b"0\r\n\r\n"
    )
    assert (response.status, response.json["body"]) == (200, "chk")


def test_100_continue_is_sent_only_where_the_body_is_read(server: HttpServer) -> None:
    wanted = server.exchange(request(more="Expect: 100-continue\r\n"))
    assert [response.status for response in wanted] == [100, 200]
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\nExpect: 100-continue\r\n"
    for more, status in (("Content-Length: 99999999\r\n\r\n", 413), ("X-User-ID: \xff\r\n\r\n", 400)):
        responses = server.exchange((head + more).encode("latin-1"))
        assert responses[-1].status == status or [one.status for one in responses] == [100, status]


def test_ten_megabytes_get_their_413_and_the_connection_goes_on(server: HttpServer) -> None:
    responses = server.exchange(request(body=b"x" * 10_000_000), GET)
    assert [response.status for response in responses] == [413, 200]
    assert error_of(responses[0]) == "request body too large"


def test_http_1_0_needs_no_host_and_is_not_kept_alive(server: HttpServer) -> None:
    (response,) = server.exchange(b"GET /healthz HTTP/1.0\r\n\r\n" * 2)
    assert (response.status, response.headers["connection"]) == (200, "close")


def long_thread(api: Api) -> str:
    thread = api.thread()
    for _ in range(30):
        api.message("alice", thread, "x" * 100_000)
    return thread


def test_http_1_0_gets_a_long_list_without_chunks() -> None:
    api = Api()
    target = f"/v1/messages?thread={long_thread(api)}"
    with running(api) as server, server.connect() as connection:
        connection.sendall(f"GET {target} HTTP/1.0\r\nX-API-Key: {BACKEND}\r\n\r\n".encode())
        with connection.makefile("rb") as received:
            head, _, body = received.read().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert len(json.loads(body)["messages"]) == 30


@pytest.mark.parametrize("length", [0, 10])
def test_a_response_that_has_begun_is_not_interrupted_by_a_100_continue(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    api = Api()
    real = api.store.reading.messages

    async def waiting(thread_id: str, **named: Any) -> Any:
        async for chunk in real(thread_id, **named):
            await asyncio.sleep(0)
            yield chunk

    monkeypatch.setattr(api.store.reading, "messages", waiting)
    more = f"X-API-Key: {BACKEND}\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
    target = f"/v1/messages?thread={long_thread(api)}"
    with running(api) as server:
        *_, response = server.exchange(f"GET {target} HTTP/1.1\r\nHost: x\r\n{more}".encode() + b"x" * length)
    assert len(json.loads(response.body)["messages"]) == 30


def test_nothing_tells_which_software_answers(server: HttpServer) -> None:
    (response,) = server.exchange(GET)
    assert "server" not in response.headers


def test_options_may_ask_about_the_server_as_a_whole(server: HttpServer) -> None:
    responses = server.exchange(request("OPTIONS", "*", b"") + request("GET", "*", b""))
    assert [response.status for response in responses] == [204, 400]


def test_an_upgrade_is_not_followed(server: HttpServer) -> None:
    upgrade = request("GET", "/v1/threads?author=a", b"", "Connection: Upgrade\r\nUpgrade: websocket\r\n")
    assert [response.status for response in server.exchange(upgrade)] == [200]


# --- what is refused --------------------------------------------------------------------------------------------
HEAD = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\n".encode()
READ = {
    "empty line first", "only an empty line", "fragment", "quote in the target", "absolute-form", "asterisk-form",
    "target too long", "TRACE", "unknown method", "method of another protocol", "too many headers", "head too large",
    "headers without end", "POST without length", "PUT without length", "Content-Length beyond the bound",
    "Content-Length of 16 digits", "chunk extension", "extension of the last chunk", "space after the size",
    "size beyond the bound", "size of 32 bits", "trailer", "too many chunks", "Upgrade", "Upgrade to h2c",
    "Upgrade without Connection", "Connection: upgrade alone", "Trailer announced", "Expect of something else",
    "compressed body", "Content-Type twice", "Authorization twice", "X-Request-ID twice",
}  # fmt: skip
"""What the key service refuses and this server reads as a request, or refuses for its size. It has larger bounds, and
serves clients and balancers that nobody chose."""
MALFORMED = {name: data for name, (data, _) in REFUSED.items() if name not in READ and not name.startswith("end ")}
MALFORMED["no HTTP"] = b"hello\r\n\r\n"


def test_malformed_http_is_a_400_in_json_and_the_end_of_the_connection(server: HttpServer) -> None:
    for name, data in MALFORMED.items():
        responses = server.exchange(data + GET)
        assert [response.status for response in responses] == [400], name
        assert responses[0].headers["connection"] == "close"
        assert error_of(responses[0]) == "malformed HTTP request"
    assert server.api.store.empty


def test_what_the_key_service_refuses_is_read_here_where_it_says_so(server: HttpServer) -> None:
    for name in READ - {"Authorization twice"}:  # the gate refuses it
        statuses = {response.status for response in server.exchange(REFUSED[name][0] + GET)}
        assert statuses and statuses <= {200, 204, 401, 431}, name


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * limits.HEAD_BYTES_MAX + b"\r\n\r\n",
        b"GET /" + b"x" * limits.HEAD_BYTES_MAX + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * (limits.HEADERS_COUNT_MAX + 1) + b"\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
        + b"".join(b"A%d: %s\r\n" % (n, b"x" * 900) for n in range(60))
        + b"\r\n",
    ],
)
def test_a_head_that_is_too_large_is_a_431(server: HttpServer, head: bytes) -> None:
    responses = server.exchange(head)
    assert [(response.status, error_of(response)) for response in responses] == [(431, "request head too large")]


def test_a_head_that_never_ends_is_cut_off(server: HttpServer) -> None:
    responses = server.exchange(
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n", *(b"X: " + b"y" * 8000 + b"\r\n" for _ in range(50))
    )
    assert [response.status for response in responses] in ([431], [])  # the answer may be lost in the reset


@pytest.mark.parametrize(
    ("before", "part"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", b"y"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX", b"y"),
        (b"GET /", b"y"),
        (b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ", b"y"),
        (b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"y"),
    ],
    ids=["value", "name", "target", "trailer", "chunk extension"],
)
def test_a_line_that_never_ends_is_cut_off_before_it_costs_memory(
    server: HttpServer, before: bytes, part: bytes
) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(60)
        connection.sendall(before)
        with contextlib.suppress(ConnectionError):
            while sent < 64 * READ_BYTES:
                connection.sendall(part * 8192)
                sent += 8192
    assert sent < 32 * READ_BYTES  # the kernel holds some megabytes of what is never read


def test_trailers_never_become_headers(server: HttpServer) -> None:
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b'c\r\n{"body":"x"}\r\n0\r\nX-User-ID: mallory\r\n\r\n'
    (response,) = server.exchange(head.encode() + body)
    assert (response.status, error_of(response)) == (400, AUTHOR_REQUIRED)
    keyless = head.replace(f"X-API-Key: {BACKEND}\r\n", "").encode()
    (response,) = server.exchange(keyless + body.replace(b"X-User-ID: mallory", b"X-API-Key: " + BACKEND.encode()))
    assert response.status == 401


@pytest.mark.parametrize(
    "name", ["no HTTP", "Host twice", "NUL in a value", "Content-Length and chunked", "broken chunk"]
)
def test_a_malformed_request_is_not_answered_in_place_of_an_earlier_one(name: str) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    malformed = {**MALFORMED, "broken chunk": chunked + b"5\r\nhelloXX"}[name]
    api = Api()
    real = api.store.messages.create

    async def slow(*given: Any, **named: Any) -> Any:
        await asyncio.sleep(0.05)
        return await real(*given, **named)

    with pytest.MonkeyPatch.context() as patch, running(api) as server:
        patch.setattr(api.store.messages, "create", slow)
        responses = server.exchange(request() + request() + malformed + request())
        assert [response.status for response in responses] == [200, 200, 400]
        assert len(api.store.stored_versions) == 2


def test_head_is_refused_without_a_body(server: HttpServer) -> None:
    with server.connect() as connection:
        connection.sendall(request("HEAD", "/healthz", b"") + GET)
        data = b""
        while b'{"status":"ok"}' not in data:
            data += receive_more(connection)
    first, second, body = data.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 405")
    assert second.startswith(b"HTTP/1.1 200")
    assert body == b'{"status":"ok"}'


def refused_and_sending(server: HttpServer) -> socket.socket:
    """A connection whose refused client has its response and still sends."""
    connection = server.connect()
    connection.sendall(MALFORMED["no HTTP"])
    assert [response.status for response in read_responses(connection)] == [400]
    return connection


def test_a_refused_client_that_still_sends_is_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS_MAX", 600)
    with running() as server, refused_and_sending(server) as connection:
        for _ in range(3):
            connection.sendall(b"x" * 1000)


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 1 << 30), (600, 1 << 20)], ids=["time", "bytes"])
def test_a_refused_client_sends_for_a_bounded_time_and_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS_MAX", seconds)
    monkeypatch.setattr(limits, "LINGER_BYTES_MAX", count)
    with running() as server, refused_and_sending(server) as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(b"x" * 1000)


# --- time and connections ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"GET /hea",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        request()[:-1],
        HEAD + b"Content-Length: 9\r\n\r\n",
    ],
)
def test_a_request_that_does_not_come_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 1.0)
    with running() as server:
        with server.connect() as slow:
            slow.sendall(sent)
            assert closed_within(slow, 60)
        assert server.api.store.empty


def test_a_client_that_sends_a_byte_now_and_then_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 0.3)
    with running() as server, server.connect() as slow:
        slow.settimeout(0.05)
        for byte in request():
            try:
                slow.sendall(bytes([byte]))
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the request was taken")
        assert server.api.store.empty


def test_a_body_that_breaks_off_stores_nothing(server: HttpServer) -> None:
    for sent in (request()[:-1], HEAD + b"Transfer-Encoding: chunked\r\n\r\n21\r\n" + request()[-33:]):
        with server.connect() as connection:
            connection.sendall(sent)
            time.sleep(0.02)
    (response,) = server.exchange(GET)
    assert response.status == 200
    assert server.api.store.empty


def test_without_room_the_longest_idle_connection_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_COUNT_MAX", 5)
    with running() as server:
        held = [server.connect() for _ in range(5)]
        for connection in held:
            connection.sendall(GET)
            assert read_response(connection).status == 200
        held.append(server.connect())
        assert closed_within(held[0], 60)
        for connection in held[1:]:
            connection.sendall(GET)
            assert read_response(connection).status == 200


def test_a_connection_counts_once_while_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_COUNT_MAX", 2)
    first_is_made, second_waits = threading.Event(), threading.Event()
    made = Connection.connection_made

    def connection_made(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made(connection, transport)
        first_is_made.set()
        assert second_waits.wait(WAIT_S_MAX)

    monkeypatch.setattr(Connection, "connection_made", connection_made)
    with running() as server:
        held = [server.connect()]
        assert first_is_made.wait(WAIT_S_MAX)
        held.append(server.connect())
        second_waits.set()
        for connection in held:
            connection.sendall(GET)
            assert read_response(connection).status == 200


def test_many_half_open_connections_do_not_keep_a_good_client_waiting() -> None:
    with running() as server:
        half_open = [server.connect() for _ in range(300)]
        for connection in half_open:
            connection.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n")
        responses = server.exchange(*([GET] * 50))
        assert [response.status for response in responses] == [200] * 50


def test_a_client_that_does_not_read_its_list_is_no_burden_for_others() -> None:
    api = Api()
    thread = api.thread()
    for _ in range(40):
        api.message("alice", thread, "x" * 1_000_000)
    with running(api) as server, server.connect() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(request("GET", f"/v1/messages?thread={thread}", b""))
        responses = server.exchange(*([GET] * 20))
        assert [response.status for response in responses] == [200] * 20
        lazy.close()


def test_a_long_list_arrives_whole_and_a_broken_one_is_seen_to_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    thread = long_thread(api)
    read = request("GET", f"/v1/messages?thread={thread}", b"")
    with running(api) as server:
        whole, after = server.exchange(read, GET)
        assert whole.headers["transfer-encoding"] == "chunked"
        assert len(json.loads(whole.body)["messages"]) == 30
        assert after.status == 200

        real = api.store.reading.messages

        async def breaking(thread_id: str, **named: Any) -> Any:
            count = 0
            async for chunk in real(thread_id, **named):
                count += 1
                if count > 5:
                    raise RuntimeError("private text")
                yield chunk

        monkeypatch.setattr(api.store.reading, "messages", breaking)
        with server.connect() as connection:
            connection.sendall(read)
            data = b""
            while part := connection.recv(1 << 16):
                data += part
        assert data.startswith(b"HTTP/1.1 200")
        assert not data.endswith(b"0\r\n\r\n")
        (after,) = server.exchange(GET)
        assert after.status == 200


# --- stopping ---------------------------------------------------------------------------------------------------
def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    started, go_on = threading.Event(), threading.Event()
    real = api.store.messages.create

    async def slow(*given: Any, **named: Any) -> Any:
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, go_on.wait)
        return await real(*given, **named)

    monkeypatch.setattr(api.store.messages, "create", slow)
    with running(api) as server:
        connection, idle = server.connect(), server.connect()
        connection.sendall(request())
        assert started.wait(60)
        server.ask_to_stop()
        assert closed_within(idle, 60)
        with pytest.raises(OSError, match=r"refused|reset"):
            server.connect().recv(1)
        go_on.set()
        (response,) = read_responses(connection)
        assert (response.status, response.headers["connection"]) == (200, "close")
        server.join()
    assert len(api.store.stored_versions) == 1


def test_a_stop_waits_for_the_rest_of_a_body() -> None:
    with running() as server:
        whole = request(body=b'{"author":"alice","body":"' + b"x" * 200_000 + b'"}')
        connection, idle = server.connect(), server.connect()
        connection.sendall(whole[:100_000])
        wait_until(lambda: server.shares.bodies_bytes > 0)
        server.ask_to_stop()
        assert closed_within(idle, 60)
        connection.sendall(whole[100_000:] + GET)
        (response,) = read_responses(connection)
        assert (response.status, response.headers["connection"]) == (200, "close")


def test_a_stop_does_not_wait_for_a_request_that_ignores_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "STOP_SECONDS_MAX", 0.1)
    monkeypatch.setattr(serving, "CANCEL_SECONDS_MAX", 0.1)
    api = Api()
    started, go_on = threading.Event(), threading.Event()

    async def stubborn(*given: Any, **named: Any) -> Any:
        started.set()
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        raise MessageNotFoundError("message not found")

    monkeypatch.setattr(api.store.messages, "create", stubborn)
    with running(api) as server:
        connection = server.connect()
        connection.sendall(request())
        assert started.wait(60)
        server.ask_to_stop()
        assert closed_within(connection, 60)  # before the request has ended
        go_on.set()


# --- TLS --------------------------------------------------------------------------------------------------------
def test_with_a_certificate_the_server_speaks_tls_only(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    trusting = ssl.create_default_context(cafile=certificate.cert_file)
    with running(tls=certificate) as server:
        with trusting.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
            assert connection.version() in ("TLSv1.2", "TLSv1.3")
            connection.sendall(request())
            assert read_response(connection).json["body"] == "hello"
        with server.connect() as plain:
            plain.sendall(GET)
            assert closed_within(plain, 60) or not plain.recv(65536).startswith(b"HTTP")


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"//",
        b"//a@b:1/c?d",
        b"/a?",
        b"/a?b?c&d=%3F",
        b"/a;b|c",
        b"/%2f%zz",
        b"/?",
        b"/a#b",
        b"/a?b#c?d",
        b"http://x/a?b",
    ],
)
def test_a_target_is_cut_as_the_parser_cuts_it(target: bytes) -> None:
    parsed = httptools.parse_url(target)
    raw = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target
    head = framing.parse_head(raw, 0)
    assert head is not None
    assert (head.path, head.query) == (parsed.path, parsed.query or b"")
