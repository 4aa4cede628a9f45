"""`progressdb config check` and `config show`.

Owns: the checks that depend on this machine (whether the files that the configuration names exist) and the printed form
of a configuration. Invariant: it prints the number of API keys, but never a key.
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
    """Check the configuration without starting the server.

    Exit status: 0 it is valid, 1 it is not, 2 a file that it names does not exist.
    """
    loaded = load_config(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
    check(loaded.config, has_master_key=master_key_fd is not None)
    print("the configuration is valid")
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
    """Print every setting with its value and its source. API keys are not printed, only their number."""
    loaded = load_config(addr=addr, db=db, config=config, master_key_file=master_key_file, dev=dev)
    print("\n".join(setting_lines(loaded)))
    return 0


def check(config: Config, *, has_master_key: bool) -> None:
    """Check the configuration and the files that it names. Raises ConfigError, ConfigMissingError."""
    check_tls(config.server.tls)
    check_key_source(config, has_master_key=has_master_key)
    for name, path in (("kms.binary", config.kms.binary), ("kms.master_key_file", config.kms.master_key_file)):
        if path and not os.path.exists(path):
            raise ConfigMissingError(f"{name} names {path}, which does not exist")


def setting_lines(loaded: Loaded) -> Iterator[str]:
    """One printed line for each setting."""
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
