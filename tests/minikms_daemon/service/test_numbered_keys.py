"""Numbered keys: each next key of a thread has the next number, which is stored with it and used once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minikms.keys.dek import UNNUMBERED_COUNT_MAX
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import Answer, ask, new_key, post


def numbered(daemon: LiveDaemon, thread_id: str, replaces: str = "", purpose: str = "data") -> Answer:
    body = {"thread_id": thread_id, "purpose": purpose, "numbered": True}
    return post(daemon, "/create_dek_for_thread", body | ({"replaces": replaces} if replaces else {}))


def numbers(daemon: LiveDaemon, thread_id: str) -> list[tuple[int, str]]:
    keys = ask(daemon, "GET", f"/keys?thread_id={thread_id}").body["keys"]
    return [(key["number"], key["state"]) for key in keys]


def test_each_key_gets_the_next_number_and_retires_the_one_before(daemon: LiveDaemon) -> None:
    key_id = ""
    for number in (1, 2, 3):
        key_id = numbered(daemon, "n-1", key_id).body["key_id"]
        record = json.loads((daemon.data_dir / "kms-deks" / f"{key_id}.json").read_bytes())
        assert record["number"] == number
    assert numbers(daemon, "n-1") == [(1, "retired"), (2, "retired"), (3, "active")]
    assert post(daemon, "/encrypt", {"key_id": key_id, "plaintext": ""}).status == 200


def test_a_numbered_key_replaces_the_newest_of_its_thread(daemon: LiveDaemon) -> None:
    first = numbered(daemon, "n-2").body["key_id"]
    second = numbered(daemon, "n-2", first).body["key_id"]
    refused = [
        numbered(daemon, "n-2"),
        numbered(daemon, "n-2", first),
        numbered(daemon, "n-2", second, "derived"),
        numbered(daemon, "n-3", new_key(daemon, "n-3", purpose="data")),
    ]
    assert [(answer.status, answer.code) for answer in refused] == [(409, "conflict")] * 4
    assert numbers(daemon, "n-2") == [(1, "retired"), (2, "active")]


def test_keys_without_a_number_do_not_stop_the_numbers_of_their_thread(daemon: LiveDaemon) -> None:
    """They may be newer, and may have retired the numbered one; beyond a bound they have to be destroyed first."""
    new_key(daemon, "n-6")
    first = numbered(daemon, "n-6").body["key_id"]
    other = new_key(daemon, "n-6", purpose="data", replaces=first)
    second = numbered(daemon, "n-6", first).body["key_id"]
    assert ask(daemon, "GET", f"/keys/{second}").body["number"] == 2
    new_key(daemon, "n-6")
    post(daemon, f"/keys/{second}/retire", {})
    assert post(daemon, f"/keys/{second}/destroy", {"key_id": second}).code == "conflict"
    for _ in range(UNNUMBERED_COUNT_MAX):
        other = new_key(daemon, "n-6")
    assert numbered(daemon, "n-6", second).status == 409
    for state in ("retire", "destroy"):
        assert post(daemon, f"/keys/{other}/{state}", {"key_id": other} if state == "destroy" else {}).status == 200
    assert numbered(daemon, "n-6", second).status == 200


def test_of_creates_at_once_one_gets_the_number(daemon: LiveDaemon) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: numbered(daemon, "n-4"), range(8)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 7


def test_a_number_is_not_used_again_while_the_thread_has_a_key(daemon: LiveDaemon) -> None:
    first = numbered(daemon, "n-5").body["key_id"]
    second = numbered(daemon, "n-5", first).body["key_id"]
    post(daemon, f"/keys/{second}/retire", {})
    refused = post(daemon, f"/keys/{second}/destroy", {"key_id": second})
    assert (refused.status, refused.code) == (409, "conflict")
    assert post(daemon, f"/keys/{first}/destroy", {"key_id": first}).status == 200
    assert numbered(daemon, "n-5", second).status == 200
    assert numbers(daemon, "n-5") == [(2, "retired"), (3, "active")]


def test_no_number_is_given_while_a_key_file_can_not_be_read(tmp_path: Path) -> None:
    """The file may be of the same thread, and have the highest number. Numbers stay after a start and a rotation."""
    with LiveDaemon(tmp_path, "file") as daemon:
        first = numbered(daemon, "n").body["key_id"]
        second = numbered(daemon, "n", first).body["key_id"]
        assert post(daemon, "/rotate_kek", {}).status == 200
        file = daemon.data_dir / "kms-deks" / f"{second}.json"
        good = file.read_bytes()
        daemon.stop()
        file.write_bytes(b"x" + good[1:])
        daemon.start()
        refused = numbered(daemon, "n", first)
        assert (refused.status, refused.code) == (503, "key_unreadable")
        daemon.stop()
        file.write_bytes(good)
        daemon.start()
        assert numbered(daemon, "n", second).status == 200
        assert numbers(daemon, "n") == [(1, "retired"), (2, "retired"), (3, "active")]


def test_a_data_key_is_made_under_a_key_of_purpose_derived(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon, "n-6", purpose="derived")
    assert post(daemon, "/generate_data_key", {"key_id": key_id}).status == 200
