"""The page of the audit log: who read a thread, as an auditor answers it, and what is shown where none answers."""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import pytest

from minikms.api.audit_questions import LINES_MAX, AuditQuestion
from minikms_auditor.auditor import Status
from minikms_auditor.sinks import SinkStatus
from progressdb_server import config
from progressdb_server.api.viewer.audit import AuditorClient, AuditorError
from progressdb_server.conditions import state
from tests import needs
from tests.harness.waiting import listens
from tests.minikms_auditor.asking import beside
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.browser import Browser
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.viewer_client import ViewerClient

STATUS = Status(origin="o", vkeys=(), position_seq=10**6, durable_seq=10**6)
Asking = Callable[..., AbstractContextManager[Path]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    base = tmp_path_factory.mktemp("audit")
    with real_server(base, environment={"PROGRESSDB_AUDIT_SOCKET": str(base / "q")}) as server:
        yield server


@pytest.fixture
def auditor(server: RealServer) -> Asking:
    """Answers on the socket that the server knows, within a block."""

    def answering(status: Status = STATUS, **more: tuple[int, ...]) -> AbstractContextManager[Path]:
        return beside(server.db / "kms", server.db.parent, status, **more)

    return answering


@pytest.fixture(scope="module")
def inside(server: RealServer) -> ViewerClient:
    client = ViewerClient(server.port)
    client.login(ADMIN)
    return client


def read_thread(server: RealServer, thread: str, *request_ids: str) -> None:
    server("POST", f"/v1/threads/{thread}/messages", {"author": "ada", "body": "x"}, headers={"X-Request-Id": "wrote"})
    for name in request_ids:
        reply = server("GET", f"/v1/threads/{thread}/messages?author=ada", headers={"X-Request-Id": name})
        assert reply.status == 200


def requests_in(page: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"request <code>([^<]*)</code>", page)))


def test_a_thread_leads_to_who_read_it_and_a_line_to_its_proof(
    server: RealServer, inside: ViewerClient, auditor: Asking
) -> None:
    read_thread(server, "t1", "r-1", "r-2")
    read_thread(server, "t2", "r-3")
    with auditor():
        link = re.findall(r'href="(/viewer/audit\?[^"]*)">Who read this thread', inside("/viewer/threads/t1").text)
        page = inside(link[0].replace("&amp;", "&")).text
        assert requests_in(page)[-2:] == ["r-2", "r-1"], "the page of the thread itself was read last"
        assert re.search(r"<code>minikms-auditor prove \d+ --config ", page) and "may be missing" not in page
        assert requests_in(inside("/viewer/audit?thread=t1&verb=create_dek").text) == ["wrote"]
        for none in ("from=2100-01-01", "to=2020-01-01T09:30", "outcome=forbidden", "actor=nobody", "verb=reads&key=k"):
            assert "No lines match." in inside(f"/viewer/audit?thread=t1&{none}").text, none
        page = inside("/viewer/audit?thread=nobody").text
        assert "No lines match." in page and "may be missing" in page
    siem = SinkStatus("siem", required=True, error="its disk is full")
    with auditor(Status(origin="o", vkeys=(), alarm="the log is not intact", quorum=1, sinks=(siem,))):
        assert asyncio.run(AuditorClient(config.ViewerSection(str(server.db.parent / "q"))).conditions()) == [
            state("auditor_alarm", reason="the log is not intact"),
            state("auditor_failing", count="2", first="the sink siem, which is required: its disk is full"),
        ]
        page = inside("/viewer/audit?thread=t1").text
        assert "is not in the signed tree yet" in page and "the log is not intact" in page


def test_older_lines_follow_until_the_first(server: RealServer, inside: ViewerClient, auditor: Asking) -> None:
    read_thread(server, "t3", *(f"old-{number}" for number in range(LINES_MAX + 5)))
    seen: list[str] = []
    with auditor():
        place = "/viewer/audit?thread=t3&verb=decrypt_batch&outcome=ok"
        while place:
            page = inside(place).text
            seen += [one for one in requests_in(page) if one.startswith("old-")]
            following = re.findall(r'rel="next" href="([^"]*)"', page)
            place = following[0].replace("&amp;", "&") if following else ""
    assert seen == [f"old-{number}" for number in reversed(range(LINES_MAX + 5))]


def test_what_is_wrong_with_the_auditor_is_a_sentence(
    server: RealServer, inside: ViewerClient, auditor: Asking
) -> None:
    away = inside("/viewer/audit?thread=t1")
    assert away.status == 200 and "no auditor answers at" in away.text and "No such file" in away.text
    with auditor(uids=(os.getuid() + 1,)):
        assert "<code>users</code> of <code>[questions]</code> must name the user" in inside("/viewer/audit").text
    for wrong, said in (
        ("from=yesterday", "a time is written as"),
        ("before=x", "a number"),
        ("to=1900-01-01", "time"),
    ):
        reply = inside(f"/viewer/audit?{wrong}")
        assert reply.status == 400 and said in reply.text


def test_without_an_auditor_the_page_says_how_to_get_one(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        client = ViewerClient(server.port)
        client.login(ADMIN)
        page = client("/viewer/audit?thread=t").text
    assert "<code>PROGRESSDB_AUDIT_SOCKET=" in page and "minikms audit find --thread" in page


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"SSH-2.0-x\r\n\r\n"])
def test_another_program_at_the_socket_is_no_auditor(tmp_path: Path, answer: bytes) -> None:
    async def asked(uids: tuple[int, ...] = ()) -> None:
        async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(answer)
            writer.close()

        settings = config.ViewerSection(audit_socket=str(tmp_path / "q"), audit_server_uids=uids)
        async with await asyncio.start_unix_server(answered, settings.audit_socket):
            await AuditorClient(settings).ask(AuditQuestion())

    with pytest.raises(AuditorError, match=r"of another version|closed the connection"):
        asyncio.run(asked())
    with pytest.raises(AuditorError, match=r"nothing was sent; name its user in `viewer.audit_server_uids`"):
        asyncio.run(asked((54321,)))


def test_the_page_fits_a_phone_and_axe_finds_no_violation(server: RealServer, auditor: Asking) -> None:
    package = needs.library("axe_core_python").__name__
    read_thread(server, "t1", "r-1")
    with auditor() as path, Browser() as browser:
        assert listens(path)
        browser.go(f"http://127.0.0.1:{server.port}/viewer/")
        browser.evaluate(f"document.getElementById('key').value = {ADMIN!r}")
        browser.follow("document.forms[0].submit()")
        browser.size(320, 800)
        browser.go(f"http://127.0.0.1:{server.port}/viewer/audit?thread=t1")
        assert browser.evaluate("document.querySelectorAll('tbody tr').length") > 1
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.evaluate(resources.files(package).joinpath("axe.min.js").read_text("utf-8") + "; 0")
        browser.evaluate("axe.run().then(found => window.violations = found.violations.map(one => one.id))")
        browser.until("window.violations !== undefined")
        assert browser.evaluate("window.violations") == []
        assert browser.complaints == []
