"""Limits of the policy file on a real daemon: drained stores, invented names, restarts, and what is recorded."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.policy.meters import SAVED_NAME
from minikms_daemon.server.refusals import ACTORS_COUNT_MAX, PRINCIPALS_OTHERS
from tests.harness.callers import OTHER, PROXY, ROOT_GRANT, USER, Caller, PolicyDaemon, Reply
from tests.harness.waiting import wait_until

READERS = f"""
[[grant]]
name = "readers"
principals = ["uid:{USER}", "uid:{OTHER}"]
roles = ["decrypt"]
threads = ["*"]
limits = {{ decrypts_per_hour = 200 }}
limits_total = {{ decrypts_per_hour = 300 }}
"""
INVENTED = f"""
[[grant]]
name = "hosts"
principals = ["spiffe://prod/**"]
roles = ["decrypt", "encrypt"]
threads = ["*"]
limits = {{ decrypts_per_hour = 10 }}
[[proxy]]
name = "gateway"
principals = ["uid:{PROXY}"]
on_behalf_of = ["spiffe://prod/**"]
limits_total = {{ decrypts_per_hour = 25 }}
"""


class Store:
    """One key, one ciphertext, and how many of it a caller gets."""

    def __init__(self, daemon: PolicyDaemon) -> None:
        self.key_id = daemon.new_key("t")
        sealed = daemon.caller().post("/encrypt", {"key_id": self.key_id, "plaintext": ""}).body["ciphertext"]
        self.item = {"key_id": self.key_id, "ciphertext": sealed}

    def decrypt(self, who: Caller, items: int = 1) -> Reply:
        return who.post("/decrypt_batch", {"items": [self.item] * items})

    def drain(self, who: Caller, items: int, *, tries: int) -> int:
        """The number of plaintexts that `tries` batches return."""
        return sum(items for _ in range(tries) if self.decrypt(who, items).status == 200)


def filled(limit: int, begun: float) -> int:
    """At most so many more uses an hourly limit has got since then."""
    return 1 + int(limit * (time.monotonic() - begun) / 3600)


def test_a_client_that_drains_a_store_is_stopped(public: Path) -> None:
    """Others go on until the limit of all is reached. An orderly stop and a kill give nothing back."""
    with PolicyDaemon(public, ROOT_GRANT + READERS) as daemon:
        store, begun = Store(daemon), time.monotonic()
        user, other = daemon.caller(USER), daemon.caller(OTHER)
        used = store.drain(user, 7, tries=60)
        assert 196 <= used <= 200 + filled(200, begun)
        refused = store.decrypt(user, 50)
        assert (refused.status, refused.code) == (429, "limit_exceeded")
        assert 0 < int(refused.headers["retry-after"]) <= 900
        assert "decrypts_per_hour" in refused.body["error"]
        assert store.drain(other, 10, tries=5) == 50
        assert daemon.metric("minikms_policy_refusals_total", reason="decrypts_per_hour") > 10
        daemon.stop()
        assert (daemon.data_dir / SAVED_NAME).exists()
        daemon.start()
        user, other = daemon.caller(USER), daemon.caller(OTHER)
        assert store.decrypt(user, 50).status == 429
        assert store.drain(other, 40, tries=1) == 40
        daemon.use_policy(ROOT_GRANT + READERS + "\n[[grant]]\nprincipals = ['uid:7']\nroles = ['rotate']\n")
        assert store.decrypt(user, 50).status == 429, "nor does a reload give anything"
        daemon.kill()
        daemon.start()
        assert store.drain(daemon.caller(OTHER), 1, tries=30) <= 300 - used - 90 + filled(300, begun)
        assert daemon.caller().post("/decrypt", store.item).status == 200, "other grants have limits of their own"


def test_invented_names_behind_a_proxy_bring_no_fresh_limit(public: Path) -> None:
    with PolicyDaemon(public, ROOT_GRANT + INVENTED) as daemon:
        store, begun = Store(daemon), time.monotonic()
        proxy = daemon.caller(PROXY)
        names = [f"spiffe://prod/host/{number}" for number in range(60)]
        used = sum(store.drain(proxy.acting_for(name), 1, tries=1) for name in names)
        assert 25 <= used <= 25 + filled(25, begun)
        refused = store.decrypt(proxy.acting_for(names[0]), 10)
        assert (refused.status, refused.code) == (429, "limit_exceeded")
        encrypted = proxy.acting_for(names[0]).post("/encrypt", {"key_id": store.key_id, "plaintext": ""})
        assert encrypted.status == 200, "other verbs go on"
        assert store.decrypt(daemon.caller()).status == 200, "and so do others"
        daemon.kill()
        daemon.start()
        assert store.decrypt(daemon.caller(PROXY, "spiffe://prod/host/new"), 10).status == 429


def test_refusals_by_a_limit_are_a_few_audit_lines_with_a_count(public: Path) -> None:
    policy = ROOT_GRANT + READERS.replace("decrypts_per_hour = 200", "requests_per_second = 1")
    policy = policy.replace(f'"uid:{OTHER}"', '"spiffe://prod/**"')
    proxy_of_all = f'[[proxy]]\nprincipals = ["uid:{PROXY}"]\non_behalf_of = ["spiffe://prod/**"]\n'
    with PolicyDaemon(public, policy + proxy_of_all) as daemon:
        store = Store(daemon)
        begun = time.monotonic()
        user, proxy = daemon.caller(USER), daemon.caller(PROXY)
        answers = Counter(store.decrypt(user).status for _ in range(200))
        assert answers[429] > 100
        lines: list[dict[str, Any]] = []
        while PRINCIPALS_OTHERS not in {line["actor"] for line in lines}:  # comes with many names in one second
            for number in range(40):
                for _ in range(2):
                    answers[store.decrypt(proxy.acting_for(f"spiffe://prod/{number}")).status] += 1
            lines = daemon.events("refused")
        wait_until(lambda: sum(line["count"] for line in daemon.events("refused")) >= answers[429])
        lines = daemon.events("refused")
        assert sum(line["count"] for line in lines) == answers[429]
        assert {line["outcome"] for line in lines} == {"limit_exceeded"}
        assert len(lines) <= (ACTORS_COUNT_MAX + 2) * (2 + time.monotonic() - begun)
        actors = {(line["actor"], line.get("facts", {}).get("via", "")) for line in lines}
        assert (f"peer_uid:{USER}", "") in actors
        assert (PRINCIPALS_OTHERS, f"peer_uid:{PROXY}") in actors
        assert all(via == f"peer_uid:{PROXY}" for actor, via in actors if actor.startswith("spiffe:"))
        assert not [line for line in daemon.events("decrypt_batch") if line["outcome"] == "limit_exceeded"]


REFUSED: dict[str, tuple[str, str, object]] = {
    "a malformed body": ("POST", "/decrypt", b"{"),
    "a wrong query": ("GET", "/get_wrapped?key=1", None),
    "a new key in another thread": ("POST", "/create_dek_for_thread", {"thread_id": "b-1"}),
    "a verb that is never proxied": ("POST", "/rotate_kek", {}),
    "a seal": ("POST", "/seal", {}),
    "a verb without the role": ("POST", "/generate_data_key", {"key_id": "k"}),
    "a batch without the role": ("POST", "/encrypt_batch", {"items": []}),
    "an unknown key": ("GET", "/get_wrapped?key_id=k_01kazzzzzzzzzzzzzzzzzzzzzz", None),
    "an unknown path": ("GET", "/nothing", None),
    "a wrong method": ("POST", "/status", {}),
}


def test_requests_that_are_refused_are_charged(public: Path) -> None:
    """Otherwise they would fill the audit log without reaching a limit."""
    roles = 'roles = ["create", "decrypt"]\nthreads = ["a-*"]\nlimits = { requests_per_second = 1 }\n'
    policy = f'[[grant]]\nprincipals = ["spiffe://prod/**", "uid:{USER}"]\n{roles}'
    policy += f'[[proxy]]\nprincipals = ["uid:{PROXY}"]\non_behalf_of = ["spiffe://prod/**"]\n'
    with PolicyDaemon(public, ROOT_GRANT + policy) as daemon:
        proxy, user = daemon.caller(PROXY), daemon.caller(USER)
        for number, (case, (method, path, body)) in enumerate(REFUSED.items()):
            who = proxy.acting_for(f"spiffe://prod/{number}")
            answers = [who.ask(method, path, body).status]
            assert answers[0] in (400, 403, 404, 405), case
            while answers[-1] != 429:
                assert len(answers) < 200, case
                answers.append(who.ask(method, path, body).status)
        assert 429 in {user.post("/seal", {}).status for _ in range(200)}
        assert daemon.status()["status"] == "ok"


SHARED = f"""
[[grant]]
principals = ["uid:{USER}"]
roles = ["encrypt"]
threads = ["*"]
limits = {{ requests_per_second = 1 }}
[[grant]]
name = "shared"
principals = ["uid:{USER}", "uid:{OTHER}"]
roles = ["encrypt"]
threads = ["*"]
limits_total = {{ concurrent = 3 }}
"""


def test_requests_that_reach_no_verb_lock_nobody_out(public: Path) -> None:
    """The first grant of the user refuses, and the second one admits what others share with it."""
    malformed = [("POST", "/encrypt", b"{"), ("GET", "/nothing", None), ("GET", "/encrypt", None)]
    with PolicyDaemon(public, ROOT_GRANT + SHARED) as daemon:
        encrypt = {"key_id": daemon.new_key("t"), "plaintext": ""}
        user, other = daemon.caller(USER), daemon.caller(OTHER)
        for _ in range(10):
            assert [user.ask(*request).status for request in malformed] == [400, 404, 405]
            assert other.post("/encrypt", encrypt).status == 200


def test_a_request_counts_until_its_audit_line_is_durable(public: Path) -> None:
    """Or until a seal ends it, which leaves no line."""
    own = f"[[grant]]\nprincipals = ['uid:{USER}']\nroles = ['create', 'monitor']\nthreads = ['*']\n"
    with PolicyDaemon(public, ROOT_GRANT + own + "limits = { concurrent = 1 }\n") as daemon:
        daemon.new_key("t")  # so that the next one reserves nothing, with a line of its own
        waiting, user = daemon.caller(USER), daemon.caller(USER)
        with daemon.held_up("audit", "fdatasync"):
            waiting.send("POST", "/create_dek_for_thread", {"thread_id": "t"})
            wait_until(lambda: len(daemon.events("create_dek")) == 2)
            assert user.get("/status").status == 429
        assert waiting.receive().status == 200
        assert user.get("/status").status == 200
        root = daemon.caller()
        with daemon.held_up("audit", "fdatasync"):
            waiting.send("POST", "/create_dek_for_thread", {"thread_id": "t"})
            wait_until(lambda: len(daemon.events("create_dek")) == 3)
            assert root.post("/seal", {}).status == 200
            assert waiting.receive().code == "sealed"
        assert root.post("/unseal", {"from_source": True}).status == 200
        assert user.get("/status").status == 200


def test_the_clients_read_how_long_to_wait(public: Path) -> None:
    own = """
