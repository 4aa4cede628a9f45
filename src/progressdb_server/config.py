"""The server's configuration: flags over environment over file over defaults.

Owns: the settings, the names of their environment variables, how a duration is written, and the rules for every value.
Invariants: a file that is named but missing, malformed or with an unknown key stops the start, with the reason; an
empty variable counts as unset; `load` returns only a configuration that passed every check. API keys are in no repr and
no error text. It must never hold the root key, only the path of its file.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import yaml

from minikms.api.errors import StartError
from minikms.processes.config_file import Uid, check_socket, has_nul

ENVIRONMENT_PREFIX: Final = "PROGRESSDB_"
CONFIG_BYTES_MAX: Final = 1024 * 1024
API_KEY_CHARS_MAX: Final = 256

BODY_BYTES: Final = 128 * 1024 * 1024
BODY_BYTES_MIN: Final = 16 * 1024 * 1024
"""An eighth of it, the share of one user, holds one body of the greatest length."""
DRAIN_SECONDS_MAX: Final = 300
PURGE_S_MIN: Final = 86_400
"""A deleted thread stays for at least so long."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""Exact as a float, in which rates are computed."""
_DIGITS_MAX: Final = 20

_ORIGIN: Final = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+", re.ASCII | re.IGNORECASE)
_DURATION: Final = re.compile(r"([1-9][0-9]{0,8})([smhd])", re.ASCII)
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration_s(text: str) -> int:
    """The seconds of `90d`, `12h`, `30m` or `45s`. Raises ValueError with the reason."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("must be a number and one of s, m, h, d, as in 90d")
    return int(match[1]) * _UNIT_S[match[2]]


def seconds(text: str) -> int:
    """The seconds of a duration, 0 for `never` and the empty text. Raises ValueError."""
    return 0 if text in ("", "never") else duration_s(text)


class ConfigError(Exception):
    """The configuration cannot be used; the text says which value, why, and where it came from."""


class ConfigMissingError(ConfigError):
    """No data directory is named, or a file that the configuration names does not exist."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TlsSection(_Section, frozen=True):
    cert_file: str = ""
    key_file: str = ""


class ServerSection(_Section, frozen=True):
    address: str = "127.0.0.1"
    port: int = 8080
    tls: TlsSection = TlsSection()
    dev: bool = False
    """For development: a spawned miniKMS makes its own root key file."""
    body_bytes: Count = BODY_BYTES
    """The bytes of the bodies of all requests that are being received or handled."""
    idle_connections: Count = 0
    """The idle connections of one address; 0 is no bound."""
    drain: str = ""
    """How long the server serves after SIGTERM, with `/readyz` 503: a duration, at most DRAIN_SECONDS_MAX. Empty: it
    stops at once."""
    proxies: tuple[str, ...] = ()
    """Addresses and networks of proxies, which stand for many clients: the bounds of one address on
    bodies and idle connections do not apply to them, and rates by address count the last address that their
    `X-Forwarded-For` names."""


class Storage(_Section, frozen=True):
    db_path: str = ""


class StoreSection(_Section, frozen=True):
    """A database in the place of the store's files, for several servers."""

    url: str = ""
    """`postgresql://…`, without a password."""
    single_node: bool = False
    """Whether it is enough that one disk has what was acknowledged."""


class Cors(_Section, frozen=True):
    allowed_origins: tuple[str, ...] = ()


class RateLimit(_Section, frozen=True):
    rps: float = 100.0
    """Requests per second of each key; 0 is no limit."""
    burst: Count = 200


class ApiKeys(_Section, frozen=True):
    backend: tuple[str, ...] = ()
    frontend: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    allow_unauth: bool = False

    def __repr__(self) -> str:
        counts = f"backend: {len(self.backend)}, frontend: {len(self.frontend)}, admin: {len(self.admin)}"
        return f"ApiKeys({counts}, allow_unauth={self.allow_unauth})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("allow_unauth", self.allow_unauth)]


