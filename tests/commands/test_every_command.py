"""Every command of both programs: wrong usage, missing arguments, help and `--json`, found by walking the trees."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App

from minikms import __version__ as minikms_version
from minikms.cli import main as minikms_main
from minikms.cli.command import app as minikms
from minikms.commands.usage import label
from minikms.platform.process_metrics import build
from minikms_auditor.command import app as auditor
from minikms_auditor.command import main as auditor_main
from minikms_gateway.command import app as gateway
from minikms_gateway.command import main as gateway_main
from minikms_replicator.command import app as replicator
from minikms_replicator.command import main as replicator_main
from minikms_unlock.command import app as unlock
from minikms_unlock.command import main as unlock_main
from progressdb_server.cli import main as progressdb_main
from progressdb_server.cli.command import app as progressdb
from tests import needs
from tests.harness import forked
from tests.harness.waiting import wait_until

PROJECT = Path(__file__).resolve().parents[2]
RUN_SECONDS_MAX = 60
WITHOUT_JSON = {
    ("minikms", "serve"),
    ("minikms", "completion"),
    ("minikms", "audit", "export"),
    ("minikms", "keys", "receipt"),
    ("minikms-auditor", "accept-log"),
    ("minikms-auditor", "check-config"),
    ("minikms-auditor", "checkpoint"),
    ("minikms-auditor", "completion"),
    ("minikms-auditor", "prove"),
    ("minikms-auditor", "skip"),
    ("minikms-gateway", "check-config"),
    ("minikms-gateway", "completion"),
    ("minikms-replicator", "completion"),
    ("minikms-replicator", "fetch"),
    ("minikms-replicator", "init"),
    ("minikms-replicator", "reset"),
    ("minikms-unlock", "completion"),
    ("minikms-unlock", "serve"),
    ("progressdb", "serve"),
    ("progressdb", "completion"),
}
"""Their output is a log, a script, one sentence or nothing, or has one form only."""


def commands(app: App, *words: str) -> Iterator[tuple[tuple[str, ...], App]]:
    """Each command that can be run, with its words."""
    inner = [name for name in app if not name.startswith("-")]
    if not inner:
        yield words, app
    for name in inner:
        yield from commands(app[name], *words, name)


PROGRAMS = {
    "minikms": minikms,
    "minikms-auditor": auditor,
    "minikms-gateway": gateway,
    "minikms-replicator": replicator,
    "minikms-unlock": unlock,
    "progressdb": progressdb,
}
MAINS = {
    "minikms": minikms_main,
    "minikms-auditor": auditor_main,
    "minikms-gateway": gateway_main,
    "minikms-replicator": replicator_main,
    "minikms-unlock": unlock_main,
    "progressdb": progressdb_main,
}
COMMANDS = [command for name, app in PROGRAMS.items() for command in commands(app, name)]
NAMES = [" ".join(words) for words, _ in COMMANDS]
each_command = pytest.mark.parametrize(("words", "app"), COMMANDS, ids=NAMES)


def run(*words: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    package = {"progressdb": "progressdb_server"}.get(words[0], words[0].replace("-", "_"))
    return forked.run(package, *words[1:], cwd=where or ".")


@functools.cache
def completion(program: str, shell: str) -> str:
    """The script, which takes a second to make."""
    script = run(program, "completion", shell)
    assert (script.returncode, script.stderr) == (0, "")
    return script.stdout


class Here:
    """Runs a command in this process, without the cost of a new one. Only for what ends before a command begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        self._monkeypatch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as ended:
            MAINS[words[0]]()
        output = self._capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), output.out, output.err)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def assert_one_sentence(done: subprocess.CompletedProcess[str], program: str) -> None:
    """Status 2, nothing on standard output, and one line that begins with the program's name."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith(f"{program}: ") and done.stderr.count("\n") == 1, done.stderr


def test_the_walk_finds_the_commands() -> None:
    assert {"minikms keys show", "minikms serve", "progressdb serve", "progressdb rotation-backups prune"} <= set(NAMES)
    assert len(NAMES) > 40


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        *((f"{program} --no-such-option --config none", f"See `{program} --help`.") for program in PROGRAMS),
        *((f"{program} no-such-command", f"`{program} --help` lists the commands.") for program in PROGRAMS),
        ("minikms --socket s --data-dir d --master-key-file none", "openssl rand -hex 32 > none"),
        ("progressdb --addr 127.0.0.1:0 --db d --master-key-file none", "openssl rand -hex 32 > "),
        ("minikms-auditor --config none", "make it, or name another"),
        ("minikms-gateway --config none", "make it, or name another"),
        ("minikms-replicator --config none", "make it, or name another"),
        ("minikms-unlock doctor --config none", "make it, or name another"),
    ],
)
def test_the_same_mistake_is_the_same_status_in_every_program(tmp_path: Path, line: str, advice: str) -> None:
    """2, one line that names the mistake, and what to do next."""
    done = run(*line.split(), where=tmp_path)
    assert done.returncode == 2 and not done.stdout, done
    *log, sentence = done.stderr.splitlines()
    assert sentence.startswith(f"{line.split(maxsplit=1)[0]}: ") and advice in sentence
    assert not any(advice in earlier for earlier in log)


@each_command
def test_a_wrong_flag_is_named_in_one_sentence(here: Here, words: tuple[str, ...], app: App) -> None:
    required = [argument for argument in app.assemble_argument_collection() if argument.required]
    given = [word for argument in required if label(argument) is None for word in (argument.name, "1")]
    done = here(*words, *given, "--no-such-flag")
    assert_one_sentence(done, words[0])
    assert "--no-such-flag" in done.stderr
    assert f"See `{' '.join(words)} --help`." in done.stderr


@each_command
def test_a_missing_argument_is_named_in_one_sentence(here: Here, words: tuple[str, ...], app: App) -> None:
    required = [argument for argument in app.assemble_argument_collection() if argument.required]
    if not required:
        return
    done = here(*words)
    assert_one_sentence(done, words[0])
    assert any((label(argument) or argument.name) in done.stderr for argument in required), done.stderr


@each_command
def test_help_describes_every_argument_as_it_is_given(here: Here, words: tuple[str, ...], app: App) -> None:
    done = here(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {' '.join(words)}")
    for argument in app.assemble_argument_collection():
        if argument.show:
            assert argument.parameter.help, argument.name
        name = label(argument)
        if name is not None:
            shown = [line for line in done.stdout.splitlines() if f" {name} " in line and line.startswith("│")]
            assert shown and f"--{name.lower()}" not in done.stdout, done.stdout


@each_command
def test_every_command_with_a_result_has_json(words: tuple[str, ...], app: App) -> None:
    names = {name for argument in app.assemble_argument_collection() for name in argument.names}
    assert ("--json" in names) is (words not in WITHOUT_JSON)


@pytest.mark.parametrize(
    "words",
    [
        ("progressdb", "--addr", "foo", "--db", "somewhere"),
        ("progressdb", "status"),
        ("progressdb", "config", "check"),
        ("progressdb", "rotate-dek"),
        ("progressdb", "rotate-dek", "t", "--url", "nonsense"),
        ("progressdb", "jobs", "list"),
        ("progressdb", "rotation-backups", "prune"),
        ("progressdb", "backup", "forget", "name", "--db", "somewhere"),
        ("progressdb", "backup", "create", "../name", "--db", "somewhere"),
        ("progressdb", "nonsense"),
        ("progressdb", "jobs", "nonsense"),
        ("minikms", "status"),
        ("minikms", "keys", "nonsense"),
        ("minikms", "audit", "tail", "--lines", "many"),
        ("minikms", "completion", "tcsh"),
        ("minikms", "unlock", "nonsense"),
        ("minikms", "gateway", "nonsense"),
        ("minikms", "auditor", "nonsense"),
        ("minikms-auditor", "--config", "missing"),
        ("minikms-auditor", "status", "--config", "missing"),
        ("minikms-auditor", "prove", "many", "--config", "missing"),
        ("minikms-gateway", "--config", "missing"),
        ("minikms-gateway", "check-config", "--config", "missing"),
        ("minikms-unlock", "nonsense"),
        ("minikms-unlock", "unseal", "passphrase:", "--config", "missing", "--socket", "missing"),
        ("minikms-unlock", "unseal", "tpm2:", "--config", "missing"),
    ],
    ids=" ".join,
)
def test_wrong_usage_and_missing_things_have_status_2(tmp_path: Path, words: tuple[str, ...]) -> None:
    program = "-".join(words[:2]) if words[1:2] in (("auditor",), ("gateway",), ("unlock",)) else words[0]
    assert_one_sentence(run(*words, where=tmp_path), program)
    assert not list(tmp_path.iterdir()), "nothing was made"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("minikms ba", ["backup"]),
        ("minikms unl", ["unlock"]),
        ("minikms unlock uns", ["unseal"]),
        ("minikms unlock unseal p", ["passphrase:"]),
        ("minikms doctor --data-dir a-d", ["a-directory"]),
        ("minikms status --socket a-f", ["a-file"]),
        ("minikms encrypt a-", ["a-directory", "a-file"]),
        ("minikms audit verify --root f", ["fd:", "file:"]),
        ("minikms root add s", ["shares:", "systemd-credential:"]),
        ("minikms-unlock unseal passphrase: --config a-f", ["a-file"]),
        ("progressdb backup ver", ["verify"]),
        ("progressdb --config a-f", ["a-file"]),
        ("progressdb check --db a-d", ["a-directory"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_completion_knows_commands_files_and_sources(tmp_path: Path, line: str, offered: list[str]) -> None:
    """The script, in bash, with what a line stands for there."""
    (tmp_path / "a-file").touch()
    (tmp_path / "a-directory").mkdir()
    words = line.split()
    script = completion(words[0], "bash")
    registered = script.rstrip().splitlines()[-1].split()
    assert registered[:5] == ["complete", "-o", "bashdefault", "-o", "default"], "a path after `file:` is a file"
    ask = 'COMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n' + registered[-2] + '\nprintf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ("bash", "-c", script + ask, "bash", *words),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert sorted(done.stdout.split()) == offered


@pytest.mark.parametrize(
    "line", ["minikms", "minikms keys", "minikms-gateway", "minikms-unlock", "progressdb", "progressdb jobs"]
)
def test_a_command_that_is_not_whole_shows_its_help_with_status_2(
    here: Here, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """`minikms` and `progressdb` alone serve when their environment configures them."""
    for name in list(os.environ):
        if name.startswith(("MINIKMS_", "PROGRESSDB_")):
            monkeypatch.delenv(name)
    done = here(*line.split())
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith(f"Usage: {line} COMMAND")
    monkeypatch.setenv("PROGRESSDB_KMS_SOCKET", "s")
    if line == "minikms":
        assert_one_sentence(here(line), line)


def test_help_and_version_are_words_too(here: Here) -> None:
    """`git archive` writes the commit into the files of a source archive."""
    source = f"commit {build().commit}" if build().commit else "a checkout"
    assert here("minikms", "help", "keys", "list").stdout == here("minikms", "keys", "list", "--help").stdout
    for program in ("minikms", "minikms-gateway", "progressdb"):
        assert here(program, "help").stdout == here(program, "--help").stdout
        assert {here(program, word).stdout for word in ("version", "-V", "--version")} == {
            f"{minikms_version} ({source})\n"
        }


def test_only_the_help_of_minikms_names_the_helpers(here: Here) -> None:
    for words in (("minikms", "--help"), ("minikms", "keys", "list", "--help"), ("minikms", "keys", "--help")):
        shown = " ".join(here(*words).stdout.split())
        assert ("runs minikms-unlock" in shown) is (len(words) == 2)
        assert "Exit status: 0" in shown


@pytest.mark.parametrize("words", [("minikms", "keys", "list"), ("minikms-unlock", "unseal", "x"), ("progressdb", "x")])
def test_with_json_an_error_is_json_too(here: Here, words: tuple[str, ...]) -> None:
    text, shown = here(*words), here(*words, "--json")
    assert (shown.returncode, shown.stdout) == (text.returncode, "") == (2, "")
    assert text.stderr == f"{words[0]}: {json.loads(shown.stderr)['error']}\n"


@pytest.mark.parametrize("program", ["minikms-auditor", "minikms-gateway", "minikms-replicator", "minikms-unlock"])
def test_a_mistyped_command_of_a_helper_is_named(here: Here, program: str) -> None:
    done = here(program, "complet")
    assert done.returncode == 2
    assert done.stderr == f"{program}: there is no command 'complet'. Did you mean `{program} completion`?\n"


def test_an_unexpected_argument_is_named(here: Here) -> None:
    done = here("minikms", "keys", "list", "extra")
    assert done.returncode == 2
    assert done.stderr == "minikms: unexpected argument: extra. See `minikms keys list --help`.\n"


@pytest.mark.parametrize("program", ["minikms", "minikms-unlock", "progressdb"])
def test_completion_in_zsh_registers_sourced_and_from_fpath(tmp_path: Path, program: str) -> None:
    zsh = needs.program("zsh")
    (tmp_path / f"_{program}").write_text(completion(program, "zsh"))
    for load, registered in (
        (f"compinit -d {tmp_path}/d1; source <(cat {tmp_path}/_{program})", f"_cyclopts_{program}\n"),
        (f"HOME={tmp_path}; source {tmp_path}/_{program}", f"_cyclopts_{program}\n"),
        (f"fpath+=({tmp_path}); compinit -u -d {tmp_path}/d2", f"_{program}\n"),
    ):
        few = "fpath=(${^fpath}/compinit(N:h))"  # else it reads the completions of 900 other programs
        script = f"{few}; autoload -Uz compinit; {load}; print $_comps[{program}]"
        done = subprocess.run((zsh, "-f", "-c", script), capture_output=True, text=True, timeout=60, check=True)
        assert (done.stdout, done.stderr) == (registered, "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("minikms kek ", ["list", "prune"]),
        ("minikms ba", ["backup"]),
        ("minikms --socket a-", ["a-directory/", "a-file"]),
        ("minikms encrypt a-", ["a-directory/", "a-file"]),
        ("progressdb config ", ["check", "show"]),
    ],
)
def test_completion_in_fish_offers_files_only_where_one_is_meant(tmp_path: Path, line: str, offered: list[str]) -> None:
    fish = needs.program("fish")
    (tmp_path / "a-file").touch()
    (tmp_path / "a-directory").mkdir()
    program = line.partition(" ")[0]
    (tmp_path / "script").write_text(completion(program, "fish"))
    words = (fish, "--no-config", "-c", f"source script; complete -C '{line}'")
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=home, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(shown.partition("\t")[0] for shown in done.stdout.splitlines()) == offered


def test_a_configuration_as_json_holds_no_api_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGRESSDB_API_ADMIN_KEYS", "a-secret-key,another-one")
    done = run("progressdb", "config", "show", "--db", "somewhere", "--json", where=tmp_path)
    page = json.loads(done.stdout)
    assert page["security.api_keys.admin"] == {"value": 2, "source": "environment"}
    assert page["storage.db_path"] == {"value": "somewhere", "source": "flag"}
    assert "secret" not in done.stdout and "another" not in done.stdout


@pytest.mark.parametrize("flags", [(), ("--follow",)], ids=["once", "follow"])
def test_tail_ends_with_141_when_its_reader_has_left(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Also while no line is written: the reader's end of the pipe is watched."""
    made = run("minikms", "init", "--data-dir", str(tmp_path / "kms"), "--master-key-file", str(tmp_path / "key"))
    assert made.returncode == 0, made.stderr
    words = [sys.executable, "-m", "minikms", "audit", "tail", "--data-dir", str(tmp_path / "kms"), *flags]
    reading, writing = os.pipe()
    if not flags:
        os.close(reading)
    with subprocess.Popen(words, stdout=writing, stderr=subprocess.PIPE, text=True) as tail:
        os.close(writing)
        if flags:
            assert b"genesis" in os.read(reading, 100_000)
            os.close(reading)
        wait_until(lambda: tail.poll() is not None)
        assert tail.stderr is not None
        assert (tail.returncode, tail.stderr.read()) == (141, "")
