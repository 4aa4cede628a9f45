"""The commands of `progressdb` and their flags.

Owns: the command tree, and how an error becomes a sentence and an exit status: 0 done, 1 refused or found wrong, 2
something that was named is not there. It must never hold what a command does.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import metadata
from typing import Annotated, Final, Literal

from cyclopts import App, Parameter

from progressdb_server.config import Config, ConfigError, ConfigMissingError, Loaded, load

EXIT_REFUSED: Final = 1
EXIT_MISSING: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_READER_LEFT: Final = 141
"""128 and the signal, SIGINT and SIGPIPE, as shells have it."""

Addr = Annotated[str | None, Parameter(help="Where to listen, host:port; default 127.0.0.1:8080 [PROGRESSDB_ADDR].")]
Db = Annotated[str | None, Parameter(help="Directory of all data [PROGRESSDB_DB_PATH].")]
ConfigFile = Annotated[
    str | None, Parameter(name="--config", help="Configuration file, YAML or .toml [PROGRESSDB_CONFIG].")
]
MasterKeyFile = Annotated[
    str | None,
    Parameter(help="File with the root key for miniKMS: 64 hex characters [PROGRESSDB_MINIKMS_MASTER_KEY_FILE]."),
]
Dev = Annotated[
    bool | None,
    Parameter(help="Development: miniKMS makes its own root key file [PROGRESSDB_DEV].", negative=()),
]
AcceptRestore = Annotated[
    bool,
    Parameter(help="Serve although the key service's data is older than what the store has seen.", negative=()),
]
NoKms = Annotated[
    Literal["none"] | None,
    Parameter(
        name="--kms",
        help="`none` stores everything in plaintext, to measure against; refused outside benchmarks.",
    ),
]
LogFormat = Annotated[str | None, Parameter(help="console or json [PROGRESSDB_LOG_FORMAT].")]


def _loaded(
    *,
    addr: str | None,
    db: str | None,
    config: str | None,
    master_key_file: str | None,
    dev: bool | None,
    log_format: str | None = None,
) -> Loaded:
    flags = {
        "addr": addr,
        "storage.db_path": db,
        "config": config,
        "kms.master_key_file": master_key_file,
        "server.dev": dev,
        "logging.format": log_format,
    }
    return load(flags, os.environ)


def loaded_config(
    *,
    addr: str | None = None,
    db: str | None = None,
    config: str | None = None,
    master_key_file: str | None = None,
) -> Config:
    """The configuration of a command that serves nothing. Raises ConfigError."""
    return _loaded(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=None).config


def _refused(error: Exception) -> int:
    print(f"progressdb: {error}", file=sys.stderr)
    return EXIT_MISSING if isinstance(error, ConfigMissingError) else EXIT_REFUSED


def application(master_key_fd: int | None) -> App:
    """The command tree. `master_key_fd` holds the root key that was in the environment."""
    app = App(
        name="progressdb",
        help="The ProgressDB message server. With flags only, it serves.",
        version=metadata.version("progressdb-minikms"),
        version_flags=["--version"],
    )

    @app.default
    @app.command(name="serve")
    def serve(
        *,
        addr: Addr = None,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
        dev: Dev = None,
        log_format: LogFormat = None,
        accept_restore: AcceptRestore = False,
        kms: NoKms = None,
    ) -> int:
        """Serve the HTTP API until SIGTERM."""
        from progressdb_server import server

        try:
            server.run(
                _loaded(
                    addr=addr,
                    db=db,
                    config=config,
                    master_key_file=master_key_file,
                    dev=dev,
                    log_format=log_format,
                ).config,
                master_key_fd,
                accept_restore=accept_restore,
                encrypting=kms is None,
            )
        except (ConfigError, server.ServeError) as error:
            return _refused(error)
        return 0

    app.command(
        "progressdb_server.cli.demo:demo", name="demo", help="A guided tour: store, read back, search the disk, verify."
    )

    from progressdb_server.cli import upkeep  # which needs this module's flags

    upkeep.add(app, master_key_fd)
    configuration = App(name="config", help="Check or show the configuration that the server would run with.")
    app.command(configuration)

    @configuration.command(name="check")
    def check_configuration(
        *,
        addr: Addr = None,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
        dev: Dev = None,
    ) -> int:
        """Exit 0 when the server could start with it, 1 with the reason when not, 2 when a named file is missing."""
        from progressdb_server.cli import configuration as command

        try:
            loaded = _loaded(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
            command.check(loaded.config, has_master_key=master_key_fd is not None)
        except ConfigError as error:
            return _refused(error)
        print("the configuration is good")
        return 0

    @configuration.command(name="show")
    def show_configuration(
        *,
        addr: Addr = None,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
        dev: Dev = None,
    ) -> int:
        """Print every setting, its value and where that came from; API keys are only counted."""
        from progressdb_server.cli import configuration as command

        try:
            loaded = _loaded(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
        except ConfigError as error:
            return _refused(error)
        print("\n".join(command.shown(loaded)))
        return 0

    from progressdb_server.cli import jobs

    jobs.commands(app)
    return app


def run(master_key_fd: int | None) -> None:
    """Carries out the command line and ends the process."""
    app = application(master_key_fd)
    mistyped = _mistyped(sys.argv[1:], [name for name in app if not name.startswith("-")])
    if mistyped:
        print(f"progressdb: {mistyped}", file=sys.stderr)
        sys.exit(EXIT_MISSING)
    try:
        try:
            sys.exit(app())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has closed it; Python must not complain when it flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_READER_LEFT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _mistyped(words: list[str], commands: list[str]) -> str:
    """What is wrong with a first word that is no command: `serve` takes flags only, so it can't be anything else."""
    if not words or words[0].startswith("-") or words[0] in commands:
        return ""
    close = get_close_matches(words[0], commands, n=1)
    meant = f"Did you mean `progressdb {close[0]}`?" if close else "`progressdb --help` lists what there is."
    return f"there is no command {words[0]!r}. {meant}"
