"""`progressdb config check` and `config show`.

Owns: the checks that need this machine (files that the configuration names) and the printed form of a configuration.
Invariant: no API key is printed, only their number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
from cyclopts import App

from progressdb_server.api.http.listener import check_tls
from progressdb_server.cli.flags import Addr, ConfigFile, Db, Dev, MasterKeyFd, MasterKeyFile, load_config
from progressdb_server.config import Config, ConfigMissingError, Loaded
from progressdb_server.server import check_key_source

app = App(name="config", help="Check or show the configuration that the server would run with.")


@app.command(name="check")
def check_configuration(
    *,
    addr: Addr = None,
    db: Db = None,
    config: ConfigFile = None,
    master_key_file: MasterKeyFile = None,
    dev: Dev = None,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Exit status: 0 the server could start with it, 1 it could not, 2 a file that it names does not exist."""
    loaded = load_config(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
    check(loaded.config, has_master_key=master_key_fd is not None)
    print("the configuration is good")
    return 0


@app.command(name="show")
def show_configuration(
    *,
    addr: Addr = None,
    db: Db = None,
    config: ConfigFile = None,
    master_key_file: MasterKeyFile = None,
    dev: Dev = None,
) -> int:
    """Print every setting with its value and its source. Of API keys only the number is printed."""
    loaded = load_config(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
    print("\n".join(shown(loaded)))
    return 0


def check(config: Config, *, has_master_key: bool) -> None:
    """Raises ConfigError, ConfigMissingError if the server could not start with it."""
    check_tls(config.server.tls)
    check_key_source(config, has_master_key=has_master_key)
    for name, path in (("kms.binary", config.kms.binary), ("kms.master_key_file", config.kms.master_key_file)):
        if path and not os.path.exists(path):
            raise ConfigMissingError(f"{name} names {path}, which does not exist")


def shown(loaded: Loaded) -> Iterator[str]:
    """A line for each setting."""
    for path, value in _settings(loaded.config):
        yield f"{path} = {value}  ({loaded.sources.get(path, 'default')})"


def _settings(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in section.__struct_fields__:
        value = getattr(section, field)
        path = prefix + field
        if isinstance(value, msgspec.Struct):
            yield from _settings(value, path + ".")
        elif prefix == "security.api_keys." and isinstance(value, tuple):
            yield path, f"{len(value)} configured"
        else:
            yield path, msgspec.json.encode(value).decode()
