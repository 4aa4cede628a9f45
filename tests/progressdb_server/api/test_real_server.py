"""Real processes: the server, its store and the miniKMS that it spawns."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, OTHER_BACKEND, Api, signed
from tests.progressdb_server.api.real_server import RealServer, real_server

PLANTED = "Zr7-planted-secret"


def files_below(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """Without those that a running server removes meanwhile."""
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_socket():
                yield path, path.read_bytes()


def test_the_service_manager_hears_from_the_server_alone_once_it_answers(tmp_path: Path) -> None:
    """Not from the miniKMS that it starts, which is ready earlier."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        with real_server(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as server:
            assert manager.recv(4096).decode() == f"READY=1\nSTATUS=serving http://127.0.0.1:{server.port}"


# --- the store in memory tells the truth ------------------------------------------------------------------------
# Each step: method, path, body, and what else is sent. `{name}` stands for an id that an earlier step has got.
Step = tuple[str, str, Any, dict[str, Any]]
STORY: list[Step] = [
    ("POST", "/v1/threads", {"title": "Café!", "author": "alice"}, {"keep": "t"}),
    ("GET", "/v1/threads?author=alice", None, {}),
    ("GET", "/v1/threads?author=alice&title=CAF", None, {}),
    ("GET", "/v1/threads?author=bob", None, {}),
    ("GET", "/v1/threads/{t}?author=alice", None, {}),
    ("GET", "/v1/threads/{t}?author=bob", None, {}),
    ("POST", "/v1/messages", {"thread": "{t}", "author": "alice", "body": {"n": [1, None, "é"]}}, {"keep": "m"}),
    ("POST", "/v1/messages", {"thread": "{t}", "author": "bob", "role": "system", "body": 2}, {"keep": "n"}),
    ("POST", "/v1/messages", {"thread": "{t}", "author": "bob", "body": 3, "reply_to": "{m}"}, {"keep": "o"}),
    ("GET", "/v1/messages?thread={t}", None, {}),
    ("GET", "/v1/messages?thread={t}&limit=2", None, {}),
    ("GET", "/v1/messages?thread={t}&limit=0", None, {}),
    ("GET", "/v1/messages?thread={t}&before={o}", None, {}),
    ("GET", "/v1/messages?thread={t}&after={m}", None, {}),
    ("GET", "/v1/messages?thread={t}&after={m}&before={o}", None, {}),
    ("GET", "/v1/messages?thread={t}", None, {"key": FRONTEND, "headers": signed("bob")}),
    ("GET", "/v1/messages?thread={t}", None, {"key": FRONTEND, "headers": signed("eve")}),
    ("GET", "/v1/threads/{t}/messages?author=eve", None, {}),
    ("PUT", "/v1/messages/{m}", {"author": "alice", "body": "edited", "thread": "elsewhere"}, {}),
    ("PUT", "/v1/messages/{m}", {"author": "bob", "body": "mine"}, {}),
    ("PUT", "/v1/threads/none/messages/{m}", {"author": "alice", "body": "x"}, {}),
    ("GET", "/v1/messages?thread={t}", None, {}),
    ("POST", "/v1/messages/{m}/reactions", {"id": "bob", "reaction": "+1"}, {}),
    ("POST", "/v1/messages/{m}/reactions", {"id": "carol", "reaction": "♥"}, {}),
    ("GET", "/v1/messages/{m}/reactions", None, {}),
    ("DELETE", "/v1/messages/{m}/reactions/bob", None, {}),
    ("DELETE", "/v1/messages/{m}/reactions/bob", None, {}),
    ("GET", "/v1/messages/{m}/versions", None, {}),
    ("DELETE", "/v1/messages/{n}?author=alice", None, {}),
    ("DELETE", "/v1/messages/{n}?author=bob", None, {}),
    ("GET", "/v1/messages/{n}", None, {}),
    ("GET", "/v1/messages?thread={t}", None, {}),
    ("GET", "/v1/messages?thread={t}&include_deleted=true", None, {}),
    ("DELETE", "/v1/messages/{o}?author=alice", None, {"key": ADMIN}),
    ("GET", "/v1/messages/{o}/versions", None, {}),
    ("GET", "/v1/messages/msg-1-1", None, {}),
    ("GET", "/v1/messages/msg-1-1/versions", None, {}),
    ("GET", "/v1/messages/msg-1-1/reactions", None, {}),
    ("PUT", "/v1/threads/{t}", {"title": "Renamed", "author": "alice"}, {}),
    ("PUT", "/v1/threads/{t}", {"title": "Mine", "author": "bob"}, {}),
    ("PUT", "/v1/threads/none", {"title": "x", "author": "bob"}, {}),
    ("DELETE", "/v1/threads/none?author=bob", None, {}),
    ("DELETE", "/v1/threads/{t}?author=bob", None, {}),
    ("POST", "/v1/threads/named/messages", {"author": "alice", "body": 1}, {"keep": "p"}),
    ("GET", "/v1/threads/named?author=alice", None, {}),
    ("POST", "/v1/messages", {"author": "a", "body": 7}, {"headers": {"Idempotency-Key": "k"}, "keep": "q"}),
    ("POST", "/v1/messages", {"author": "a", "body": 7}, {"headers": {"Idempotency-Key": "k"}}),
    ("POST", "/v1/messages", {"author": "a", "body": 8}, {"headers": {"Idempotency-Key": "k"}}),
    ("POST", "/v1/threads", {"author": "a", "title": "i"}, {"headers": {"Idempotency-Key": "l"}, "keep": "r"}),
    ("POST", "/v1/threads", {"author": "a", "title": "i"}, {"headers": {"Idempotency-Key": "l"}}),
    ("DELETE", "/v1/threads/{t}?author=alice", None, {}),
    ("GET", "/v1/threads/{t}?author=alice", None, {}),
    ("GET", "/v1/threads/{t}?author=alice", None, {"key": ADMIN}),
    ("GET", "/v1/threads?author=alice", None, {}),
    ("GET", "/v1/threads/{t}/messages?author=alice", None, {}),
    ("GET", "/v1/messages?thread={t}", None, {}),
    ("GET", "/v1/messages?thread={t}&include_deleted=true", None, {}),
    ("POST", "/v1/messages", {"thread": "{t}", "author": "alice", "body": 9}, {}),
    ("DELETE", "/v1/threads/{t}?author=alice", None, {}),
]


