"""`minikms seal` and `minikms unseal`, as operators use them on their terminals."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api import errors
from minikms_daemon.seal.unseal import FREE_FAILURES
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.terminal import OnTerminal
from tests.minikms_daemon.service.asking import post

ASKS = "Share or root key"


class Kit:
    """A daemon whose keyring two of three shares open too."""

    def __init__(self, daemon: LiveDaemon, texts: list[str]) -> None:
        self.daemon = daemon
        self.texts = texts

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "minikms", *words, "--socket", str(self.daemon.socket)]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return forked.run("minikms", *words, "--socket", self.daemon.socket)

    def terminal(self, *words: str) -> OnTerminal:
        return OnTerminal(self.command("unseal", *words))


@pytest.fixture
def kit(public: Path) -> Iterator[Kit]:
    words = ("--master-key-file", public / "first", "--recovery-shares", "2/3", "--shares-dir", public / "shares")
    forked.run("minikms", "init", "--data-dir", public / "data", *words).check_returncode()
    texts = [file.read_text("ascii").strip() for file in sorted((public / "shares").iterdir())]
    key = (public / "first").read_text()
    (public / "data.master-key").touch(0o600)
    with KeyedDaemon(public, key) as daemon:
        yield Kit(daemon, texts)
        assert "internal error" not in daemon.log.read_text()


class KeyedDaemon(LiveDaemon):
    """Over a data directory that exists, with its key."""

    def __init__(self, base: Path, key: str) -> None:
        self._key = key
        super().__init__(base)

    def start(self, *under: str) -> None:
        self.root_file.write_text(self._key)
        super().start(*under)


def has_no_dumps(pid: int) -> bool:
    """No core dump is made, and the files of the process are root's, as of one that is not dumpable."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    return re.search(r"Max core file size +0 +0 ", limits) is not None and Path(f"/proc/{pid}/mem").stat().st_uid == 0


def test_a_seal_is_confirmed_and_ended_from_the_source(kit: Kit) -> None:
    refused = kit.run("seal")
    assert refused.returncode == 2 and "--yes" in refused.stderr
    sealed = kit.run("seal", "--yes")
    assert sealed.returncode == 0 and "no key in its memory" in sealed.stdout
    status = kit.run("unseal", "--status")
    assert status.returncode == 1 and "sealed since" in status.stdout
    shown = kit.run("keys", "list")
    assert shown.returncode == 1 and "minikms unseal" in shown.stderr
    status = kit.run("status")
    assert status.returncode == 1 and "0 keys open" in status.stdout
    assert "audit" not in status.stdout, "a sealed daemon does not know its log"
    done = kit.run("unseal", "--from-source")
    assert done.returncode == 0 and "it serves" in done.stdout
    assert json.loads(kit.run("unseal", "--status", "--json").stdout)["sealed"] is False
    assert kit.run("unseal").returncode == 0


