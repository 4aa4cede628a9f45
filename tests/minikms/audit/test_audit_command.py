"""`minikms audit …` as an operator runs it: output and exit status, with and without the root key."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import KmsRefusedError
from minikms.audit import AuditLog, Event, ExpectedLog
from minikms.audit.queries import READ_TYPES
from minikms.cli import audit
from minikms.cli.console import DataFiles, RootKey
from minikms.client import DecryptItem, ReencryptItem
from minikms.crypto.aead import NonceSource
from minikms.custody.keyring_file import KeyringFile
from minikms.datadir import audit_keys, open_for_reading, open_keyring
from minikms.memory.arena import SecretArena
from minikms.offline import rotate_audit_key
from minikms.platform.directory_lock import DataDirLock
from minikms.roots.providers import DevelopmentKey
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.minikms.audit.logmaker import open_log

LOG = "minikms-audit.log"
BY_PUBLIC_KEY = "the signed lines were checked with the public key"
START_NS = 1_764_000_000_123_456_789


def make_data_dir(directory: Path, *, hash_thread_ids: bool = False) -> None:
    """A data directory with a keyring, its key file beside it, and a closed log of a few lines."""
    with DataDirLock(str(directory)) as lock, ThreadPoolExecutor(1) as executor:
        arena = SecretArena(64)
        file = KeyringFile(lock.directory_fd, executor)
        root = DevelopmentKey(str(directory))
        unlocked, *_ = open_keyring(str(directory), file, root, arena=arena, nonces=NonceSource())
        log = AuditLog(directory, audit_keys(unlocked), hash_thread_ids=hash_thread_ids, now_ns=lambda: START_NS)
        log.add(Event(type="create_dek", actor="peer_uid:1000", pid=9, key_id="k_a", thread_id="t1", request_id="r1"))
        log.add(Event(type="encrypt_batch", actor="peer_uid:1000", count=2, key_ids=["k_a"], request_ids=["x", "y"]))
        log.add(Event(type="rotate_kek", actor="peer_uid:1001", outcome="forbidden"))
        log.close()
        arena.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("command") / "data"
    make_data_dir(directory)
    return directory


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    """A copy to alter, its key file too."""
    shutil.copy(f"{made}.master-key", tmp_path / "data.master-key")
    return Path(shutil.copytree(made, tmp_path / "data"))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from minikms.cli import main; main()", "audit", *map(str, arguments)]


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)"""
    done = forked.run("minikms", "audit", *arguments, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def public_key_of(directory: Path) -> str:
    genesis = json.loads((directory / LOG).read_bytes().split(b"\n")[0])
    return str(genesis["event"]["facts"]["public_key"])


def test_an_intact_log_exits_0_and_says_what_was_checked(made: Path) -> None:
    status, output, errors = run("verify", "--data-dir", made)
    assert (status, errors) == (0, "")
    head = json.loads((made / LOG).read_bytes().split(b"\n")[-2])["sig"]
    assert output.splitlines()[0] == "The audit log is intact: every line was checked with the audit key."
    assert f"head        5:{head}" in output
    assert "lines       1 to 5" in output and "anchor      none given" in output


@pytest.mark.parametrize("how", ["argument", "file", "variable"])
def test_the_root_key_is_read_from_the_sources_of_the_daemon(data_dir: Path, tmp_path: Path, how: str) -> None:
    key_file = tmp_path / "elsewhere"
    os.rename(f"{data_dir}.master-key", key_file)
    assert run("verify", "--data-dir", data_dir)[0] == 2
    if how == "argument":
        status = run("verify", "--data-dir", data_dir, "--master-key-file", key_file)[0]
    elif how == "file":
        named = {"PROGRESSDB_KMS_DATA_DIR": str(data_dir), "PROGRESSDB_MINIKMS_MASTER_KEY_FILE": str(key_file)}
        status = run("verify", **named)[0]
    else:
        status = run("verify", "--data-dir", data_dir, PROGRESSDB_MINIKMS_MASTER_KEY=key_file.read_text().strip())[0]
    assert status == 0


def test_an_altered_log_exits_1_and_names_file_line_and_fault(data_dir: Path) -> None:
    content = (data_dir / LOG).read_bytes()
    (data_dir / LOG).write_bytes(content.replace(b'"forbidden"', b'"ok"'))
    status, output, _ = run("verify", "--data-dir", data_dir)
    assert status == 1
    assert output.splitlines()[:2] == [
        "The audit log is NOT intact: 1 finding.",
        f"  {LOG}:4: line 4 was altered: its MAC does not fit its event and the line before (altered)",
    ]
    assert run("verify", "--data-dir", data_dir, "--public-key", public_key_of(data_dir))[0] == 1


def test_the_report_is_available_as_json(data_dir: Path) -> None:
    status, output, _ = run("verify", "--data-dir", data_dir, "--json")
    report = json.loads(output)
    assert (status, report["intact"], report["lines"], report["findings"]) == (0, True, 5, [])
    (data_dir / LOG).write_bytes((data_dir / LOG).read_bytes() + b"x\n")
    status, output, _ = run("verify", "--data-dir", data_dir, "--json")
    report = json.loads(output)
    assert (status, report["intact"], report["findings"][0]["kind"]) == (1, False, "malformed")


def test_the_public_key_alone_checks_signed_lines(data_dir: Path, tmp_path: Path) -> None:
    os.unlink(f"{data_dir}.master-key")
    key = public_key_of(data_dir)
    assert (
        "the signed lines were checked with the public key"
        in run("verify", "--data-dir", data_dir, "--public-key", key)[1]
    )
    (tmp_path / "audit.pub").write_text(base64.b64decode(key).hex() + "\n")
    assert run("verify", "--data-dir", data_dir, "--public-key", tmp_path / "audit.pub")[0] == 0
    other = encode_text(bytes(32))
    status, output, _ = run("verify", "--data-dir", data_dir, "--public-key", other)
    assert status == 1 and "a public key that is not trusted" in output


def test_the_expected_head_reveals_removed_last_lines(data_dir: Path) -> None:
    lines = (data_dir / LOG).read_bytes().split(b"\n")
    head = f"5:{json.loads(lines[4])['sig']}"
    assert "0 line(s) are newer" in run("verify", "--data-dir", data_dir, "--expect-head", head)[1]
    (data_dir / LOG).write_bytes(b"\n".join(lines[:4]) + b"\n")
    status, output, _ = run("verify", "--data-dir", data_dir, "--expect-head", head)
    assert status == 1 and "ends at line 4, but the expected line 5 was written" in output


def test_a_check_of_a_part_names_the_part(data_dir: Path) -> None:
    make_more(data_dir)
    key = public_key_of(data_dir)
    _, output, _ = run("verify", "--data-dir", data_dir, "--from-checkpoint", 5)
    assert output.splitlines()[0] == "The audit log is intact from line 5: every line was checked with the audit key."
    assert "before      the lines before line 5 were not checked" in output
    _, output, _ = run("verify", "--data-dir", data_dir, "--public-key", key)
    assert output.splitlines()[0] == f"The audit log is intact up to line 5: {BY_PUBLIC_KEY}."
    assert "not signed  the last 1 line(s): the public key can't check them" in output
    assert f"key         version 1, public key {key}" in output
    _, output, _ = run("verify", "--data-dir", data_dir, "--public-key", key, "--from-checkpoint", 5)
    assert output.splitlines()[0] == f"The audit log is intact from line 5 up to line 5: {BY_PUBLIC_KEY}."
    head = f"6:{json.loads((data_dir / LOG).read_bytes().splitlines()[-1])['sig']}"
    _, output, _ = run("verify", "--data-dir", data_dir, "--public-key", key, "--expect-head", head)
    assert "anchor      0 line(s) are newer than the expected head; that one is not signed yet" in output


def test_a_log_that_can_not_be_checked_is_neither_intact_nor_altered(data_dir: Path) -> None:
    lines = (data_dir / LOG).read_bytes().split(b"\n")
    (data_dir / LOG).write_bytes(b"\n".join(lines[:3]) + b"\n")
    given = ("--data-dir", data_dir, "--public-key", public_key_of(data_dir))
    status, output, _ = run("verify", *given)
    assert status == 2
    assert output.startswith("The audit log can't be checked with the public key: no line of it is signed yet.\n")
    status, output, _ = run("verify", *given, "--json")
    report = json.loads(output)
    assert (status, report["intact"], report["conclusive"], report["findings"]) == (2, False, False, [])
    assert run("verify", "--data-dir", data_dir)[0] == 0


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("verify", {}, "name the data directory"),
        ("verify", {"data_dir": "/nowhere"}, "there is no directory"),
        ("verify", {"data_dir": "DATA", "from_checkpoint": 77}, "no line 77"),
        ("verify", {"data_dir": "DATA", "expect_head": "5"}, "SEQ:SIG"),
        (
            "verify",
            {"data_dir": "DATA", "expect_head": f"4:{encode_text(bytes(32))}", "from_checkpoint": 5},
            "--from-checkpoint 5 leaves out line 4, which is expected",
        ),
        ("verify", {"data_dir": "DATA", "public_key": ["nonsense"]}, "neither a public key"),
        ("verify", {"data_dir": "DATA", "public_key": ["/dev/null"]}, "does not hold a public key"),
        ("verify", {"data_dir": "DATA", "master_key_file": Path("/nowhere")}, "can't be read"),
        ("verify", {"data_dir": "EMPTY", "public_key": [encode_text(bytes(32))]}, "there is no audit log"),
        ("verify", {"data_dir": "EMPTY", "master_key_file": Path("/nowhere")}, "there is no keyring"),
        ("verify", {"data_dir": "EMPTY"}, "or only the log's public key with --public-key"),
        ("find", {"data_dir": "DATA"}, "give something to find"),
        ("find", {"data_dir": "EMPTY", "key": "k"}, "there is no audit log"),
        ("tail", {"data_dir": "EMPTY"}, "there is no audit log"),
        ("rotate_key", {"data_dir": "EMPTY", "master_key_file": Path("/nowhere")}, "there is no keyring"),
        ("rotate_key", {"data_dir": "EMPTY"}, "give the root key"),
    ],
)
def test_missing_inputs_exit_2_with_one_sentence(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: dict[str, object], text: str
) -> None:
    places = {"DATA": str(made), "EMPTY": str(tmp_path)}
    arguments: dict[str, Any] = {
        flag: places.get(value, value) if isinstance(value, str) else value for flag, value in flags.items()
    }
    if name in ("verify", "rotate_key"):
        root_key = RootKey(arguments.pop("master_key_file", None))
        arguments["files"] = DataFiles(arguments.pop("data_dir", None), root_key)
    assert getattr(audit, name)(**arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert text in errors and errors.startswith("minikms: ") and errors.count("\n") == 1


def test_a_removed_log_exits_2(data_dir: Path) -> None:
    (data_dir / LOG).unlink()
    assert run("verify", "--data-dir", data_dir)[0] == 2


def test_the_last_lines_are_shown_as_text_and_as_json(made: Path) -> None:
    _, output, _ = run("tail", "--data-dir", made, "--lines", 3)
    assert output.splitlines()[0] == (
        "2025-11-24T16:00:00.123Z        3 encrypt_batch    peer_uid:1000 ok keys=k_a count=2 requests=x,y"
    )
    _, output, _ = run("tail", "--data-dir", made, "--json")
    assert output.encode() == (made / LOG).read_bytes()


def test_a_log_can_not_send_commands_to_the_terminal(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data_dir / LOG).write_bytes((data_dir / LOG).read_bytes() + b"\x1b]0;owned\x07\x1b[2J\n")
    directory = str(data_dir)
    audit.tail(data_dir=directory)
    audit.tail(data_dir=directory, json=True)
    audit.verify(files=DataFiles(directory))
    output = capsys.readouterr().out
    assert "byte 0x1b at offset 0" in output
    assert "\x1b" not in output and "owned" not in output


def test_new_lines_are_followed_until_interrupted(data_dir: Path) -> None:
    with subprocess.Popen(
        command("tail", "--data-dir", data_dir, "--lines", 1, "--follow"), stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        assert " 5 checkpoint" in following.stdout.readline()
        make_more(data_dir)
        assert " 6 decrypt" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert following.wait(60) == 130


def make_more(directory: Path) -> None:
    """One more line, as a daemon would write it."""
    with open_for_reading(str(directory), DevelopmentKey(str(directory))) as unlocked:
        log = AuditLog(str(directory), audit_keys(unlocked), expected=ExpectedLog(), now_ns=lambda: START_NS)
        log.add(Event(type="decrypt", actor="peer_uid:1000"))
        log.commit()


def test_lines_are_found_by_thread_key_actor_and_request(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines_of: list[tuple[dict[str, Any], int]] = [
        ({"thread": "t1"}, 2),
        ({"key": "k_a"}, 2),
        ({"actor": "peer_uid:1001"}, 1),
        ({"request": "y"}, 1),
        ({"key": "k_a", "request": "r1"}, 1),
    ]
    for sought, count in lines_of:
        assert audit.find(data_dir=str(made), **sought) == 0
        assert len(capsys.readouterr().out.splitlines()) == count, sought
    assert run("find", "--data-dir", made, "--key", "k_a", "--request", "r1")[0] == 0
    assert run("find", "--data-dir", made, "--thread", "t2")[:2] == (1, "")


def test_the_reads_of_a_thread_are_found_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By older keys too, in single lines and batches; not by a key of another thread."""
    client: dict[str, Any] = {"actor": "peer_uid:1000"}
    here = tmp_path / "data"
    here.mkdir(mode=0o700)
    with contextlib.closing(open_log(here)) as log:
        log.add(Event(type="create_dek", key_id="k_a", thread_id="t1", **client))
        log.add(Event(type="decrypt", key_id="k_a", request_id="r1", **client))
        log.add(Event(type="create_dek", key_id="k_b", thread_id="t2", **client))
        log.add(Event(type="decrypt_batch", key_ids=["k_b"], request_id="other", **client))
        log.add(Event(type="decrypt_batch", key_ids=["k_b", "k_a"], request_id="r2", **client))
        log.add(Event(type="encrypt_batch", key_ids=["k_a"], request_id="w1", **client))
        log.add(Event(type="retire_key", key_id="k_b", thread_id="t1", outcome="wrong_thread", **client))
        log.add(Event(type="create_dek", key_id="k_c", thread_id="t1", detail="replaces k_a", **client))
        log.add(Event(type="decrypt_batch", key_ids=["k_c"], request_id="r3", **client))
        log.add(Event(type="decrypt_batch", key_ids=["k_b"], request_id="other", **client))

    def requests(**sought: Any) -> list[str]:
        status = audit.find(data_dir=str(here), **sought)
        found = re.findall(r"request=(\S+)", capsys.readouterr().out)
        assert status == (0 if found else 1)
        return found

    assert requests(thread="t1", reads=True) == ["r1", "r2", "r3"]
    assert requests(thread="t1", reads=True, request="r2") == ["r2"]
    assert requests(thread="t1", key="k_c") == ["r3"]
    assert requests(thread="t1", reads=True, actor="peer_uid:7") == []
    assert len(requests(thread="t1")) == 4
    assert requests(reads=True) == ["r1", "other", "r2", "r3", "other"]


def test_the_reads_of_a_daemon_are_those_that_answered_plaintext(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch counts if one of its items was decrypted. A refused request is in the log, and is no read."""
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        key = kms.create_dek_for_thread("t", purpose="data").key_id
        other = kms.create_dek_for_thread("t2").key_id
        good = DecryptItem(key_id=key, ciphertext=kms.encrypt(key, b"text"))
        bad = DecryptItem(key_id=other, ciphertext=bytes(28))
        kms.decrypt(key, good.ciphertext, request_id="opened")
        with pytest.raises(KmsRefusedError):
            kms.decrypt(key, good.ciphertext, aad=b"another place", request_id="refused")
        kms.decrypt_batch([good, bad], request_id="partly")
        kms.generate_data_key(key, request_id="data-key")
        with pytest.raises(KmsRefusedError):
            kms.generate_data_key(other, request_id="no-data-key")
        kms.check_batch(key, [ReencryptItem(ciphertext=good.ciphertext)], request_id="checked")
    for thread in ("", "t"):
        assert audit.find(data_dir=str(daemon.data_dir), reads=True, thread=thread) == 0
        assert re.findall(r"request=(\S+)", capsys.readouterr().out) == ["opened", "partly", "data-key"]
    assert audit.find(data_dir=str(daemon.data_dir), request="refused") == 0


@pytest.mark.parametrize("read_type", READ_TYPES)
def test_of_all_outcomes_only_those_with_an_answer_are_reads(
    tmp_path: Path, read_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {code for name, code in vars(api).items() if name.startswith("CODE_")}
    outcomes = sorted(codes | {"ok", "partly_refused"})
    assert {"forbidden", "decryption_failed", "key_destroyed", "interrupted", "internal"} < codes
    here = tmp_path / "data"
    here.mkdir(mode=0o700)
    with contextlib.closing(open_log(here)) as log:
        for outcome in outcomes:
            log.add(Event(type=read_type, actor="peer_uid:1000", key_id="k_a", outcome=outcome, request_id=outcome))
    assert audit.find(data_dir=str(here), reads=True) == 0
    assert re.findall(r"request=(\S+)", capsys.readouterr().out) == ["ok", "partly_refused"]


def test_a_removed_line_of_a_keys_creation_is_made_up_for_by_the_key_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        for thread in ("t1", "t2"):
            key = kms.create_dek_for_thread(thread).key_id
            sealed = kms.encrypt(key, b"text")
            assert kms.decrypt(key, sealed, request_id=f"read-{thread}") == b"text"
    log = daemon.data_dir / LOG
    lines = log.read_bytes().splitlines(keepends=True)
    created = max(at for at, line in enumerate(lines) if b'"create_dek"' in line)
    first = next(at for at, line in enumerate(lines) if b'"create_dek"' in line)
    log.write_bytes(b"".join(lines[first + 1 : created] + lines[created + 1 :]))
    for thread in ("t1", "t2"):
        assert audit.find(data_dir=str(daemon.data_dir), thread=thread, reads=True) == 0
        assert re.findall(r"request=(\S+)", capsys.readouterr().out) == [f"read-{thread}"]


def test_a_log_after_an_accepted_loss_shows_reads_under_older_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new log begins with line 1, but does not show the creation of keys that are older."""
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        key = kms.create_dek_for_thread("t1").key_id
        sealed = kms.encrypt(key, b"text")
        daemon.stop()
        (daemon.data_dir / LOG).unlink()
        daemon.command.append("--accept-audit-loss")
        daemon.start()
        kms.decrypt(key, sealed, request_id="after")
    assert audit.find(data_dir=str(daemon.data_dir), thread="t1", reads=True) == 0
    assert re.findall(r"request=(\S+)", capsys.readouterr().out) == ["after"]


def test_hidden_threads_are_found_with_the_root_key(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    make_data_dir(directory, hash_thread_ids=True)
    key_file = Path(f"{directory}.master-key").rename(tmp_path / "key")
    assert run("find", "--data-dir", directory, "--thread", "t1")[0] == 1
    status, output, _ = run("find", "--data-dir", directory, "--thread", "t1", "--master-key-file", key_file)
    assert status == 0 and "thread=hmac-sha256:" in output


def test_the_log_names_a_new_audit_key_and_both_keys_verify(data_dir: Path) -> None:
    old = public_key_of(data_dir)
    status, output, _ = run("rotate-key", "--data-dir", data_dir, "--json")
    made = json.loads(output)
    assert (status, made["version"]) == (0, 2)
    assert made["public_key"] != old
    status, output, _ = run("verify", "--data-dir", data_dir, "--json")
    assert (status, json.loads(output)["head"]) == (0, made["head"])
    assert run("verify", "--data-dir", data_dir, "--public-key", old)[0] == 0
    assert run("rotate-key", "--data-dir", data_dir)[1].startswith("The audit key is now version 3.")
    assert run("verify", "--data-dir", data_dir)[0] == 0


def test_the_next_start_completes_an_interrupted_change_of_the_audit_key(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keyring records after which line the new key begins: a log that ends at another line is refused."""
    head = json.loads(run("verify", "--data-dir", data_dir, "--json")[1])["head"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "change_key", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate_audit_key(str(data_dir), DevelopmentKey(str(data_dir)))
    status, output, _ = run("verify", "--data-dir", data_dir)
    assert status == 1
    assert f"ends under audit key version 1, but version 2 was introduced after line {head['seq']}" in output
    content = (data_dir / LOG).read_bytes()
    (data_dir / LOG).write_bytes(b"\n".join(content.split(b"\n")[:-2]) + b"\n")
    (data_dir / f"{LOG}.confirmed").unlink()
    status, _, errors = run("rotate-key", "--data-dir", data_dir)
    assert status == 2 and f"but version 2 was introduced after line {head['seq']}" in errors
    (data_dir / LOG).write_bytes(content)
    assert json.loads(run("rotate-key", "--data-dir", data_dir, "--json")[1])["version"] == 3
    types = [json.loads(line)["event"]["type"] for line in (data_dir / LOG).read_bytes().split(b"\n")[:-1]]
    assert types[-2:] == ["audit_key", "audit_key"]
    assert run("verify", "--data-dir", data_dir)[0] == 0


def test_the_audit_key_does_not_change_under_a_running_daemon(data_dir: Path) -> None:
    before = (data_dir / "keyring.json").read_bytes(), (data_dir / LOG).read_bytes()
    with DataDirLock(str(data_dir)):
        status, _, errors = run("rotate-key", "--data-dir", data_dir)
        assert status == 2
        assert f"(pid {os.getpid()}) owns {data_dir}; the audit key changes only while the daemon is stopped" in errors
        assert run("verify", "--data-dir", data_dir)[0] == 0, "reading takes no lock"
    assert ((data_dir / "keyring.json").read_bytes(), (data_dir / LOG).read_bytes()) == before
