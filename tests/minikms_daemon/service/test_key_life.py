"""The life of a key through a real daemon: made, listed, replaced, retired, destroyed; and keys for the caller."""

import base64
import json
from pathlib import Path
from typing import Any

from minikms import api
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import Answer, ask, b64, encrypted, new_key, post, status


def listed(daemon: LiveDaemon, query: str = "", limit: int = 1000) -> list[dict[str, Any]]:
    """All pages."""
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        answer = ask(daemon, "GET", f"/keys?limit={limit}{query}" + (f"&cursor={cursor}" if cursor else ""))
        assert answer.status == 200, answer
        assert len(answer.body["keys"]) <= limit
        found += answer.body["keys"]
        cursor = answer.body.get("next_cursor", "")
        if not cursor:
            return found


def destroy(daemon: LiveDaemon, key_id: str, **given: str) -> Answer:
    return post(daemon, f"/keys/{key_id}/destroy", {"key_id": key_id, **given})


def test_a_new_key_is_on_disk_when_its_id_is_answered_and_says_what_it_is(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon, "thread-1", purpose="data")
    record = json.loads((daemon.data_dir / "kms-deks" / f"{key_id}.json").read_bytes())
    assert (record["id"], record["thread_id"], record["purpose"], record["state"]) == (
        key_id,
        "thread-1",
        "data",
        "active",
    )
    answer = ask(daemon, "GET", f"/keys/{key_id}").body
    assert answer == {
        "key_id": key_id,
        "thread_id": "thread-1",
        "purpose": "data",
        "state": "active",
        "kek_version": 1,
        "created_at": record["created_at"],
    }
    line = daemon.events("create_dek")[-1]
    assert (line["key_id"], line["thread_id"], line["outcome"]) == (key_id, "thread-1", "ok")


def test_two_creates_for_a_thread_are_two_keys(daemon: LiveDaemon) -> None:
    assert new_key(daemon, "thread-2") != new_key(daemon, "thread-2")


def test_a_replaced_key_is_retired_in_the_same_step(daemon: LiveDaemon) -> None:
    old = new_key(daemon, "thread-3")
    new = new_key(daemon, "thread-3", replaces=old)
    assert ask(daemon, "GET", f"/keys/{old}").body["state"] == "retired"
    assert ask(daemon, "GET", f"/keys/{new}").body["state"] == "active"
    assert daemon.events("create_dek")[-1]["detail"] == f"replaces {old}"


def test_listings_are_paged_filtered_and_in_order_of_creation(daemon: LiveDaemon) -> None:
    mine = [new_key(daemon, "listed") for _ in range(7)]
    new_key(daemon, "listed-too")
    post(daemon, f"/keys/{mine[2]}/retire", {})
    assert [key["key_id"] for key in listed(daemon, "&thread_id=listed", limit=3)] == sorted(mine)
    assert [key["key_id"] for key in listed(daemon, "&thread_id=listed&state=retired")] == [mine[2]]
    assert len(listed(daemon, "&thread_id=listed&state=active", limit=1)) == 6
    assert listed(daemon, "&thread_id=nobody") == []
    everything = listed(daemon, limit=4)
    assert len({key["key_id"] for key in everything}) == len(everything)
    assert {*mine} < {key["key_id"] for key in everything}
    assert listed(daemon, "&cursor=k_7zzzzzzzzzzzzzzzzzzzzzzzzz") == []


