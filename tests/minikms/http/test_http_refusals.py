"""The table of refused input, over a real socket: each row gets its 4xx and ends the connection."""

import asyncio
import re
from pathlib import Path

import pytest

from minikms import api
from minikms.http import limits
from tests.minikms.http.http_harness import get, parse_answers, post, serving
from tests.minikms.http.http_inputs import ACCEPTED, REFUSED

pytestmark = pytest.mark.uvloop

SPECIFICATION = Path(__file__).resolve().parents[3] / "docs" / "spec" / "http.md"


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str) -> None:
    """The status is as the table says, the connection ends, and the application never sees a request."""
    data, status = REFUSED[name]
    ends_early = name.startswith("end ")

    async with serving() as running:
        peer = await running.peer()
        peer.send(data)
        if ends_early:
            peer.writer.write_eof()
        [answer] = parse_answers(await peer.rest())
        await peer.close()
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert set(answer.json) == {"error", "code"}
        assert running.app.seen == []
        assert running.app.refusals == [(status, answer.json["code"])]
        assert running.internal_errors == []


@pytest.mark.parametrize(
    "name", [name for name in REFUSED if not name.startswith("end ") and "without end" not in name]
)
async def test_bytes_after_a_refusal_are_not_a_request(name: str) -> None:
    """A request smuggled behind refused bytes is never started; one before them is answered first."""
    data, status = REFUSED[name]

    async with serving() as running:
        peer = await running.peer()
        peer.send(post("/echo", b"first") + data + get("/smuggled"))
        answers = parse_answers(await peer.rest())
        await peer.close()
        assert [answer.status for answer in answers] == [200, status]
        assert [path for _, path, _ in running.app.seen] == ["/echo"]


@pytest.mark.parametrize("name", ACCEPTED)
async def test_accepted(name: str) -> None:
    """Requests that each rule just accepts."""
    async with serving() as running:
        answers = await running.exchange(ACCEPTED[name])
        assert answers
        assert {answer.status for answer in answers} == {200}
        assert running.app.refusals == []


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    """The answer can be read although megabytes of the body are still being sent."""
    async with serving() as running:
        peer = await running.peer()
        peer.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        for _ in range(50):
            peer.send(b"x" * 100_000)
            await asyncio.sleep(0)
        answer = await peer.answer()
        assert (answer.status, answer.json["code"]) == (413, "too_large")
        await peer.close()


TABLE = {name: row for name, row in vars(limits).items() if isinstance(row, limits.Refusal)}


def test_the_specification_lists_every_refusal() -> None:
    """docs/spec/http.md and the table of the engine have the same names, statuses and codes."""
    rows = re.findall(r"^\| ([0-9]{3}) \| `([a-z_]+)` \| (`[A-Z_`, ]+`) \|$", SPECIFICATION.read_text(), re.M)
    listed = [(name, int(status), code) for status, code, names in rows for name in re.findall(r"[A-Z_]+", names)]
    assert sorted(listed) == sorted((name, row.status, row.code) for name, row in TABLE.items())


def test_the_specification_states_every_bound() -> None:
    """Each row of its table of bounds names a constant and that constant's value."""
    units = {"": 1, " KiB": 1024, " MiB": 1024 * 1024, " s": 1}
    rows = re.findall(r"^\| .+ \| ([0-9,]+)( KiB| MiB| s|) \| `(api\.)?([A-Z_]+)` \|$", SPECIFICATION.read_text(), re.M)
    assert len(rows) == 19
    for number, unit, in_api, name in rows:
        value = getattr(api if in_api else limits, name)
        assert value == int(number.replace(",", "")) * units[unit], name


def test_only_the_state_of_the_service_is_a_5xx() -> None:
    """Nothing that a peer sends is answered with a 5xx by the engine itself."""
    service = {"OVERLOADED", "TOO_MANY_CONNECTIONS", "SHUTTING_DOWN", "INTERRUPTED", "AUDIT_UNAVAILABLE", "INTERNAL"}
    assert {name for name, row in TABLE.items() if row.status >= 500} == service
