"""The gateway is a user of its own, which holds no key and has no right in the key service by itself."""

import base64
import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.harness.callers import Caller, connected_as
from tests.harness.descriptors import open_files
from tests.harness.gateways import DAEMON, GATEWAY, Pair
from tests.minikms.memory import scanner


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    needs.interpreter_for(DAEMON)
    with Pair(daemon_uid=DAEMON, forked=False) as made:
        yield made


def test_root_finds_no_key_of_the_key_service_in_the_gateway(pair: Pair) -> None:
    """After it has carried the plaintext of every key."""
    with pair.gateway.caller(pair.client()) as caller:
        plaintext = base64.b64encode(os.urandom(2000)).decode()
        for number in range(20):
            key = caller.post("/create_dek_for_thread", {"thread_id": f"t-{number}"}).body["key_id"]
            sealed = caller.post("/encrypt", {"key_id": key, "plaintext": plaintext}).body["ciphertext"]
            assert caller.post("/decrypt", {"key_id": key, "ciphertext": sealed}).body["plaintext"] == plaintext
            assert caller.get(f"/get_wrapped?key_id={key}").status == 200
        keys = pair.daemon.keys()
        assert len(keys) >= 25
        needles = [needle for name, key in keys.items() for needle in scanner.forms_of(name, key)]
        assert pair.gateway.process is not None
        pid = pair.gateway.process.pid
        assert scanner.scan_process(pid, needles).hits == []
        for path in open_files(pid).values():
            if os.path.isfile(path):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    assert scanner.scan_file(path, needles).hits == [], path


def test_the_gateways_user_has_no_right_of_its_own(pair: Pair) -> None:
    """A compromised gateway asks on behalf of the names that the policy lets it name, and can do nothing else."""
    with contextlib.closing(Caller(connected_as(GATEWAY, pair.daemon.socket))) as own:
        for method, target in (("GET", "/status"), ("POST", "/rotate_kek"), ("POST", "/seal"), ("GET", "/metrics")):
            assert own.ask(method, target, {} if method == "POST" else None).status == 403
            for name in ("uid:0", "spiffe://other/x", "spiffe://prod/chat/api"):
                answer = own.acting_for(name).ask(method, target, {} if method == "POST" else None)
                allowed = (name, target) == ("spiffe://prod/chat/api", "/status")
                assert answer.status == (200 if allowed else 403), (name, target)
    read = ["setpriv", f"--reuid={GATEWAY}", "--clear-groups", "ls", str(pair.daemon.data_dir)]
    needs.program("setpriv")
    assert subprocess.run(read, capture_output=True, check=False).returncode != 0


def test_daemon_gateway_and_client_are_three_users_and_trust_by_uid(pair: Pair) -> None:
    """The gateway sends nothing to a socket that another user serves, root included."""
    uids = {
        re.search(r"Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[1]  # type: ignore[index]  # always there
        for pid in (pair.daemon.pid, pair.gateway.process.pid)  # type: ignore[union-attr]  # it was started
    }
    assert uids == {str(DAEMON), str(GATEWAY)}
    assert os.geteuid() == 0
    good = pair.gateway.config.read_text()
    pair.gateway.configure(good.replace(f"kms_server_uids = [{DAEMON}]", "kms_server_uids = [0]"))
    pair.gateway.stop()
    pair.gateway.start()
    lines = len(pair.audited())
    with pair.gateway.caller(pair.client()) as caller:
        assert caller.post("/random", {"count": 1}).status == 503
    assert len(pair.audited()) == lines
    assert pair.gateway.metric("kms_reachable") == 0
    pair.gateway.configure(good)
    pair.gateway.stop()
    pair.gateway.start()