[[grant]]
principals = ["uid:0"]
roles = ["create", "encrypt", "decrypt", "monitor"]
threads = ["*"]
limits = { decrypts_per_hour = 2 }
"""
    with PolicyDaemon(public, own) as daemon, daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        sealed = client.encrypt(key_id, b"text")
        assert [client.decrypt(key_id, sealed) for _ in range(2)] == [b"text"] * 2
        with pytest.raises(minikms.LimitExceededError, match="decrypts_per_hour") as refused:
            client.decrypt(key_id, sealed)
        assert (refused.value.status, 1700 < refused.value.retry_after_s <= 1800) == (429, True)
        items = [minikms.DecryptItem(key_id=key_id, ciphertext=sealed)]
        with pytest.raises(minikms.LimitExceededError):
            client.decrypt_batch(items)
        assert client.encrypt(key_id, b"text")


def test_a_limit_never_holds_up_a_seal(public: Path) -> None:
    own = """
[[grant]]
principals = ["uid:0"]
roles = ["rotate", "monitor", "unseal"]
threads = []
limits = { requests_per_second = 1, concurrent = 1 }
"""
    with PolicyDaemon(public, own) as daemon:
        who = daemon.caller()
        while who.get("/status").status != 429:
            pass
        assert who.post("/seal", {}).status == 200
        assert who.get("/status").body["status"] == "sealed"
