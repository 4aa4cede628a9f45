"""`minikms policy check` and `minikms policy explain`, as a person runs them."""

import json
from pathlib import Path

import pytest

from minikms.cli.policy import check, explain
from minikms.cli.serve import POLICY_VARIABLE
from minikms.policy.rules import PolicyFileError
from minikms.processes.flags import ALLOWED_UIDS_VARIABLE
from tests.harness import forked

FILE = """\
version = 1
[[grant]]
name = "chat"
principals = ["uid:1000", "spiffe://prod/chat/*"]
roles = ["encrypt", "decrypt"]
threads = ["chat-*"]
limits = { decrypts_per_hour = 500 }
[[proxy]]
name = "gateway"
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/**"]
limits_total = { decrypts_per_hour = 800 }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(FILE)
    return path


def test_a_valid_file_is_summed_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(file) == 0
    assert "is valid: 1 grant, 1 proxy, SHA-256" in capsys.readouterr().out
    assert check(file, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["grants"], found["proxies"], found["warnings"]) == (True, 1, 1, [])


def test_warnings_do_not_make_a_file_invalid(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("version = 1\n")
    assert check(file) == 0
    assert "warning: the file has no grant" in capsys.readouterr().out


def test_an_invalid_file_fails_with_its_place(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(FILE.replace("threads", "thread"))
    assert check(file) == 1
    assert 'grant 1 (chat): there is no member "thread"' in capsys.readouterr().err
    assert check(file, json=True) == 1
    assert json.loads(capsys.readouterr().out)["valid"] is False


def test_an_explanation_has_the_decision_the_grant_and_a_change(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(policy=file, principal="uid:1000", role="decrypt", thread="chat-1") == 0
    allowed = capsys.readouterr().out
    assert "allowed" in allowed and "grant 1 (chat)" in allowed and "it would be denied" in allowed
    assert explain(policy=file, principal="uid:1000", role="decrypt", thread="x", json=True) == 1
    denied = json.loads(capsys.readouterr().out)
    assert (denied["decision"], denied["code"], denied["grant"]) == ("denied", "key_not_found", "")
    assert denied["what_would_change"]


def test_the_variable_names_the_file_too(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLICY_VARIABLE, str(file))
    assert explain(principal="spiffe://prod/chat/a", role="encrypt", via="uid:992") == 0
    assert "uid:992" in capsys.readouterr().out


def test_the_allowed_uids_of_the_daemon_count(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decided(allowed_uids: str | None) -> int:
        return explain(policy=file, principal="uid:1000", role="decrypt", thread="chat-1", allowed_uids=allowed_uids)

    assert decided("7") == 1
    monkeypatch.setenv(ALLOWED_UIDS_VARIABLE, "7,8")
    assert decided(None) == 1
    assert capsys.readouterr().out.count("may not connect") == 2
    assert decided("7,1000") == 0


def test_an_invalid_file_explains_nothing(file: Path) -> None:
    file.write_text("version = 2")
    with pytest.raises(PolicyFileError):
        explain(policy=file, principal="uid:1", role="decrypt")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["check", "FILE"], 0, "is valid"),
        (["check", "missing.toml"], 2, "No such file"),
        (["explain", "--policy", "FILE", "--principal", "uid:7", "--role", "decrypt"], 1, "denied (unauthorized)"),
        (["explain", "--policy", "FILE", "--principal", "root", "--role", "decrypt"], 2, "begins with uid:"),
        (["explain", "--policy", "FILE", "--principal", "uid:7", "--role", "everything"], 2, "no role 'everything'"),
        (["explain", "--principal", "uid:7", "--role", "decrypt"], 2, "name the policy file"),
    ],
)
def test_the_exit_status_says_what_happened(file: Path, words: list[str], status: int, said: str) -> None:
    done = forked.run("minikms", "policy", *(word.replace("FILE", str(file)) for word in words))
    assert done.returncode == status, done
    assert said in done.stdout + done.stderr
