"""An auditor of the real daemon: its position, before and after a seal, a kill and a power cut."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.audit.reader import LOG_NAME
from minikms.offline import detach_auditor
from minikms.roots.providers import KeyFile
from tests.harness import forked
from tests.harness.audited_daemon import ORIGIN, POLICY, AuditedDaemon, send_report
from tests.harness.callers import OTHER, PROXY, USER, Caller, PolicyDaemon, Reply
from tests.harness.disk_faults import failing_os
from tests.harness.waiting import wait_until

LINES_MAX = 100


@pytest.fixture
def daemon(public: Path) -> Iterator[AuditedDaemon]:
    with AuditedDaemon(public) as running:
        yield running
        assert "internal error" not in running.log.read_text()


def test_an_auditor_learns_what_is_durable_and_reports_what_it_took(daemon: AuditedDaemon) -> None:
    daemon.new_key("t")
    assert daemon.status()["audit"]["position"] is None
    answer = daemon.shipped()
    durable, status = answer["durable"], daemon.status()["audit"]
    assert base64.b64decode(answer["public_key"]).hex() == status["public_key"]
    assert answer["log_id"] == status["log_id"]
    line = daemon.lines()[durable["seq"] - 1]
    assert (line["event"]["seq"], line["sig"]) == (durable["seq"], durable["mac"])
    assert status["position"]["seq"] == durable["seq"] and status["position"]["origin"] == ORIGIN
    assert status["durable"]["seq"] >= durable["seq"]
    assert status["position"]["lag_lines"] == status["durable"]["seq"] - durable["seq"]


def test_a_report_leaves_no_line_but_the_first_and_refused_ones(daemon: AuditedDaemon) -> None:
    daemon.shipped()
    first = daemon.audited("report_audit_position")
    assert [event.get("detail", "") for event in first] == [f"begun: {ORIGIN}", ""]
    assert first[1]["facts"] == {"epoch": daemon.status()["epoch"], "origin": ORIGIN}
    for _ in range(5):
        daemon.shipped()
    assert len(daemon.audited("report_audit_position")) == 2
    assert daemon.report(origin="example.org/another").code == "conflict"
    assert daemon.report(1, base64.b64encode(bytes(32)).decode(), log_id=daemon.shipped()["log_id"]).status == 409
    assert daemon.report(-1).status == 400
    assert [event["outcome"] for event in daemon.audited("report_audit_position")[2:]] == [
        "conflict",
        "conflict",
        "invalid_request",
    ]


def test_only_a_grant_of_the_policy_file_lets_anyone_report(daemon: AuditedDaemon) -> None:
    for uid in (0, OTHER):
        assert daemon.report(uid=uid).code == "forbidden"
    assert send_report(daemon.caller(PROXY, "spiffe://prod/ship")).code == "forbidden"
    assert daemon.status()["audit"]["position"] is None


def test_the_origin_stays_after_a_restart_and_no_other_one_is_attached(daemon: AuditedDaemon) -> None:
    daemon.shipped()
    daemon.kill()
    daemon.start()
    position = daemon.status()["audit"]["position"]
    assert (position["seq"], position["origin"], position["age_seconds"]) == (0, ORIGIN, None)
    answer = daemon.report(origin="example.org/another")
    assert (answer.code, answer.body["error"]) == (
        "conflict",
        f"the audit log belongs to the origin {ORIGIN}, and no other auditor can be attached",
    )
    daemon.shipped()


def test_an_auditor_is_detached_while_the_daemon_is_stopped(
    daemon: AuditedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line about it is durable before the keyring changes: a crash between the two leaves the auditor attached."""
    daemon.shipped()
    directory, key = str(daemon.data_dir), ("--master-key-file", str(daemon.root_file))
    detach = ("minikms", "audit", "detach", "--yes", "--data-dir", directory, *key)
    beside = forked.run(*detach)
    assert beside.returncode == 2 and "an auditor is detached only while the daemon is stopped" in beside.stderr
    daemon.stop()
    with failing_os(monkeypatch, "rename"), pytest.raises(StorageUnavailableError):
        detach_auditor(directory, KeyFile(daemon.root_file))
    daemon.start()
    assert daemon.report(origin="example.org/another").code == "conflict"
    daemon.stop()
    done = forked.run(*detach)
    assert (done.returncode, ORIGIN in done.stdout) == (0, True), done
    assert "no auditor is attached" in forked.run(*detach).stderr
    assert [event["facts"]["origin"] for event in daemon.audited("detach_auditor")] == [ORIGIN, ORIGIN]
    daemon.start()
    assert daemon.status()["audit"]["position"] is None
    assert daemon.report(origin="example.org/another").status == 200


def test_an_attached_auditor_gets_signed_lines_without_a_rush(daemon: AuditedDaemon) -> None:
    """The lines of an idle daemon end: neither a report nor a checkpoint line calls for another checkpoint line."""
    daemon.shipped()
    daemon.new_key("t")
    wait_until(lambda: daemon.lines()[-1]["event"]["type"] == "checkpoint")
    count = len(daemon.lines())
    wait_until(lambda: daemon.shipped()["durable"]["seq"] == count)
    assert len(daemon.lines()) == count


def test_without_a_directory_of_the_log_no_auditor_is_attached(public: Path) -> None:
    with PolicyDaemon(public, POLICY) as daemon:
        answer = send_report(daemon.caller(USER))
        assert (answer.code, "--audit-dir" in answer.body["error"]) == ("conflict", True)


# --- an auditor that lags --------------------------------------------------------------------------------------------


