"""The real server: its routes for jobs, the commands on them, a kill in the middle."""

import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.jobs.runner import RUNNING_MAX
from tests.harness import forked
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND
from tests.progressdb_server.api.real_server import RealServer, real_server

UNKNOWN = "job-00000000000000000001-00000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_server(tmp_path_factory.mktemp("server"), environment={"PROGRESSDB_ROTATION_RATE": "0"}) as started:
        yield started


def new_thread(server: RealServer, messages: int) -> str:
    body = {"title": "a thread", "author": "ann"}
    thread: str = server("POST", "/v1/threads", body).json["id"]
    append(server, thread, messages)
    return thread


def append(server: RealServer, thread: str, messages: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for n in range(messages):
        body = {"thread": thread, "author": "ann", "body": {"n": n}}
        assert server("POST", "/v1/messages", body, connection=connection).status == 200
    connection.close()


def bodies(server: RealServer, thread: str) -> list[Any]:
    return [message["body"]["n"] for message in server("GET", f"/v1/messages?thread={thread}").json["messages"]]


def rotate(server: RealServer, thread: str, **how: Any) -> Any:
    return server("POST", "/admin/rotate_thread_dek", {"thread_id": thread, **how}, key=ADMIN)


def ended(server: RealServer, job: str) -> Any:
    deadline = time.monotonic() + 60
    while True:
        found = server("GET", f"/admin/jobs/{job}", key=ADMIN).json
        if found["status"] not in ("queued", "running", "verifying"):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(server: RealServer, *words: str, key: str = ADMIN) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.port}"
    return forked.run("progressdb_server", *words, env={"PROGRESSDB_URL": url, "PROGRESSDB_API_ADMIN_KEYS": key})


def test_a_rotation_answers_at_once_with_the_new_key_and_ends_done(server: RealServer) -> None:
    thread = new_thread(server, 20)
    begun = rotate(server, thread)
    assert begun.status == 202
    assert begun.json.keys() == {"job_id", "new_key", "status"}
    mapped = server("GET", f"/admin/keys/kms:map:thread:{thread}", key=ADMIN).body.decode()
    assert begun.json["new_key"] == mapped
    job = ended(server, begun.json["job_id"])
    assert (job["status"], job["done"], job["total"], job["failed"]) == ("done", 21, 21, 0)
    assert (job["job_id"], job["thread_id"], job["new_key"]) == (begun.json["job_id"], thread, mapped)
    assert bodies(server, thread) == list(range(20))


