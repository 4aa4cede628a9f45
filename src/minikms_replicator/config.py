"""The configuration file of the replicator.

Owns: the format of `replicator.toml`, and what its values may be. It must never open a socket.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

from minikms.api.errors import StartError
from minikms.processes.config_file import ConfigFiles, Uid, check_metrics, check_socket, parse_toml
from minikms.processes.postgresql import why_refused


class DatabaseConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """single_node: the database has no standby; an acknowledged commit is on one disk."""

    url: str
    single_node: bool = False

    @property
    def paths(self) -> list[str]:
        """The files that the URL names, which are read at each connection."""
        query = parse_qs(urlsplit(self.url).query)
        names = ("passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl", "service_file")
        return [query[name][-1] for name in names if name in query]


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """socket: of the daemon. server_uids: who may serve it."""

    version: Literal[1]
    socket: str
    database: DatabaseConfig
    server_uids: tuple[Uid, ...] = (0,)
    metrics: str = ""


class Files(ConfigFiles):
    """The configuration of the replicator."""

    def config(self) -> Config:
        """With an absolute path of the socket. Raises StartError."""
        config = parse_config(self.content(), str(self.config_path))
        return msgspec.structs.replace(config, socket=str(self.path(config.socket)))


def parse_config(content: bytes, place: str) -> Config:
    """Parses the configuration; errors call the file `place`."""
    return parse_toml(content, Config, place, _check)


def _check(config: Config) -> None:
    check_socket(config.socket, "socket")
    check_metrics(config.metrics)
    if not config.server_uids:
        raise StartError("server_uids must name a user")
    check_url(config.database.url, "database.url")


def check_url(url: str, name: str) -> None:
    """Checks a URL; errors call it `name`."""
    if why := why_refused(url):
        raise StartError(f"{name} {why}")
