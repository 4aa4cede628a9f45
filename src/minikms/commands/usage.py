"""Shared by all commands of this distribution: their frame, exit statuses, wrong usage, help, completion.

Owns: how a command begins and ends (`new_app`, `run`), the exit statuses, the variables that name the daemon, the
sentence for a command line that can't be read, the panels of `--help`, and the completion scripts. Exit status 0: done,
or a check passed. 1: a check failed, the request was refused, or a start failed that may succeed later. 2: wrong usage,
or something needed (a daemon, a file, a key) is missing; systemd does not start such a service again. Invariants: the
sentence is one line and names the command whose help describes it; a positional argument is shown by its name alone,
although a flag of that name is accepted too. It must never import what only an error or a help page needs, because
every start of a command imports it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

from minikms.processes.flags import COLLECTED_OBJECTS_MIN as COLLECTED_OBJECTS_MIN  # noqa: PLC0414  for the commands
from minikms.processes.flags import EXIT_FAILED as EXIT_FAILED  # noqa: PLC0414  as above
from minikms.processes.flags import EXIT_INTERRUPTED
from minikms.processes.flags import EXIT_MISSING as EXIT_MISSING  # noqa: PLC0414  as above


def missing_library(error: ModuleNotFoundError, program: str) -> str:
    """The sentence for a program whose extra was not installed. A missing module of our own is raised again."""
    if error.name is None or error.name.startswith(("minikms", "progressdb_server")):
        raise error
    of_library = {"joserfc": "gateway", "asyncpg": "replicator"}.get(error.name, "daemon")
    extra = "server" if program.startswith("progressdb") else of_library
    return f"the library {error.name} is missing: install the wheel of progressdb-minikms with its extra `{extra}`"


def _program() -> str:
    """The name of the command that runs, also of `python -m`."""
    called = Path(sys.argv[0])
    name = called.parent.name if called.name == "__main__.py" else called.name
    return "progressdb" if name == "progressdb_server" else name.replace("_", "-")


try:
    from cyclopts import App, validators
    from cyclopts import Parameter as Parameter  # noqa: PLC0414  for the commands, whose first import is this module
except ModuleNotFoundError as error:  # the client was installed alone
    print(f"{_program()}: {missing_library(error, _program())}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from cyclopts import Argument, CycloptsError
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

    from minikms.client import Client

    PathText = str
    RootSource = str
    PassphraseSource = str
    UnlockSource = str
else:  # cyclopts converts to the first type of a union, and completes files for `Path` and the words of a `Literal`
    PathText = str | Path
    RootSource = str | Literal["file:", "fd:", "dev:", "systemd-credential:", "unlock:", "shares:"]
    PassphraseSource = str | Literal["passphrase:"]
    UnlockSource = str | Literal["pkcs11:", "tpm2:", "aws-kms:", "vault-transit:", "clevis:"]
Shell = Annotated[Literal["bash", "zsh", "fish"], Parameter(help="The shell.")]
LogFormat = Annotated[Literal["console", "json"], Parameter(name="--log-format", help="The form of the log.")]
RequireHardening = Annotated[
    bool, Parameter(name="--require-hardening", help="Don't start unless all hardening is in force.")
]

EXIT_GOOD: Final = 0
EXIT_READER_LEFT: Final = 141
"""128 + SIGPIPE: the reader closed the pipe before it had all of the output."""

SOCKET_VARIABLE: Final = "MINIKMS_SOCKET"
SOCKET_VARIABLES: Final = (SOCKET_VARIABLE, "PROGRESSDB_KMS_SOCKET")
"""The first that is set counts. The second one is the message server's too."""
OWN_SOCKETS: Final = ("kms/minikms.sock", "data/run/minikms.sock")
"""The sockets of the README's daemons: in the working directory, below directories that nobody else can write to."""
PACKAGE_SOCKET: Final = "/run/minikms/minikms.sock"
"""The socket of the units of `deploy/systemd`. Only root can make /run/minikms."""
PAGES: Final = (
    "The runbook and the other pages that messages name are in share/doc/progressdb of the environment; Debian has "
    "them in /usr/share/doc/progressdb. "
)
SERVER_UIDS_VARIABLE: Final = "PROGRESSDB_KMS_SERVER_UIDS"
UNTRUSTED_ADVICE: Final = f"If that user is meant to serve it, give --server-uid, or set {SERVER_UIDS_VARIABLE}"


