"""How the command hands its flags to the daemon, and what a reader of the process table sees."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.cli import command
from minikms.processes import flags
from tests import needs
from tests.harness.live_daemon import LiveDaemon


@pytest.mark.parametrize("source", ["ab" * 32, f"vault:{'ab' * 32}"])
def test_a_key_given_for_a_source_reaches_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str
) -> None:
    words = ["--socket", str(tmp_path / "s"), "--data-dir", str(tmp_path / "d"), "--root", source]
    monkeypatch.setattr(sys, "argv", ["minikms", *words])
    monkeypatch.setattr(os, "memfd_create", None)  # the file that the daemon would read
    with pytest.raises(SystemExit) as ended:
        command.run()
    assert (ended.value.code, source in capsys.readouterr().err) == (2, False)


def test_the_daemon_shows_the_words_of_the_command(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "environment", forked=False) as daemon:
        _, *words = Path(f"/proc/{daemon.process.pid}/cmdline").read_text().removesuffix("\0").split("\0")
        assert words[:3] == ["-P", "-m", flags.DAEMON]
        assert words[4:-2] == daemon.command[3:]
        assert words[-2] == "--master-key-fd"


def test_the_daemon_keeps_no_file_of_flags_open(tmp_path: Path) -> None:
    needs.root()  # the daemon is not dumpable: its own user may not read its list of descriptors
    with LiveDaemon(tmp_path, "environment", forked=False) as daemon:
        files = []
        for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the daemon has closed it
                files.append(os.readlink(link))
        assert files
        assert not [file for file in files if "memfd:minikms-flags" in file]


@pytest.mark.parametrize("words", [(), ("x",), ("0",), ("9999",)])
def test_the_daemon_alone_says_how_it_is_started(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", flags.DAEMON, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "minikms: the daemon is started by `minikms serve`\n")


@pytest.mark.parametrize("last", [("-I", "-Wd", "-m"), ("-Wd", "-Im"), ("-I", "-Wd", "-mminikms")])
def test_options_of_the_interpreter_are_kept(monkeypatch: pytest.MonkeyPatch, last: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", *last, "minikms", "-x"])
    programs: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *program: programs.append(program))
    monkeypatch.setattr(flags, "write_flags", lambda _: 7)
    become: Callable[..., object] = flags.become_daemon  # which does not return
    become(None, ["-x"])
    [(program, words, environ)] = programs
    options = ["-X", "dev", *(("-Wd", "-I") if last[-1] == "-Im" else ("-I", "-Wd"))]
    assert (program, words[1:]) == (sys.executable, [*options, "-P", "-m", flags.DAEMON, "7", "-x"])
    assert environ[flags.BIND_VARIABLE] == "1"