class Security(_Section, frozen=True):
    cors: Cors = Cors()
    rate_limit: RateLimit = RateLimit()
    ip_whitelist: tuple[str, ...] = ()
    api_keys: ApiKeys = ApiKeys()
    threads: Literal["members", "open"] = "members"
    """Who may post into a thread that exists (`conversations.membership`). `open`: as in ProgressDB 0.1."""


class Kms(_Section, frozen=True):
    provider: Literal["minikms", "local"] = "minikms"
    """`local`: the key service runs in this process; refused without `server.dev`."""
    socket: str = ""
    """A path, or several with commas between them."""
    data_dir: str = ""
    binary: str = ""
    spawn: bool = True
    master_key_file: str = ""
    server_uids: tuple[Uid, ...] = ()
    """User ids that may serve the socket. Empty: the one of this process, and root."""
    url: str = ""
    """The URL of a gateway on another host, or of several. No key service is spawned then."""
    ca: str = ""
    cert: str = ""
    key: str = ""
    token_file: str = ""
    long_lived_cert: bool = False
    """Whether `cert` may be valid for more than 30 days."""
    exclusive: bool | None = None
    """Whether only this server makes keys of purpose `thread` there. None: if no socket, no data directory and no URL
    is given."""


class RotationSection(_Section, frozen=True):
    """When the keys of threads are rotated. A duration is such as `90d`; an empty one is never."""

    max_age: str = ""
    max_uses: Count = 0
    """0: as many as the key service allows for a key."""
    records_per_second: Count = 10_000
    """Records that background jobs re-encrypt in a second; 0 is without a bound."""
    destroy_old_after: str = ""
    """When the old keys of automatic rotations are destroyed."""


class Retention(_Section, frozen=True):
    """What is removed after a duration such as `90d`; `never` or empty: it stays."""

    deleted_after: str = "30d"
    """Deleted threads and their keys; at least PURGE_S_MIN."""
    rotation_backups_after: str = "30d"
    """The backups of rotations that are done, since they began."""


class Logging(_Section, frozen=True):
    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class ViewerSection(_Section, frozen=True):
    audit_socket: str = ""
    """On which an auditor answers questions about the audit log."""
    audit_server_uids: tuple[Uid, ...] = ()
    """User ids that may serve it. Empty: the one of this process, and root."""


class Config(_Section, frozen=True):
    server: ServerSection = ServerSection()
    storage: Storage = Storage()
    store: StoreSection = StoreSection()
    security: Security = Security()
    kms: Kms = Kms()
    rotation: RotationSection = RotationSection()
    retention: Retention = Retention()
    viewer: ViewerSection = ViewerSection()
    logging: Logging = Logging()

    @property
    def store_dir(self) -> Path:
        """The directory of the store's files, within the directory that `--db` names."""
        return Path(self.storage.db_path) / "store"

    @property
    def backups_dir(self) -> Path:
        """The directory in which backups are made."""
        return Path(self.storage.db_path) / "backups"

    @property
    def kms_data_dir(self) -> Path:
        return Path(self.kms.data_dir) if self.kms.data_dir else Path(self.storage.db_path) / "kms"

    @property
    def kms_socket(self) -> str | Path:
        """The socket in the form that clients take. A comma separates addresses in a text only, not in the path of the
        data.
        """
        return self.kms.socket or Path(self.storage.db_path) / "run" / "minikms.sock"

    @property
    def kms_is_exclusive(self) -> bool:
        if self.kms.exclusive is not None:
            return self.kms.exclusive
        return not (self.kms.socket or self.kms.data_dir or self.kms.url)

    @property
    def destroys_keys(self) -> bool:
        """Whether keys can be destroyed: no gateway takes a request for it."""
        return not self.kms.url

    @property
    def kms_client(self) -> dict[str, Any]:
        """The address of the key service, as arguments of its clients."""
        kms = self.kms
        if not kms.url:
            return {"address": self.kms_socket, "server_uids": kms.server_uids or None}
        files = {name: getattr(kms, name) or None for name in _FILES_OF_A_URL}
        return {"address": kms.url, "long_lived_cert": kms.long_lived_cert, **files}


