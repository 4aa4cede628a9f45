"""The configuration: layers, files, and the commands that judge it."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.config import (
    VARIABLES,
    Config,
    ConfigError,
    ConfigMissingError,
    load,
    split_address,
    unknown_variables,
)
from progressdb_server.server import check_key_source
from tests.harness import forked

DB = {"storage.db_path": "/srv/db"}
YAML = """
server:
  address: 0.0.0.0
  port: 9000
  tls: {cert_file: /c.pem, key_file: /k.pem}
storage:
  db_path: /srv/file
security:
  cors: {allowed_origins: ["https://a.example"]}
  rate_limit: {rps: 7.5, burst: 9}
  ip_whitelist: [127.0.0.1, 10.0.0.0/8]
  api_keys: {backend: [b1, b2], frontend: [f1], admin: [a1], allow_unauth: true}
kms:
  spawn: false
"""
TOML = """
[server]
address = "0.0.0.0"
port = 9000
tls = {cert_file = "/c.pem", key_file = "/k.pem"}
[storage]
db_path = "/srv/file"
[security]
ip_whitelist = ["127.0.0.1", "10.0.0.0/8"]
cors.allowed_origins = ["https://a.example"]
rate_limit = {rps = 7.5, burst = 9}
[security.api_keys]
backend = ["b1", "b2"]
frontend = ["f1"]
admin = ["a1"]
allow_unauth = true
[kms]
spawn = false
"""


def config_of(flags: dict[str, object] | None = None, environment: dict[str, str] | None = None) -> Config:
    return load({**DB, **(flags or {})}, environment or {}).config


def refusal_of(flags: Mapping[str, object], environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as refused:
        load(flags, environment)
    return str(refused.value)


def written(directory: Path, text: str | bytes, name: str = "progressdb.yaml") -> str:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --- defaults and layers ----------------------------------------------------------------------------------------
def test_the_defaults_are_those_of_the_contract() -> None:
    config = config_of()
    assert (config.server.address, config.server.port) == ("127.0.0.1", 8080)
    assert (config.security.rate_limit.rps, config.security.rate_limit.burst) == (100, 200)
    assert config.security.api_keys.allow_unauth is False
    assert config.security.cors.allowed_origins == ()
    assert config.kms.spawn is True


def test_everything_is_in_the_one_directory_unless_told_otherwise() -> None:
    config = config_of()
    assert str(config.store_dir) == "/srv/db/store"
    assert str(config.kms_data_dir) == "/srv/db/kms"
    assert str(config.kms_socket) == "/srv/db/run/minikms.sock"
    environment = {"PROGRESSDB_KMS_DATA_DIR": "/var/lib/kms", "PROGRESSDB_KMS_SOCKET": "/run/kms.sock"}
    config = config_of(environment=environment)
    assert (str(config.kms_data_dir), str(config.kms_socket)) == ("/var/lib/kms", "/run/kms.sock")
    several = config_of(environment={"PROGRESSDB_KMS_SOCKET": "/a,/b", "PROGRESSDB_KMS_SPAWN": "0"})
    assert several.kms_client == {"address": "/a,/b", "server_uids": None}
    assert config_of({"storage.db_path": "/srv/a,b"}).kms_socket == Path("/srv/a,b/run/minikms.sock")


@pytest.mark.parametrize(("text", "name"), [(YAML, "c.yaml"), (YAML, "c.yml"), (TOML, "c.toml")])
def test_yaml_and_toml_say_the_same(tmp_path: Path, text: str, name: str) -> None:
    config = load({"config": written(tmp_path, text, name)}, {}).config
    assert (config.server.address, config.server.port) == ("0.0.0.0", 9000)
    assert (config.server.tls.cert_file, config.server.tls.key_file) == ("/c.pem", "/k.pem")
    assert config.storage.db_path == "/srv/file"
    assert config.security.cors.allowed_origins == ("https://a.example",)
    assert (config.security.rate_limit.rps, config.security.rate_limit.burst) == (7.5, 9)
    assert config.security.ip_whitelist == ("127.0.0.1", "10.0.0.0/8")
    keys = config.security.api_keys
    assert (keys.backend, keys.frontend, keys.admin, keys.allow_unauth) == (("b1", "b2"), ("f1",), ("a1",), True)
    assert config.kms.spawn is False


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, YAML)
    in_file = {"PROGRESSDB_CONFIG": path}
    assert load({}, in_file).config.server.port == 9000
    environment = {**in_file, "PROGRESSDB_PORT": "9001", "PROGRESSDB_DB_PATH": "/srv/env"}
    loaded = load({}, environment)
    assert (loaded.config.server.port, loaded.config.server.address) == (9001, "0.0.0.0")
    assert loaded.sources["server.port"] == "environment"
    assert loaded.sources["server.address"] == path
    loaded = load({"addr": "127.0.0.1:9002"}, environment)
    assert (loaded.config.server.port, loaded.config.server.address) == (9002, "127.0.0.1")
    assert (loaded.config.storage.db_path, loaded.sources["server.port"]) == ("/srv/env", "flag")


def test_the_file_of_the_flag_goes_over_that_of_the_environment(tmp_path: Path) -> None:
    one, other = written(tmp_path, YAML, "one.yaml"), written(tmp_path, "storage: {db_path: /other}", "other.yaml")
    assert load({"config": other}, {"PROGRESSDB_CONFIG": one}).config.storage.db_path == "/other"


ENVIRONMENT: list[tuple[str, str, str, object]] = [
    ("ADDR", "127.0.0.2:81", "server.address", "127.0.0.2"),
    ("ADDR", "127.0.0.2:81", "server.port", 81),
    ("ADDRESS", "::1", "server.address", "::1"),
    ("PORT", "81", "server.port", 81),
    ("DEV", "1", "server.dev", True),
    ("DB_PATH", "/d", "storage.db_path", "/d"),
    ("CORS_ORIGINS", "https://a, https://b ,", "security.cors.allowed_origins", ("https://a", "https://b")),
    ("RATE_RPS", "0.5", "security.rate_limit.rps", 0.5),
    ("RATE_BURST", "3", "security.rate_limit.burst", 3),
    ("IP_WHITELIST", "10.0.0.0/8,::1", "security.ip_whitelist", ("10.0.0.0/8", "::1")),
    ("THREADS", "open", "security.threads", "open"),
    ("BODY_BYTES", "20000000", "server.body_bytes", 20_000_000),
    ("IDLE_CONNECTIONS", "9", "server.idle_connections", 9),
    ("DRAIN", "10s", "server.drain", "10s"),
    ("PROXIES", "10.0.0.0/8", "server.proxies", ("10.0.0.0/8",)),
    ("API_BACKEND_KEYS", "k1,k2", "security.api_keys.backend", ("k1", "k2")),
    ("API_FRONTEND_KEYS", "k1", "security.api_keys.frontend", ("k1",)),
    ("API_ADMIN_KEYS", " k1 ", "security.api_keys.admin", ("k1",)),
    ("ALLOW_UNAUTH", "true", "security.api_keys.allow_unauth", True),
    ("KMS_PROVIDER", "local", "kms.provider", "local"),
    ("KMS_SOCKET", "/s", "kms.socket", "/s"),
    ("KMS_DATA_DIR", "/k", "kms.data_dir", "/k"),
    ("KMS_BINARY", "/b", "kms.binary", "/b"),
    ("KMS_SPAWN", "0", "kms.spawn", False),
    ("KMS_EXCLUSIVE", "0", "kms.exclusive", False),
    ("KMS_SERVER_UIDS", "0,1000", "kms.server_uids", (0, 1000)),
    ("MINIKMS_MASTER_KEY_FILE", "/m", "kms.master_key_file", "/m"),
    ("AUDIT_SOCKET", "/q", "viewer.audit_socket", "/q"),
    ("AUDIT_SERVER_UIDS", "7", "viewer.audit_server_uids", (7,)),
    ("ROTATION_MAX_AGE", "90d", "rotation.max_age", "90d"),
    ("ROTATION_MAX_USES", "1000", "rotation.max_uses", 1000),
    ("ROTATION_RATE", "50", "rotation.records_per_second", 50),
    ("ROTATION_DESTROY_OLD_AFTER", "7d", "rotation.destroy_old_after", "7d"),
    ("RETENTION_DELETED_AFTER", "1d", "retention.deleted_after", "1d"),
    ("RETENTION_ROTATION_BACKUPS_AFTER", "never", "retention.rotation_backups_after", "never"),
    ("LOG_FORMAT", "json", "logging.format", "json"),
    ("LOG_LEVEL", "debug", "logging.level", "debug"),
]


@pytest.mark.parametrize(("name", "text", "path", "value"), ENVIRONMENT)
def test_each_variable_sets_its_setting_and_an_empty_one_none(name: str, text: str, path: str, value: object) -> None:
    def setting(environment: dict[str, str]) -> Any:
        found: Any = load({"storage.db_path": "/srv/db"} if name != "DB_PATH" else {}, environment).config
        for part in path.split("."):
            found = getattr(found, part)
        return found

    assert setting({f"PROGRESSDB_{name}": text}) == value
    if name != "DB_PATH":
        assert setting({f"PROGRESSDB_{name}": ""}) == setting({})


def test_tls_takes_both_variables() -> None:
    tls = config_of(environment={"PROGRESSDB_TLS_CERT": "/c", "PROGRESSDB_TLS_KEY": "/k"}).server.tls
    assert (tls.cert_file, tls.key_file) == ("/c", "/k")


GATEWAY = {
    "PROGRESSDB_KMS_URL": "https://kms.internal",
    "PROGRESSDB_KMS_CA": "/ca",
    "PROGRESSDB_KMS_CERT": "/c",
    "PROGRESSDB_KMS_KEY": "/k",
    "PROGRESSDB_KMS_TOKEN_FILE": "/t",
    "PROGRESSDB_KMS_LONG_LIVED_CERT": "1",
}


def test_a_key_service_behind_a_gateway_takes_a_url_and_files() -> None:
    config = config_of(environment=GATEWAY)
    files = {"ca": "/ca", "cert": "/c", "key": "/k", "token_file": "/t"}
    assert config.kms_client == {"address": "https://kms.internal", "long_lived_cert": True, **files}
    assert not config.kms_is_exclusive
    assert config_of(environment={**GATEWAY, "PROGRESSDB_KMS_EXCLUSIVE": "1"}).kms_is_exclusive


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("KMS_SOCKET", "/s", "leave kms.socket out"),
        ("KMS_DATA_DIR", "/d", "leave kms.data_dir out"),
        ("KMS_BINARY", "/b", "leave kms.binary out"),
        ("KMS_SERVER_UIDS", "0", "leave kms.server_uids out"),
        ("MINIKMS_MASTER_KEY_FILE", "/m", "leave kms.master_key_file out"),
        ("KMS_PROVIDER", "local", "leave kms.url out"),
        ("ROTATION_DESTROY_OLD_AFTER", "7d", "no gateway takes a request to destroy a key"),
        ("KMS_URL", "http://kms.internal", "begins with https://"),
        ("KMS_URL", "https://kms.internal/path", "without a path"),
        ("KMS_URL", "https://a,/b", "kms.url: several addresses are all paths of sockets, or all URLs"),
        ("KMS_CA", "", "a URL needs `ca`"),
        ("KMS_KEY", "", "`cert` and `key` belong together"),
        ("KMS_URL", "", "give its kms.url too"),
    ],
)
def test_what_does_not_fit_a_gateway_stops_the_start(name: str, text: str, reason: str) -> None:
    assert reason in refusal_of(DB, {**GATEWAY, f"PROGRESSDB_{name}": text})


DATABASE = {
    "PROGRESSDB_STORE_URL": "postgresql:///progressdb?host=/run/postgresql",
    "PROGRESSDB_STORE_SINGLE_NODE": "1",
    "PROGRESSDB_KMS_SOCKET": "/run/minikms.sock",
    "PROGRESSDB_KMS_SPAWN": "0",
}


def test_a_store_in_a_database_shares_its_key_service() -> None:
    config = config_of(environment=DATABASE)
    assert (config.store.url, config.store.single_node) == (DATABASE["PROGRESSDB_STORE_URL"], True)
    assert config.destroys_keys


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("KMS_SPAWN", "1", "share one key service"),
        ("KMS_SOCKET", "", "share one key service"),
        ("KMS_EXCLUSIVE", "1", "leave kms.exclusive out"),
        ("STORE_URL", "", "give its store.url too"),
    ],
)
def test_what_does_not_fit_a_store_in_a_database_stops_the_start(name: str, text: str, reason: str) -> None:
    assert reason in refusal_of(DB, {**DATABASE, f"PROGRESSDB_{name}": text})


def test_a_root_key_beside_a_gateway_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="PROGRESSDB_MINIKMS_MASTER_KEY"):
        check_key_source(config_of(environment=GATEWAY), has_master_key=True)
    check_key_source(config_of(environment=GATEWAY), has_master_key=False)


def test_every_variable_is_in_the_table_above() -> None:
    tested = {name for name, *_ in ENVIRONMENT} | {"TLS_CERT", "TLS_KEY"}
    tested |= {name.removeprefix("PROGRESSDB_") for name in {**GATEWAY, **DATABASE}}
    assert tested == {variable.name for variable in VARIABLES}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        (":8080", ("0.0.0.0", 8080)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_an_address_is_host_and_port(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts


@pytest.mark.parametrize("text", ["", "8080", "host", "host:", "host:x", "host:-1", "host:65536", "::1:8080", "host:²"])
def test_a_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        split_address(text)


# --- refusals ---------------------------------------------------------------------------------------------------
FILES: dict[str, tuple[str | bytes, str]] = {
    "unknown key": ("server: {prot: 1}", "unknown field `prot`"),
    "unknown section": ("servers: {}", "unknown field `servers`"),
    "wrong type": ("server: {port: '8080'}", "Expected `int`, got `str`"),
    "key that is no text": ("security: {api_keys: {admin: [12345]}}", "Expected `str`, got `int`"),
    "string for a list": ("security: {api_keys: {admin: secret}}", "Expected `array`, got `str`"),
    "yes for a key": ("security: {api_keys: {admin: [yes]}}", "Expected `str`, got `bool`"),
    "given twice": ("server: {port: 1, port: 2}", "given twice"),
    "section given twice": ("server: {}\nserver: {}\n", "given twice"),
    "no mapping": ("- a\n- b\n", "must contain sections"),
    "malformed": ("server: {port: ", "malformed"),
    "a tag": ("server: !!python/object/apply:os.system [id]", "malformed"),
    "not UTF-8": (b"server: {address: \xff}", "not UTF-8"),
    "too large": ("#" * (1024 * 1024 + 1), "larger than"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_stops_the_start_with_the_reason(tmp_path: Path, name: str) -> None:
    text, reason = FILES[name]
    path = written(tmp_path, text)
    refusal = refusal_of({**DB, "config": path}, {})
    assert reason in refusal
    assert path in refusal


def test_a_malformed_toml_file_stops_the_start(tmp_path: Path) -> None:
    assert "malformed" in refusal_of({**DB, "config": written(tmp_path, "server = ", "c.toml")}, {})
    assert "unknown field" in refusal_of({**DB, "config": written(tmp_path, "[x]\n", "c.toml")}, {})


def test_a_file_that_is_named_but_missing_stops_the_start(tmp_path: Path) -> None:
    for flags, environment in (
        ({"config": str(tmp_path / "none.yaml")}, {}),
        ({}, {"PROGRESSDB_CONFIG": str(tmp_path / "none.yaml")}),
    ):
        with pytest.raises(ConfigMissingError, match="does not exist"):
            load({**DB, **flags}, environment)


def test_an_empty_file_is_a_file_without_settings(tmp_path: Path) -> None:
    assert load({**DB, "config": written(tmp_path, "")}, {}).config == config_of()


def test_an_error_in_a_file_is_explained_without_quoting_it(tmp_path: Path) -> None:
    for text in ("security: {api_keys: {admin: [s3cret\n", "security:\n  api_keys: s3cret\n  x: {", "a: 's3cret"):
        assert "s3cret" not in refusal_of({**DB, "config": written(tmp_path, text)}, {})


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("PORT", "x", "PROGRESSDB_PORT must be a whole number"),
        ("PORT", "70000", "server.port must be from 0 to 65535"),
        ("ADDR", "8080", "PROGRESSDB_ADDR must be host:port"),
        ("RATE_RPS", "x", "PROGRESSDB_RATE_RPS must be a number"),
        ("RATE_RPS", "-1", "rps must be 0 (off) or more"),
        ("RATE_RPS", "nan", "rps must be 0 (off) or more"),
        ("RATE_RPS", "inf", "rps must be 0 (off) or more"),
        ("RATE_BURST", "0", "burst must be at least 1"),
        ("RATE_BURST", "9" * 400, "PROGRESSDB_RATE_BURST must be a whole number"),
        ("RATE_BURST", "9" * 20, "security.rate_limit.burst"),
        ("API_ADMIN_KEYS", ",,", "PROGRESSDB_API_ADMIN_KEYS has nothing between its commas"),
        ("CORS_ORIGINS", "https://a.example,https://a.example/b", "allowed_origins, origin 2, must be"),
        ("ALLOW_UNAUTH", "maybe", "PROGRESSDB_ALLOW_UNAUTH must be"),
        ("KMS_SPAWN", "2", "PROGRESSDB_KMS_SPAWN must be"),
        ("IP_WHITELIST", "10.0.0.1/8", "has host bits set"),
        ("IP_WHITELIST", "example.org", "security.ip_whitelist"),
        ("PROXIES", "example.org", "server.proxies"),
        ("DRAIN", "301s", "server.drain must be at most 300s"),
        ("RETENTION_DELETED_AFTER", "23h", "retention.deleted_after must be at least 1d, or never"),
        ("RETENTION_ROTATION_BACKUPS_AFTER", "soon", "retention.rotation_backups_after must be a number and one of"),
        ("DRAIN", "soon", "server.drain must be a number and one of"),
        ("BODY_BYTES", "16777215", "server.body_bytes must be at least 16777216"),
        ("THREADS", "closed", "security.threads"),
        ("TLS_CERT", "/c", "TLS needs both"),
        ("API_ADMIN_KEYS", "has space", "security.api_keys.admin, key 1,"),
        ("API_ADMIN_KEYS", "kéy", "security.api_keys.admin, key 1,"),
        ("API_ADMIN_KEYS", "ok,ok", "security.api_keys.admin, key 2, is also a admin key"),
        ("API_ADMIN_KEYS", "x" * 257, "security.api_keys.admin, key 1,"),
        ("LOG_LEVEL", "loud", "logging.level"),
        ("KMS_SOCKET", "/" + "x" * 107, "(PROGRESSDB_KMS_SOCKET): a socket path has 1 to 107 bytes"),
        ("KMS_SOCKET", "/a,/b", "kms.socket names several key services, none of which is started here"),
        ("KMS_SOCKET", "/a," * 8 + "/b", "kms.spawn = false"),
    ],
)
def test_a_value_that_breaks_a_rule_stops_the_start_with_the_reason(name: str, text: str, reason: str) -> None:
    refusal = refusal_of(DB, {f"PROGRESSDB_{name}": text})
    assert reason in refusal
    if name.startswith("API_"):
        assert text not in refusal


def test_a_file_of_deep_nesting_stops_the_start_with_the_reason(tmp_path: Path) -> None:
    for name in ("deep.yaml", "deep.toml"):
        text = ("a = " if name.endswith("toml") else "") + "[" * 5000
        assert "malformed" in refusal_of({**DB, "config": written(tmp_path, text, name)}, {})


def test_a_misspelled_variable_is_named_with_the_one_that_is_like_it() -> None:
    environment = {
        "PROGRESSDB_RATE_LIMIT": "5",
        "PROGRESSDB_\x1b[2J": "",
        "PROGRESSDB_MINIKMS_POLICY": "p",
        "PROGRESSDB_ADDR": ":1",
    }
    assert unknown_variables(environment) == [
        "the variable 'PROGRESSDB_\\x1b[2J' sets nothing: did you mean PROGRESSDB_URL?",
        "the variable 'PROGRESSDB_RATE_LIMIT' sets nothing: did you mean PROGRESSDB_RATE_BURST?",
    ]


def test_one_key_has_one_role() -> None:
    environment = {"PROGRESSDB_API_BACKEND_KEYS": "same", "PROGRESSDB_API_FRONTEND_KEYS": "same"}
    refusal = refusal_of(DB, environment)
    assert "each key has one role" in refusal
    assert "same" not in refusal


def test_without_a_data_directory_nothing_starts() -> None:
    assert "use --db DIR" in refusal_of({}, {})


def test_a_long_data_directory_needs_a_socket_of_its_own() -> None:
    long_db = {"storage.db_path": "/" + "d" * 100}
    assert "PROGRESSDB_KMS_SOCKET" in refusal_of(long_db, {})
    assert load(long_db, {"PROGRESSDB_KMS_SOCKET": "/run/k.sock"}).config.kms.socket == "/run/k.sock"


# --- the commands -----------------------------------------------------------------------------------------------
def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("progressdb_server", *words, env={"PATH": os.environ["PATH"], **environment})


def test_config_check_exits_0_if_good_1_if_bad_and_2_if_missing(tmp_path: Path) -> None:
    db = ("--db", str(tmp_path / "db"))
    good = command("config", "check", *db, "--dev")
    assert (good.returncode, good.stdout, good.stderr) == (0, "the configuration is valid\n", "")
    bad = command("config", "check", *db, "--dev", PROGRESSDB_RATE_RPS="-1")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("progressdb: security.rate_limit.rps must be")
    missing = command("config", "check", *db, "--dev", "--config", str(tmp_path / "none.yaml"))
    assert missing.returncode == 2
    assert "does not exist" in missing.stderr
    assert not (tmp_path / "db").exists()


def test_without_a_root_key_the_start_is_refused_with_the_way_out(tmp_path: Path) -> None:
    db = tmp_path / "db"
    for words in (("config", "check"), ("serve",), ()):
        refused = command(*words, "--db", str(db))
        assert refused.returncode == (1 if words == ("config", "check") else 2)
        assert "--master-key-file" in refused.stderr
        assert "--dev" in refused.stderr
        assert not db.exists()


def test_a_root_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    key = "0f" * 32
    both = command(
        "config", "check", "--db", str(tmp_path / "db"), "--master-key-file", "/key", PROGRESSDB_MINIKMS_MASTER_KEY=key
    )
    assert both.returncode == 1
    assert "twice" in both.stderr
    assert key not in both.stderr


@pytest.mark.parametrize(
    ("text", "said"), [(r'kms: {socket: "/a\0b"}', "NUL"), ("kms: {server_uids: [-1]}", "server_uids")]
)
def test_a_setting_that_no_system_call_takes_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal_of({**DB, "config": written(tmp_path, text)}, {})


@pytest.mark.parametrize("content", [None, "not a key"])
def test_tls_files_are_looked_at_before_the_start(tmp_path: Path, content: str | None) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if content is not None:
        cert.write_text(content)
        key.write_text(content)
    checked = command(
        "config",
        "check",
        "--db",
        str(tmp_path / "db"),
        "--dev",
        PROGRESSDB_TLS_CERT=str(cert),
        PROGRESSDB_TLS_KEY=str(key),
    )
    assert checked.returncode == (2 if content is None else 1)
    assert str(cert) in checked.stderr


def test_config_show_tells_each_value_and_its_source_and_no_key(tmp_path: Path) -> None:
    path = written(tmp_path, "security: {api_keys: {backend: [s3cret-1, s3cret-2]}, rate_limit: {rps: 5}}")
    shown = command("config", "show", "--db", "/srv/db", "--config", path, PROGRESSDB_API_ADMIN_KEYS="s3cret-3")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert 'storage.db_path = "/srv/db"  (flag)' in lines
    assert f"security.rate_limit.rps = 5.0  ({path})" in lines
    assert f"security.api_keys.backend = 2 configured  ({path})" in lines
    assert "security.api_keys.admin = 1 configured  (environment)" in lines
    assert "server.port = 8080  (default)" in lines
    assert "s3cret" not in shown.stdout + shown.stderr
