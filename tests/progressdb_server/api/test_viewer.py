"""Sessions of the viewer: who gets one, for how long, and what a form of another site can do."""

import contextlib
import http.client
import os
import re
import shutil
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from minikms import Client
from progressdb_server.api.viewer import sessions
from progressdb_server.api.viewer.routes import JOBS_SHOWN_MAX, LOGIN_BURST
from progressdb_server.api.viewer.sessions import Sessions, same
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, signed
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.viewer_client import ViewerClient

PAGES = (
    "/viewer/",
    "/viewer/?part=live&period=day",
    "/viewer/threads",
    "/viewer/threads/t",
    "/viewer/messages/m",
    "/viewer/keys",
    "/viewer/jobs",
    "/viewer/jobs?part=rows",
    "/viewer/audit",
    "/viewer/status",
)
NO_MORE_ATTEMPTS = (
    "-c",
    "from progressdb_server.api.viewer import routes; routes.LOGIN_RPS = 0.0003; "
    "from progressdb_server.cli import main; main()",
)
"""The command, with login attempts that do not come back while a test makes others, however slow the machine is."""


@pytest.fixture(scope="module")
def inside(server: RealServer) -> ViewerClient:
    client = ViewerClient(server.port)
    assert client.login(ADMIN).status == 303
    return client


def test_without_a_session_every_page_leads_to_the_login(server: RealServer) -> None:
    for page in PAGES:
        reply = ViewerClient(server.port)(page)
        assert (reply.status, reply.text) == (303, "")
        place, _, query = reply.headers["location"].partition("?")
        assert (place, parse_qs(query).get("next", ["/viewer/"])) == ("/viewer/login", [page])
    forged = ViewerClient(server.port)
    forged.cookies["progressdb_viewer"] = "A" * 43
    assert forged("/viewer/").status == 303


def test_an_api_key_in_a_header_is_no_session(server: RealServer) -> None:
    assert server("GET", "/viewer/", key=ADMIN).status == 303


def test_the_cookie_is_for_this_site_and_no_script(inside: ViewerClient, server: RealServer) -> None:
    reply = ViewerClient(server.port).login(ADMIN)
    (cookie,) = [one for one in reply.set_cookies if one.startswith("progressdb_viewer=")]
    value, *attributes = cookie.split("; ")
    assert set(attributes) == {"Path=/viewer", "HttpOnly", "SameSite=Strict"}
    assert len(value) > 40
    assert ADMIN not in cookie


def test_every_page_carries_a_policy_that_allows_no_inline_script(inside: ViewerClient) -> None:
    for page in PAGES:
        reply = inside(page)
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert " style=" not in reply.text
        assert " onclick=" not in reply.text


def test_a_page_of_what_is_not_there_says_so(inside: ViewerClient) -> None:
    assert inside("/viewer/threads/nothing").status == 404
    assert inside("/viewer/messages/msg-1-000001").status == 404
    assert inside("/viewer/threads?q=msg-%2F").status == 404
    assert inside("/viewer/threads/a%2Fb").status == 404
    assert inside("/viewer/threads?q=" + "x" * 2000).status == 400
    assert "No threads found." in inside("/viewer/threads?q=nothing").text


@pytest.mark.parametrize("path", ["/viewer/nothere", "/viewer/threads/nothing", "/viewer/threads?q=" + "x" * 2000])
def test_an_error_is_a_page_with_the_way_on(inside: ViewerClient, path: str) -> None:
    reply = inside(path)
    assert reply.headers["content-type"].startswith("text/html")
    assert '<a href="/viewer/jobs">Jobs</a>' in reply.text and "Request id" in reply.text
    assert "Log out" in reply.text, "the session goes on"
    assert reply.status == 400 or f"Not found: <code>{path}</code>" in reply.text


def test_a_wrong_key_id_or_cursor_is_the_mistake_of_the_reader(inside: ViewerClient) -> None:
    for query in ("key=k_wrong", "key=k_" + "a" * 26, "cursor=wrong"):
        page = inside(f"/viewer/keys?{query}").text
        assert "because of what was asked for" in page and "gives no list" not in page, query


def test_head_is_answered_as_get_without_a_body(server: RealServer) -> None:
    for path, status in (("/viewer/login", 200), ("/viewer/", 303), ("/viewer/nothere", 404)):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("HEAD", path)
            reply = connection.getresponse()
            assert (reply.status, reply.read()) == (status, b""), path