class CommandError(Exception):
    """Ends the command; the text is for the person who ran it."""

    def __init__(self, text: str, exit_status: int = EXIT_MISSING) -> None:
        super().__init__(text)
        self.exit_status = exit_status


Socket = Annotated[
    PathText | None,
    Parameter(name="--socket", help=f"The daemon's Unix socket [{SOCKET_VARIABLE}]; default: the one that is found."),
]
ServerUid = Annotated[
    int | None,
    Parameter(
        name="--server-uid",
        help=f"The user that must serve the socket; default: this one or root [{SERVER_UIDS_VARIABLE}].",
    ),
]
Json = Annotated[bool, Parameter(name="--json", help="JSON instead of text.", show_default=False)]
Watch = Annotated[bool, Parameter(name=("--watch", "-w"), help="Repeat until interrupted.", show_default=False)]
Interval = Annotated[float, Parameter(help="Seconds between two requests.", validator=validators.Number(gte=0.1))]
INTERVAL_SECONDS: Final = 2.0
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def found_socket(flag: str | None, *, look: bool = True) -> str | None:
    """The daemon's socket: the flag's, else a variable's, else the first place where there is one: then it says so.
    Without `look` the places are left out. Whoever made the socket, a client sends nothing before it has checked the
    user that serves it.
    """
    named = flag or next(filter(None, map(os.environ.get, SOCKET_VARIABLES)), None)
    if named or not look:
        return named
    places = [path for path in OWN_SOCKETS if is_own(path, stat.S_ISSOCK)]
    if os.path.lexists(os.path.dirname(PACKAGE_SOCKET)):  # a socket that this user may not see is none that is missing
        places.append(PACKAGE_SOCKET)
    if not places:
        return None
    say_chosen("--socket", places[0])
    return places[0]


def found_serving(kms: Client) -> str | None:
    """The address that serves, where there are several. A sealed host answers other calls than `ready` too."""
    from minikms.api.errors import SealedError

    if len(kms.addresses) == 1:
        return None
    with contextlib.suppress(SealedError):
        kms.ready()
    return kms.address


def say_chosen(flag: str, path: str) -> None:
    """Which place a command has found by itself. A program that wants JSON gets nothing else."""
    if not wants_json():
        print(f"{_program()}: {flag} is not given: {path} is used", file=sys.stderr)


def wants_json() -> bool:
    """True if the command line asks for JSON, even one that can't be read."""
    return "--json" in sys.argv[1:]


def is_own(path: str, has_kind: Callable[[int], bool]) -> bool:
    """Whether it is of this user and kind, below directories of this user that no other one can write to."""
    parts = path.split("/")
    try:
        entries = [os.lstat("/".join(parts[:count])) for count in range(1, len(parts) + 1)]
    except OSError:
        return False
    closed = all(stat.S_ISDIR(entry.st_mode) and not entry.st_mode & _WRITABLE_BY_OTHERS for entry in entries[:-1])
    return closed and has_kind(entries[-1].st_mode) and {entry.st_uid for entry in entries} == {os.geteuid()}


def new_app(name: str, about: str, epilogue: str) -> App:
    """The command `name`. `about` and `epilogue`: the texts before and after the list of its subcommands."""
    return App(
        name=name,
        help=about,
        help_format="plaintext",  # what Markdown needs takes long to import
        help_formatter=HelpPages(),
        help_epilogue=epilogue,
        version_flags=["--version", "-V"],
        version=_version,
        default_parameter=Parameter(negative=()),  # no flag has a twin `--no-…`, but where it says so itself
    )


def _version() -> str:
    from minikms.platform.process_metrics import build

    built = build()
    return f"{built.version} ({f'commit {built.commit}' if built.commit else 'a checkout'})"


