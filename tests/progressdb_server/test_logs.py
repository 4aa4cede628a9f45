"""The logs of both programs: structured, tied together by one request id, and empty of secrets and private text."""

import base64
from pathlib import Path

from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, OTHER_BACKEND, signature, signed
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.viewer_client import ViewerClient

PLANTED = "Zx9-planted-private-text"
REQUEST_ID = "trace/2026:11.24+request=1"


def provoke(server: RealServer) -> None:
    """Private text and keys in every place that a request has, in good requests and in bad ones."""
    author = {"X-User-ID": "alice", "X-Request-Id": REQUEST_ID}
    thread = server("POST", "/v1/threads", {"title": PLANTED}, headers=author).json["id"]
    message = server("POST", "/v1/messages", {"thread": thread, "body": PLANTED}, headers=author).json["id"]
    server("PUT", f"/v1/messages/{message}", {"body": {PLANTED: [PLANTED]}}, headers=author)
    server("POST", f"/v1/messages/{message}/reactions", {"id": "bob", "reaction": PLANTED}, headers=author)
    server("GET", f"/v1/threads?title={PLANTED}&slug={PLANTED}", headers=author)
    server("GET", f"/v1/threads/{thread}/messages", headers=signed("alice"), key=FRONTEND)
    for target in (f"/{PLANTED}", f"/v1/messages/{PLANTED}", f"/v1/messages?thread={PLANTED}%00", f"/?{PLANTED}=1"):
        for method in ("GET", "DELETE", "PATCH"):
            server(method, target, {"body": PLANTED}, headers=author)
    server("POST", "/v1/messages", {"body": PLANTED, "role": [PLANTED]}, headers=author)
    server("POST", "/v1/_sign", {"userId": "alice"})
    server("POST", "/v1/messages", {"body": PLANTED}, headers={"X-User-ID": "a", "X-User-Signature": PLANTED})
    server("POST", "/v1/messages", {"body": PLANTED}, key=PLANTED)
    server("POST", "/v1/messages", {"body": 1}, headers={**author, "Idempotency-Key": PLANTED})
    server("POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}, key=ADMIN)
    server("POST", "/admin/rotate_thread_dek", {"thread_id": PLANTED}, key=ADMIN)
    client = ViewerClient(server.port)
    client.login(PLANTED)
    client.login(ADMIN)
    for page in (
        "/viewer/",
        f"/viewer/threads?q={PLANTED}",
        f"/viewer/threads/{thread}",
        f"/viewer/messages/{message}",
    ):
        client(page)
    client("/viewer/logout", {"csrf": PLANTED})


def test_logs_hold_no_secret_and_nothing_that_a_user_typed(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        provoke(server)
        cookie = ViewerClient(server.port)
        cookie.login(ADMIN)
    root = (server.db / "kms.master-key").read_text().strip()
    secrets = [
        PLANTED,
        BACKEND,
        OTHER_BACKEND,
        FRONTEND,
        ADMIN,
        signature("alice"),
        cookie.cookies["progressdb_viewer"],
    ]
    secrets += [root, root.upper(), base64.b64encode(bytes.fromhex(root)).decode()]
    written = {path: path.read_text() for path in (server.log_path, server.db / "kms" / "minikms-audit.log")}
    found = [
        f"{path.name}: {line[:200]}"
        for path, text in written.items()
        for line in text.splitlines()
        for secret in secrets
        if secret in line or base64.b64encode(secret.encode()).decode().rstrip("=")[:-1] in line
    ]
    assert found == []
    assert len(written[server.log_path].splitlines()) > 40


def test_every_line_of_both_is_one_json_object_with_its_level_and_time(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        server("POST", "/v1/messages", {"body": "hello"}, headers={"X-User-ID": "alice"})
    for event in server.log:
        assert {"event", "level", "timestamp"} <= event.keys(), event
    programs = {event["event"]: event.get("program", "progressdb") for event in server.log}
    assert (programs["serving"], programs["listening"]) == ("minikms", "progressdb")
