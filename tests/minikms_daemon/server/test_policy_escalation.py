"""Attempts to do more than the policy file grants, against a real daemon and as several real users."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.keys.dek import key_id_to_bytes
from tests.harness.callers import NOBODY, OTHER, PROXY, ROOT_GRANT, USER, Caller, PolicyDaemon, Reply
from tests.harness.live_daemon import LiveDaemon
from tests.harness.verb_requests import spelt
from tests.harness.waiting import wait_until
from tests.minikms_daemon.service.asking import NO_KEY, b64

CHAT = "spiffe://prod/chat/one"
POLICY = (
    ROOT_GRANT
    + f"""
[[grant]]
name = "user"
principals = ["uid:{USER}"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "destroy"]
threads = ["mine-*"]
[[grant]]
name = "reader"
principals = ["uid:{OTHER}"]
roles = ["decrypt"]
threads = ["mine-*"]
[[grant]]
name = "chat"
principals = ["spiffe://prod/chat/*", "dns:host.example"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor", "rotate", "destroy", "unseal", "audit", "ship"]
threads = ["mine-*"]
[[proxy]]
principals = ["uid:{PROXY}"]
on_behalf_of = ["spiffe://prod/**", "dns:**.example"]
"""
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[PolicyDaemon]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, PolicyDaemon(Path(name), POLICY) as running:
        yield running


class Keys:
    """Keys in and out of scope, each with a ciphertext."""

    def __init__(self, daemon: PolicyDaemon) -> None:
        root = daemon.caller()
        self.mine, self.mine_too = daemon.new_key("mine-1"), daemon.new_key("mine-1")
        self.foreign, self.data = daemon.new_key("theirs-1"), daemon.new_key("theirs-1", purpose="data")
        self.sealed = {
            key_id: str(root.post("/encrypt", {"key_id": key_id, "plaintext": b64(b"text")}).body["ciphertext"])
            for key_id in (self.mine, self.mine_too, self.foreign, self.data)
        }


@pytest.fixture(scope="module")
def keys(daemon: PolicyDaemon) -> Keys:
    return Keys(daemon)


# --- headers ----------------------------------------------------------------------------------------------------------

EVERY_PATH = [
    *((verb.method, verb.path.format(key_id=NO_KEY, slot_id="s1", member_id="m2")) for verb in api.VERBS),
    ("GET", "/nowhere"),
]


@pytest.mark.parametrize("method, path", EVERY_PATH)
def test_a_proxy_that_names_nobody_is_refused_on_every_path(daemon: PolicyDaemon, method: str, path: str) -> None:
    answer = daemon.caller(PROXY).ask(method, path, {} if method == "POST" else None)
    assert (answer.status, answer.code) == (403, "forbidden")


def test_a_proxy_may_ask_the_probes_without_a_name(daemon: PolicyDaemon) -> None:
    proxy = daemon.caller(PROXY)
    assert [proxy.get(path).status for path in ("/health", "/ready")] == [200, 200]


@pytest.mark.parametrize("uid", [0, USER, OTHER])
def test_a_user_that_is_no_proxy_may_name_nobody(daemon: PolicyDaemon, uid: int) -> None:
    for name in (CHAT, f"uid:{uid}", "uid:0", "", "*"):
        assert daemon.caller(uid, name).get("/status").status == 403, name


def test_without_a_policy_file_nobody_may_be_named(public: Path) -> None:
    with LiveDaemon(public) as plain, socket.socket(socket.AF_UNIX) as made:
        made.connect(str(plain.socket))
        caller = Caller(made, CHAT)
        assert caller.get("/status").status == 403
        assert caller.acting_for(None).get("/status").status == 200


def test_the_header_may_come_only_once(daemon: PolicyDaemon) -> None:
    proxy = daemon.caller(PROXY, CHAT)
    answer = proxy.ask("GET", "/status", headers=("x-minikms-principal: dns:host.example",))
    assert (answer.status, answer.headers["connection"]) == (400, "close")


BAD_NAMES = {
    "a uid": ("uid:0", 403),
    "its own uid": (f"uid:{PROXY}", 403),
    "a granted uid": (f"uid:{USER}", 403),
    "no name": ("", 400),
    "a glob character": ("spiffe://prod/chat/*", 400),
    "a question mark": ("spiffe://prod/chat/?", 400),
    "a bracket": ("spiffe://prod/chat/[a]", 400),
    "too long": ("spiffe://prod/chat/" + "a" * 200, 400),
    "much too long": ("spiffe://prod/chat/" + "a" * 9000, 400),
    "bytes above ASCII": ("spiffe://prod/chat/\xe9", 400),
    "a tab": ("spiffe://prod/chat/a\tb", 400),
    "two names": (f"{CHAT}, {CHAT}", 400),
    "an unknown scheme": ("http://prod/chat/one", 400),
    "another trust domain": ("spiffe://test/chat/one", 403),
    "a trust domain that begins alike": ("spiffe://prod.evil/chat/one", 403),
    "upper case in the scheme": ("SPIFFE://prod/chat/one", 400),
    "a name that no grant has": ("spiffe://prod/other/one", 403),
    "another case in the path": ("spiffe://prod/Chat/one", 403),
    "a segment more": ("spiffe://prod/chat/one/two", 403),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_no_other_name_takes_the_rights_of_a_principal(daemon: PolicyDaemon, keys: Keys, case: str) -> None:
    name, status = BAD_NAMES[case]
    proxy = daemon.caller(PROXY, name)
    for method, path, body in (
        ("GET", "/status", None),
        ("GET", f"/get_wrapped?key_id={keys.mine}", None),
        ("POST", "/encrypt", {"key_id": keys.mine, "plaintext": ""}),
    ):
        answer = proxy.ask(method, path, body)
        assert answer.status == status, (path, answer)
        assert name == "" or name not in json.dumps(answer.body), "the answer quotes nothing that was sent"


def test_the_body_of_a_refused_proxy_is_not_received(daemon: PolicyDaemon) -> None:
    for name in (None, "uid:0"):
        proxy = daemon.caller(PROXY, name)
        named = "" if name is None else f"X-MiniKMS-Principal: {name}\r\n"
        proxy.sock.sendall(
            f"POST /encrypt_batch HTTP/1.1\r\nHost: x\r\n{named}Content-Length: 9000000\r\n\r\nx".encode()
        )
        answer = proxy.receive()
        assert (answer.status, answer.headers["connection"]) == (403, "close")


def test_what_a_proxy_asks_wrongly_is_a_few_audit_lines_with_a_count(daemon: PolicyDaemon) -> None:
    """Invented names add no actor of their own."""

    def of_proxy() -> list[dict[str, Any]]:
        return [line for line in daemon.events("refused") if line["actor"] == f"peer_uid:{PROXY}"]

    before, begun = len(of_proxy()), time.monotonic()
    proxy = daemon.caller(PROXY)
    for number in range(50):
        for name in (f"spiffe://elsewhere/{number}", f"spiffe://prod/without/grant/{number}"):
            assert proxy.acting_for(name).post("/decrypt", b"{").status == 403
    wait_until(lambda: sum(line["count"] for line in of_proxy()[before:]) >= 100)
    lines = of_proxy()[before:]
    assert len(lines) <= 2 + (time.monotonic() - begun), "one at once and one a second"
    assert {line["outcome"] for line in lines} == {"forbidden"}
    assert not [line for line in daemon.events("decrypt") if line["actor"].startswith("spiffe://prod/without")]
    assert daemon.metric("minikms_policy_refusals_total", reason="proxy") >= 100


# --- verbs that are never proxied -------------------------------------------------------------------------------------

ADMIN: dict[str, tuple[str, str, object]] = {
    "rotate_kek": ("POST", "/rotate_kek", {}),
    "rotate_kek to a root of one's own": ("POST", "/rotate_kek", {"new_kek_hex": "ab" * 32}),
    "prune_kek": ("POST", "/kek/prune", {}),
    "destroy_key": ("POST", "/keys/{mine}/destroy", {"key_id": "{mine}"}),
    "list_roots": ("GET", "/roots", None),
    "add_root": ("POST", "/roots", {"provider": "file", "root_hex": "ab" * 32}),
    "test_root": ("POST", "/roots/s1/test", {"root_hex": "ab" * 32}),
    "remove_root": ("POST", "/roots/s1/remove", {}),
    "seal": ("POST", "/seal", {}),
    "unseal": ("POST", "/unseal", {"from_source": True}),
    "unseal_status": ("GET", "/unseal", None),
    "policy_reload": ("POST", "/policy/reload", {}),
    "metrics": ("GET", "/metrics", None),
    "report_audit_position": ("POST", "/audit/position", {"origin": "o", "log_id": "", "seq": 0, "mac": ""}),
    **{verb.name: spelt(verb, NO_KEY) for verb in api.REPLICA_VERBS},
}


@pytest.mark.parametrize("verb", ADMIN)
def test_no_proxy_administers_whatever_a_grant_says(daemon: PolicyDaemon, keys: Keys, verb: str) -> None:
    """The grant of this principal has every role."""
    method, path, body = ADMIN[verb]
    sent = json.dumps(body).replace("{mine}", keys.mine).encode() if body is not None else None
    answer = daemon.caller(PROXY, CHAT).ask(method, path.replace("{mine}", keys.mine), sent)
    assert (answer.status, answer.code) == (403, "forbidden")


def test_every_verb_is_either_proxied_or_tested_as_one_that_is_not() -> None:
    tested = {verb.split()[0] for verb in ADMIN}
    assert {verb.name for verb in api.VERBS if not verb.proxied} == tested


def test_behind_a_proxy_the_status_says_nothing_of_files_roots_and_others(daemon: PolicyDaemon, keys: Keys) -> None:
    while daemon.status()["keys"]["indexing"]:  # this may be the first test of the daemon
        pass
    shown = daemon.caller(PROXY, CHAT).get("/status").body
    whole = daemon.status()
    assert shown.keys() == {"status", "uptime_seconds", "epoch", "keyring_id", "keys", "audit"}
    assert shown["keys"] == {"indexing": False, "writable": True, "unavailable_reason": ""}
    assert shown["audit"].keys() == {"head", "writable", "synced"}
    assert (shown["epoch"], shown["keyring_id"]) == (whole["epoch"], whole["keyring_id"])
    assert shown["audit"]["head"]["seq"] <= whole["audit"]["head"]["seq"]


def test_a_user_with_some_threads_reads_no_key_ids_in_the_status(daemon: PolicyDaemon, keys: Keys) -> None:
    damaged = daemon.new_key("theirs-9")
    (daemon.data_dir / "kms-deks" / f"{damaged}.json").write_bytes(b"{}")
    daemon.caller().get(f"/keys/{damaged}")
    assert damaged in daemon.status()["keys"]["unreadable_files"]
    assert daemon.caller(USER).get("/status").body["keys"]["unreadable_files"] == {}


def test_a_user_with_some_threads_prunes_nothing(daemon: PolicyDaemon) -> None:
    """It would remove backups of the keys of other threads."""
    backup = daemon.data_dir / "kms-deks-backup"
    daemon.new_key("theirs-1")
    assert daemon.caller().post("/rotate_kek", {}).status == 200
    before = sorted(backup.rglob("*"))
    assert daemon.caller(USER).post("/kek/prune", {"backups": True}).status == 403
    assert sorted(backup.rglob("*")) == before != []


def test_a_limited_principal_reads_no_key_id_in_a_warning(daemon: PolicyDaemon) -> None:
    """The name of a batch backup has two key ids."""
    root, user = daemon.caller(), daemon.caller(USER)
    daemon.new_key("foreign-1")
    assert root.post("/rotate_kek", {}).status == 200
    backup = next((daemon.data_dir / "kms-deks-backup").glob("*/*.journal"))
    whole = backup.read_bytes()
    os.truncate(backup, 5 * 1024 * 1024)
    assert root.post("/kek/prune", {"backups": True}).status == 200
    shown = {who: " ".join(who.get("/status").body["warnings"]) for who in (root, user)}
    backup.write_bytes(whole)
    assert backup.name in shown[root]
    assert "rotation backups can't be read" in shown[user]
    assert api.KEY_ID_PATTERN.search(shown[user]) is None


# --- threads of others ------------------------------------------------------------------------------------------------


def unknown(answer: Reply) -> bool:
    named = answer.status == 404 and api.KEY_ID_PATTERN.sub("KEY", answer.body["error"])
    return (named, answer.code) == ("key not found: KEY", "key_not_found")


BY_KEY: dict[str, Callable[[Caller, Keys, str], Reply]] = {
    "encrypt": lambda who, keys, key: who.post("/encrypt", {"key_id": key, "plaintext": ""}),
    "encrypt, with the thread": lambda who, keys, key: who.post(
        "/encrypt", {"key_id": key, "plaintext": "", "thread_id": "theirs-1"}
    ),
    "encrypt, with a thread in scope": lambda who, keys, key: who.post(
        "/encrypt", {"key_id": key, "plaintext": "", "thread_id": "mine-1"}
    ),
    "decrypt": lambda who, keys, key: who.post("/decrypt", {"key_id": key, "ciphertext": keys.sealed[keys.foreign]}),
    "decrypt, with the thread": lambda who, keys, key: who.post(
        "/decrypt", {"key_id": key, "ciphertext": keys.sealed[keys.foreign], "thread_id": "theirs-1"}
    ),
    "get_wrapped": lambda who, keys, key: who.get(f"/get_wrapped?key_id={key}"),
    "get_key": lambda who, keys, key: who.get(f"/keys/{key}"),
    "check": lambda who, keys, key: who.post(
        "/check_batch", {"key_id": key, "items": [{"ciphertext": keys.sealed[keys.foreign]}]}
    ),
    "check nothing": lambda who, keys, key: who.post("/check_batch", {"key_id": key, "items": []}),
    "re-encrypt from": lambda who, keys, key: who.post(
        "/reencrypt_batch", {"from_key_id": key, "to_key_id": keys.mine, "items": []}
    ),
    "re-encrypt to": lambda who, keys, key: who.post(
        "/reencrypt_batch",
        {"from_key_id": keys.mine, "to_key_id": key, "items": [{"ciphertext": keys.sealed[keys.mine]}]},
    ),
    "re-encrypt within": lambda who, keys, key: who.post(
        "/reencrypt_batch", {"from_key_id": key, "to_key_id": key, "items": []}
    ),
    "data key": lambda who, keys, key: who.post("/generate_data_key", {"key_id": key}),
    "replaces": lambda who, keys, key: who.post("/create_dek_for_thread", {"thread_id": "mine-1", "replaces": key}),
    "retire": lambda who, keys, key: who.post(f"/keys/{key}/retire", {}),
    "destroy": lambda who, keys, key: who.post(f"/keys/{key}/destroy", {"key_id": key}),
}


@pytest.mark.parametrize("verb", BY_KEY)
def test_a_key_of_a_foreign_thread_is_answered_as_an_unknown_one(daemon: PolicyDaemon, keys: Keys, verb: str) -> None:
    """Byte for byte, headers included, for a user and for a principal behind a proxy."""
    ask = BY_KEY[verb]
    callers = [daemon.caller(USER)]
    if verb != "destroy":
        callers.append(daemon.caller(PROXY, CHAT))
    for who in callers:
        answers = [ask(who, keys, key) for key in (keys.foreign, keys.data, NO_KEY)]
        assert all(map(unknown, answers)), answers
        heads = [{name: value for name, value in one.headers.items() if name != "date"} for one in answers]
        assert heads[0] == heads[1] == heads[2]
    root = daemon.caller().get(f"/keys/{keys.foreign}").body
    assert root["state"] == "active", "the attempt changed nothing"


def test_the_items_of_a_batch_are_decided_one_by_one(daemon: PolicyDaemon, keys: Keys) -> None:
    who = daemon.caller(USER)
    order = [keys.mine, keys.foreign, NO_KEY, keys.mine_too, keys.foreign]
    for path, items in (
        ("/decrypt_batch", [{"key_id": key, "ciphertext": keys.sealed.get(key, "AAAA")} for key in order]),
        ("/encrypt_batch", [{"key_id": key, "plaintext": b64(b"text")} for key in order]),
    ):
        answer = who.post(path, {"items": items})
        assert answer.status == 200
        codes = [item.get("code", "ok") for item in answer.body["items"]]
        assert codes == ["ok", "key_not_found", "key_not_found", "ok", "key_not_found"]
        texts = [item["error"] for item in answer.body["items"] if "code" in item]
        assert texts == [f"key not found: {key}" for key in (keys.foreign, NO_KEY, keys.foreign)]


def test_keys_are_made_in_threads_of_the_scope_only(daemon: PolicyDaemon) -> None:
    who = daemon.caller(USER)
    for path in ("/create_dek_for_thread", "/get_or_create_dek_for_thread"):
        for thread in ("theirs-1", "theirs-new", "Mine-1", "mine"):
            answer = who.post(path, {"thread_id": thread})
            assert (answer.status, answer.code) == (403, "forbidden"), thread
        assert who.post(path, {"thread_id": "mine-" + "x" * 200}).status == 400
        assert who.post(path, {"thread_id": "mine-new"}).status == 200


def test_a_role_in_one_thread_gives_no_other_role_there(daemon: PolicyDaemon, keys: Keys) -> None:
    who = daemon.caller(OTHER)
    sealed = keys.sealed[keys.mine]
    assert who.post("/decrypt", {"key_id": keys.mine, "ciphertext": sealed}).status == 200
    for path, body in (
        ("/encrypt", {"key_id": keys.mine, "plaintext": ""}),
        ("/create_dek_for_thread", {"thread_id": "mine-1"}),
        ("/reencrypt_batch", {"from_key_id": keys.mine, "to_key_id": keys.mine_too, "items": []}),
        ("/generate_data_key", {"key_id": keys.mine}),
        (f"/keys/{keys.mine}/retire", {}),
    ):
        assert (who.post(path, body).status, who.post(path, body).code) == (403, "forbidden"), path
    for path in ("/keys", f"/keys/{keys.mine}", "/status", "/metrics"):
        assert who.get(path).status == 403, path
    items = who.post("/encrypt_batch", {"items": [{"key_id": keys.mine, "plaintext": ""}]})
    assert items.body["items"][0]["code"] == "forbidden"


# --- listings ---------------------------------------------------------------------------------------------------------


def pages(who: Caller, query: str = "") -> tuple[list[str], list[str]]:
    """Key ids and cursors of all pages."""
    found: list[str] = []
    cursors: list[str] = []
    while True:
        cursor = f"&cursor={cursors[-1]}" if cursors else ""
        answer = who.get(f"/keys?limit=1{query}{cursor}")
        assert answer.status == 200, answer
        found += [key["key_id"] for key in answer.body["keys"]]
        if "next_cursor" not in answer.body:
            return found, cursors
        cursors.append(answer.body["next_cursor"])


def test_a_listing_shows_visible_keys_only_and_its_cursors_no_key(daemon: PolicyDaemon, keys: Keys) -> None:
    everything, _ = pages(daemon.caller())
    for who in (daemon.caller(USER), daemon.caller(PROXY, CHAT)):
        found, cursors = pages(who)
        assert set(found) < set(everything)
        assert {keys.mine, keys.mine_too} <= set(found)
        assert not {keys.foreign, keys.data} & set(found)
        assert cursors and not any(api.KEY_ID_PATTERN.search(cursor) for cursor in cursors)
        raw = bytes.fromhex("".join(cursors))
        assert not any(key_id_to_bytes(key)[:6] in raw for key in everything), "not even the time of a key"
        assert pages(who, "&thread_id=theirs-1") == ([], [])
        assert who.get("/keys?thread_id=theirs-1").body == who.get("/keys?thread_id=theirs-none").body


def test_a_cursor_is_of_one_principal_and_no_key_id_is_one(daemon: PolicyDaemon, keys: Keys) -> None:
    who, other = daemon.caller(USER), daemon.caller(PROXY, CHAT)
    cursor = who.get("/keys?limit=1").body["next_cursor"]
    assert who.get(f"/keys?cursor={cursor}").status == 200
    flipped = cursor[:-1] + ("0" if cursor[-1] != "0" else "1")
    for caller, given in ((other, cursor), (who, flipped), (who, keys.foreign), (who, keys.mine), (who, "00")):
        answer = caller.get(f"/keys?cursor={given}")
        assert (answer.status, answer.code) == (400, "invalid_request"), given


def test_who_may_see_every_key_pages_by_key_ids_as_before(daemon: PolicyDaemon, keys: Keys) -> None:
    _, cursors = pages(daemon.caller())
    assert all(api.KEY_ID_PATTERN.fullmatch(cursor) for cursor in cursors)


# --- keys whose thread nobody knows -----------------------------------------------------------------------------------


def test_destroyed_and_unreadable_keys_are_unknown_to_limited_principals(daemon: PolicyDaemon) -> None:
    root, who = daemon.caller(), daemon.caller(USER)
    destroyed, damaged = daemon.new_key("mine-1"), daemon.new_key("mine-1")
    assert who.post(f"/keys/{destroyed}/retire", {}).status == 200
    assert who.post(f"/keys/{destroyed}/destroy", {"key_id": destroyed}).status == 200
    daemon.kill()
    (daemon.data_dir / "kms-deks" / f"{damaged}.json").write_bytes(b"damaged")
    (daemon.data_dir / "kms-journal").unlink(missing_ok=True)  # else a start mends the file
    daemon.start()
    root, who = daemon.caller(), daemon.caller(USER)
    while daemon.status()["keys"]["indexing"]:
        pass
    assert root.get(f"/keys/{destroyed}").code == "key_destroyed"
    assert root.get(f"/keys/{damaged}").code == "key_unreadable"
    assert unknown(who.get(f"/keys/{destroyed}"))
    assert unknown(who.get(f"/keys/{damaged}"))


# --- the audit log ----------------------------------------------------------------------------------------------------


def test_each_line_names_the_principal_and_the_proxy(daemon: PolicyDaemon) -> None:
    """The actor is the principal that asked in the end; a local user stays a peer_uid."""
    who = daemon.caller(PROXY, CHAT)
    made = who.post("/create_dek_for_thread", {"thread_id": "mine-7", "request_id": "by-proxy"}).body["key_id"]
    sealed = who.post("/encrypt", {"key_id": made, "plaintext": "", "request_id": "by-proxy"}).body["ciphertext"]
    who.post("/decrypt", {"key_id": made, "ciphertext": sealed, "request_id": "by-proxy"})
    who.post("/encrypt", {"key_id": NO_KEY, "plaintext": "", "request_id": "by-proxy"})
    for body in ({"key_id": made}, {"key_id": made, "unknown": 1}):
        who.ask("POST", "/generate_data_key", body, headers=("X-Request-Id: by-proxy",))
    who.ask("POST", f"/keys/{made}/retire", {}, headers=("X-Request-Id: by-proxy",))
    types = [verb.name for verb in api.VERBS]
    lines = [line for line in daemon.events(*types) if line.get("request_id") == "by-proxy"]
    assert len(lines) == 7
    assert {(line["actor"], line["facts"]["via"]) for line in lines} == {(CHAT, f"peer_uid:{PROXY}")}
    daemon.caller(USER).get("/keys")
    (listed, *_) = reversed(daemon.events("list_keys"))
    assert listed["actor"] == f"peer_uid:{USER}" and "facts" not in listed


def test_a_user_without_a_grant_is_turned_away(daemon: PolicyDaemon) -> None:
    answer = daemon.caller(NOBODY).get("/status")
    assert (answer.status, answer.headers["connection"]) == (401, "close")