def new_helper(name: str, about: str, epilogue: str) -> App:
    """The command of a process beside the daemon, with its subcommand `completion`."""
    app = new_app(name, about, epilogue)

    def completion(shell: Shell) -> int:
        return print_completion(app, name, shell)

    app.command(
        completion,
        name="completion",
        help=f"Print the completion script of a shell. For bash and zsh: source <({name} completion bash)",
    )
    return app


def run(program: str, command: Callable[[], Any], explain: Callable[[Exception], tuple[str, int]]) -> NoReturn:
    """Runs a command and ends the process with its exit status. `explain`: the text and the exit status of an error. It
    raises again an error that is a defect of the program.
    """
    try:
        try:
            sys.exit(command())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has left. Python flushes once more at exit, and must not report that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_READER_LEFT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001  `explain` raises a defect again
        from minikms.api.printable import clean

        # A command's module is imported by cyclopts, which raises an error of its own from that of the import.
        cause = error.__cause__ if isinstance(error, ImportError) and error.__cause__ is not None else error
        if isinstance(cause, ModuleNotFoundError):
            text, exit_status = missing_library(cause, program), EXIT_MISSING
        else:
            text, exit_status = explain(error)
        if wants_json():
            import json

            code = getattr(error, "code", None)  # of a refusal of the key service
            print(json.dumps({"error": text} | ({"code": code} if isinstance(code, str) else {})), file=sys.stderr)
        else:
            print(f"{program}: {clean(text)}", file=sys.stderr)
        sys.exit(exit_status)


def run_service(app: App) -> NoReturn:
    """Runs the command line of a service beside the daemon."""
    from minikms.api.errors import KmsError, StartLaterError, StorageUnavailableError

    def explain(error: Exception) -> tuple[str, int]:
        text = str(error) if isinstance(error, KmsError) else explained_system(error, app.name[0])
        return text, EXIT_FAILED if isinstance(error, StartLaterError | StorageUnavailableError) else EXIT_MISSING

    run_app(app, explain)


def run_app(app: App, explain: Callable[[Exception], tuple[str, int]]) -> NoReturn:
    """Runs the command line of a helper: see `run`."""

    def command() -> Any:
        words = prepared(app, sys.argv[1:])
        if unknown := unknown_command(app.name[0], words, list(app)):
            raise CommandError(unknown)
        return app(words, print_error=False, exit_on_error=False)

    run(app.name[0], command, explain)


def explained_system(error: Exception, program: str) -> str:
    """The sentence for a command line that can't be read, or for an error of the system. Raises another error again."""
    from cyclopts import CycloptsError

    if isinstance(error, CycloptsError):
        return explained(error, program)
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return system_error(error)
    raise error


def system_error(error: OSError) -> str:
    """What the system says, and the file."""
    return (error.strerror or "") + (f": {error.filename}" if error.filename else "")


def unknown_command(program: str, words: list[str], commands: Sequence[str]) -> str:
    """The sentence for a first word that is no command; empty otherwise. `serve`, which runs without a
    command, takes flags only, so the word can't be its argument.
    """
    if not words or words[0].startswith("-") or words[0] in commands:
        return ""
    from difflib import get_close_matches

    close = get_close_matches(words[0], commands, n=1)
    meant = f"Did you mean `{program} {close[0]}`?" if close else f"`{program} --help` lists the commands."
    return f"there is no command {words[0]!r}. {meant}"


def server_uids(flag: int | None) -> frozenset[int] | None:
    """The users that may serve the socket: the flag's, else those of the variable, else None for the default.

    Raises ValueError for a variable that isn't a list of numbers.
    """
    if flag is not None:
        return frozenset({flag})
    words = [word.strip() for word in os.environ.get(SERVER_UIDS_VARIABLE, "").split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"{SERVER_UIDS_VARIABLE} must be user ids separated by commas, as in 991,0")
    return frozenset(int(word) for word in words) or None


def label(argument: Argument) -> str | None:
    """How a positional argument is named, as in `KEY-ID`; None for a flag."""
    if not argument.field_info.is_positional:
        return None
    name = next((name for name in argument.names if name.startswith("--")), argument.name)
    return name.lstrip("-").upper()


