"""What single commands say, and the one that writes to a terminal, against a real daemon."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minikms.cli import console
from minikms.cli.doctor import doctor
from minikms.commands import usage
from minikms.commands.usage import SOCKET_VARIABLES
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import python_program
from tests.harness.terminal import OnTerminal

MINIKMS = (sys.executable, "-P", "-m", "minikms")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *words)


def test_only_an_explicit_dash_decrypts_to_a_terminal(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_text("the door code is 4711\n")
    with LiveDaemon(tmp_path, "file") as daemon:
        place = ("--socket", str(daemon.socket))
        assert run("encrypt", note, *place).returncode == 0
        words = [*MINIKMS, "decrypt", f"{note}.kms", "--output", "-", *place]
        with OnTerminal(words, env=dict(os.environ)) as terminal:
            assert terminal.wait() == 0 and b"the door code is 4711" in terminal.shown
        piped = f"{shlex.join(MINIKMS)} decrypt {' '.join(place)} < {note}.kms"
        with OnTerminal(["sh", "-c", piped], env=dict(os.environ)) as terminal:
            assert terminal.wait() == 2 and b"insist with --output -" in terminal.shown


def test_an_error_of_encrypt_names_the_file_of_the_caller(tmp_path: Path) -> None:
    """Not the one beside it, which gets its name at the end; and nothing about the files of the key service."""
    note, missing = tmp_path / "note", tmp_path / "missing" / "note.kms"
    note.write_text("text")
    with LiveDaemon(tmp_path, "file") as daemon:
        for words, place in (((note, "--output", missing), missing), ((missing,), missing)):
            told = run("encrypt", *words, "--socket", daemon.socket)
            assert (told.returncode, told.stderr) == (2, f"minikms: No such file or directory: {place}\n")
        assert "pack it first" in run("encrypt", tmp_path, "--output", "x", "--socket", daemon.socket).stderr


def test_commands_name_commands_and_offer_only_what_they_can_do(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        place = ("--socket", daemon.socket)
        assert "`minikms root list`" in run("root", "test", "s9", "--root", f"file:{daemon.root_file}", *place).stderr
        receipt = run("keys", "receipt", "KEY-ID", "--data-dir", daemon.data_dir)
        assert (receipt.returncode, receipt.stderr[:27]) == (2, "minikms: a key id is k_ and")
        listed = run("keys", "list", "--state", "destroyed", *place)
        assert listed.returncode == 2 and "destroyed" not in run("keys", "list", "--help").stdout


def test_without_flags_commands_look_where_the_units_are_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Except for `serve`, which would make what it does not find."""
    for variable in (*SOCKET_VARIABLES, console.DATA_DIR_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(usage, "PACKAGE_SOCKET", str(tmp_path / "run" / "s"))
    monkeypatch.setattr(console, "PACKAGE_DATA_DIR", str(tmp_path / "d"))
    for choose in (console.chosen_socket, console.chosen_data_dir):
        with pytest.raises(usage.CommandError, match="name the"):
            choose(None)
    (tmp_path / "run").mkdir()
    (tmp_path / "d").mkdir()
    assert console.chosen_socket(None) == str(tmp_path / "run" / "s")
    assert console.chosen_data_dir(None) == str(tmp_path / "d")
    said = capsys.readouterr().err
    assert f"{tmp_path}/run/s is used" in said and f"{tmp_path}/d is used" in said
    with pytest.raises(usage.CommandError, match="name the daemon's socket"):
        console.chosen_socket(None, must_exist=False)


def test_a_socket_of_the_working_directory_is_used_only_if_it_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a link, nor a file, nor a directory that others may write to. With --json nothing is said."""
    for variable in SOCKET_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(usage, "PACKAGE_SOCKET", str(tmp_path / "nowhere" / "s"))
    monkeypatch.setattr(sys, "argv", ["minikms"])
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "data" / "run"
    directory.mkdir(mode=0o700, parents=True)
    (tmp_path / "data").chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "minikms.sock"))
        assert usage.found_socket(None) == "data/run/minikms.sock"
        assert capsys.readouterr().err == "minikms: --socket is not given: data/run/minikms.sock is used\n"
        monkeypatch.setattr(sys, "argv", ["minikms", "--json"])
        assert usage.found_socket(None) == "data/run/minikms.sock"
        assert capsys.readouterr().err == ""
        monkeypatch.setenv("PROGRESSDB_KMS_SOCKET", "second")
        assert usage.found_socket(None) == "second"
        monkeypatch.setenv("MINIKMS_SOCKET", "first")
        assert (usage.found_socket(None), usage.found_socket("given")) == ("first", "given")
        for variable in SOCKET_VARIABLES:
            monkeypatch.delenv(variable)
        with monkeypatch.context() as another:
            another.setattr(os, "geteuid", lambda: os.getuid() + 1)
            assert usage.found_socket(None) is None
        (tmp_path / "data").chmod(0o770)
        assert usage.found_socket(None) is None
        (tmp_path / "data").rename(tmp_path / "other")
        (tmp_path / "data").symlink_to("other")
        (tmp_path / "other").chmod(0o700)
        assert usage.found_socket(None) is None
    (tmp_path / "kms").mkdir(mode=0o700)
    (tmp_path / "kms" / "minikms.sock").touch()
    assert usage.found_socket(None) is None


def test_doctor_without_flags_examines_what_the_units_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flag limits it to what the flag names."""
    for variable in (*SOCKET_VARIABLES, console.DATA_DIR_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    directory, path = tmp_path / "d", tmp_path / "run" / "s"
    monkeypatch.setattr(usage, "PACKAGE_SOCKET", str(path))
    monkeypatch.setattr(console, "PACKAGE_DATA_DIR", str(directory))
    with pytest.raises(usage.CommandError, match="say what to examine"):
        doctor()
    directory.mkdir(0o700)
    path.parent.mkdir()
    assert doctor() == 1
    both = capsys.readouterr()
    assert "keyring.json is missing" in both.out and "problem: daemon" in both.out
    assert f"{path} is used" in both.err and f"{directory} is used" in both.err
    assert doctor(data_dir=str(directory)) == 1
    files = capsys.readouterr()
    assert "keyring.json is missing" in files.out and "problem: daemon" not in files.out and not files.err


def test_init_prints_the_next_commands_to_paste(tmp_path: Path) -> None:
    """With the path of a program that PATH does not have, and a private directory for the socket."""
    script = tmp_path / "minikms"
    python_program(script, f"import sys\nsys.argv[0] = {str(script)!r}\nfrom minikms.cli import main\nmain()\n", "-P")
    words = ("init", "--data-dir", "d", "--master-key-file", "k")
    elsewhere = subprocess.run(
        ("./minikms", *words), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert f"\n  {script} --socket {tmp_path}/minikms.sock" in elsewhere.stdout
    assert f"\n  export MINIKMS_SOCKET={tmp_path}/minikms.sock\n  {script} status\n" in elsewhere.stdout
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    said = run("init", "--data-dir", shared / "d", "--master-key-file", tmp_path / "k2").stdout
    assert f"\n  install -d -m 700 {shared}/run\n  minikms --socket {shared}/run/minikms.sock" in said
    made = run("init", "--data-dir", tmp_path / "the data", "--master-key-file", tmp_path / "root.key")
    assert (
        f"\n  minikms --socket {tmp_path}/minikms.sock --data-dir '{tmp_path}/the data' --master-key-file"
        in made.stdout
    )
    assert f"\n  export MINIKMS_SOCKET={tmp_path}/minikms.sock\n  minikms status\n" in made.stdout


def test_a_daemon_that_never_answers_is_looked_up_in_its_log(tmp_path: Path) -> None:
    """As the socket of systemd, while the service ends at each start."""
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        said = run("status", "--socket", tmp_path / "s")
    assert said.returncode == 2 and "`journalctl -u minikms -n 20`" in said.stderr