@pytest.fixture
def bounded(public: Path) -> Iterator[AuditedDaemon]:
    """Refuses requests while more than LINES_MAX lines are not reported."""
    with AuditedDaemon(public, "--refuse-when-unshipped", str(LINES_MAX)) as running:
        yield running
        assert "internal error" not in running.log.read_text()


def refused(daemon: AuditedDaemon, caller: Caller) -> Reply:
    """The first refusal because the auditor lags, after requests that add a line each."""
    for _ in range(100 * LINES_MAX):
        answer = caller.post("/create_dek_for_thread", {})
        if answer.code == "audit_lagging":
            return answer
        assert answer.code == "invalid_request"
    raise AssertionError("it serves")


def test_no_key_is_used_while_the_auditor_lags(bounded: AuditedDaemon) -> None:
    """Also if none was ever attached. What an operator needs is served: the state, a seal, reports, the policy."""
    caller = bounded.caller()
    made = caller.post("/create_dek_for_thread", {"thread_id": "t"}).body["key_id"]
    asked = {"key_id": made, "plaintext": "AA=="}
    answer = refused(bounded, caller)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "minikms-auditor" in answer.body["error"] and str(LINES_MAX) in answer.body["error"]
    for path in ("/encrypt", "/rotate_kek", "/no-such-path"):
        assert caller.post(path, asked).code == "audit_lagging"
    assert caller.get("/ready").code == "audit_lagging"
    assert caller.get("/health").status == 200
    status = bounded.status()
    assert (status["status"], status["reason"]) == ("audit_lagging", answer.body["error"])
    assert bounded.metric("minikms_up") == 0
    assert caller.post("/policy/reload", {}).status == 200
    bounded.shipped()
    wait_until(lambda: caller.post("/encrypt", asked).status == 200)
    status = bounded.status()
    assert (status["status"], status["audit"]["position"]["lag_lines"] < LINES_MAX) == ("ok", True)
    assert bounded.metric("minikms_audit_lag_lines") < LINES_MAX
    assert bounded.metric("minikms_audit_position_line") == status["audit"]["position"]["seq"]
    refused(bounded, caller)
    assert caller.post("/seal", {}).status == 200
    assert caller.post("/encrypt", asked).code == "sealed"
    assert caller.post("/unseal", {"from_source": True}).status == 200
    assert caller.post("/encrypt", asked).code == "audit_lagging"


def test_refusals_of_a_lag_are_counted_in_few_lines(bounded: AuditedDaemon) -> None:
    caller = bounded.caller()
    refused(bounded, caller)
    for _ in range(LINES_MAX):
        assert caller.post("/encrypt", {}).code == "audit_lagging"
    bounded.stop()
    counts = [event["count"] for event in bounded.audited("refused") if event["outcome"] == "audit_lagging"]
    assert counts == [1, LINES_MAX]


def test_a_restart_is_no_way_around_the_bound_of_a_lag(bounded: AuditedDaemon) -> None:
    caller = bounded.caller()
    refused(bounded, caller)
    bounded.shipped()
    wait_until(lambda: caller.post("/encrypt", {}).code == "invalid_request")
    bounded.kill()
    bounded.start()
    assert bounded.caller().post("/encrypt", {}).code == "audit_lagging"
    bounded.shipped()
    wait_until(lambda: bounded.caller().post("/encrypt", {}).code == "invalid_request")


# --- sealed ----------------------------------------------------------------------------------------------------------


def test_a_sealed_daemon_answers_a_known_auditor_and_keeps_its_position(daemon: AuditedDaemon) -> None:
    daemon.shipped()
    daemon.new_key("t")
    before = daemon.shipped()
    operator = daemon.caller()
    assert operator.post("/seal", {}).status == 200
    count = len(daemon.lines())
    sealed = daemon.shipped()
    assert (sealed["log_id"], sealed["public_key"]) == (before["log_id"], before["public_key"])
    assert before["durable"]["seq"] <= sealed["durable"]["seq"] <= count
    assert daemon.report(origin="example.org/another").code == "conflict"
    assert daemon.report(uid=OTHER).code == "forbidden"
    assert len(daemon.lines()) == count
    assert operator.post("/unseal", {"from_source": True}).status == 200
    assert daemon.status()["audit"]["position"]["seq"] == sealed["durable"]["seq"]
    assert daemon.shipped()["durable"]["seq"] > sealed["durable"]["seq"]


def test_a_daemon_that_starts_sealed_answers_a_known_auditor(daemon: AuditedDaemon) -> None:
    operator = daemon.caller()
    assert operator.post("/seal", {}).status == 200
    assert daemon.report().code == "sealed", "an origin can't be recorded without the keyring"
    assert operator.post("/unseal", {"from_source": True}).status == 200
    before = daemon.shipped()
    assert operator.post("/seal", {}).status == 200
    daemon.kill()
    daemon.start()
    answer = daemon.shipped()
    assert (answer["log_id"], answer["public_key"]) == (before["log_id"], before["public_key"])
    assert before["durable"]["seq"] <= answer["durable"]["seq"] <= len(daemon.lines())
    (daemon.log_dir / f"{LOG_NAME}.confirmed").unlink()
    daemon.kill()
    daemon.start()
    sealed = daemon.report(before["durable"]["seq"], before["durable"]["mac"], log_id=before["log_id"])
    assert sealed.status == 200 and sealed.body["durable"]["seq"] == 1
    assert daemon.caller().post("/unseal", {"from_source": True}).status == 200
    daemon.shipped()