_FILES_OF_A_URL: Final = ("ca", "cert", "key", "token_file")


# --- text to values ---------------------------------------------------------------------------------------------
def _comma_separated(value: str) -> list[str]:
    words = [word for word in (part.strip() for part in value.split(",")) if word]
    if not words:
        raise ValueError("has nothing between its commas")
    return words


def _integers(value: str) -> list[int]:
    return [_integer(word) for word in _comma_separated(value)]


def _integer(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= _DIGITS_MAX):
        raise ValueError("must be a whole number")
    return int(value)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def _boolean(value: str) -> bool:
    word = value.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be 1, true, yes, on, 0, false, no or off")


class Variable(msgspec.Struct, frozen=True):
    """An environment variable: its name without the prefix, the path of its setting, and the parser of its text."""

    name: str
    path: str
    read: Callable[[str], Any]


VARIABLES: Final = (
    Variable("ADDRESS", "server.address", str),
    Variable("PORT", "server.port", _integer),
    Variable("DEV", "server.dev", _boolean),
    Variable("BODY_BYTES", "server.body_bytes", _integer),
    Variable("IDLE_CONNECTIONS", "server.idle_connections", _integer),
    Variable("DRAIN", "server.drain", str),
    Variable("PROXIES", "server.proxies", _comma_separated),
    Variable("TLS_CERT", "server.tls.cert_file", str),
    Variable("TLS_KEY", "server.tls.key_file", str),
    Variable("DB_PATH", "storage.db_path", str),
    Variable("STORE_URL", "store.url", str),
    Variable("STORE_SINGLE_NODE", "store.single_node", _boolean),
    Variable("CORS_ORIGINS", "security.cors.allowed_origins", _comma_separated),
    Variable("RATE_RPS", "security.rate_limit.rps", _number),
    Variable("RATE_BURST", "security.rate_limit.burst", _integer),
    Variable("IP_WHITELIST", "security.ip_whitelist", _comma_separated),
    Variable("THREADS", "security.threads", str),
    Variable("API_BACKEND_KEYS", "security.api_keys.backend", _comma_separated),
    Variable("API_FRONTEND_KEYS", "security.api_keys.frontend", _comma_separated),
    Variable("API_ADMIN_KEYS", "security.api_keys.admin", _comma_separated),
    Variable("ALLOW_UNAUTH", "security.api_keys.allow_unauth", _boolean),
    Variable("KMS_PROVIDER", "kms.provider", str),
    Variable("KMS_SOCKET", "kms.socket", str),
    Variable("KMS_DATA_DIR", "kms.data_dir", str),
    Variable("KMS_BINARY", "kms.binary", str),
    Variable("KMS_SPAWN", "kms.spawn", _boolean),
    Variable("KMS_SERVER_UIDS", "kms.server_uids", _integers),
    Variable("KMS_URL", "kms.url", str),
    Variable("KMS_CA", "kms.ca", str),
    Variable("KMS_CERT", "kms.cert", str),
    Variable("KMS_KEY", "kms.key", str),
    Variable("KMS_TOKEN_FILE", "kms.token_file", str),
    Variable("KMS_LONG_LIVED_CERT", "kms.long_lived_cert", _boolean),
    Variable("KMS_EXCLUSIVE", "kms.exclusive", _boolean),
    Variable("MINIKMS_MASTER_KEY_FILE", "kms.master_key_file", str),
    Variable("ROTATION_MAX_AGE", "rotation.max_age", str),
    Variable("ROTATION_MAX_USES", "rotation.max_uses", _integer),
    Variable("ROTATION_RATE", "rotation.records_per_second", _integer),
    Variable("ROTATION_DESTROY_OLD_AFTER", "rotation.destroy_old_after", str),
    Variable("RETENTION_DELETED_AFTER", "retention.deleted_after", str),
    Variable("RETENTION_ROTATION_BACKUPS_AFTER", "retention.rotation_backups_after", str),
    Variable("AUDIT_SOCKET", "viewer.audit_socket", str),
    Variable("AUDIT_SERVER_UIDS", "viewer.audit_server_uids", _integers),
    Variable("LOG_FORMAT", "logging.format", str),
    Variable("LOG_LEVEL", "logging.level", str),
    Variable("ADDR", "addr", str),  # the last one: it wins over ADDRESS and PORT
)
_OTHER_VARIABLES: Final = ("CONFIG", "BENCHMARK", "URL")
_KEY_SERVICE_PREFIX: Final = ENVIRONMENT_PREFIX + "MINIKMS_"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable with the prefix that no program here reads. Those of the key service are its own."""
    known = {ENVIRONMENT_PREFIX + name for name in (*(variable.name for variable in VARIABLES), *_OTHER_VARIABLES)}
    names = (name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    sentences = []
    for name in sorted(name for name in names if not name.startswith(_KEY_SERVICE_PREFIX)):
        like = difflib.get_close_matches(name, known, 1)
        sentences.append(f"the variable {name!a} sets nothing{f': did you mean {like[0]}?' if like else ''}")
    return sentences


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[v6]:port` or `:port` (every interface). Raises ValueError with the reason."""
    host, colon, port_text = text.rpartition(":")
    if not colon:
        raise ValueError("must be host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address needs brackets: [::1]:8080")
    port = _integer(port_text) if port_text else -1
    if not 0 <= port <= 65535:
        raise ValueError("the port must be a number from 0 to 65535")
    return host or "0.0.0.0", port  # noqa: S104 - an address without a host means every interface