@pytest.mark.parametrize(
    ("body", "shown"),
    [("plain", "plain"), ({"text": "said"}, "said"), ({"text": "said", "n": 1}, "&#34;n&#34;: 1"), ({"text": 5}, "5")],
)
def test_a_body_that_is_a_text_is_shown_as_one(
    server: RealServer, inside: ViewerClient, body: object, shown: str
) -> None:
    made = server("POST", "/v1/messages", {"author": "ann", "body": body}).json
    page = inside(f"/viewer/messages/{made['id']}").text
    assert shown in re.findall(r'<div class="body" dir="auto">(.*?)</div>', page, re.DOTALL)[0]
    assert ("text&#34;" in page) == (shown == "&#34;n&#34;: 1")
    assert re.search(r">\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC</time>", page), "times name their zone"

    def roles() -> set[str]:
        """Of the viewer's reads. A line may be written after its answer."""
        return {line["role"] for line in server.log if line["event"] == "records_opened" and line["viewer_key"]}

    wait_until(lambda: roles() == {"admin"})


def test_the_audit_key_is_shown_as_commands_print_it(server: RealServer, inside: ViewerClient) -> None:
    page = inside("/viewer/status").text
    assert re.search(r"<dt>Public key</dt><dd><code>[A-Za-z0-9+/]{43}=</code>", page)


