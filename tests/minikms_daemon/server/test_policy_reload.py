"""The policy file of a real daemon: where it may lie, and what a change of it does to connections that are open."""

import contextlib
import hashlib
import os
import resource
import select
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import StartError
from minikms.http import GroupFull
from minikms.policy.file_policy import FilePolicy
from minikms.policy.rules import POLICY_BYTES_MAX, parse_policy
from minikms_daemon.seal.seal import OWED_LINES_MAX
from minikms_daemon.server.admission import Admission, Session
from minikms_daemon.server.policy_file import PolicyFile
from tests import needs
from tests.harness import forked
from tests.harness.callers import NOBODY, OTHER, PROXY, ROOT_GRANT, USER, Caller, PolicyDaemon
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms_daemon.service.asking import b64

NAME = "spiffe://prod/chat/one"


def grant(principal: str, threads: str = '["mine-*"]', roles: str = '["create", "encrypt", "decrypt"]') -> str:
    return f'[[grant]]\nprincipals = ["{principal}"]\nroles = {roles}\nthreads = {threads}\n'


PROXIED = f'[[proxy]]\nprincipals = ["uid:{PROXY}"]\non_behalf_of = ["spiffe://prod/**"]\n' + grant(
    "spiffe://prod/chat/*"
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[PolicyDaemon]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, PolicyDaemon(Path(name), ROOT_GRANT) as running:
        yield running


def reloads(daemon: PolicyDaemon, actor: str) -> list[dict[str, Any]]:
    """The lines about reloads by `actor`. The line about one by a signal may follow those of later requests."""
    return [line for line in daemon.events("policy_reload") if line["actor"] == actor]


def is_turned_away(who: Caller) -> bool:
    """Whether a request gets 401, which ends the connection, or finds it closed: the uid may not connect any more."""
    try:
        answer = who.get("/status")
    except ConnectionError:
        return True
    return (answer.status, answer.headers.get("connection")) == (401, "close")


def audited_generation(daemon: PolicyDaemon) -> int:
    """Of the newest line about a reload; 0 while there is none. A line may come after the policy is in force."""
    lines = daemon.events("policy_reload")
    return int(lines[-1]["facts"]["policy_generation"]) if lines else 0


# --- open connections -------------------------------------------------------------------------------------------------


def test_a_change_takes_effect_on_open_connections(daemon: PolicyDaemon) -> None:
    daemon.use_policy(ROOT_GRANT + grant(f"uid:{USER}") + PROXIED)
    key_id, other = daemon.new_key("mine-1"), daemon.new_key("more-1")
    user, nobody = daemon.caller(USER), daemon.caller(NOBODY)
    proxy = daemon.caller(PROXY, NAME)
    encrypt = {"key_id": key_id, "plaintext": ""}
    for who in (user, proxy):
        assert who.post("/encrypt", encrypt).status == 200
        assert who.post("/encrypt", encrypt | {"key_id": other}).status == 404

    daemon.use_policy(ROOT_GRANT + grant(f"uid:{USER}", '["more-*"]') + PROXIED.replace("mine-", "more-"))
    for who in (user, proxy):
        assert who.post("/encrypt", encrypt).status == 404
        assert who.post("/encrypt", encrypt | {"key_id": other}).status == 200

    daemon.use_policy(ROOT_GRANT + grant(f"uid:{USER}", roles='["decrypt"]') + PROXIED.replace('"encrypt", ', ""))
    for who in (user, proxy):
        assert who.post("/encrypt", encrypt).status == 403
        assert who.post("/decrypt", {"key_id": key_id, "ciphertext": b64(bytes(40))}).code == "decryption_failed"

    daemon.use_policy(ROOT_GRANT + grant(f"uid:{NOBODY}") + grant(f"uid:{PROXY}"))
    assert nobody.post("/encrypt", encrypt).status == 200, "its connection was open before it was granted"
    assert proxy.post("/encrypt", encrypt).status == 403, "the proxy is none any more"
    assert proxy.acting_for(None).post("/encrypt", encrypt).status == 200
    assert is_turned_away(user)


def test_a_connection_gives_back_its_place_under_any_policy() -> None:
    """Uids that are not allowed have few places. A change of the policy neither leaks one nor makes one."""
    rules = {name: parse_policy(f"version = 1\n{text}".encode()) for name, text in (("none", ""), ("own", ROOT_GRANT))}
    needs.root()
    policy = FilePolicy(rules["none"])
    admission = Admission(policy, connections_max=16, report=lambda event: None)  # 4 places
    with contextlib.ExitStack() as pairs:

        def opened() -> Session | None:
            ours, theirs = socket.socketpair()
            pairs.enter_context(ours)
            session = admission.open_session(pairs.enter_context(theirs))
            assert not isinstance(session, GroupFull)
            return session

        for _ in range(3):
            policy.replace(rules["none"])
            turned_away = [opened() for _ in range(4)]
            assert opened() is None
            policy.replace(rules["own"])
            allowed = [opened() for _ in range(4)]
            policy.replace(rules["none"])
            for session in (*turned_away, *allowed):
                assert session is not None
                admission.close_session(session)


def test_a_reload_does_not_wait_for_listings(public: Path) -> None:
    """Otherwise a caller whose rights are being revoked could delay that with listings on many connections."""
    listing = grant(f"uid:{USER}", roles='["monitor"]')
    with PolicyDaemon(public, ROOT_GRANT + listing) as daemon:
        daemon.new_key("mine-1")
        user = daemon.caller(USER)
        with daemon.held_up("reader", "openat"):
            user.send("GET", "/keys")
            daemon.use_policy(ROOT_GRANT)
            assert not select.select([user.sock], [], [], 0)[0], "the listing still waits"
        assert user.receive().status == 401


# --- reloads ----------------------------------------------------------------------------------------------------------


def test_a_reload_is_audited_and_shown(daemon: PolicyDaemon) -> None:
    text = ROOT_GRANT + grant(f"uid:{USER}")
    daemon.write_policy(text)
    digest = hashlib.sha256(daemon.policy.read_bytes()).hexdigest()
    before = daemon.status()["policy"]["generation"]
    with daemon.client() as client:
        answer = client.reload_policy()
        status = client.status()
    assert (answer.sha256, answer.generation) == (digest, before + 1)
    assert status.policy is not None
    assert (status.policy.sha256, status.policy.generation, status.policy.last_error) == (digest, before + 1, "")
    assert reloads(daemon, "peer_uid:0")[-1]["facts"] == {"policy_generation": before + 1, "policy_sha256": digest}
    assert daemon.metric("minikms_policy_generation") == before + 1
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: daemon.status()["policy"]["generation"] == before + 2)
    wait_until(lambda: audited_generation(daemon) == before + 2)
    assert daemon.events("policy_reload")[-1]["detail"] == "SIGHUP"