def told(call: Any) -> list[Any]:
    """The story's answers, with ids and times replaced by their order of appearance."""
    names: dict[str, str] = {}
    seen: dict[str, str] = {}
    answers = []

    def numbered(word: str, found: re.Match[str]) -> str:
        return seen.setdefault(found[0], f"<{word} {len(seen)}>")

    def plain(text: str) -> str:
        for pattern, word in ((r"(?:msg|thread)-\d+-\d+", "id"), (r"\b\d{19}\b", "time")):
            text = re.sub(pattern, partial(numbered, word), text)
        return re.sub(r"New Thread #\d+", "New Thread #n", text)

    for method, target, sent_body, more in STORY:
        path, body = target, sent_body
        for name, made in names.items():
            path = path.replace("{" + name + "}", made)
            body = json.loads(json.dumps(body).replace("{" + name + "}", made))
        sent = {name: value for name, value in more.items() if name != "keep"}
        reply = call(method, path, body, **sent)
        if "keep" in more:
            names[more["keep"]] = reply.json["id"]
        answered = json.loads(reply.body) if reply.body else None
        answers.append((method, path.partition("?")[0].count("/"), reply.status, plain(json.dumps(answered))))
    return answers


def test_the_store_in_memory_answers_as_the_real_one_does(tmp_path: Path) -> None:
    """Both are empty: the story lists threads."""
    with real_server(tmp_path) as server:
        real, imagined = told(server), told(Api())
    for step, one, other in zip(STORY, real, imagined, strict=True):
        assert one == other, step