# --- layers -----------------------------------------------------------------------------------------------------
Layer = dict[str, Any]


def _put(layer: Layer, path: str, value: object) -> None:
    """Sets what is at the path; `addr` is host:port, which sets two settings. Raises ValueError for another text."""
    if path == "addr":
        host, port = split_address(str(value))
        _put(layer, "server.address", host)
        _put(layer, "server.port", port)
        return
    *sections, name = path.split(".")
    for section in sections:
        layer = layer.setdefault(section, {})
    layer[name] = value


def _merge(below: Layer, above: Layer) -> Layer:
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        merged[name] = _merge(lower, value) if isinstance(lower, dict) and isinstance(value, dict) else value
    return merged


def _paths(layer: Layer, prefix: str = "") -> Iterator[str]:
    for name, value in layer.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """The settings of the environment. An empty variable counts as unset; `ADDR` wins over `ADDRESS` and `PORT`."""
    layer: Layer = {}
    for variable in VARIABLES:
        full_name = ENVIRONMENT_PREFIX + variable.name
        value = environment.get(full_name, "")
        if not value:
            continue
        try:
            _put(layer, variable.path, variable.read(value))
        except ValueError as error:
            raise ConfigError(f"{full_name} {error}") from None
    return layer


def flags_layer(flags: Mapping[str, object]) -> Layer:
    """The settings of the command line: `addr`, and others by path. None is a flag that was not given."""
    layer: Layer = {}
    for name, value in flags.items():
        if value is not None:
            try:
                _put(layer, name, value)
            except ValueError as error:
                raise ConfigError(f"--{name} {error}") from None
    return layer


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a repeated key. YAML takes the last one, which could silently replace a list of API keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice or is not text", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def file_layer(path: str) -> Layer:
    """The settings of a YAML file, or of a TOML file if its name ends in `.toml`. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigMissingError(f"the configuration file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"the configuration file {path} is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        text = raw.decode("utf-8")
        layer = tomllib.loads(text) if path.endswith(".toml") else yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration file {path} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is malformed: {error}") from None
    except RecursionError:
        raise ConfigError(f"the configuration file {path} is malformed: it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration file {path} is malformed: {_yaml_reason(error)}") from None
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise ConfigError(f"the configuration file {path} must contain sections such as `server:`")
    _convert(layer, f"the configuration file {path}")
    return layer


def _yaml_reason(error: yaml.YAMLError) -> str:
    """The problem and its line. PyYAML's own text quotes the file, which may contain API keys."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or 'not YAML'}{where}"