def test_only_the_role_rotate_reloads(daemon: PolicyDaemon) -> None:
    daemon.use_policy(ROOT_GRANT + grant(f"uid:{USER}", roles='["create", "decrypt", "monitor", "destroy"]'))
    generation = daemon.status()["policy"]["generation"]
    assert daemon.caller(USER).post("/policy/reload", {}).status == 403
    assert daemon.status()["policy"]["generation"] == generation


def make_foreign(path: Path) -> None:
    os.chown(path, USER, USER)


def to_link(daemon: PolicyDaemon) -> None:
    moved = daemon.policy.rename(daemon.policy.with_name("moved"))
    daemon.policy.symlink_to(moved)


BROKEN: dict[str, Callable[[PolicyDaemon], object]] = {
    "not TOML": lambda daemon: daemon.write_policy("[[grant"),
    "too large": lambda daemon: daemon.write_policy(ROOT_GRANT + "#" * POLICY_BYTES_MAX),
    "gone": lambda daemon: daemon.policy.unlink(),
    "of another owner": lambda daemon: make_foreign(daemon.policy),
    "written by all": lambda daemon: daemon.policy.chmod(0o666),
    "written by the group": lambda daemon: daemon.policy.chmod(0o664),
    "a directory of another owner": lambda daemon: make_foreign(daemon.policy.parent),
    "a directory that all write": lambda daemon: daemon.policy.parent.chmod(0o777),
    "a link": to_link,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_valid_leaves_the_policy_with_an_alarm(daemon: PolicyDaemon, case: str) -> None:
    text = ROOT_GRANT + grant(f"uid:{USER}")
    daemon.use_policy(text)
    before, by_signal = daemon.status()["policy"], len(reloads(daemon, "minikms"))
    try:
        BROKEN[case](daemon)
        answer = daemon.caller().post("/policy/reload", {})
        assert (answer.status, answer.code) == (409, "invalid_policy")
        assert str(daemon.policy.parent) not in answer.body["error"], "the answer has no path"
        after = daemon.status()
        assert (after["policy"]["sha256"], after["policy"]["generation"]) == (before["sha256"], before["generation"])
        assert after["policy"]["last_error"]
        assert any(after["policy"]["last_error"] in warning for warning in after["warnings"])
        assert daemon.metric("minikms_policy_reload_failed") == 1
        line = reloads(daemon, "peer_uid:0")[-1]
        assert (line["outcome"], line["facts"]["policy_sha256"]) == ("invalid_policy", before["sha256"])
        assert "policy not reloaded" in daemon.log.read_text()
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: "invalid_policy" in [line["outcome"] for line in reloads(daemon, "minikms")[by_signal:]])
        assert daemon.caller(USER).post("/create_dek_for_thread", {"thread_id": "mine-1"}).status == 200
    finally:
        daemon.policy.unlink(missing_ok=True)
        os.chown(daemon.policy.parent, 0, 0)
        daemon.policy.parent.chmod(0o755)
    daemon.use_policy(text)
    assert daemon.status()["policy"]["last_error"] == ""
    assert daemon.metric("minikms_policy_reload_failed") == 0