# --- what is stored ---------------------------------------------------------------------------------------------
def test_what_a_user_typed_and_every_key_stay_out_of_files_and_logs(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        thread = server("POST", "/v1/threads", {"title": PLANTED, "author": "alice"}).json["id"]
        sent = {"thread": thread, "author": "alice", "body": {"text": PLANTED}}
        message = server("POST", "/v1/messages", sent, headers={"Idempotency-Key": PLANTED}).json["id"]
        server("PUT", f"/v1/messages/{message}", {"author": "alice", "body": PLANTED + "2"})
        server("POST", f"/v1/messages/{message}/reactions", {"id": "bob", "reaction": PLANTED})
        server("GET", f"/v1/threads?author=alice&title={PLANTED}")
        server("GET", f"/nowhere/{PLANTED}?x={PLANTED}", headers={"X-Anything": PLANTED})
        server("POST", "/v1/messages", {"author": PLANTED * 20, "body": PLANTED})
        server("GET", "/v1/threads", key=PLANTED)
        assert server("GET", f"/v1/messages/{message}").json["body"] == PLANTED + "2"
        server("DELETE", f"/v1/messages/{message}?author=alice")
        seen_alive = [name for name, content in files_below(tmp_path) if PLANTED.encode() in content]
    stored = list(files_below(tmp_path))
    assert len(stored) > 5
    assert seen_alive == []
    for secret in (PLANTED, BACKEND, OTHER_BACKEND, FRONTEND, ADMIN, PLANTED.lower()):
        assert [name for name, content in stored if secret.encode() in content] == [], secret


def test_a_request_id_goes_through_the_answer_both_logs_and_the_audit_log(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        reply = server("POST", "/v1/messages", {"author": "a", "body": 1}, headers={"X-Request-Id": "trace-a1b2"})
        assert reply.headers["x-request-id"] == "trace-a1b2"
    assert "trace-a1b2" in (tmp_path / "db" / "kms" / "minikms-audit.log").read_text()
    (line,) = [line for line in server.log if line.get("request_id") == "trace-a1b2"]
    assert (line["route"], line["status"], line["role"]) == ("/v1/messages", 200, "backend")


# --- restarts ---------------------------------------------------------------------------------------------------
def test_a_restart_keeps_everything_also_idempotency_keys(tmp_path: Path) -> None:
    sent = {"author": "alice", "body": {"text": "once"}}
    retry = {"Idempotency-Key": "order-66"}
    with real_server(tmp_path) as server:
        message = server("POST", "/v1/messages", sent, headers=retry).json
        titled, retry_thread = {"author": "alice", "title": "T"}, {"Idempotency-Key": "order-67"}
        thread = server("POST", "/v1/threads", titled, headers=retry_thread).json
        server("PUT", f"/v1/messages/{message['id']}", {"author": "alice", "body": "edited"})
        server.kill()
    with real_server(tmp_path) as server:
        assert server("POST", "/v1/messages", sent, headers=retry).json == message
        other = server("POST", "/v1/messages", {**sent, "body": "other"}, headers=retry)
        assert (other.status, other.json) == (
            409,
            {"error": "this Idempotency-Key was used before with another request"},
        )
        listed = server("GET", f"/v1/messages?thread={message['thread']}").json["messages"]
        assert [one["body"] for one in listed] == ["edited"]
        assert server("POST", "/v1/threads", titled, headers=retry_thread).json == thread
        assert len(server("GET", "/v1/threads?author=alice").json["threads"]) == 2
        assert server.stop() == 0


def test_a_stop_by_signal_ends_the_server_and_its_key_service(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        server("POST", "/v1/messages", {"author": "a", "body": 1})
        for _ in range(3):  # an impatient operator
            os.kill(server.pid, signal.SIGINT)
        assert server.stop() == 0
    log = server.log_path.read_text()
    assert "miniKMS stopped" in log
    assert "Traceback" not in log
    with real_server(tmp_path) as server:
        assert server("GET", "/admin/stats").json == {"threads": 1, "messages": 1}


def minikms_pid(server: RealServer) -> int:
    return int([line["pid"] for line in server.log if line["event"] == "miniKMS spawned"][-1])


def test_a_key_service_that_is_killed_costs_a_short_wait_and_no_message(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        thread = server("POST", "/v1/messages", {"author": "a", "body": 0}).json["thread"]
        acknowledged = 1
        for _ in range(3):
            os.kill(minikms_pid(server), signal.SIGKILL)
            for _ in range(3):
                reply = server("POST", "/v1/messages", {"thread": thread, "author": "a", "body": acknowledged})
                assert reply.status in (200, 503), reply
                acknowledged += reply.status == 200
        listed = server("GET", f"/v1/messages?thread={thread}").json["messages"]
        assert [message["body"] for message in listed][:acknowledged] == [*range(acknowledged)]
        assert server.stop() == 0


@pytest.mark.torture
def test_while_the_key_service_hangs_requests_get_a_503_in_bounded_time(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        thread = server("POST", "/v1/messages", {"author": "a", "body": "first"}).json["thread"]
        os.kill(minikms_pid(server), signal.SIGSTOP)
        for method, path, body in (
            ("POST", "/v1/messages", {"thread": thread, "author": "a", "body": "x"}),
            ("GET", f"/v1/messages?thread={thread}", None),
        ):
            reply = server(method, path, body)
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert "key service" in reply.json["error"]
        assert server("GET", "/healthz").status == 200
        os.kill(minikms_pid(server), signal.SIGCONT)
        listed = server("GET", f"/v1/messages?thread={thread}").json["messages"]
        assert listed[0]["body"] == "first"


def failed_start(directory: Path, *words: str) -> str:
    program = [sys.executable, "-m", "progressdb_server", "--db", str(directory / "db"), "--dev", *words]
    started = subprocess.run(
        program, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False
    )
    assert started.returncode in (1, 2)
    assert "Traceback" not in started.stderr
    return started.stderr


def test_a_start_that_can_not_be_says_why(server: RealServer, tmp_path: Path) -> None:
    taken = failed_start(tmp_path, "--addr", f"127.0.0.1:{server.port}")
    assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in taken
    locked = failed_start(server.db.parent, "--addr", "127.0.0.1:0")
    assert "is in use by another process" in locked
    (tmp_path / "file").write_text("")
    assert "can't make the data directory" in failed_start(tmp_path / "file", "--addr", "127.0.0.1:0")
    assert server("GET", "/healthz").status == 200


def test_a_stop_while_it_starts_ends_the_server_at_once(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "progressdb_server", "--addr", "127.0.0.1:0", "--db", str(tmp_path / "db")]
    variables = {"PATH": os.environ["PATH"], "PROGRESSDB_KMS_SPAWN": "0"}  # so it waits for one that never comes
    with subprocess.Popen(program, env=variables, stderr=subprocess.PIPE, text=True) as starting:
        assert starting.stderr is not None
        assert "waiting for miniKMS" in starting.stderr.readline()
        starting.terminate()
        _, said = starting.communicate(timeout=60)  # it would fail after ten seconds
        assert starting.returncode == 0
        assert "listening" not in said
        assert "Traceback" not in said


def test_without_an_api_key_the_server_refuses_everything_but_health(tmp_path: Path) -> None:
    """Its log says so."""
    none = {f"PROGRESSDB_API_{role}_KEYS": "" for role in ("BACKEND", "FRONTEND", "ADMIN")}
    with real_server(tmp_path, environment=none) as server:
        assert any("no API key is configured" in line["event"] for line in server.log)
        assert server("GET", "/v1/threads").status == 401
        assert server("GET", "/healthz", key=None).status == 200


def test_the_log_of_a_start_names_the_pages_and_where_a_key_comes_from(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        wait_until(lambda: any(line["event"] == "documentation" for line in server.log))
        pages = {line["event"]: line for line in server.log}
        assert pages["viewer"]["url"] == f"http://127.0.0.1:{server.port}/viewer/"
        assert "PROGRESSDB_API_ADMIN_KEYS" in pages["viewer"]["key"]
        assert pages["documentation"]["url"] == f"http://127.0.0.1:{server.port}/docs/"


# --- many at once -----------------------------------------------------------------------------------------------
def test_appends_from_many_connections_have_one_order_and_lose_nothing(server: RealServer) -> None:
    clients, each = 12, 40
    thread = server("POST", "/v1/threads", {"author": "alice", "title": "Busy"}).json["id"]
    made: list[list[str]] = [[] for _ in range(clients)]

    def append(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for at in range(each):
            sent = {"thread": thread, "author": f"user-{number}", "body": [number, at]}
            made[number].append(server("POST", "/v1/messages", sent, connection=connection).json["id"])
        connection.close()

    workers = [threading.Thread(target=append, args=(number,)) for number in range(clients)]
    lists: list[list[str]] = []
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        listed = server("GET", f"/v1/messages?thread={thread}").json["messages"]
        lists.append([message["id"] for message in listed])
    for worker in workers:
        worker.join()
    final = server("GET", f"/v1/messages?thread={thread}").json["messages"]
    ids = [message["id"] for message in final]
    assert len(ids) == clients * each
    assert sorted(ids) == sorted(one for of_client in made for one in of_client)
    assert [message["ts"] for message in final] == sorted({message["ts"] for message in final})
    for number, of_client in enumerate(made):
        assert [message["body"][1] for message in final if message["body"][0] == number] == [*range(each)]
        assert [one for one in ids if one in set(of_client)] == of_client
    for seen in lists:  # every reader saw a beginning of the same order
        assert seen == ids[: len(seen)]


def test_an_append_is_answered_while_a_long_list_of_threads_is_sent(server: RealServer) -> None:
    """Its client reads the rest after the append."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        for _ in range(100):
            server("POST", "/v1/threads", {"author": "many", "title": "x" * 4000}, connection=connection)
        connection.request("GET", "/v1/threads?author=many", headers={"X-API-Key": BACKEND})
        listed = connection.getresponse()
        beginning = listed.read(1)
        assert server("POST", "/v1/messages", {"author": "bob", "body": 1}).status == 200
        assert len(json.loads(beginning + listed.read())["threads"]) == 100


def test_the_memory_of_large_bodies_returns_to_the_system(tmp_path: Path) -> None:
    """glibc alone keeps 130 MiB after these."""
    with real_server(tmp_path, program=("-P", "-m", "progressdb_server")) as server:

        def resident_mib() -> int:
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
            assert found is not None
            return int(found[1]) // 1024

        def post(_: int) -> int:
            return server("POST", "/v1/messages", {"author": "ann", "body": "x" * 900_000}).status

        before = resident_mib()
        with ThreadPoolExecutor(16) as threads:
            assert set(threads.map(post, range(96))) == {200}
        wait_until(lambda: resident_mib() < before + 60)
