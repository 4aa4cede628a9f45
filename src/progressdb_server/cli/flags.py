"""Flags that several commands have, and the configuration that they give.

Owns: the text of each shared flag. A command raises `minikms.commands.usage.CommandError`, or an error of another room;
`command.run` prints the text and ends with the status. Invariant: no flag takes a key.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from minikms.commands import usage
from minikms.commands.usage import PathText

if TYPE_CHECKING:
    from progressdb_server.config import Config, LoadedConfig


Addr = Annotated[str | None, Parameter(help="Where to listen, host:port; default 127.0.0.1:8080 [PROGRESSDB_ADDR].")]
Db = Annotated[PathText | None, Parameter(help="Directory of all data [PROGRESSDB_DB_PATH].")]
ConfigFile = Annotated[
    PathText | None, Parameter(name="--config", help="Configuration file, YAML or .toml [PROGRESSDB_CONFIG].")
]
MasterKeyFile = Annotated[
    PathText | None,
    Parameter(help="File with the root key for miniKMS: 64 hex characters [PROGRESSDB_MINIKMS_MASTER_KEY_FILE]."),
]
Dev = Annotated[bool | None, Parameter(help="Development: miniKMS makes its own root key file [PROGRESSDB_DEV].")]
Json = usage.Json
Url = Annotated[
    str | None,
    Parameter(name="--url", help="The running server, http://HOST:PORT [PROGRESSDB_URL]; default: as configured."),
]
ConfiguredUrl = Annotated[
    str | None, Parameter(name="--url", help="The running server, http://HOST:PORT; default: the configured one.")
]
"""The URL for a command that has a configuration: a variable must not lead its admin key to another server."""
KeyFile = Annotated[
    Path | None, Parameter(name="--api-key-file", help="File with an admin key [PROGRESSDB_API_ADMIN_KEYS].")
]
MasterKeyFd = Annotated[int | None, Parameter(parse=False)]
"""Not a flag: the descriptor of a root key that was in the environment. `command.run` passes it."""


_OWN_DIRECTORY: Final = "data"
"""The data directory of the README's server, in the working directory."""
_PACKAGE_DIRECTORY: Final = "/var/lib/progressdb/db"
"""The data directory of the units of `deploy/systemd`. Only root can make /var/lib/progressdb."""


@Parameter(name="*")
@dataclass(frozen=True)
class StoreFlags:
    """The flags for the data of a server, and for its configuration."""

    db: Db = None
    config: ConfigFile = None

    def load(self, settings: Mapping[str, object] | None = None, *, with_data: bool = True) -> LoadedConfig:
        """The configuration of these flags, of other `settings` by path, the environment and the file. Raises
        ConfigError."""
        from progressdb_server.config import load

        flags = {"storage.db_path": self.db, "config": self.config, **(settings or {})}
        return load(flags, os.environ, with_data=with_data)

    def load_for_store(self, settings: Mapping[str, object] | None = None) -> Config:
        """The configuration for a command about a store that exists. What only a server needs may be missing beside the
        URL of a database. Without a store it is that of the README's server or of the package: then it says so.
        Raises ConfigError."""
        config = self.load(settings, with_data=False).config
        if config.store.url or config.storage.db_path:
            return config
        place, socket = _OWN_DIRECTORY, config.kms.socket
        if not usage.is_own(place, stat.S_ISDIR):
            place, socket = _PACKAGE_DIRECTORY, socket or ("" if config.kms.url else usage.PACKAGE_SOCKET)
            if not os.path.lexists(place):
                return self.load(settings).config  # raises
        usage.say_chosen("--db", place)
        return self.load({**(settings or {}), "storage.db_path": place, "kms.socket": socket}).config

    def load_for_server(self, url: str | None) -> Config:
        """The configuration for a command that asks the running server, which a `url` names. Raises ConfigError."""
        return self.load_for_store() if url is None else self.load(with_data=False).config


@Parameter(name="*")
@dataclass(frozen=True)
class ServerFlags:
    """The flags of a server that is started or whose configuration is examined."""

    addr: Addr = None
    store: StoreFlags = StoreFlags()
    master_key_file: MasterKeyFile = None
    dev: Dev = None

    def load(self, log_format: str | None = None) -> LoadedConfig:
        """The configuration, with the errors of `StoreFlags.load`."""
        settings = {"addr": self.addr, "kms.master_key_file": self.master_key_file, "server.dev": self.dev}
        return self.store.load({**settings, "logging.format": log_format})
