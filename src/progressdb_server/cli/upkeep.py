"""The commands of `progressdb` that look after its data: `status`, `check`, `backup`.

Owns: their flags, and how their errors become sentences and exit statuses: 0 done or right, 1 wrong or refused, 2
something that was named is not there. It must never hold what a command does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from progressdb_server.cli.command import (
    EXIT_MISSING,
    EXIT_REFUSED,
    Addr,
    ConfigFile,
    Db,
    MasterKeyFile,
    loaded_config,
)
from progressdb_server.config import ConfigError, ConfigMissingError

Json = Annotated[bool, Parameter(name="--json", help="JSON instead of text.", negative=(), show_default=False)]


def add(app: App, master_key_fd: int | None) -> None:
    """Adds the commands. `master_key_fd` holds the root key that was in the environment."""

    @app.command(name="status")
    def status(*, addr: Addr = None, db: Db = None, config: ConfigFile = None, json: Json = False) -> int:
        """Show the server and its key service on one page, with the configuration that the server has.

        Exit status: 0 both are well, 1 one can't do its work, 2 the server does not answer.
        """

        def work() -> int:
            from progressdb_server.cli import status as command

            return command.status(loaded_config(addr=addr, db=db, config=config), as_json=json)

        return _done(work)

    @app.command(name="check")
    def check(
        *,
        repair: Annotated[
            bool,
            Parameter(
                help="Rebuild indexes and counters from the records. The server must be stopped.",
                negative=(),
                show_default=False,
            ),
        ] = False,
        db: Db = None,
        config: ConfigFile = None,
        json: Json = False,
    ) -> int:
        """Walk the whole store, also beside the running server, which is then asked to open every record.

        Exit status: 0 all is right, 1 something is not, 2 there is no store.
        """

        def work() -> int:
            from progressdb_server.cli import check as command

            return command.check(loaded_config(db=db, config=config), repairing=repair, as_json=json)

        return _done(work)

    backups = App(name="backup", help="Back up store and key service, verify and restore backups.", version_flags=[])
    app.command(backups)

    @backups.command(name="create")
    def create(
        name: Annotated[str, Parameter(help="The backup's name: it is made in <db>/backups.")],
        *,
        store_only: Annotated[
            bool,
            Parameter(
                name="--store-only",
                help="Leave the key service out, where another user has it.",
                negative=(),
                show_default=False,
            ),
        ] = False,
        addr: Addr = None,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
    ) -> int:
        """Back up the store, then the key service, also while they serve. Neither holds the root key."""

        def work() -> int:
            from progressdb_server.cli import backup as command

            chosen = loaded_config(addr=addr, db=db, config=config, master_key_file=master_key_file)
            return command.create(chosen, name, master_key_fd, store_only=store_only)

        return _done(work)

    @backups.command(name="list")
    def listed(*, addr: Addr = None, db: Db = None, config: ConfigFile = None, json: Json = False) -> int:
        """List the store's backups that count when an old key is to be destroyed, also those that are not found."""

        def work() -> int:
            from progressdb_server.cli import backup as command

            return command.listed(loaded_config(addr=addr, db=db, config=config), as_json=json)

        return _done(work)

    @backups.command(name="forget")
    def forget(
        name: Annotated[str, Parameter(help="The backup's name, as in the list.")],
        *,
        yes: Annotated[
            bool,
            Parameter(help="It was deleted, and every copy of it.", negative=(), show_default=False),
        ] = False,
        addr: Addr = None,
        db: Db = None,
        config: ConfigFile = None,
    ) -> int:
        """Forget a deleted backup, so that keys which it needed may be destroyed. Refused while it is still there."""

        def work() -> int:
            from progressdb_server.cli import backup as command

            return command.forget(loaded_config(addr=addr, db=db, config=config), name, agreed=yes)

        return _done(work)

    @backups.command(name="verify")
    def verify(
        backup: Annotated[Path, Parameter(help="The backup's directory.")],
        *,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
    ) -> int:
        """Read a backup back: every file of the store, every key. Exit status: 0 good, 1 not, 2 it is not there."""

        def work() -> int:
            from progressdb_server.cli import backup as command

            if not backup.is_dir():
                raise ConfigMissingError(f"there is no directory {backup}")
            chosen = loaded_config(db=db or ".", config=config, master_key_file=master_key_file)
            return command.verify(chosen, backup, master_key_fd)

        return _done(work)

    @backups.command(name="restore")
    def restore(
        backup: Annotated[Path, Parameter(help="The backup's directory.")],
        *,
        newer_keyring: Annotated[
            Path | None,
            Parameter(help="A keyring.json of later than the backup: keys destroyed by then are not brought back."),
        ] = None,
        db: Db = None,
        config: ConfigFile = None,
        master_key_file: MasterKeyFile = None,
    ) -> int:
        """Restore into the directories of the configuration, which must be empty. Nothing is ever overwritten."""

        def work() -> int:
            from progressdb_server.cli import backup as command

            if not backup.is_dir():
                raise ConfigMissingError(f"there is no directory {backup}")
            chosen = loaded_config(db=db, config=config, master_key_file=master_key_file)
            return command.restore(chosen, backup, master_key_fd, newer_keyring=newer_keyring)

        return _done(work)


def _done(work: Callable[[], int]) -> int:
    """The exit status of `work`, whose errors are said in a sentence."""
    from progressdb_server.cli.admin_client import ServerAwayError, ServerRefusedError
    from progressdb_server.cli.backup import BackupCommandError
    from progressdb_server.cli.check import CheckError
    from progressdb_server.store.backup import BackupError
    from progressdb_server.store.engine import EngineUnavailableError

    try:
        return work()
    except (ConfigMissingError, CheckError, ServerAwayError) as error:
        print(f"progressdb: {error}", file=sys.stderr)
        return EXIT_MISSING
    except (ConfigError, BackupError, BackupCommandError, EngineUnavailableError, ServerRefusedError) as error:
        print(f"progressdb: {error}", file=sys.stderr)
        return EXIT_REFUSED
