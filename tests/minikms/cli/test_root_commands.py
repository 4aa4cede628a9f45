"""`minikms root` and `minikms pin` against a real daemon, and a start with a pin file."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minikms.processes.flags import UNLOCK_UIDS_VARIABLE
from minikms.processes.handover import KEY
from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.terminal import OnTerminal
from tests.harness.unlocking import REFUSED, UnlockListener
from tests.minikms.custody.rotation.crash_points import Daemon


def key_file(directory: Path, name: str) -> Path:
    path = directory / name
    path.touch(0o600)
    path.write_text(os.urandom(32).hex() + "\n")
    return path


def run(
    *words: str | Path, pass_fds: tuple[int, ...] = (), environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    if not pass_fds:
        return forked.run("minikms", *words, env={**os.environ, **(environ or {})})
    command = [sys.executable, "-m", "minikms", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, pass_fds=pass_fds)


def done(*words: str | Path, pass_fds: tuple[int, ...] = ()) -> str:
    ended = run(*words, pass_fds=pass_fds)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_root_is_added_listed_tested_and_removed(tmp_path: Path) -> None:
    spare = key_file(tmp_path, "spare.key")
    with LiveDaemon(tmp_path, "file") as daemon:
        socket = ("--socket", daemon.socket)
        added = json.loads(done("root", "add", f"file:{spare}", *socket, "--json"))
        slot = added["slot_id"]
        assert (added["provider"], added["state"]) == ("file", "active")
        listed = json.loads(done("root", "list", *socket, "--json"))["roots"]
        assert [root["slot_id"] for root in listed] == ["s1", slot]
        assert "the daemon was started under it" in done("root", "list", *socket)
        assert f"opens slot {slot}" in done("root", "test", slot, "--root", f"file:{spare}", *socket)
        wrong = run("root", "test", slot, "--root", f"file:{daemon.root_file}", *socket)
        assert (wrong.returncode, "does not open slot" in wrong.stderr) == (1, True)
        missing = run("root", "test", slot, "--root", f"file:{tmp_path}/none", *socket)
        assert (missing.returncode, "new root key" in missing.stderr) == (2, False)
        inside = ("--shares-dir", daemon.data_dir / "shares")
        refused = run("root", "add", "shares:2/3", *inside, *socket)
        assert (refused.returncode, "is in the data directory" in refused.stderr) == (2, True)
        unasked = run("root", "remove", slot, *socket)
        assert (unasked.returncode, "--yes" in unasked.stderr) == (2, True)
        assert "opens no later keyring. It still opens older copies" in done("root", "remove", slot, "--yes", *socket)
        daemon.wait_for_event("root_removed")
        assert slot not in done("root", "list", *socket)
        last = run("root", "remove", "s1", "--yes", *socket)
        assert (last.returncode, "last root key" in last.stderr) == (1, True)
        said = daemon.log.read_text() + (daemon.data_dir / "minikms-audit.log").read_text()
        assert spare.read_text().strip() not in said


def test_after_a_new_root_key_the_other_roots_are_named(tmp_path: Path) -> None:
    """Also where the key file was rewritten, so that the former root key is gone already."""
    spare, new = key_file(tmp_path, "spare.key"), key_file(tmp_path, "new.key")
    with LiveDaemon(tmp_path, "file", "--rewrite-master-key-file") as daemon:
        socket = ("--socket", daemon.socket)
        done("root", "add", f"file:{spare}", *socket)
        told = done("rotate-kek", "--new-master-key-file", new, "--yes", *socket)
    assert "in place of the former one" in told
    assert "1 other root key(s) open it too" in told
    assert "Both root keys" not in told
    assert "Only the new root key" not in told


def test_a_root_comes_from_an_inherited_descriptor_too(tmp_path: Path) -> None:
    spare = key_file(tmp_path, "spare.key")
    with LiveDaemon(tmp_path, "file") as daemon, spare.open("rb") as text:
        descriptor = text.fileno()
        added = done("root", "add", f"fd:{descriptor}", "--socket", daemon.socket, "--json", pass_fds=(descriptor,))
    assert json.loads(added)["provider"] == "environment"


@pytest.mark.parametrize("source", ["ab" * 32, "file:", "dev:", "shares:", "file:/no/such/file"])
def test_a_source_that_gives_no_key_is_refused_before_the_daemon_is_asked(source: str) -> None:
    ended = run("root", "add", source, "--socket", "/no/such/socket")
    assert ended.returncode == 2
    assert "socket" not in ended.stderr
    assert "abab" not in ended.stderr


def test_offline_commands_take_a_source(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        root, where = daemon.root_file, daemon.data_dir
        assert run("audit", "verify", "--data-dir", where, "--root", f"file:{root}").returncode == 0
        twice = run("audit", "verify", "--data-dir", where, "--root", f"file:{root}", "--master-key-file", root)
        assert (twice.returncode, "given twice" in twice.stderr) == (2, True)


def test_the_variable_names_the_source_unless_a_flag_does(tmp_path: Path) -> None:
    """Two variables at once name none, also where one holds the key itself."""
    with LiveDaemon(tmp_path, "file") as daemon:
        root, verify = daemon.root_file, ("audit", "verify", "--data-dir", daemon.data_dir)

        def ended(*flags: str | Path, **variables: str | Path) -> tuple[int, bool]:
            environ = {f"PROGRESSDB_MINIKMS_{name}": str(value) for name, value in variables.items()}
            done = run(*verify, *flags, environ=environ)
            return done.returncode, "given twice" in done.stderr

        assert ended(ROOT=f"file:{root}") == (0, False)
        assert ended("--root", f"file:{root}", ROOT="file:/no/such/file") == (0, False)
        assert ended("--master-key-file", root, ROOT="file:/no/such/file") == (0, False)
        assert ended(ROOT=f"file:{root}", MASTER_KEY_FILE=root) == (2, True)
        assert ended(ROOT=f"file:{root}", MASTER_KEY=root.read_text().strip()) == (2, True)


def test_a_file_that_is_rewritten_may_be_named_by_the_variable(tmp_path: Path) -> None:
    """As the unit does."""
    new = key_file(tmp_path, "new.key")
    with LiveDaemon(tmp_path, "file") as daemon:
        daemon.stop()
        place = daemon.command.index("--master-key-file")
        daemon.environ["PROGRESSDB_MINIKMS_ROOT"] = f"file:{daemon.command[place + 1]}"
        daemon.command[place : place + 2] = ["--rewrite-master-key-file"]
        daemon.start()
        done("rotate-kek", "--new-master-key-file", new, "--yes", "--socket", daemon.socket)
        assert daemon.root_file.read_text() == new.read_text()
    refused = run("serve", *daemon.words[1:], environ={"PROGRESSDB_MINIKMS_ROOT": "fd:7"})
    assert (refused.returncode, "needs a root key in a file" in refused.stderr) == (2, True)


def test_offline_commands_ask_the_unlock_service(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon, UnlockListener(tmp_path / "unlock", KEY + daemon.root()) as listener:
        verify = ("audit", "verify", "--data-dir", daemon.data_dir, "--root", f"unlock:{listener.path}")
        assert run(*verify, environ={UNLOCK_UIDS_VARIABLE: str(os.geteuid())}).returncode == 0
        foreign = run(*verify, environ={UNLOCK_UIDS_VARIABLE: "77"})
        assert (foreign.returncode, "expected is uid 77" in foreign.stderr) == (2, True)
        listener.answer = REFUSED
        refused = run(*verify, environ={UNLOCK_UIDS_VARIABLE: str(os.geteuid())})
        assert (refused.returncode, "AccessDeniedException" in refused.stderr) == (2, True)


def test_a_daemon_starts_from_a_source(tmp_path: Path) -> None:
    root = key_file(tmp_path, "root.key")
    done("init", "--data-dir", tmp_path / "data", "--master-key-file", root)
    ended = run("serve", "--socket", tmp_path / "s", "--data-dir", tmp_path / "data", "--root", "vault:x")
    assert (ended.returncode, "file:PATH, fd:NUMBER, dev:" in ended.stderr) == (2, True)


# --- the pin file ---------------------------------------------------------------------------------------------------


@contextmanager
def pinned(base: Path) -> Iterator[Daemon]:
    """A running daemon whose root key is in its pin file, `base`/pins/pin."""
    needs.root()
    (base / "pins").mkdir(0o755, parents=True)
    pin = base / "pins" / "pin"
    root = key_file(base, "key")
    done("init", "--data-dir", base / "data", "--master-key-file", root)
    assert "names the root key" in done("pin", "add", f"file:{root}", "--pin", pin, "--data-dir", base / "data")
    daemon = Daemon(base, "--pin", str(pin))
    try:
        assert daemon.start(), daemon.log()
        yield daemon
    finally:
        daemon.kill()


def test_with_a_pin_file_only_pinned_roots_open_the_keyring_or_are_added(tmp_path: Path) -> None:
    with pinned(tmp_path) as daemon:
        spare, pin = key_file(tmp_path, "spare.key"), tmp_path / "pins" / "pin"
        socket = ("--socket", tmp_path / "s")
        for refused in (
            run("root", "add", f"file:{spare}", *socket),
            run("rotate-kek", "--new-master-key-file", spare, "--yes", *socket),
        ):
            assert (refused.returncode, "does not name the root key" in refused.stderr) == (1, True), refused.stderr
        place = ("--pin", pin, "--data-dir", tmp_path / "data")
        assert "minikms root add SOURCE" in done("pin", "add", f"file:{spare}", *place)
        added = json.loads(done("root", "add", f"file:{spare}", *socket, "--json"))  # the daemon reads the file again
        assert added["state"] == "active"
        daemon.stop()
        pin.unlink()
        assert not daemon.start()
        assert "the pin file" in daemon.log()
        daemon.key_file.write_text(spare.read_text())
        first = run("pin", "add", f"file:{key_file(tmp_path, 'unknown.key')}", *place)
        assert (first.returncode, "wrong root key" in first.stderr) == (2, True)  # which keyring is it for?


def test_a_data_directory_that_was_replaced_whole_is_refused(tmp_path: Path) -> None:
    """By a consistent one, with a keyring and a root key of the attacker's; and by one with his keyring only."""
    with pinned(tmp_path / "real") as daemon:
        daemon.stop()
        with pinned(tmp_path / "attacker") as other:
            other.stop()
        (tmp_path / "real" / "data").rename(tmp_path / "moved")
        (tmp_path / "attacker" / "data").rename(tmp_path / "real" / "data")
        assert not daemon.start()
        assert "is for keyring" in daemon.log()
        daemon.key_file.write_text(other.key_file.read_text())
        assert not daemon.start()