def _convert(layer: Layer, source: str) -> Config:
    if has_nul(layer):
        raise ConfigError(f"{source}: a text has the character NUL")
    try:
        return msgspec.convert(layer, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {str(error).replace('`$.', '`').replace(' - at ', ', at ')}") from None


class LoadedConfig(msgspec.Struct, frozen=True):
    config: Config
    sources: dict[str, str]
    """The source of each setting that is not a default, by its path: `flag`, `environment` or the file's path."""


def load(flags: Mapping[str, object], environment: Mapping[str, str], *, with_data: bool = True) -> LoadedConfig:
    """Read all layers and check the result. `flags` may contain `config`, the path of the file. Without `with_data` no
    data directory need be named.

    Raises ConfigError, or ConfigMissingError if a file does not exist.
    """
    named = flags.get("config") or environment.get(ENVIRONMENT_PREFIX + "CONFIG") or None
    path = None if named is None else str(named)
    from_file = file_layer(path) if path is not None else {}
    from_environment = environment_layer(environment)
    from_flags = flags_layer({name: value for name, value in flags.items() if name != "config"})
    merged = _merge(_merge(from_file, from_environment), from_flags)
    config = _convert(merged, "the configuration")
    sources = {name: str(path) for name in _paths(from_file)}
    sources.update(dict.fromkeys(_paths(from_environment), "environment"))
    sources.update(dict.fromkeys(_paths(from_flags), "flag"))
    check(config, with_data=with_data)
    return LoadedConfig(config=config, sources=sources)


# --- rules ------------------------------------------------------------------------------------------------------
def check(config: Config, *, with_data: bool = True) -> None:
    """Check every rule that a type cannot express. Reads no file. Raises ConfigError for the first broken rule."""
    if not 0 <= config.server.port <= 65535:
        raise ConfigError("server.port must be from 0 to 65535")
    if with_data and not (config.storage.db_path or config.store.url):
        raise ConfigMissingError("no data directory is given: use --db DIR, PROGRESSDB_DB_PATH or storage.db_path")
    if config.store.url and with_data:  # else no server runs with it
        _check_store(config)
    elif config.store.single_node and not config.store.url:
        raise ConfigError("store.single_node is for a store in a database: give its store.url too")
    if bool(config.server.tls.cert_file) != bool(config.server.tls.key_file):
        raise ConfigError("TLS needs both server.tls.cert_file and server.tls.key_file")
    rate = config.security.rate_limit
    if not 0 <= rate.rps < float("inf"):
        raise ConfigError("security.rate_limit.rps must be 0 (off) or more")
    if rate.rps > 0 and rate.burst < 1:
        raise ConfigError("security.rate_limit.burst must be at least 1")
    if config.server.body_bytes < BODY_BYTES_MIN:
        raise ConfigError(f"server.body_bytes must be at least {BODY_BYTES_MIN}, so that one user can send one body")
    for number, origin in enumerate(config.security.cors.allowed_origins, start=1):
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"security.cors.allowed_origins, origin {number}, must be `*` or scheme://host[:port] without a path"
            )
    for network in config.security.ip_whitelist:
        parse_network(network)
    for network in config.server.proxies:
        parse_network(network, "server.proxies")
    if config.viewer.audit_socket:
        try:
            check_socket(config.viewer.audit_socket, "viewer.audit_socket")
        except StartError as error:
            raise ConfigError(str(error)) from None
    _check_api_keys(config.security.api_keys)
    _check_durations(config)
    if config.kms.url:
        _check_url(config)
        _check_addresses(config)
        return
    of_a_url = next((name for name in (*_FILES_OF_A_URL, "long_lived_cert") if getattr(config.kms, name)), None)
    if of_a_url is not None:
        raise ConfigError(f"kms.{of_a_url} is for a key service on another host: give its kms.url too")
    if "," in config.kms.socket and (config.kms.spawn or config.kms.provider == "local"):
        raise ConfigError("kms.socket names several key services, none of which is started here: set kms.spawn = false")
    _check_addresses(config)


