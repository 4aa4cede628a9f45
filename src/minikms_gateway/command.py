"""The command `minikms-gateway`.

Owns: its subcommands and flags, and the sentence for each error. Invariants: results go to standard output, everything
else to standard error; what `check-config` accepts, a start accepts too, but for its sockets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from minikms.commands.usage import EXIT_GOOD, LogFormat, Parameter, RequireHardening, new_helper, run_service

app = new_helper(
    "minikms-gateway",
    "The key service for other hosts, over TLS with client certificates and tokens. Without a command it serves.",
    "Exit status: 0 done, 1 a start that may succeed later, 2 wrong usage, or the configuration is not valid.",
)

Config = Annotated[Path, Parameter(name="--config", help="The configuration, a TOML file.")]


@app.default
def serve(*, config: Config, log_format: LogFormat = "console", require_hardening: RequireHardening = False) -> int:
    """Serve until SIGTERM. SIGHUP reads all files again; changed ones are noticed without it."""
    from minikms_gateway.process import run

    run(config, log_format, require_hardening=require_hardening)
    return EXIT_GOOD


@app.command(name="check-config")
def check_config(*, config: Config) -> int:
    """Read the configuration and all files that it names, as a start does."""
    from minikms.commands.output import counted
    from minikms_gateway.process import Loader

    loaded = Loader(config, lambda issuer, why: None).load()
    loaded.check_certificate()
    cas, issuers = len(loaded.config.client_ca), len(loaded.config.issuer)
    print(f"{config}: valid; {counted(cas, 'client CA')}, {counted(issuers, 'issuer')}")
    return EXIT_GOOD


def main() -> None:
    """Runs the command line and ends the process."""
    run_service(app)