def test_a_root_key_in_the_environment_does_not_hinder_a_seal(kit: Kit) -> None:
    """As in the daemon's own environment. The command uses none."""
    done = subprocess.run(
        kit.command("seal", "--yes"),
        env={**os.environ, "PROGRESSDB_MINIKMS_MASTER_KEY": "ab" * 32},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_terminal_nothing_is_asked(kit: Kit) -> None:
    kit.run("seal", "--yes")
    done = subprocess.run(
        kit.command("unseal"), capture_output=True, text=True, check=False, timeout=60, start_new_session=True
    )
    assert done.returncode == 2 and "terminal" in done.stderr


def test_a_root_key_is_typed_and_not_shown(kit: Kit) -> None:
    """Blanks around it are left out, and the process that asks for it is never dumped."""
    kit.run("seal", "--yes")
    with kit.terminal() as terminal:
        terminal.wait_for(ASKS)
        terminal.type("0" * 64)
        terminal.wait_for("does not open the keyring")
        terminal.wait_for(ASKS, times=2)
        assert has_no_dumps(terminal.process.pid)
        terminal.type(f" {kit.daemon.root().hex()}\t ")  # as it is pasted
        assert terminal.wait() == 0
        assert b"it serves" in terminal.shown
        assert kit.daemon.root().hex().encode() not in terminal.shown


def test_two_operators_enter_their_shares_on_two_terminals(kit: Kit) -> None:
    """Each sees the progress; a wrong share is named and leaves the others."""
    with kit.daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        client.seal()
        with kit.terminal() as first, kit.terminal() as second:
            first.wait_for(ASKS)
            first.type(kit.texts[0])
            first.wait_for("1 of 2 shares are there (number 1)")
            first.wait_for(ASKS, times=2)
            first.type("")
            second.wait_for(ASKS)
            altered = kit.texts[1][:-1] + ("0" if kit.texts[1][-1] != "0" else "1")
            second.type(altered)
            second.wait_for("compare it with what was written down")
            second.wait_for(ASKS, times=2)
            second.type(kit.texts[0])
            second.wait_for("share 1 was entered already")
            second.wait_for(ASKS, times=3)
            second.type(kit.texts[2])
            assert second.wait() == 0 and first.wait() == 0
            for text in kit.texts:
                assert text.encode()[5:30] not in first.shown + second.shown
        client.encrypt(key_id, b"text")
    [unsealed] = kit.daemon.events("unseal")
    assert (unsealed["facts"]["kind"], unsealed["facts"]["share"]) == ("share", 3)
    attempts = kit.daemon.events("unseal_attempt")
    assert [event["outcome"] for event in attempts] == ["share_kept", "refused", "refused"]


def test_shares_are_collected_through_the_socket(kit: Kit, tmp_path: Path) -> None:
    words = ("--master-key-file", tmp_path / "k", "--recovery-shares", "2/2", "--shares-dir", tmp_path / "s")
    forked.run("minikms", "init", "--data-dir", tmp_path / "d", *words).check_returncode()
    foreign_text = sorted((tmp_path / "s").iterdir())[0].read_text("ascii").strip()
    with kit.daemon.client() as client:
        client.seal()
        with pytest.raises(errors.WrongShareError, match="keyring"):
            client.unseal(share=foreign_text)
        with pytest.raises(errors.InvalidRequestError):
            client.unseal(share="mks1-0000")
        shares = client.unseal(share=bytearray(kit.texts[1].upper().encode())).shares
        assert shares is not None and (shares.numbers, shares.threshold) == ([2], 2)
        with pytest.raises(errors.WrongRootError):  # a wrong root key leaves the shares
            client.unseal(root_hex="0" * 64)
        assert client.unseal_status().shares is not None
        client.seal()  # zeroes what was entered too
        assert client.unseal_status().shares is None
        client.unseal(share=kit.texts[1])
        log = kit.daemon.data_dir / "minikms-audit.log"
        log.rename(log.with_suffix(".away"))
        wrong = client.unseal_status().failed_attempts
        for _ in range(FREE_FAILURES + 1):
            with pytest.raises(errors.UnsealFailedError, match="enter share 1 again"):
                client.unseal(share=kit.texts[0])
            shares = client.unseal_status().shares
            assert shares is not None and shares.numbers == [2]
        assert client.unseal_status().failed_attempts == wrong
        log.unlink(missing_ok=True)
        log.with_suffix(".away").rename(log)
        for body in ({"share": ""}, {"share": "x" * 257}, {"share": kit.texts[0], "root_hex": "0" * 64}):
            assert post(kit.daemon, "/unseal", body).code == "invalid_request"
        assert not client.unseal(share=kit.texts[0]).sealed
        client.create_dek_for_thread("t")


def test_a_restart_forgets_the_shares_and_stays_sealed(kit: Kit) -> None:
    with kit.daemon.client() as client:
        client.seal()
        client.unseal(share=kit.texts[0])
        kit.daemon.kill()
        kit.daemon.start()
        assert client.unseal_status().sealed and client.unseal_status().shares is None
        client.unseal(share=kit.texts[1])
        assert not client.unseal(share=kit.texts[2]).sealed