def test_a_limited_monitor_does_not_see_what_the_file_says(daemon: PolicyDaemon) -> None:
    """Why a reload failed may quote other principals; sealed or not."""
    monitor = grant(f"uid:{USER}", roles='["monitor"]')
    daemon.use_policy(ROOT_GRANT + monitor)
    user, root = daemon.caller(USER), daemon.caller()
    daemon.write_policy(ROOT_GRANT + monitor + grant("spiffe://prod/pay*/secret*team", roles='["encrypts"]'))
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: bool(daemon.status()["policy"]["last_error"]))
    for path in ("/status", "/seal"):
        if path == "/seal":
            assert root.post(path, {}).status == 200
        why = root.get("/status").body["policy"]["last_error"]
        assert "encrypts" in why
        answer = user.get("/status").body
        assert answer["policy"]["last_error"] == "the file is not valid"
        assert why not in str(answer) and any("the file is not valid" in text for text in answer["warnings"])
    assert root.post("/unseal", {"from_source": True}).status == 200


def test_policies_are_taken_while_the_audit_log_cannot_be_written(daemon: PolicyDaemon) -> None:
    daemon.use_policy(ROOT_GRANT)
    before, lines = daemon.status()["policy"]["generation"], len(daemon.events("policy_reload"))
    wait_until(lambda: audited_generation(daemon) == before)
    unlimited = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
    size = (daemon.data_dir / "minikms-audit.log").stat().st_size
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        root = daemon.caller()
        wait_until(lambda: root.get("/status").body.get("status") == "audit_unavailable")
        daemon.write_policy("[[grant")
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: bool(daemon.status()["policy"]["last_error"]))
        daemon.use_policy(ROOT_GRANT + grant(f"uid:{USER}"))
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, unlimited)
    wait_until(lambda: audited_generation(daemon) == before + 1)
    found = daemon.events("policy_reload")[lines:]
    assert [line["outcome"] for line in found[-2:]] == ["invalid_policy", "ok"]


def test_without_a_policy_file_there_is_nothing_to_reload(public: Path) -> None:
    with LiveDaemon(public) as plain, plain.client() as client:
        with pytest.raises(minikms.ConflictError, match="without --policy"):
            client.reload_policy()
        os.kill(plain.pid, signal.SIGHUP)
        assert client.status().policy is None
        assert plain.process.poll() is None


# --- sealed -----------------------------------------------------------------------------------------------------------


def test_a_sealed_daemon_obeys_a_new_policy_and_audits_it_at_the_unseal(daemon: PolicyDaemon) -> None:
    monitor = grant(f"uid:{USER}", roles='["monitor"]')
    daemon.use_policy(ROOT_GRANT + monitor + PROXIED.replace('["create"', '["monitor", "create"'))
    root, user, proxy = daemon.caller(), daemon.caller(USER), daemon.caller(PROXY, NAME)
    assert root.post("/seal", {}).status == 200
    assert (user.get("/status").body["status"], user.post("/seal", {}).status) == ("sealed", 403)
    assert proxy.get("/status").body.keys() == {"status", "uptime_seconds"}
    for method, path in (("POST", "/seal"), ("GET", "/unseal"), ("POST", "/unseal")):
        assert proxy.ask(method, path, {} if method == "POST" else None).status == 403
    assert proxy.acting_for(None).get("/status").status == 403
    assert root.post("/policy/reload", {}).code == "sealed"
    generation = root.get("/status").body["policy"]["generation"]
    daemon.write_policy(ROOT_GRANT)
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: root.get("/status").body["policy"]["generation"] == generation + 1)
    assert is_turned_away(user) and is_turned_away(proxy)
    assert root.post("/unseal", {"from_source": True}).status == 200
    wait_until(lambda: audited_generation(daemon) == generation + 1)
    assert daemon.events("policy_reload")[-1]["detail"] == "SIGHUP"


