"""A provider that replays answers: bytes over TLS, or in plain text, for what no provider here can be made to answer.

Owns: the listener, and what it was asked. It knows no protocol beyond the frame of a request, and is no proof of what
a provider says: the answers are those of its documentation.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Self

from tests.harness.certificates import SERVER, Authority
from tests.minikms_tokens.wrappers import NO_KEYS

DRIP_SECONDS: Final = 0.05


def reply(status: int, body: bytes | str, *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else body.encode()
    lines = [f"HTTP/1.1 {status} Replayed", f"Content-Length: {len(content)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Replay:
    """`answer`: parts of the answer to each request. `port`: 0 for a free one."""

    def __init__(self, directory: Path, port: int = 0, *, name: str = "localhost", tls: bool = True) -> None:
        self.answer: Iterable[bytes] = ()
        self.requests: list[bytes] = []
        authority = Authority("provider")
        self.ca_file = directory / "provider-ca.pem"
        self.ca_file.write_bytes(authority.pem)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._context is not None:
            issued = authority.issue(dns=[name], extended=[SERVER])
            self._context.load_cert_chain(*issued.write(directory, "provider"))
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._exchange, args=(connection,), daemon=True).start()

    def _exchange(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as file:
                head = b"".join(iter(file.readline, b"\r\n"))
                lengths = [line[15:] for line in head.splitlines() if line.lower().startswith(b"content-length:")]
                self.requests.append(head + b"\r\n" + file.read(int(lengths[0]) if lengths else 0))
                for part in self.answer:
                    connection.sendall(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def drip() -> Iterator[bytes]:
    """An answer that never ends, a byte at a time."""
    yield b"HTTP/1.1 200 Replayed\r\nContent-Length: 4096\r\n\r\n"
    while True:
        time.sleep(DRIP_SECONDS)
        yield b" "


GARBAGE: Final = {
    "huge": [reply(200, b'{"data": "' + bytes(1 << 20))],
    "no HTTP": [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "no JSON": [reply(200, "<html>")],
    "another JSON": [reply(200, "[[]]")],
    "deep JSON": [reply(200, "[" * 10_000)],
    "cut": [reply(200, b"{}" * 100)[:-150]],
    "nothing": [b""],
}


def without_key(answer: Callable[[bytes], bytes]) -> dict[str, tuple[Iterable[bytes], str]]:
    """Parts of answers that hold no root key, and what the error says. `answer`: that of the provider with this key."""
    return {
        **{name: (parts, "") for name, parts in GARBAGE.items()},
        **{name: ([answer(key)], "no root key") for name, key in NO_KEYS.items()},
        "drip": (drip(), "did not answer in"),
    }
