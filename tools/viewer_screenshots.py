"""Take the pictures of the viewer and the API page that docs/ shows: `python tools/viewer_screenshots.py`.

Starts a server of its own on a directory of its own, fills it with a small conversation, and looks at it with
Chromium. Owns `docs/images/*.png`. Needs the development environment and Debian's `chromium`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from minikms_auditor.auditor import Status  # noqa: E402 (the tests are importable from here on)
from tests.minikms_auditor.asking import beside  # noqa: E402 (as above)
from tests.progressdb_server.api.asgi_client import ADMIN  # noqa: E402 (as above)
from tests.progressdb_server.api.browser import Browser  # noqa: E402 (as above)
from tests.progressdb_server.api.real_server import RealServer, real_server  # noqa: E402 (as above)

IMAGES = PROJECT / "docs" / "images"
DESKTOP, PHONE = (1100, 760), (390, 760)
SAID = (
    ("amira", "Is the quarterly export encrypted too?"),
    ("jonas", "Every record is, under the thread's own key. The viewer shows which one."),
    ("amira", {"kind": "checklist", "items": ["rotate the key", "verify the audit log"]}),
    ("jonas", "Rotated. Nothing was down meanwhile."),
)


def fill(server: RealServer) -> tuple[str, str]:
    """A few threads; the ids of the shown one and of an edited message in it."""
    for title in ("Release notes", "Incident 14 March", "Onboarding"):
        thread = server("POST", "/v1/threads", {"title": title, "author": "jonas"}).json["id"]
        server("POST", "/v1/messages", {"thread": thread, "author": "jonas", "body": "..."})
    thread = str(server("POST", "/v1/threads", {"title": "Security review", "author": "amira"}).json["id"])
    made = [
        str(server("POST", "/v1/messages", {"thread": thread, "author": author, "body": body}).json["id"])
        for author, body in SAID
    ]
    server("PUT", f"/v1/messages/{made[0]}", {"author": "amira", "body": "Is the quarterly export encrypted, too?"})
    server("POST", f"/v1/messages/{made[1]}/reactions", {"id": "amira", "reaction": "+1"})
    server("POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}, key=ADMIN)
    return thread, made[0]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as opened:
        base = Path(directory)
        environment = {"PROGRESSDB_AUDIT_SOCKET": str(base / "q")}
        server = opened.enter_context(real_server(base, environment=environment))
        opened.enter_context(beside(server.db / "kms", base, Status("o", (), position_seq=10**6)))
        thread, message = fill(server)
        address = f"http://127.0.0.1:{server.port}"
        with Browser() as browser:
            browser.go(f"{address}/viewer/")
            browser.size(*DESKTOP)
            browser.screenshot(IMAGES / "viewer-login.png")
            browser.evaluate(f"document.getElementById('key').value = {ADMIN!r}")
            browser.follow("document.forms[0].submit()")
            for name, place, size, scheme in (
                ("viewer-overview", "/viewer/", DESKTOP, "light"),
                ("viewer-threads", "/viewer/threads", DESKTOP, "light"),
                ("viewer-conversation", f"/viewer/threads/{thread}", DESKTOP, "light"),
                ("viewer-conversation-phone", f"/viewer/threads/{thread}", PHONE, "dark"),
                ("viewer-versions", f"/viewer/messages/{message}", DESKTOP, "light"),
                ("viewer-keys", "/viewer/keys", DESKTOP, "light"),
                ("viewer-audit", f"/viewer/audit?thread={thread}&verb=reads", DESKTOP, "light"),
                ("viewer-jobs", "/viewer/jobs", DESKTOP, "dark"),
                ("viewer-key-service", "/viewer/status", DESKTOP, "light"),
                ("api-docs", "/docs/", DESKTOP, "dark"),
            ):
                browser.size(*size)
                browser.scheme(scheme)
                browser.go(address + place)
                browser.screenshot(IMAGES / f"{name}.png")
                print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main()