def test_a_page_without_a_limit_has_a_hundred_keys_at_most(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        made = [new_key(daemon) for _ in range(105)]
        answer = ask(daemon, "GET", "/keys").body
        assert len(answer["keys"]) == 100
        assert answer["next_cursor"] == sorted(made)[99]


def test_retiring_is_answered_and_may_be_repeated(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    for _ in range(2):
        answer = post(daemon, f"/keys/{key_id}/retire", {})
        assert (answer.status, answer.body["state"]) == (200, "retired")
    assert ask(daemon, "POST", f"/keys/{key_id}/retire").status == 200  # without a body


def in_backups(daemon: LiveDaemon, key_id: str) -> int:
    """In how many records; each names the key twice."""
    needle = b'"id":"%s"' % key_id.encode()
    return sum(path.read_bytes().count(needle) for path in (daemon.data_dir / "kms-deks-backup").glob("*/*")) // 2


def test_a_key_is_destroyed_only_for_the_thread_that_is_named(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon, "victim")
    post(daemon, f"/keys/{key_id}/retire", {})
    refused = destroy(daemon, key_id, thread_id="other")
    assert (refused.status, refused.code) == (403, "wrong_thread")
    assert ask(daemon, "GET", f"/keys/{key_id}").body["state"] == "retired"
    assert destroy(daemon, key_id, thread_id="victim").status == 200
    assert destroy(daemon, key_id, thread_id="victim").status == 200  # a repeated request completes an interrupted one


def test_a_destroyed_key_is_gone_with_its_backups_and_a_receipt_says_so(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        key_id, other = new_key(daemon), new_key(daemon)
        sealed = encrypted(daemon, other)
        for _ in range(2):
            assert post(daemon, "/rotate_kek", {}).status == 200
        assert in_backups(daemon, key_id) == 2
        assert destroy(daemon, key_id).code == "conflict"
        post(daemon, f"/keys/{key_id}/retire", {})
        code, first = destroy(daemon, key_id)
        said = {"key_id": key_id, "state": "destroyed", "backups_removed": 2, "archives": [], "tombstone": 1}
        assert (code, said.items() <= first.items(), first["epoch"] > 1) == (200, True, True)
        assert (daemon.data_dir / "kms-tombstones").read_bytes().hex()[-32:] == first["tombstone_tag"]
        assert in_backups(daemon, key_id) == 0
        assert list(daemon.data_dir.glob(f"kms-deks/{key_id}*")) == []
        again = destroy(daemon, key_id).body  # to be sure that everything went
        assert again == {**first, "backups_removed": 0}
        assert status(daemon)["keys"]["destroyed"] == 1
        assert [key["key_id"] for key in listed(daemon)] == [other]
        lines = daemon.events("destroy_key")
        assert [(line["outcome"], line.get("detail", "")) for line in lines] == [
            ("conflict", ""),
            ("ok", "begun"),
            ("ok", ""),
            ("ok", "begun"),
            ("ok", ""),
        ]
        daemon.process.terminate()
        daemon.process.wait()
        daemon.start()
        assert ask(daemon, "GET", f"/keys/{key_id}").status == 410
        assert destroy(daemon, key_id).status == 200
        assert post(daemon, "/decrypt", {"key_id": other, "ciphertext": sealed}).status == 200


# --- keys and bytes for the caller --------------------------------------------------------------------------------


def test_a_data_key_opens_with_decrypt_and_may_stay_sealed(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon, "files", purpose="data")
    given = post(daemon, "/generate_data_key", {"key_id": key_id, "aad": b64(b"file-1")}).body
    assert set(given) == {"key_id", "plaintext", "ciphertext"}
    assert len(base64.b64decode(given["plaintext"])) == 32
    opened = post(daemon, "/decrypt", {"key_id": key_id, "ciphertext": given["ciphertext"], "aad": b64(b"file-1")})
    assert opened.body == {"plaintext": given["plaintext"]}
    sealed = post(daemon, "/generate_data_key", {"key_id": key_id, "plaintext": False}).body
    assert set(sealed) == {"key_id", "ciphertext"}
    assert len(base64.b64decode(sealed["ciphertext"])) == 24 + 32 + 16
    log = (daemon.data_dir / "minikms-audit.log").read_text()
    assert given["plaintext"] not in log and given["ciphertext"] not in log


def test_random_bytes_are_as_many_as_asked_and_differ(daemon: LiveDaemon) -> None:
    for count in (1, 16, api.RANDOM_BYTES_MAX):
        assert len(base64.b64decode(post(daemon, "/random", {"count": count}).body["random"])) == count
    drawn = {post(daemon, "/random", {"count": 16}).body["random"] for _ in range(20)}
    assert len(drawn) == 20
    assert daemon.events("random")[-1]["count"] == 16


def test_the_status_names_the_epoch_the_audit_head_and_no_secret(daemon: LiveDaemon) -> None:
    told = status(daemon)
    assert told["epoch"] >= 2
    assert set(told["audit"]["head"]) == {"seq", "sig"}
    text = json.dumps(told)
    for key in daemon.keys().values():
        assert key.hex() not in text and b64(key) not in text
