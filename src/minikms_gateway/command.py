"""The command `minikms-gateway`.

Owns: its subcommands and flags, and the sentence for each error. Invariants: results go to standard output, everything
else to standard error; what `check-config` accepts, a start accepts too, but for its sockets.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import App, Parameter

from minikms import usage
from minikms.usage import EXIT_GOOD, EXIT_INTERRUPTED, EXIT_MISSING, HelpPages, Shell, print_completion

app = App(
    name="minikms-gateway",
    help="The key service for other hosts, over TLS with client certificates and tokens. Without a command it serves.",
    help_format="plaintext",
    help_formatter=HelpPages(),
    help_epilogue="Exit status: 0 done, 2 wrong usage, or the configuration is not valid.",
    version_flags=["--version"],
    version="0.2.0",
)
_MISSING_LIBRARY: Final = "joserfc"

Config = Annotated[Path, Parameter(name="--config", help="The configuration (docs/spec/gateway.md).")]
LogFormat = Annotated[Literal["text", "json"], Parameter(name="--log-format", help="The form of the log.")]


@app.default
def serve(
    *,
    config: Config,
    log_format: LogFormat = "text",
    require_hardening: Annotated[
        bool, Parameter(name="--require-hardening", help="Don't start unless all hardening is in force.", negative=())
    ] = False,
) -> int:
    """Serve until SIGTERM. SIGHUP reads all files again; changed ones are noticed without it."""
    from minikms_gateway.process import run

    run(config, log_format, require_hardening=require_hardening)
    return EXIT_GOOD


@app.command(name="check-config")
def check_config(*, config: Config) -> int:
    """Read the configuration and all files that it names, as a start does."""
    from minikms_gateway.process import Loader

    loaded = Loader(config, lambda issuer, why: None).load()
    cas, issuers = len(loaded.config.client_ca), len(loaded.config.issuer)
    print(f"{config}: valid; {cas} client CAs, {issuers} issuers")
    return EXIT_GOOD


@app.command
def completion(shell: Shell) -> int:
    """Print the completion script of a shell. For bash: source <(minikms-gateway completion bash)"""
    return print_completion(app, "minikms-gateway", shell)


def main() -> None:
    """Runs the command line and ends the process."""
    try:
        words = sys.argv[1:]
        usage.show_whole_help(app, words)
        try:
            sys.exit(app(words, print_error=False, exit_on_error=False))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001  defects are raised again by `explained`
        print(f"minikms-gateway: {explained(error)}", file=sys.stderr)
        sys.exit(EXIT_MISSING)


def explained(error: Exception) -> str:
    """The text of an error. An error that is a defect is raised again."""
    from cyclopts import CycloptsError

    from minikms.api.errors import StartError

    if isinstance(error, CycloptsError):
        return usage.explained(error, "minikms-gateway")
    if isinstance(error, StartError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == _MISSING_LIBRARY:
        return "the library joserfc is missing: pip install 'progressdb-minikms[gateway]'"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    raise error
