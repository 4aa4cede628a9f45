"""`progressdb config check` and `config show`.

Owns: the checks that need the machine (files that the configuration names) and the printed form of a configuration.
Invariant: no API key is printed, only how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from progressdb_server.api.http.listener import check_tls
from progressdb_server.config import Config, ConfigMissingError, Loaded
from progressdb_server.server import check_key_source


def check(config: Config, *, has_master_key: bool) -> None:
    """What the start would refuse. Raises ConfigError, ConfigMissingError."""
    check_tls(config.server.tls)
    check_key_source(config, has_master_key=has_master_key)
    for name, path in (("kms.binary", config.kms.binary), ("kms.master_key_file", config.kms.master_key_file)):
        if path and not os.path.exists(path):
            raise ConfigMissingError(f"{name} names {path}, which does not exist")


def shown(loaded: Loaded) -> Iterator[str]:
    """One line for each setting."""
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
