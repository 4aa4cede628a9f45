"""Lists leave in bounded memory, and never look whole when they are not."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from progressdb_server.api.gate import limits, response
from progressdb_server.api.gate.response import JsonList, send_list
from progressdb_server.http.asgi import ClientGoneError
from progressdb_server.store.model import Message, StoreUnavailableError


def message(number: int, size: int) -> Message:
    return Message(id=f"msg-{number}-1", thread="t", author="a", body="x" * size)


class Source:
    """Chunks of messages; counts what it has handed out and notes that it was closed."""

    def __init__(
        self, chunks: int, of: int, size: int = 1000, fails_at: int | None = None, *, waits: bool = False
    ) -> None:
        """`waits`: it says between two chunks that the next one has to wait."""
        self.handed_out = 0
        self.closed = False
        self._chunks, self._of, self._size, self._fails_at, self._waits = chunks, of, size, fails_at, waits

    async def read(self) -> AsyncIterator[Sequence[Message]]:
        try:
            for chunk in range(self._chunks):
                if chunk == self._fails_at:
                    raise StoreUnavailableError("the disk is gone")
                if self._waits:
                    yield []
                self.handed_out += 1
                yield [message(chunk * self._of + number, self._size) for number in range(self._of)]
        finally:
            self.closed = True


class Client:
    """The sending side of a connection: keeps what left, can hang up or stop reading after some parts."""

    def __init__(self, *, gone_after: int | None = None, stalls_after: int | None = None) -> None:
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self._gone_after, self._stalls_after = gone_after, stalls_after
        self._asked = 0

    async def receive(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, sent: Any) -> None:
        self.sent.append(sent)
        if len(self.sent) == self._gone_after:
            self.gone.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self._stalls_after is not None and len(self.sent) >= self._stalls_after:
            await asyncio.Event().wait()

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def parts(self) -> list[bytes]:
        return [part["body"] for part in self.sent[1:]]

    @property
    def finished(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


def run(source: Source, client: Client) -> None:
    listed = JsonList(b'{"messages":[', source.read())
    asyncio.run(send_list(listed, client.receive, client.send))


@pytest.mark.parametrize(("chunks", "of"), [(0, 0), (1, 0), (3, 0), (1, 1), (5, 7), (1, 200)])
def test_a_short_list_leaves_whole_and_with_its_length(chunks: int, of: int) -> None:
    client = Client()
    run(Source(chunks, of), client)
    assert len(client.parts) == 1
    assert client.headers[b"content-length"] == str(len(client.parts[0])).encode()
    assert len(json.loads(client.parts[0])["messages"]) == chunks * of


def test_a_long_list_is_streamed_in_parts_of_bounded_size() -> None:
    source, client = Source(chunks=60, of=50), Client()
    run(source, client)
    assert b"content-length" not in client.headers
    assert len(client.parts) > 5
    largest_chunk = 50 * 1200
    assert max(map(len, client.parts)) < limits.LIST_BUFFER_BYTES_MAX + largest_chunk
    read = json.loads(b"".join(client.parts))["messages"]
    assert [one["id"] for one in read] == [f"msg-{number}-1" for number in range(3000)]
    assert (client.finished, source.closed) == (True, True)


def test_the_first_chunk_leaves_before_the_second_is_read() -> None:
    source = Source(chunks=3, of=2, waits=True)

    class Watching(Client):
        """Notes how many chunks had been read when each part left."""

        def __init__(self) -> None:
            super().__init__()
            self.read_before: list[int] = []

        async def send(self, sent: Any) -> None:
            self.read_before.append(source.handed_out)
            await super().send(sent)

    client = Watching()
    run(source, client)
    assert client.read_before == [1, 1, 2, 3]  # the head and a part for each chunk
    assert len(json.loads(b"".join(client.parts))["messages"]) == 6


def test_a_list_of_one_chunk_that_had_to_wait_leaves_whole() -> None:
    client = Client()
    run(Source(chunks=1, of=5, waits=True), client)
    assert client.headers[b"content-length"] == str(len(client.parts[0])).encode()


def test_a_failure_before_anything_left_can_still_be_answered() -> None:
    source, client = Source(chunks=5, of=10, fails_at=1), Client()
    with pytest.raises(StoreUnavailableError):
        run(source, client)
    assert (client.sent, source.closed) == ([], True)


def test_a_failure_in_the_middle_leaves_the_answer_unfinished() -> None:
    source, client = Source(chunks=60, of=50, fails_at=40), Client()
    with pytest.raises(StoreUnavailableError):
        run(source, client)
    assert client.sent
    assert not client.finished
    with pytest.raises(json.JSONDecodeError):
        json.loads(b"".join(client.parts))


def test_a_client_that_hangs_up_ends_the_reading() -> None:
    source, client = Source(chunks=1000, of=50), Client(gone_after=3)
    run(source, client)
    assert source.handed_out < 40
    assert (client.finished, source.closed) == (False, True)


def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response, "STREAM_STALL_SECONDS_MAX", 0.05)
    source, client = Source(chunks=1000, of=50), Client(stalls_after=4)
    with pytest.raises(ClientGoneError):
        run(source, client)
    assert source.handed_out < 40
    assert (client.finished, source.closed) == (False, True)
