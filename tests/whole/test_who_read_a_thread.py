"""Who read a thread, and when: the audit log of the key service and the log of the server together."""

import re
from pathlib import Path
from typing import Any

from tests.harness import forked
from tests.progressdb_server.api.asgi_client import ADMIN, FRONTEND, signed
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.viewer_client import ViewerClient


def reads_of(server: RealServer, thread: str) -> list[str]:
    """The ids of the requests for which the thread was read, as the documented command shows them."""
    done = forked.run("minikms", "audit", "find", "--data-dir", server.db / "kms", "--thread", thread, "--reads")
    return re.findall(r" request=(\S+)", done.stdout)


def test_every_read_of_a_thread_is_found_with_its_reader(tmp_path: Path) -> None:
    """Lists, single messages, versions, metadata, the viewer and the reads within a change; also under an older key."""
    with real_server(tmp_path, environment={"PROGRESSDB_LOG_LEVEL": "info"}) as server:

        def ask(request_id: str, method: str, target: str, body: object = None, **more: Any) -> Any:
            headers = {"X-Request-Id": request_id, **more.pop("headers", {})}
            reply = server(method, target, body, headers=headers, **more)
            assert reply.status in (200, 202), reply
            return reply.json

        message = ask("write", "POST", "/v1/threads/t1/messages", {"author": "ada", "body": "x"})["id"]
        ask("other-write", "POST", "/v1/threads/t2/messages", {"author": "ada", "body": "x"})
        assert reads_of(server, "t1") == []
        ask("list", "GET", "/v1/threads/t1/messages?author=ada")
        ask("one", "GET", f"/v1/messages/{message}", key=FRONTEND, headers=signed("ada"))
        ask("old", "GET", f"/v1/messages/{message}/versions")
        ask("meta", "GET", "/v1/threads/t1?author=ada")
        ask("edit", "PUT", f"/v1/messages/{message}", {"author": "ada", "body": "y"})
        ask("other", "GET", "/v1/threads/t2/messages?author=ada")
        ask("rotate", "POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": "t1"}, key=ADMIN)
        ask("new-key", "GET", "/v1/messages?thread=t1")
        viewer = ViewerClient(server.port)
        viewer.login(ADMIN)
        page = viewer("/viewer/threads/t1")
        found = reads_of(server, "t1")
        # reading a thread through its own route opens its metadata too
        assert list(dict.fromkeys(found)) == [
            "list", "one", "old", "meta", "edit", "new-key", page.headers["x-request-id"]
        ]  # fmt: skip
        who = {event["request_id"]: event for event in server.log if event["event"] == "records_opened"}
        assert set(found) <= set(who)
        assert (who["list"]["role"], who["list"]["author"], who["list"]["user"]) == ("backend", "ada", None)
        assert (who["one"]["role"], who["one"]["user"]) == ("frontend", "ada")
        assert who[page.headers["x-request-id"]]["viewer_key"] > 0
        assert "write" not in who


def test_an_append_opens_no_record_and_is_not_logged(tmp_path: Path) -> None:
    with real_server(tmp_path, environment={"PROGRESSDB_LOG_LEVEL": "info"}) as server:
        for _ in range(3):
            server("POST", "/v1/threads/t1/messages", {"author": "ada", "body": "x"})
        assert [event for event in server.log if event["event"] == "records_opened"] == []