def test_every_command_about_root_keys_says_which_are_not_pinned(tmp_path: Path) -> None:
    """Here a spare key, whose pin was removed. Shares that were made before the pin file are in the same position."""
    with pinned(tmp_path):
        spare, socket = key_file(tmp_path, "spare.key"), ("--socket", tmp_path / "s")
        place = ("--pin", tmp_path / "pins" / "pin", "--data-dir", tmp_path / "data")
        done("pin", "add", f"file:{spare}", *place)
        slot = json.loads(done("root", "add", f"file:{spare}", *socket, "--json"))["slot_id"]
        assert "pinned" not in done("root", "list", *socket).lower() + done("status", *socket)
        done("root", "test", slot, "--root", f"file:{spare}", *socket)
        done("pin", "remove", f"file:{spare}", *place, "--yes")
        [line] = [line for line in done("root", "list", *socket).splitlines() if "NOT PINNED" in line]
        assert line.startswith(slot)
        tested = run("root", "test", slot, "--root", f"file:{spare}", *socket)
        assert tested.returncode == 1 and "is not pinned" in tested.stderr
        for command in ("status", "doctor"):
            said = run(command, *socket).stdout
            assert f"can't open the keyring at the next start or unseal: slots {slot}" in said


def test_shares_are_pinned_as_they_are_made_or_when_they_are_typed(tmp_path: Path) -> None:
    with pinned(tmp_path):
        pin, socket = tmp_path / "pins" / "pin", ("--socket", tmp_path / "s")
        refused = run("root", "add", "shares:2/2", "--shares-dir", tmp_path / "one", *socket)
        assert (refused.returncode, "does not name the root key" in refused.stderr) == (1, True)
        assert "open nothing unless `minikms root list` shows that set" in refused.stderr
        done("root", "add", "shares:2/2", "--shares-dir", tmp_path / "two", "--pin", pin, *socket)
        texts = [file.read_text("ascii").strip() for file in sorted((tmp_path / "two").iterdir())]
        add = ["pin", "add", "shares:", "--pin", str(pin), "--data-dir", str(tmp_path / "data")]
        with OnTerminal([sys.executable, "-m", "minikms", *add]) as program:
            for count, text in enumerate(texts, start=1):
                program.wait_for("(it is not shown)", times=count)
                program.type(text)
            assert program.wait() == 0, program.shown
        assert b"named already the root key" in program.shown


def test_a_pin_file_lies_outside_the_data_directory(tmp_path: Path) -> None:
    needs.root()
    with LiveDaemon(tmp_path, "file") as daemon:
        inside = run(
            "pin", "add", f"file:{daemon.root_file}", "--pin", daemon.data_dir / "pin", "--data-dir", daemon.data_dir
        )
        assert (inside.returncode, "outside the data directory" in inside.stderr) == (2, True)
