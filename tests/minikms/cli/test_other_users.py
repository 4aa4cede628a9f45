"""A command that another user runs names the flag, the group or the variable that it lacks."""

import os
import subprocess
from pathlib import Path

import pytest

from minikms.api.errors import ForbiddenError, KeyDestroyedError, KeyNotFoundError, KmsUnavailableError
from minikms.cli.console import chosen_server_uids
from minikms.client import Client
from minikms.commands.usage import CommandError
from minikms.policy.principal import Principal
from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon

OTHER_UID = 54321


def run(*words: str, uid: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *words, env={**os.environ, **variables}, user=None if uid is None else (uid, uid, ()))


def test_the_variable_names_the_users_that_may_serve_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the message server. The flag wins; an empty variable counts as unset."""
    monkeypatch.setenv("PROGRESSDB_KMS_SERVER_UIDS", "0, 991")
    assert chosen_server_uids(None) == frozenset({0, 991})
    assert chosen_server_uids(7) == frozenset({7})
    monkeypatch.setenv("PROGRESSDB_KMS_SERVER_UIDS", "")
    assert chosen_server_uids(None) is None
    monkeypatch.setenv("PROGRESSDB_KMS_SERVER_UIDS", "minikms")
    with pytest.raises(CommandError, match="PROGRESSDB_KMS_SERVER_UIDS must be user ids"):
        chosen_server_uids(None)


def test_an_unexpected_server_is_refused_with_flag_and_variable(daemon: LiveDaemon) -> None:
    """With the right uid in the variable the same command works."""
    words = ("status", "--socket", str(daemon.socket))
    refused = run(*words, PROGRESSDB_KMS_SERVER_UIDS=str(OTHER_UID))
    assert refused.returncode == 1
    assert "--server-uid" in refused.stderr and "PROGRESSDB_KMS_SERVER_UIDS" in refused.stderr
    done = run(*words, PROGRESSDB_KMS_SERVER_UIDS=f"{OTHER_UID},{os.geteuid()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [1, 3])
def test_a_server_of_another_user_destroys_no_key(daemon: LiveDaemon, count: int) -> None:
    """One key and several go through different clients; both check the server, and both name flag and variable."""
    with daemon.client() as kms:
        key_ids = [kms.create_dek_for_thread("destroyed").key_id for _ in range(count)]
        for key_id in key_ids:
            kms.retire_key(key_id)
        words = ("keys", "destroy", *key_ids, "--yes", "--socket", str(daemon.socket))
        for refused in (
            run(*words, PROGRESSDB_KMS_SERVER_UIDS=str(OTHER_UID)),
            run(*words, "--server-uid", str(OTHER_UID)),
        ):
            assert refused.returncode == 1
            assert "--server-uid" in refused.stderr and "PROGRESSDB_KMS_SERVER_UIDS" in refused.stderr
            assert "may be destroyed" not in refused.stderr
        assert {kms.get_key(key_id).state for key_id in key_ids} == {"retired"}
        done = run(*words, "--json", PROGRESSDB_KMS_SERVER_UIDS=f"{OTHER_UID},{os.geteuid()}")
        assert done.returncode == 0, done.stderr
        for key_id in key_ids:
            with pytest.raises(KeyDestroyedError):
                kms.get_key(key_id)


def test_the_errors_of_the_client_name_who_is_refused_what_and_the_remedy(daemon: LiveDaemon, tmp_path: Path) -> None:
    with pytest.raises(ForbiddenError, match=r"^uid 7 does not have the role destroy; .*--admin-uids.* policy file$"):
        Principal(7, 1, "peer_uid:7", frozenset()).require("destroy")
    key_id = "k_" + "0" * 26
    with daemon.client() as kms, pytest.raises(KeyNotFoundError, match=f"^key not found: {key_id}$"):
        kms.get_key(key_id)
    with Client(tmp_path / "s", wait_s=0) as kms, pytest.raises(KmsUnavailableError, match="Start it with"):
        kms.health()


def test_a_user_without_access_reads_which_user_or_group_has_it(daemon: LiveDaemon) -> None:
    needs.root()
    needs.interpreter_for(OTHER_UID)
    asked = run("status", "--socket", str(daemon.socket), uid=OTHER_UID)
    assert asked.returncode == 2
    assert "Permission denied" in asked.stderr and "--socket-group" in asked.stderr, asked.stderr
    for words in (("backup", "list"), ("doctor",), ("audit", "tail")):
        refused = run(*words, "--data-dir", str(daemon.data_dir), uid=OTHER_UID)
        assert refused.returncode == 2
        assert "run this as that user, or as root" in refused.stderr, refused.stderr