def _check_store(config: Config) -> None:
    if not config.kms.url and (config.kms.spawn or not config.kms.socket):
        raise ConfigError(
            "store.url is for several servers, which share one key service: give its kms.url, or its kms.socket with "
            "kms.spawn = false"
        )
    if config.kms_is_exclusive:
        raise ConfigError(
            "store.url is for several servers, which all make keys of threads: leave kms.exclusive out, because one of "
            "them could retire a key that another one has just made"
        )


def _check_url(config: Config) -> None:
    kms = config.kms
    for name in ("socket", "data_dir", "binary", "master_key_file", "server_uids"):
        if getattr(kms, name):
            raise ConfigError(f"kms.url names a key service on another host: leave kms.{name} out")
    if kms.provider == "local":
        raise ConfigError("kms.provider `local` is a key service in this process: leave kms.url out")
    if config.rotation.destroy_old_after:
        raise ConfigError(
            "rotation.destroy_old_after needs the key service's socket: no gateway takes a request to destroy a key"
        )


def _check_addresses(config: Config) -> None:
    from minikms.client import Client  # only here: it loads TLS

    try:
        Client(**config.kms_client).close()
    except ValueError as error:
        setting = "kms.url" if config.kms.url else "kms.socket (PROGRESSDB_KMS_SOCKET)"
        raise ConfigError(f"{setting}: {error}") from None


def _check_durations(config: Config) -> None:
    for name in ("server.drain", "rotation.max_age", "rotation.destroy_old_after"):
        section, _, setting = name.partition(".")
        try:
            duration_s(getattr(getattr(config, section), setting) or "1s")
        except ValueError as error:
            raise ConfigError(f"{name} {error}") from None
    for name in ("deleted_after", "rotation_backups_after"):
        try:
            after_s = seconds(getattr(config.retention, name))
        except ValueError as error:
            raise ConfigError(f"retention.{name} {error}, or never") from None
        if name == "deleted_after" and 0 < after_s < PURGE_S_MIN:
            raise ConfigError("retention.deleted_after must be at least 1d, or never")
    if seconds(config.server.drain) > DRAIN_SECONDS_MAX:
        raise ConfigError(f"server.drain must be at most {DRAIN_SECONDS_MAX}s")


def parse_network(text: str, setting: str = "security.ip_whitelist") -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """An entry of the setting: an address, or a network in CIDR form. Raises ConfigError."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _check_api_keys(keys: ApiKeys) -> None:
    """The error names the position of a bad key, never its text."""
    seen: dict[str, str] = {}
    for role, of_role in (("backend", keys.backend), ("frontend", keys.frontend), ("admin", keys.admin)):
        for number, key in enumerate(of_role, start=1):
            where = f"security.api_keys.{role}, key {number},"
            if not key:
                raise ConfigError(f"{where} is empty")
            if len(key) > API_KEY_CHARS_MAX or not all("!" <= char <= "~" for char in key):
                raise ConfigError(
                    f"{where} must be at most {API_KEY_CHARS_MAX} visible ASCII characters without spaces"
                )
            if key in seen:
                raise ConfigError(f"{where} is also a {seen[key]} key: each key has one role")
            seen[key] = role
