"""`progressdb backup`: the store first, the key service second, in one directory.

Owns: the order of the two, and where a backup lies: `<db>/backups/<name>`, with `store/` and `manifest.json` of the
store and `minikms.backup` of the key service. Invariants: a backup of the store is made by whoever has it open; the key
service is backed up after it, so that every key that a record names is there; a restore goes into an empty place. The
archive of the key service is made and restored by the `minikms` command, for no key is ever in this process. Nothing
here deletes a backup: what is forgotten is the register's entry of one that was deleted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote

from progressdb_server.api.routes.store_backup import NAME, REFUSAL
from progressdb_server.cli.admin_client import Administrator
from progressdb_server.config import Config
from progressdb_server.store import backup
from progressdb_server.store.engine import EngineLockedError
from progressdb_server.store.rocks import RocksEngine

KMS_ARCHIVE: Final = "minikms.backup"
CREATE_S_MAX: Final = 3600.0


class BackupCommandError(Exception):
    """What was asked for can't be done; the text says why and what to do."""


def create(config: Config, name: str, master_key_fd: int | None, *, store_only: bool) -> int:
    """0: made and read back. Raises BackupCommandError, BackupError, EngineUnavailableError, ServerAwayError,
    ServerRefusedError.
    """
    if NAME.fullmatch(name) is None:
        raise BackupCommandError(REFUSAL)
    path = config.backups_dir / name
    engine = _engine(config)
    if engine is None:
        Administrator(config).call("POST", "/admin/store_backup", {"name": name}, timeout_s=CREATE_S_MAX)
    else:
        try:
            _create_offline(engine, path)
        finally:
            engine.close()
    print(f"{path}: the store is backed up and was read back")
    if store_only or config.kms.provider == "local":
        print("Now back up the key service, as its user: minikms backup create FILE")
        return 0
    words = ["create", str(path / KMS_ARCHIVE), "--data-dir", str(config.kms_data_dir)]
    return _minikms(words, config, master_key_fd)


def _create_offline(engine: RocksEngine, path: Path) -> None:
    if os.path.lexists(path):
        raise BackupCommandError(f"{path} exists already; a backup never overwrites one")
    created_ns = time.time_ns()
    engine.write([backup.registered(str(path), created_ns)])
    engine.sync()
    try:
        backup.create(engine, str(path), created_ns=created_ns)
    except backup.BackupError:
        if backup.Registered(str(path), created_ns).gone:
            _forget_offline(engine, [backup.Registered(str(path), created_ns)])
        raise


def _forget_offline(engine: RocksEngine, found: list[backup.Registered]) -> None:
    engine.write([(backup.register_key(known.created_ns), None) for known in found])
    engine.sync()


def listed(config: Config, *, as_json: bool) -> int:
    """The register. Raises BackupCommandError, EngineUnavailableError, ServerAwayError, ServerRefusedError."""
    engine = _engine(config)
    if engine is None:
        found = Administrator(config).call("GET", "/admin/store_backups")["backups"]
    else:
        try:
            found = [
                {"name": known.name, "path": known.path, "created_ns": known.created_ns, "gone": known.gone}
                for page in backup.registered_in(engine)
                for known in page
            ]
        finally:
            engine.close()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for known in found:
        when = datetime.fromtimestamp(known["created_ns"] / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        print(f"{known['name']}  {when}  {known['path']}{'  not found there' if known['gone'] else ''}")
    if not found:
        print("no backup is registered")
    return 0


def forget(config: Config, name: str, *, agreed: bool) -> int:
    """Strikes a deleted backup from the register. Raises what `listed` raises, and BackupError."""
    if not agreed:
        raise BackupCommandError(
            "nothing was forgotten: keys that this backup needs may be destroyed then; when it was deleted, with every "
            "copy of it, give --yes"
        )
    engine = _engine(config)
    if engine is None:
        Administrator(config).call("DELETE", f"/admin/store_backups/{quote(name, safe='')}")
    else:
        try:
            _forget_offline(engine, backup.to_forget(engine, name))
        finally:
            engine.close()
    print(f"{name} is forgotten: it keeps no old key any more")
    return 0


def _engine(config: Config) -> RocksEngine | None:
    """The store, or None when the server has it open."""
    if not os.path.isdir(config.store_dir):
        raise BackupCommandError(f"{config.store_dir} holds no store")
    try:
        return RocksEngine(str(config.store_dir))
    except EngineLockedError:
        return None


def verify(config: Config, path: Path, master_key_fd: int | None) -> int:
    """0: good, 1: not. Raises BackupError."""
    manifest = backup.verify(str(path))
    print(f"{path}: the store is whole: {len(manifest.files)} files, {manifest.bytes:,} bytes")
    if not (path / KMS_ARCHIVE).exists():
        print(f"no {KMS_ARCHIVE} in it: verify the key service's archive by itself, with minikms backup verify")
        return 0
    return _minikms(["verify", str(path / KMS_ARCHIVE)], config, master_key_fd)


def restore(config: Config, path: Path, master_key_fd: int | None, *, newer_keyring: Path | None) -> int:
    """Into the configuration's places, which must be empty: the key service first, whose archive may be refused.

    Raises BackupError, BackupCommandError.
    """
    backup.verify(str(path))
    if os.path.isdir(config.store_dir) and os.listdir(config.store_dir):
        raise BackupCommandError(f"{config.store_dir} is not empty: move what is there away first")
    archive = path / KMS_ARCHIVE
    if archive.exists():
        words = ["restore", str(archive), "--data-dir", str(config.kms_data_dir), "--yes"]
        if newer_keyring is not None:
            words += ["--newer-keyring", str(newer_keyring)]
        refused = _minikms(words, config, master_key_fd)
        if refused:
            return refused
    backup.restore(str(path), str(config.store_dir))
    print(f"Restored the store into {config.store_dir}. Start the server; if it says that it remembers a")
    print("later state of the key service, once with --accept-restore.")
    return 0


def _minikms(words: list[str], config: Config, master_key_fd: int | None) -> int:
    """`minikms backup …`, which prints for itself. A root key of our environment is passed on as a descriptor."""
    command = [sys.executable, "-P", "-m", "minikms", "backup", *words]
    key_file = config.kms.master_key_file or _development_key(config)
    if master_key_fd is not None:
        os.lseek(master_key_fd, 0, os.SEEK_SET)  # an earlier child has read it to the end
        command += ["--master-key-fd", str(master_key_fd)]
    elif key_file:
        command += ["--master-key-file", key_file]
    sys.stdout.flush()
    passed = () if master_key_fd is None else (master_key_fd,)
    return subprocess.run(command, pass_fds=passed, check=False).returncode  # noqa: S603  our own program


def _development_key(config: Config) -> str:
    from minikms.embedded import development_key_path

    path = development_key_path(config.kms_data_dir)
    return str(path) if path.exists() else ""
