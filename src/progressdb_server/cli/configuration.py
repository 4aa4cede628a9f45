"""`progressdb config check` and `config show`.

Owns: the checks that depend on this machine (whether the files that the configuration names exist) and the printed form
of a configuration. Invariant: it prints the number of API keys, but never a key.
"""

from __future__ import annotations

import json as encoder
import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from cyclopts import App

from minikms.commands.output import print_result
from minikms.commands.usage import EXIT_FAILED, CommandError
from progressdb_server.cli.flags import (
    Json,
    MasterKeyFd,
    ServerFlags,
)
from progressdb_server.conditions import CERTIFICATE_ENDS_S
from progressdb_server.config import Config, ConfigError, ConfigMissingError, LoadedConfig, TlsSection
from progressdb_server.http.listener import check_tls
from progressdb_server.server import check_key_source

app = App(name="config", help="Check or show the configuration that the server would run with.")


@app.command(name="check")
def check_configuration(
    *,
    flags: ServerFlags = ServerFlags(),
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> None:
    """Check the configuration without starting the server.

    Exit status: 0 it is valid, 1 it is not, 2 a file that it names does not exist.
    """
    try:
        config = flags.load().config
        check(config, has_master_key=master_key_fd is not None)
    except ConfigMissingError:
        raise
    except ConfigError as error:
        raise CommandError(str(error), EXIT_FAILED) from None
    warning = tls_warning(config.server.tls, time.time())
    warnings = [warning] if warning else []
    lines = [*(f"warning: {one}" for one in warnings), "the configuration is valid"]
    print_result({"valid": True, "warnings": warnings}, lines, json=json)


@app.command(name="show")
def show_configuration(*, flags: ServerFlags = ServerFlags(), json: Json = False) -> None:
    """Print every setting with its value and its source. API keys are not printed, only their number."""
    loaded = flags.load()
    settings = {
        path: {"value": value, "source": loaded.sources.get(path, "default")}
        for path, value in _settings(loaded.config)
    }
    print_result(settings, setting_lines(loaded), json=json)


def check(config: Config, *, has_master_key: bool) -> None:
    """Check the configuration and the files that it names. Raises ConfigError, ConfigMissingError."""
    check_tls(config.server.tls)
    check_key_source(config, has_master_key=has_master_key)
    for name in ("binary", "master_key_file", "ca", "cert", "key", "token_file"):
        path = getattr(config.kms, name)
        if path and not os.path.exists(path):
            raise ConfigMissingError(f"kms.{name} names {path}, which does not exist")


def tls_warning(tls: TlsSection, now_s: float) -> str:
    """A warning if the certificate is not valid yet, has expired or expires soon; otherwise empty."""
    if not tls.cert_file:
        return ""
    from cryptography import x509  # the server itself does without

    with open(tls.cert_file, "rb") as file:
        certificate = x509.load_pem_x509_certificate(file.read())
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    named = f"the TLS certificate {tls.cert_file}"
    if now_s < begins.timestamp():
        return f"{named} is valid from {begins:%Y-%m-%d %H:%M} UTC on: clients refuse the server until then"
    if now_s > ends.timestamp():
        return f"{named} expired on {ends:%Y-%m-%d %H:%M} UTC: clients refuse the server; renew it"
    if now_s > ends.timestamp() - CERTIFICATE_ENDS_S:
        return f"{named} expires on {ends:%Y-%m-%d %H:%M} UTC: renew it, then restart the server"
    return ""


def setting_lines(loaded: LoadedConfig) -> Iterator[str]:
    """One printed line for each setting."""
    for path, value in _settings(loaded.config):
        text = f"{value} configured" if path in _counted(loaded.config) else encoder.dumps(value, ensure_ascii=False)
        yield f"{path} = {text}  ({loaded.sources.get(path, 'default')})"


def _counted(config: Config) -> frozenset[str]:
    """The settings that hold API keys: only the number of keys is shown."""
    keys = config.security.api_keys
    return frozenset(
        f"security.api_keys.{name}" for name in keys.__struct_fields__ if isinstance(getattr(keys, name), tuple)
    )


def _settings(config: Config) -> Iterator[tuple[str, Any]]:
    """The path and the value of each setting; of API keys, their number."""
    counted = _counted(config)
    for path, value in _values(config):
        yield path, len(value) if path in counted else value


def _values(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in section.__struct_fields__:
        value = getattr(section, field)
        if isinstance(value, msgspec.Struct):
            yield from _values(value, f"{prefix}{field}.")
        else:
            yield prefix + field, value