def test_reloads_of_a_sealed_daemon_are_few_lines_with_their_count(daemon: PolicyDaemon) -> None:
    daemon.use_policy(ROOT_GRANT)
    before = daemon.status()["policy"]["generation"]
    wait_until(lambda: audited_generation(daemon) == before)
    lines = len(daemon.events("policy_reload"))
    root = daemon.caller()
    assert root.post("/seal", {}).status == 200
    for _ in range(OWED_LINES_MAX + 6):
        daemon.use_policy(ROOT_GRANT)
    assert root.post("/unseal", {"from_source": True}).status == 200
    wait_until(lambda: len(daemon.events("policy_reload")) == lines + OWED_LINES_MAX)
    found = daemon.events("policy_reload")[lines:]
    assert sum(line.get("count", 1) for line in found) == OWED_LINES_MAX + 6
    assert found[-1]["facts"]["policy_generation"] == before + OWED_LINES_MAX + 6


# --- starts -----------------------------------------------------------------------------------------------------------


def refused(base: Path, policy: Path, *flags: str) -> str:
    """What a start says that is refused; nothing was made."""
    words = (
        "--socket",
        base / "run" / "s",
        "--data-dir",
        base / "data",
        "--master-key-file",
        base / "key" / "root.key",
    )
    done = forked.run("minikms", *words, "--policy", policy, *flags)
    assert done.returncode == 2, done.stderr
    assert not (base / "data").exists()
    return done.stderr


def test_a_start_is_refused_with_a_policy_that_is_not_valid(public: Path) -> None:
    needs.root()
    key = public / "key" / "root.key"
    key.parent.mkdir(mode=0o700)
    key.touch(0o600)
    key.write_text("ab" * 32)
    policy = public / "policy" / "policy.toml"
    policy.parent.mkdir(mode=0o755)
    policy.write_text("version = 1\n[[grants]]\n")
    said = refused(public, policy)
    assert f"the policy file {policy}: " in said and "grants" in said
    policy.write_text("version = 1\n" + ROOT_GRANT)
    assert "--admin-uids" in refused(public, policy, "--admin-uids", "0")


def test_the_policy_has_a_directory_of_its_own(tmp_path: Path) -> None:
    data, keys = tmp_path / "data", tmp_path / "keys"
    for directory in (data, keys, data / "below", keys / "policy"):
        directory.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(data)
    root_key = str(keys / "root.key")
    for path in (data / "p", data / "below" / "p", tmp_path / "p", tmp_path / "link" / "p"):
        with pytest.raises(StartError, match=f"apart from {data}: the daemon may write there"):
            PolicyFile(path).check_apart(written=[str(data)], of_root_key=())
    with pytest.raises(StartError, match="root key"):
        PolicyFile(keys / "p").check_apart(written=[str(data)], of_root_key=[root_key])
    for shared in ("/p", "/etc/p"):
        with pytest.raises(StartError, match="one such as /etc/progressdb/policy"):
            PolicyFile(Path(shared)).check_apart(written=[str(data)], of_root_key=[root_key])
    PolicyFile(keys / "policy" / "p").check_apart(written=[str(data)], of_root_key=[root_key])


def test_the_policy_does_not_lie_where_the_daemon_may_write(public: Path) -> None:
    """Such as the directories of the socket, and of a key file that is rewritten."""
    needs.root()
    key = public / "key" / "root.key"
    key.parent.mkdir(mode=0o700)
    key.touch(0o600)
    key.write_text("ab" * 32)
    written = {public / "run": [], key.parent: ["--rewrite-master-key-file"]}
    for directory, flags in written.items():
        policy = directory / "policy" / "policy.toml"
        policy.parent.mkdir(mode=0o755, parents=True)
        policy.write_text("version = 1\n" + ROOT_GRANT)
        assert f"apart from {directory}" in refused(public, policy, *flags)


def test_the_flag_for_allowed_uids_only_narrows(public: Path) -> None:
    policy = ROOT_GRANT + grant(f"uid:{USER}") + grant(f"uid:{OTHER}")
    with PolicyDaemon(public, policy, "--allowed-uids", f"0,{USER},{NOBODY}") as daemon:
        answers = [
            daemon.caller(uid).post("/create_dek_for_thread", {"thread_id": "mine-1"}).status
            for uid in (USER, OTHER, NOBODY)
        ]
        assert answers == [200, 401, 401]
        (start,) = daemon.events("start")
        assert start["facts"]["policy_sha256"] == hashlib.sha256(daemon.policy.read_bytes()).hexdigest()
        daemon.use_policy(policy + grant(f"uid:{NOBODY}"))
        assert daemon.caller(NOBODY).post("/create_dek_for_thread", {"thread_id": "mine-1"}).status == 200