def test_a_sealed_key_service_is_to_be_unsealed_and_not_restarted(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        client = ViewerClient(server.port)
        client.login(ADMIN)
        thread = server("POST", "/v1/messages", {"author": "ann", "body": 1}).json["thread"]
        with Client(server.db / "run" / "minikms.sock") as kms:
            kms.seal()
        for path in ("/viewer/", "/viewer/status", f"/viewer/threads/{thread}"):
            wait_until(partial(lambda path: "<code>minikms unseal</code>" in client(path).text, path))
            assert "systemctl restart" not in client(path).text


def test_a_form_needs_the_token_of_its_own_page(server: RealServer) -> None:
    """Another site's form comes without the token, also when the browser sends the cookie with it."""
    client = ViewerClient(server.port)
    client("/viewer/login")
    assert client("/viewer/login", {"csrf": "other", "key": ADMIN}).status == 403
    assert ViewerClient(server.port)("/viewer/login", {"csrf": "", "key": ADMIN}).status == 403
    assert client.login(ADMIN).status == 303
    assert client("/viewer/logout", {"csrf": "other"}).status == 403
    assert client("/viewer/logout", {}).status == 403
    token = client.cookies["progressdb_viewer"]
    client("/viewer/")
    assert client("/viewer/logout", {"csrf": client.csrf}).status == 303
    client.cookies["progressdb_viewer"] = token
    assert client("/viewer/").headers["location"] == "/viewer/login"


def test_a_login_leads_to_the_requested_page_and_ends_the_first_session(server: RealServer) -> None:
    client = ViewerClient(server.port)
    form = client(client("/viewer/jobs?part=rows").headers["location"]).text
    assert 'name="next" value="/viewer/jobs?part=rows"' in form
    reply = client("/viewer/login", {"csrf": client.csrf, "key": ADMIN, "next": "/viewer/jobs?part=rows"})
    assert reply.headers["location"] == "/viewer/jobs?part=rows"
    first = client.cookies["progressdb_viewer"]
    for place in ("https://example.org/", "//example.org/", "/viewer/\r\nx", "/admin/keys", "/viewer/\\example.org"):
        client("/viewer/login")
        reply = client("/viewer/login", {"csrf": client.csrf, "key": ADMIN, "next": place})
        assert (reply.status, reply.headers["location"]) == (303, "/viewer/"), place
    client.cookies["progressdb_viewer"] = first
    assert client("/viewer/").status == 303, "the first session has ended"


def test_only_refused_keys_count_and_each_client_of_a_proxy_for_itself(tmp_path: Path) -> None:
    proxies = {"PROGRESSDB_PROXIES": "127.0.0.0/8"}
    with real_server(tmp_path, program=NO_MORE_ATTEMPTS, environment=proxies) as server:
        admin, guesser = (ViewerClient(server.port, forwarded_for=f"198.51.100.{n}") for n in (1, 2))
        for _ in range(LOGIN_BURST + 3):
            assert admin.login(ADMIN).status == 303
        assert [guesser.login("wrong").status for _ in range(LOGIN_BURST + 1)] == [401] * LOGIN_BURST + [429]
        assert guesser.login(ADMIN).status == 303, "wrong keys lock out no right one"
        assert admin.login(ADMIN).status == 303


def test_only_an_admin_key_opens_and_attempts_are_few(tmp_path: Path) -> None:
    with real_server(tmp_path, program=NO_MORE_ATTEMPTS) as server:
        client = ViewerClient(server.port)
        keys = (BACKEND, FRONTEND, "", *["wrong"] * (LOGIN_BURST - 3))
        assert [client.login(key).status for key in keys] == [401] * LOGIN_BURST
        assert client.login("wrong").status == 429
        assert client.login(ADMIN).status == 303
        assert ADMIN not in server.log_path.read_text()


def test_threads_are_found_by_author_and_by_the_beginning_of_an_id(server: RealServer, inside: ViewerClient) -> None:
    made = [
        server("POST", "/v1/threads", {"title": f"T{number}", "author": author}).json["id"]
        for number, author in enumerate(["ann", "bob", "a&b"])
    ]
    for thread, author in zip(made, ["ann", "bob", "a%26b"], strict=True):
        assert [one for one in made if one in inside(f"/viewer/threads?author={author}").text] == [thread]
        assert [one for one in made if one in inside(f"/viewer/threads?q={thread}").text] == [thread]
    assert [one for one in made if one in inside("/viewer/threads?q=thread-").text] == made
    message = server("POST", "/v1/messages", {"thread": made[0], "author": "ann", "body": "x"}).json["id"]
    assert inside(f"/viewer/threads?q={message}").headers["location"] == f"/viewer/messages/{message}"


def test_a_destroyed_and_a_damaged_key_fail_no_list(tmp_path: Path) -> None:
    """The lists of threads, messages, versions and keys, and the pages of the viewer."""
    with real_server(tmp_path) as server:
        good, destroyed, damaged = (
            server("POST", "/v1/threads", {"title": f"T{number}", "author": "ann"}).json["id"] for number in range(3)
        )
        messages = {
            thread: server("POST", "/v1/messages", {"thread": thread, "author": "ann", "body": "Body of Ann"}).json[
                "id"
            ]
            for thread in (good, destroyed, damaged)
        }
        for message in messages.values():
            assert (
                server("POST", f"/v1/messages/{message}/reactions", {"id": "bob", "reaction": "Reaction of Bob"}).status
                == 200
            )
        keys = {
            thread: server("GET", f"/admin/keys/kms:map:thread:{thread}", key=ADMIN).body.decode()
            for thread in (destroyed, damaged)
        }
        with Client(server.db / "run" / "minikms.sock") as kms:
            kms.retire_key(keys[destroyed])
            kms.destroy_key(keys[destroyed])
    (server.db / "kms" / "kms-deks" / f"{keys[damaged]}.json").write_text("{}")
    with real_server(tmp_path) as server:
        expected = {good: "", destroyed: "key_destroyed", damaged: "key_unreadable"}
        for target, key in (("/admin/threads", ADMIN), ("/v1/threads?author=ann", BACKEND)):
            reply = server("GET", target, key=key)
            assert {thread["id"]: thread.get("error", "") for thread in reply.json["threads"]} == expected
            assert b"T0" in reply.body
        client = ViewerClient(server.port)
        client.login(ADMIN)
        page = client("/viewer/threads")
        assert page.status == 200
        for shown in (*expected, "T0", "key_destroyed", "key_unreadable"):
            assert shown in page.text
        for thread, message in messages.items():
            code = expected[thread]
            for target, versions in (
                (f"/v1/messages?thread={thread}", 1),
                (f"/v1/threads/{thread}/messages?author=ann", 1),
                (f"/v1/messages/{message}/versions", 2),
            ):
                for headers in ({}, signed("ann")):
                    reply = server("GET", target, headers=headers)
                    listed = reply.json["versions" if versions == 2 else "messages"]
                    assert [one.get("error", "") for one in listed] == [code] * versions, target
                    assert [one.get("body") for one in listed] == [None if code else "Body of Ann"] * versions
            assert server("GET", f"/v1/messages/{message}/versions", headers=signed("eve")).status == 403
            for target in (f"/viewer/threads/{thread}", f"/viewer/messages/{message}"):
                page = client(target)
                assert page.status == 200
                assert ("Body of Ann" in page.text, "Reaction of Bob" in page.text, code in page.text) == (
                    not code,
                    not code,
                    True,
                )
        assert len(server("GET", "/admin/keys?prefix=thread:", key=ADMIN).json["keys"]) == 9


# --- sessions, without a server ---------------------------------------------------------------------------------------
def test_a_session_ends_after_its_time_and_after_idleness() -> None:
    table = Sessions()
    token = table.begin(1, 0.0)
    step = sessions.IDLE_SECONDS_MAX - 1
    now = 0.0
    while now + step < sessions.SESSION_SECONDS_MAX:
        now += step
        assert table.find(token, now) is not None
    assert table.find(token, sessions.SESSION_SECONDS_MAX) is None
    idle = table.begin(1, 0.0)
    assert table.find(idle, sessions.IDLE_SECONDS_MAX) is None
    assert len(table) == 0


def test_logins_that_open_no_page_end_no_session_that_did() -> None:
    table = Sessions()
    token = table.begin(1, 0.0)
    assert table.find(token, 0.0) is not None
    for _ in range(5000):
        table.begin(1, 1.0)
    assert table.find(token, 2.0) is not None
    assert len(table) == sessions.SESSIONS_COUNT_MAX


def test_sessions_are_bounded_and_the_one_unused_for_longest_goes() -> None:
    table = Sessions()
    first, second = table.begin(1, 0.0), table.begin(1, 0.0)
    table.find(first, 1.0)
    for _ in range(sessions.SESSIONS_COUNT_MAX - 1):
        table.begin(1, 2.0)
    assert len(table) == sessions.SESSIONS_COUNT_MAX
    assert table.find(second, 3.0) is None
    assert table.find(first, 3.0) is not None


def test_an_absent_token_is_never_the_right_one() -> None:
    assert not same("", "")
    assert not same("a", "")
    assert same("a", "a")


def test_the_overview_names_what_needs_a_look_and_the_command(server: RealServer, inside: ViewerClient) -> None:
    page = inside("/viewer/").text
    shown = re.findall(r'<th scope="row"><code>(\w+)</code>', page)
    listed = server("GET", "/admin/readiness", key=ADMIN).json["conditions"]
    assert shown == [one["name"] for one in listed], "they are those of the list"
    assert {"auditor_none", "backup_none"} <= set(shown) and "progressdb backup create NAME" in page
    live = inside("/viewer/?part=live").text
    assert "<h2>What there is</h2>" in live and "<header>" not in live
    assert "The last day" in inside("/viewer/?period=day").text


def test_a_backup_that_was_cut_or_removed_is_not_well(server: RealServer, inside: ViewerClient) -> None:
    assert server("POST", "/admin/store_backup", {"name": "cut"}, key=ADMIN).status == 200
    assert "backup_" not in inside("/viewer/").text
    path = server.db / "backups" / "cut"
    largest = max((path / "store").iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    assert f"{largest.name} is not what was backed up" in inside("/viewer/").text
    shutil.rmtree(path)
    assert "cut is no complete backup" in inside("/viewer/").text


def test_a_job_that_stands_still_is_shown_behind_many_newer_ones(server: RealServer, inside: ViewerClient) -> None:
    thread = server("POST", "/v1/messages", {"author": "ann", "body": 1}).json["thread"]
    for number in range(9):
        server("POST", "/v1/messages", {"author": "ann", "body": number, "thread": thread})
    sent = {"thread_id": thread, "records_per_second": 1}
    job = server("POST", "/admin/rotate_thread_dek", sent, key=ADMIN).json["job_id"]
    assert server("POST", f"/admin/jobs/{job}/pause", key=ADMIN).status == 200
    for _ in range(JOBS_SHOWN_MAX):
        other = server("POST", "/v1/messages", {"author": "ann", "body": 1}).json["thread"]
        assert server("POST", "/admin/rotate_thread_dek", {"thread_id": other}, key=ADMIN).status == 202
    assert f"progressdb jobs resume {job}" in (page := inside("/viewer/").text)
    assert f'href="/viewer/jobs/{job}"' in page
    assert f"<code>progressdb jobs resume {job}</code>" in inside(f"/viewer/jobs/{job}").text
    assert inside("/viewer/jobs/job-none").status == 404


def test_a_key_is_shown_with_what_holds_it_and_the_command(server: RealServer, inside: ViewerClient) -> None:
    thread = server("POST", "/v1/messages", {"author": "ann", "body": 1}).json["thread"]
    begun = server("POST", "/admin/rotate_thread_dek", {"thread_id": thread}, key=ADMIN).json
    job = f"/admin/jobs/{begun['job_id']}"
    wait_until(lambda: server("GET", job, key=ADMIN).json["status"] == "done")
    old, new = (server("GET", job, key=ADMIN).json[name] for name in ("old_key", "new_key"))
    page = inside(f"/viewer/keys?thread={thread}").text
    assert f"<code>progressdb rotate-dek {thread}</code>" in page
    retired = inside(f"/viewer/keys?thread={thread}&state=retired").text
    assert old in retired and new not in retired
    assert re.search(r"<code>progressdb jobs show job[^<]+</code>", retired)
    with Client(server.db / "run" / "minikms.sock") as kms:
        kms.destroy_key(old)
    gone = inside(f"/viewer/keys?key={old}").text
    assert f"<code>minikms keys receipt {old}</code>" in gone
    assert "No keys found." in inside("/viewer/keys?thread=nothing").text
    assert inside("/viewer/keys?key=" + "k" * 2000).status == 400
