"""The auditor as a process under a user of its own, beside a real daemon, a witness and a token."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from minikms_auditor.store import published
from tests import needs
from tests.harness import witness
from tests.harness.audited_daemon import ORIGIN, AuditedDaemon
from tests.harness.callers import USER
from tests.harness.hsm import RUN_S_MAX, Token
from tests.harness.waiting import wait_until
from tests.minikms_auditor.asking import ask
from tests.minikms_auditor.receivers import Collector

WITNESS = "witness.example/w1"


class Auditor:
    """The command of the user USER, with a configuration in `base`."""

    def __init__(self, base: Path, token: Token) -> None:
        self.config = base / "auditor.toml"
        self._as_user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--")
        self._environ = os.environ | token.environ

    def command(self, *arguments: str) -> list[str]:
        return [*self._as_user, sys.executable, "-P", "-m", "minikms_auditor", *arguments, f"--config={self.config}"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self._environ, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
        )

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(self.command(), env=self._environ, stdout=file, stderr=file)


@contextlib.contextmanager
def running_until_terminated(auditor: Auditor, log: Path) -> Iterator[None]:
    running = auditor.start(log)
    try:
        yield
    finally:
        running.terminate()
        assert running.wait(RUN_S_MAX) == 0, log.read_text()


def test_a_hardened_auditor_signs_with_a_token_for_its_witness(public: Path) -> None:
    """It sends the log to two sinks, too. Both keys are in the token. Their public keys and the cosignature verify the
    log, without its audit key. Hardened it can't read the library's configuration, or a PIN file, that is not below its
    token paths, and says so at the first signature.
    """
    needs.interpreter_for(USER)
    base = public / "token"
    base.mkdir()
    token = Token(base)
    state = public / "state"
    state.mkdir(mode=0o700)
    for place, directories, files in os.walk(base):
        for name in (place, *(os.path.join(place, each) for each in (*directories, *files))):
            os.chown(name, USER, USER)
    os.chown(state, USER, USER)
    auditor = Auditor(public, token)

    def tree_size() -> int:
        """Of the newest tree checkpoint that is published; 0 without any."""
        content = published(str(state))
        return 0 if content is None else int(content.splitlines()[1])

    with AuditedDaemon(public) as daemon, contextlib.ExitStack() as exits:
        daemon.new_key("t")
        signers = json.dumps([token.uri(), token.uri("object=second")])
        settings = (
            f'version = 1\norigin = "{ORIGIN}"\nkms_socket = "{daemon.socket}"\nlog_dir = "{daemon.log_dir}"\n'
            f'state_dir = "{state}"\nsigners = {signers}\ntoken_paths = ["{base}"]\n'
            f'public_keys = ["{daemon.shipped()["public_key"]}"]\n'
        )
        for more, said in ((token.pin_file, b"is away"), (token.conf, b"PIN file")):
            auditor.config.write_text(settings.replace(f'["{base}"]', f'["{base}/tokens", "{more}"]'))
            with running_until_terminated(auditor, public / "first.log"):
                shown = state / "status.json"
                wait_until(lambda: shown.exists() and said in shown.read_bytes())  # noqa: B023  within its round
        auditor.config.write_text(settings)
        checked = auditor.run("check-config")
        assert checked.returncode == 0, checked
        vkeys = [line.split()[-1] for line in checked.stdout.splitlines() if "log key" in line]
        assert "token_paths must name the PKCS#11 library's configuration" in checked.stdout
        served = witness.Witness(str(public / "w1"), WITNESS, dict([witness.parse_vkey(vkeys[0])]))
        server = witness.serve(served)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        collector = exits.enter_context(Collector())
        copies = public / "copies"
        copies.mkdir()
        os.chown(copies, USER, USER)
        auditor.config.write_text(
            f'{settings}quorum = 1\n[[witness]]\nurl = "{url}"\nkey = "{served.vkey}"\n'
            f'[[sink]]\ntype = "http"\nname = "siem"\nurl = "{collector.url}"\nrequired = true\n'
            f'[[sink]]\ntype = "file"\nname = "copy"\npath = "{copies}/copy"\n'
            f'[questions]\nusers = [0]\nsocket = "{copies}/q"\n'
        )
        with running_until_terminated(auditor, public / "auditor.log"):
            wait_until(lambda: tree_size() > 0)
            first = tree_size()
            daemon.new_key("u")
            wait_until(lambda: tree_size() > first)
            assert daemon.status()["audit"]["position"]["origin"] == ORIGIN
            sent = daemon.lines()[-1]["event"]["seq"]
            wait_until(lambda: daemon.status()["audit"]["position"]["seq"] >= sent)
            assert len(collector.lines) >= sent
            wait_until(lambda: (copies / "copy").read_bytes().count(b"\n") >= sent)
            asked = asyncio.run(ask(copies / "q", {"thread": "u", "asker": "k1"}, server_uids=[USER])).answer
            assert [line.type for line in asked.lines] == ["create_dek"] and asked.signed_seq >= sent
            assert "asker=k1" in (public / "auditor.log").read_text()
            note = public / "tree-checkpoint"
            note.write_text(auditor.run("checkpoint").stdout)
            keys = [f"--log-key={vkey}" for vkey in vkeys]
            trusted = (f"--witness={served.vkey}", "--quorum=1", "--max-age=1h", f"--checkpoint={note}")
            verify = (sys.executable, "-P", "-m", "minikms", "audit", "verify", f"--data-dir={daemon.data_dir}")
            verified = subprocess.run(
                (*verify, *trusted, *keys), capture_output=True, text=True, timeout=RUN_S_MAX, check=False
            )
            assert verified.returncode == 0, verified
            assert len(vkeys) == 2 and token.pin_file.read_text().strip() not in (public / "auditor.log").read_text()
        server.shutdown()
        server.server_close()