def test_with_wait_the_answer_comes_when_it_is_done(server: RealServer) -> None:
    thread = new_thread(server, 5)
    waited = server("POST", "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}, key=ADMIN)
    assert waited.status == 200
    mapped = server("GET", f"/admin/keys/kms:map:thread:{thread}", key=ADMIN).body.decode()
    assert waited.json == {"new_key": mapped, "status": "ok"}
    assert bodies(server, thread) == list(range(5))


@pytest.mark.parametrize(
    ("target", "body", "status", "error"),
    [
        ("/admin/rotate_thread_dek", {}, 400, "missing thread_id"),
        ("/admin/rotate_thread_dek", {"thread_id": ""}, 400, "missing thread_id"),
        ("/admin/rotate_thread_dek", ["t"], 400, "invalid request"),
        ("/admin/rotate_thread_dek", {"thread_id": 7}, 400, "invalid request"),
        ("/admin/rotate_thread_dek", {"thread_id": "t", "destroy_old_after": "soon"}, 400, "invalid request"),
        ("/admin/rotate_thread_dek", {"thread_id": "t", "records_per_second": -1}, 400, "invalid request"),
        ("/admin/rotate_thread_dek", {"thread_id": "nobody"}, 404, "thread not found"),
        ("/admin/rotate_deks", {}, 400, "invalid request"),
        ("/admin/rotate_deks", {"all": True, "older_than": "1d"}, 400, "invalid request"),
        ("/admin/rotate_deks", {"thread_ids": ["nobody"]}, 404, "thread not found"),
        (f"/admin/jobs/{UNKNOWN}/pause", None, 404, "job not found"),
        ("/admin/jobs/..%2f/cancel", None, 404, "job not found"),
        (f"/admin/jobs/{UNKNOWN}/restore", None, 404, "job not found"),
    ],
)
def test_a_request_that_means_nothing_is_refused_with_the_reason(
    server: RealServer, target: str, body: object, status: int, error: str
) -> None:
    refused = server("POST", target, body, key=ADMIN)
    assert refused.status == status
    if "%2f" not in target:
        assert refused.json == {"error": error}


def test_only_an_admin_key_rotates_sees_or_steers(server: RealServer) -> None:
    for method, target in [
        ("POST", "/admin/rotate_thread_dek"),
        ("POST", "/admin/rotate_deks"),
        ("GET", "/admin/jobs"),
        ("GET", f"/admin/jobs/{UNKNOWN}"),
        ("GET", f"/admin/jobs/{UNKNOWN}/events"),
        ("POST", f"/admin/jobs/{UNKNOWN}/cancel"),
        ("GET", "/admin/backups"),
        ("DELETE", f"/admin/jobs/{UNKNOWN}/backups"),
    ]:
        for key in (BACKEND, FRONTEND):
            assert server(method, target, key=key).status == 403
        assert server(method, target, key=None).status == 401


def test_events_tell_of_each_change_and_end_with_the_job(server: RealServer) -> None:
    """The job waits for its turn until the watching has begun."""
    before = [rotate(server, new_thread(server, 60), records_per_second=1).json["job_id"] for _ in range(RUNNING_MAX)]
    thread = new_thread(server, 300)
    begun = rotate(server, thread, records_per_second=600).json
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", f"/admin/jobs/{begun['job_id']}/events", headers={"X-API-Key": ADMIN})
    answer = connection.getresponse()
    assert answer.headers["content-type"] == "text/event-stream"
    told = answer.readline()
    for job in before:
        assert server("POST", f"/admin/jobs/{job}/cancel", key=ADMIN).status == 200
    told += answer.read()
    connection.close()
    events = [json.loads(data) for data in re.findall(r"^event: job\ndata: (.*)\n\n", told.decode(), re.MULTILINE)]
    assert (events[0]["status"], events[-1]["status"]) == ("queued", "done")
    done = [event["done"] for event in events]
    assert done == sorted(done)


def test_a_server_that_stops_ends_the_watching_and_goes_on_after_its_start(tmp_path: Path) -> None:
    with real_server(tmp_path) as first:
        thread = new_thread(first, 200)
        begun = rotate(first, thread, records_per_second=100).json
        watching = http.client.HTTPConnection("127.0.0.1", first.port, timeout=60)
        watching.request("GET", f"/admin/jobs/{begun['job_id']}/events", headers={"X-API-Key": ADMIN})
        answer = watching.getresponse()
        assert answer.readline() == b"event: job\n"
        assert first.stop() == 0
        answer.read()  # to the last chunk: the stop has ended the answer, and not cut it off when its time was over
        watching.close()
    with real_server(tmp_path) as second:
        job = ended(second, begun["job_id"])
        assert (job["status"], job["done"]) == ("done", 201)
        assert bodies(second, thread) == list(range(200))


def test_the_commands_rotate_list_show_and_prune(server: RealServer) -> None:
    thread, other = new_thread(server, 10), new_thread(server, 3)
    done = command(server, "rotate-dek", thread, other, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    jobs = json.loads(done.stdout)
    assert {(job["thread_id"], job["status"], job["done"]) for job in jobs} == {
        (thread, "done", 11),
        (other, "done", 4),
    }

    one = command(server, "rotate-dek", thread, "--destroy-old-after", "30d", "--unthrottled")
    assert re.fullmatch(rf"{thread}: done, 11 of 11 records re-encrypted \[job-\S+\]\n", one.stdout), one
    listed = command(server, "jobs", "list", "--status", "done")
    assert listed.returncode == 0
    assert listed.stdout.splitlines()[1].split()[1:7] == [thread, "done", "11", "11", "0", "11"]
    shown = command(server, "jobs", "show", jobs[0]["job_id"])
    assert f"thread_id: {jobs[0]['thread_id']}\nkind: rotation\nstatus: done\n" in shown.stdout
    watched = command(server, "jobs", "watch", jobs[0]["job_id"], "--json")
    assert json.loads(watched.stdout) == jobs[0]

    of_other = next(job["job_id"] for job in jobs if job["thread_id"] == other)
    restored = command(server, "rotation-backups", "restore", of_other)
    assert restored.stdout == "4 records restored, 0 left: they were changed since\n"
    assert bodies(server, other) == list(range(3))
    unasked = command(server, "rotation-backups", "prune", of_other)
    assert (unasked.returncode, unasked.stdout) == (2, "")
    assert "nothing was done" in unasked.stderr and "--yes" in unasked.stderr
    pruned = command(server, "rotation-backups", "prune", of_other, "--yes")
    assert pruned.stdout == "4 backups of 1 job removed\n"
    assert of_other not in command(server, "rotation-backups", "list").stdout
    assert bodies(server, other) == list(range(3))


def test_the_commands_steer_a_job(server: RealServer) -> None:
    thread = new_thread(server, 200)
    begun = command(server, "rotate-dek", thread, "--rate", "1", "--no-wait", "--json")
    job = json.loads(begun.stdout)["job_id"]
    assert command(server, "jobs", "pause", job).stdout.startswith(f"{thread}: paused")
    again = command(server, "jobs", "pause", job)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "progressdb: the server refused: a job that is paused can't be paused\n"
    assert command(server, "jobs", "resume", job).returncode == 0
    assert command(server, "jobs", "cancel", job).stdout.startswith(f"{thread}: cancelled")
    assert command(server, "jobs", "watch", job).returncode == 1
    assert bodies(server, thread) == list(range(200))


@pytest.mark.parametrize(
    ("words", "key", "status", "said"),
    [
        (["jobs", "show", UNKNOWN], ADMIN, 2, "the server refused: job not found"),
        (["rotate-dek", "nobody"], ADMIN, 2, "the server refused: thread not found"),
        (["rotate-dek"], ADMIN, 2, "name threads, or give one of --all"),
        (["rotate-dek", "t", "--all"], ADMIN, 2, "name threads, or give one of --all"),
        (["jobs", "list"], "", 2, "no admin key: set PROGRESSDB_API_ADMIN_KEYS"),
        (["jobs", "list"], "wrong-key", 1, "unauthorized (is the key one of the server's admin keys?)"),
        (["jobs", "list"], BACKEND, 1, "forbidden (an admin key is needed)"),
        (["jobs", "list", "--api-key-file", "/nonexistent/key"], ADMIN, 2, "the key file /nonexistent/key does not"),
        (["jobs", "list", "--url", "ftp://x"], ADMIN, 2, "ftp://x is no address of a server"),
        (["jobs", "list", "--url", "http://127.0.0.1:1"], ADMIN, 2, "did not answer: Connection refused"),
        (["rotation-backups", "prune"], ADMIN, 2, "name jobs, or give one of --older-than and --all"),
    ],
)
def test_what_the_commands_refuse_they_say_in_a_sentence(
    server: RealServer, words: list[str], key: str, status: int, said: str
) -> None:
    done = command(server, *words, key=key)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not key or key not in done.stderr


def test_threads_are_rotated_all_or_none(server: RealServer) -> None:
    thread = new_thread(server, 2)
    before = len(server("GET", "/admin/jobs", key=ADMIN).json["jobs"])
    refused = server("POST", "/admin/rotate_deks", {"thread_ids": [thread, "nobody"]}, key=ADMIN)
    assert (refused.status, refused.json) == (404, {"error": "thread not found"})
    assert len(server("GET", "/admin/jobs", key=ADMIN).json["jobs"]) == before


def test_all_threads_are_rotated_by_one_command(server: RealServer) -> None:
    threads = [new_thread(server, 2) for _ in range(3)]
    done = command(server, "rotate-dek", "--all", "--json")
    (walk,) = json.loads(done.stdout)
    assert (done.returncode, walk["status"], walk["done"]) == (0, "done", walk["total"])
    rotations = server("GET", "/admin/jobs?status=done", key=ADMIN).json["jobs"]
    assert set(threads) <= {job["thread_id"] for job in rotations if job["trigger"] == walk["job_id"]}
    said = command(server, "rotate-dek", "--older-than", "1d")
    assert re.fullmatch(r"all threads: done, 0 of 0 threads rotated \[job-\S+\]\n", said.stdout), said


def test_jobs_are_listed_in_pages(server: RealServer) -> None:
    thread = new_thread(server, 1)
    for _ in range(3):
        ended(server, rotate(server, thread).json["job_id"])
    for path in ("/admin/jobs", "/admin/backups"):
        everything = server("GET", path, key=ADMIN).json["jobs"]
        first = server("GET", f"{path}?limit=2", key=ADMIN).json
        second = server("GET", f"{path}?limit=2&before={first['older']}", key=ADMIN).json
        assert first["jobs"] + second["jobs"] == everything[:4]
        assert server("GET", f"{path}?limit=10001", key=ADMIN).json == {"jobs": everything}
        assert server("GET", f"{path}?limit=0", key=ADMIN).json == {"jobs": []}
        for query in ("limit=x", "limit=-1", "before=x"):
            assert server("GET", f"{path}?{query}", key=ADMIN).status == 400
    listed = command(server, "jobs", "list", "--limit", "2", "--json")
    assert len(json.loads(listed.stdout)) == 2
