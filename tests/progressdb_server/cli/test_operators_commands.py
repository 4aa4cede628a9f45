"""What `progressdb check`, `config check` and `status` tell an operator."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.commands.usage import PACKAGE_SOCKET, CommandError
from progressdb_server.cli import backup, flags
from progressdb_server.cli.admin_client import AdminClient
from progressdb_server.cli.status import status
from progressdb_server.config import Config, ConfigMissingError
from progressdb_server.store.model import StoreLockedError
from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.ports import free_port
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.certificates import self_signed
from tests.progressdb_server.api.real_server import real_server

OTHER_UID = 54321
POLICY = """version = 1
[[grant]]
name = "server"
principals = ["uid:{uid}"]
roles = ["create", "encrypt", "decrypt"]
threads = ["*"]
"""


def progressdb(*words: str, uid: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
    user = None if uid is None else (uid, uid, ())
    return forked.run("progressdb_server", *words, env={**kept, **variables}, user=user)


# --- check --------------------------------------------------------------------------------------------------------
@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user may read, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_check_does_not_call_right_what_its_user_may_not_open(open_directory: Path) -> None:
    """Keys are destroyed on the strength of this answer."""
    needs.root()
    needs.interpreter_for(OTHER_UID)
    with LiveDaemon(open_directory) as kms:
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with real_server(open_directory, environment=variables) as server:
            assert server("POST", "/v1/messages", {"author": "ann", "body": 1}).status == 200
        for path, _, files in os.walk(server.db):
            for entry in (path, *(os.path.join(path, file) for file in files)):
                os.chown(entry, OTHER_UID, OTHER_UID)
        kms.socket.chmod(0o600)
        refused = progressdb("check", "--db", str(server.db), uid=OTHER_UID, **variables)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "permission denied" in refused.stderr
        kms.stop()
        away = progressdb("check", "--db", str(server.db), uid=OTHER_UID, **variables)
        assert away.returncode == 2 and "no key service answered" in away.stdout, away
        assert "all is right" not in away.stdout
        kms.start()
        with kms.client() as client:
            client.seal()
        sealed = progressdb("check", "--db", str(server.db), **variables, uid=None)
        assert sealed.returncode == 2 and "Traceback" not in sealed.stderr, sealed
        assert "the records could not be decrypted: the key service is sealed" in sealed.stderr


# --- config check -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("days_from", "days_to", "said"),
    [(-30, -1, "expired on"), (-30, 7, "expires on"), (1, 30, "is valid from"), (-1, 300, "")],
    ids=["expired", "expires soon", "not yet valid", "good"],
)
def test_config_check_warns_of_a_certificate_that_clients_refuse(
    tmp_path: Path, days_from: float, days_to: float, said: str
) -> None:
    tls = self_signed(tmp_path, days_from=days_from, days_to=days_to)
    variables = {"PROGRESSDB_TLS_CERT": tls.cert_file, "PROGRESSDB_TLS_KEY": tls.key_file}
    done = progressdb("config", "check", "--dev", "--db", str(tmp_path / "db"), "--json", uid=None, **variables)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert [said in warning for warning in warnings] == ([True] if said else [])


# --- status -------------------------------------------------------------------------------------------------------
def test_status_and_doctor_of_an_address_need_no_data_directory(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        at = ("--url", f"http://127.0.0.1:{server.port}")
        done = progressdb("status", *at, PROGRESSDB_API_ADMIN_KEYS=ADMIN)
        assert done.returncode == 0, done.stderr
        assert "server       ok" in done.stdout and "key service  not asked: give --db" in done.stdout
        done = progressdb("doctor", *at, PROGRESSDB_API_ADMIN_KEYS=ADMIN)
        assert (done.returncode, "nothing is wrong" in done.stdout) == (0, True), done


def test_a_command_finds_the_store_of_the_readme_or_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flags, "_PACKAGE_DIRECTORY", package := str(tmp_path / "package"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["progressdb", "status"])
    monkeypatch.setenv("PROGRESSDB_ADDR", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigMissingError):
        status()
    (tmp_path / "package").mkdir()
    config = flags.StoreFlags().load_for_store()
    assert (config.storage.db_path, config.kms_socket) == (package, PACKAGE_SOCKET)
    assert capsys.readouterr().err == f"progressdb: --db is not given: {package} is used\n"
    (tmp_path / "data").mkdir(mode=0o700)
    assert status() == 2  # no server runs
    assert capsys.readouterr().err.startswith("progressdb: --db is not given: data is used\n")


def test_a_variable_leads_no_configured_command_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGRESSDB_URL", "http://192.0.2.1:1")
    assert AdminClient.from_config(Config()).url == f"http://127.0.0.1:{Config().server.port}"


# --- backup -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [("list",), ("create", "x", "--store-only"), ("create", "x")], ids=" ".join)
def test_a_directory_that_a_user_may_not_see_is_not_called_empty(open_directory: Path, words: tuple[str, ...]) -> None:
    needs.root()
    needs.interpreter_for(OTHER_UID)
    (open_directory / "db").mkdir(mode=0o700)
    done = progressdb("backup", *words, "--db", str(open_directory / "db"), uid=OTHER_UID)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"progressdb: Permission denied: {open_directory}/db/"), done.stderr


def test_a_backup_that_another_server_made_is_not_reported_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> object:
        raise StoreLockedError("another process has the store open")

    monkeypatch.setattr("progressdb_server.logs.configure", lambda *_: None)  # would silence the tests that follow
    monkeypatch.setattr("progressdb_server.store.backup.open_register", locked)
    monkeypatch.setattr(AdminClient, "call", lambda *_, **__: {})
    with pytest.raises(CommandError, match="has backed up another store: it made no"):
        backup.create("monday", store_only=True, url="http://127.0.0.1:1", flags=flags.StoreFlags(str(tmp_path)))


def test_what_the_key_service_does_not_show_is_never_called_well(tmp_path: Path) -> None:
    """The server's user lacks the role `monitor`: status, doctor and the gauge say that nobody looked."""
    for name in ("kms", "server", "policy"):
        (tmp_path / name).mkdir(mode=0o755)
    policy = tmp_path / "policy" / "policy.toml"
    policy.write_text(POLICY.format(uid=os.geteuid()))
    policy.chmod(0o644)
    with LiveDaemon(tmp_path / "kms", "file", "--policy", str(policy)) as kms:
        variables: dict[str, Any] = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with real_server(tmp_path / "server", environment=variables) as server:
            at = ("--url", f"http://127.0.0.1:{server.port}")
            told: dict[str, Any] = {"PROGRESSDB_API_ADMIN_KEYS": ADMIN, "PROGRESSDB_DB_PATH": str(server.db)}
            for command in ("status", "doctor"):
                said = progressdb(command, *at, **told, **variables)
                assert (said.returncode, "notice: key_service_unseen: " in said.stdout) == (1, True), said
                assert "nothing is wrong" not in said.stdout
            page = server("GET", "/metrics", key=ADMIN).body.decode()
            assert 'progressdb_condition{condition="key_service_unseen",severity="notice"} 1.0' in page