def explained(error: CycloptsError, program: str) -> str:
    """The sentence for a command line that can't be read. `program`: the command's first word."""
    from cyclopts import MissingArgumentError, UnknownCommandError, UnusedCliTokensError

    words = " ".join((program, *(error.command_chain or ())))
    error.verbose = False
    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = label(error.argument)
        if name is not None:
            text = f"the argument {name} is missing"
        elif error.argument.tokens or error.keyword:
            text = f"{error.keyword or error.argument.name} needs a value"
        else:
            text = f"{error.argument.name} is missing"
    elif isinstance(error, UnusedCliTokensError):
        text = f"unexpected argument: {' '.join(error.unused_tokens or ())}"
    elif isinstance(error, UnknownCommandError) and error.unused_tokens and error.unused_tokens[0].startswith("-"):
        text = f"unknown option: {error.unused_tokens[0]}"
    end = "" if text.endswith(("?", ".")) else "."
    return f"{text[:1].lower()}{text[1:]}{end} See `{words} --help`."


def prepared(app: App, words: list[str]) -> list[str]:
    """The command line with `help` and `version` as flags. Ends the process after the help of a group whose subcommand
    is missing, or of a program that nothing configures.

    If it asks for the help of one command, that help becomes the whole docstring, with the exit statuses; without this
    it is the one line of the list of commands.
    """
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    elif words[:1] == ["version"]:
        words = ["--version"]
    named = [word for word in words if word not in ("--help", "-h")]
    wants_help = len(named) < len(words)
    if not wants_help and words and words[0].startswith("-"):
        return words
    _, chain, rest = app.parse_commands(named)
    command = chain[-1]
    configured = bool(words) or any(name.startswith(("MINIKMS_", "PROGRESSDB_")) for name in os.environ)
    incomplete = not wants_help and not rest and (command.default_command is None or not configured)
    if (wants_help or incomplete) and command is not app:
        import inspect

        text = _unwrapped((command.default_command and inspect.getdoc(command.default_command)) or "")
        epilogue = str(app.help_epilogue)
        command.help = text or command.help
        command.help_epilogue = "" if "Exit status" in text else epilogue[epilogue.index("Exit status") :]
    if incomplete:
        app.help_print(words)
        sys.exit(EXIT_MISSING)
    return words


def _unwrapped(text: str) -> str:
    """Each paragraph as one line, which the terminal wraps; but for those with examples, whose lines are indented."""
    return "\n\n".join(part if "\n " in part else " ".join(part.split()) for part in text.split("\n\n"))


def print_completion(app: App, program: str, shell: Shell) -> int:
    """Prints the script of a shell, which the shell reads by `source`.

    In bash, what the script does not know is completed as a file: also a path after `file:`, since bash takes what
    follows the colon for a word. In zsh the script registers itself, unless it is loaded as the function of a directory
    of fpath. In fish no files are offered where a subcommand is expected.
    """
    import re

    script = app.generate_completion(prog_name=program, shell=shell)
    if shell == "zsh":
        function = f"_cyclopts_{program}"
        load = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }"  # a zsh without .zshrc lacks it
        script += (
            f'if [[ $funcstack[1] == _{program} ]]; then {function} "$@"; else {load}; compdef {function} {program}; fi'
        )
    elif shell == "fish":
        using = f"__fish_{program}_using_command"
        groups = [f"'{using} {name}'" for name in re.findall(r"^# Subcommands for: (.+)$", script, re.MULTILINE)]
        script += "\n".join(f"complete -c {program} -f -n {where}" for where in ("__fish_use_subcommand", *groups))
    print(script.replace("\ncomplete -F ", "\ncomplete -o bashdefault -o default -F "))
    return EXIT_GOOD


class HelpPages:
    """Prints what `--help` shows: positional arguments by their names alone, the rest as cyclopts does."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        from attrs import evolve
        from cyclopts.help.formatters import DefaultFormatter

        entries = [
            evolve(entry, positive_names=(), positive_shorts=()) if entry.positional_label else entry
            for entry in panel.entries
        ]
        DefaultFormatter()(console, options, panel.copy(entries=entries))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        from cyclopts.help.formatters import DefaultFormatter

        DefaultFormatter().render_usage(console, options, usage)
