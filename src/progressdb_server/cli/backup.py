"""`progressdb backup`: the store first, the key service second, in one directory.

Owns: the order of the two, and the place of a backup: `<db>/backups/<name>`, with `store/` and `manifest.json` of the
store and `minikms.backup` of the key service. Invariants: the process that has the store open makes its backup; the key
service is backed up after the store, so that its backup has every key that a record names; a restore writes only into
empty directories. The `minikms` command makes and restores the archive of the key service, because no key ever enters
this process. Nothing here deletes a backup: `forget` removes the entry of a deleted one from the register.
"""

from __future__ import annotations

import asyncio
import json as decoder
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote

from cyclopts import App, Parameter

from minikms import api
from minikms.api.errors import KmsError
from minikms.commands.output import counted, print_json, print_result
from minikms.commands.usage import EXIT_FAILED, CommandError
from progressdb_server import logs
from progressdb_server.api.routes.store_backup import INVALID_NAME, NAME
from progressdb_server.cli.admin_client import AdminClient
from progressdb_server.cli.check import examine
from progressdb_server.cli.flags import (
    ConfigFile,
    ConfiguredUrl,
    Json,
    MasterKeyFd,
    MasterKeyFile,
    StoreFlags,
)
from progressdb_server.config import Config
from progressdb_server.jobs.table import parse
from progressdb_server.store import backup
from progressdb_server.store.backup import Backups
from progressdb_server.store.check import Report
from progressdb_server.store.check import check as check_store
from progressdb_server.store.model import StoreLockedError, StoreUnavailableError

KMS_ARCHIVE: Final = "minikms.backup"
CREATE_S_MAX: Final = 3600.0
T = TypeVar("T")

BackupDirectory = Annotated[Path, Parameter(name="--backup", help="Its directory, or its name in <db>/backups.")]

IN_A_DATABASE: Final = (
    "the store is in a database: run progressdb backup register LABEL, back the database up with pg_basebackup or "
    "pgBackRest, then the key service with minikms backup create FILE (the page `Several message servers` says how)"
)
OF_A_DATABASE: Final = "the store is in a database: restore that with the program that backed it up"

app = App(name="backup", help="Back up store and key service, verify and restore backups.", version_flags=[])


@app.command(name="create")
def create(
    name: Annotated[str, Parameter(help="The backup's name: it is made in <db>/backups.")],
    *,
    store_only: Annotated[
        bool, Parameter(help="Back up only the store, for a key service that runs as another user.", show_default=False)
    ] = False,
    url: ConfiguredUrl = None,
    flags: StoreFlags = StoreFlags(),
    master_key_file: MasterKeyFile = None,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Back up the store, then the key service, also while they serve. Neither backup contains the root key.

    The root key is checked first. If only the backup of the store was made, the same command adds the other one.

    For example:
        progressdb backup create monday --db data
    """
    config = flags.load_for_store({"kms.master_key_file": master_key_file})
    if config.store.url:
        raise CommandError(IN_A_DATABASE)
    if NAME.fullmatch(name) is None:
        raise CommandError(INVALID_NAME)
    path = config.backups_dir / name
    words = ["create", str(path / KMS_ARCHIVE), "--data-dir", str(config.kms_data_dir)]
    with_keys = not (store_only or config.kms.provider == "local")
    if with_keys:
        for_check = None if master_key_fd is None else os.dup(master_key_fd)
        _, refused = _run_minikms([*words, "--only-check"], config, for_check, json=False)
        if refused:
            return refused
    if with_keys and (path / backup.MANIFEST).exists() and not (path / KMS_ARCHIVE).exists():
        print(f"{path} has the backup of the store already: that of the key service is added", file=sys.stderr)
    else:
        _back_up_store(config, url, name, path)
        if not json:
            print(f"{path}: the store is backed up, and each block was read back")
    page: dict[str, Any] = {"backup": str(path), "key_service": None}
    if not with_keys:
        print_result(page, "Now back up the key service, as its user: minikms backup create FILE", json=json)
        return 0
    return _minikms(words, config, master_key_fd, page if json else None)


def _back_up_store(config: Config, url: str | None, name: str, path: Path) -> None:
    """By the server if one runs. Raises CommandError, BackupError."""
    try:
        _with_register(config, lambda register: register.back_up(str(path)))
    except StoreLockedError:
        client = AdminClient.from_config(config, url)
        client.call("POST", "/admin/store_backup", {"name": name}, timeout_s=CREATE_S_MAX)
        if not path.is_dir():
            wrong = f"the server at {client.url} has backed up another store: it made no {path}"
            raise CommandError(wrong, EXIT_FAILED) from None


@app.command(name="register")
def register(
    label: Annotated[str, Parameter(help="The label of the backup, as it is given to the program that makes it.")],
    *,
    begun: Annotated[
        str | None, Parameter(help="When a backup that exists was begun: 2026-01-31T23:00:00Z; without it, now.")
    ] = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Register a backup of the database before it is made with another program. No key that it needs is destroyed.

    Once the backup and the log that restores it have expired: `progressdb backup forget LABEL`.
    """
    chosen = StoreFlags(config=config).load_for_store()
    if NAME.fullmatch(label) is None:
        raise CommandError(INVALID_NAME)
    begun_ns = None if begun is None else _unix_ns(begun)
    known = _with_register(chosen, lambda register: register.register(label, begun_ns))
    text = f"{label} is registered" + (": begin it now" if begun is None else "")
    print_result({"registered": label, "created_ns": known.created_ns}, text, json=json)


def _unix_ns(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError("--begun must be a time such as 2026-01-31T23:00:00Z") from None
    if moment.tzinfo is None or moment > datetime.now(UTC):
        raise CommandError("--begun must have a time zone, such as Z, and not be in the future")
    return int(moment.timestamp()) * 1_000_000_000


@app.command(name="list")
def list_registered(*, url: ConfiguredUrl = None, flags: StoreFlags = StoreFlags(), json: Json = False) -> None:
    """List the registered backups of the store. The server destroys no key that a registered backup needs.

    `minikms keys destroy` does not know of them.

    A backup whose directory is not found stays in the list.
    """
    config = flags.load_for_store()

    async def listed(register: Backups) -> list[dict[str, Any]]:
        names = ("name", "path", "created_ns", "gone", "of_database")
        return [{name: getattr(known, name) for name in names} async for known in register.registered()]

    try:
        backups = _with_register(config, listed)
    except StoreLockedError:
        backups = AdminClient.from_config(config, url).call("GET", "/admin/store_backups")["backups"]
    lines = []
    for known in backups:
        when = datetime.fromtimestamp(known["created_ns"] / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        place = known["path"] + ("  not found there" if known["gone"] else "")
        lines.append(f"{known['name']}  {when}  {'of the database' if known.get('of_database') else place}")
    print_result(backups, lines or "no backup is registered", json=json)


@app.command(name="forget")
def forget(
    name: Annotated[str, Parameter(help="The backup's name, as in the list.")],
    *,
    yes: Annotated[
        bool, Parameter(help="Confirm that the backup and every copy of it were deleted.", show_default=False)
    ] = False,
    url: ConfiguredUrl = None,
    flags: StoreFlags = StoreFlags(),
    json: Json = False,
) -> None:
    """Forget a deleted backup, so that keys which only it needs can be destroyed. Refused while the backup exists."""
    config = flags.load_for_store()
    if not yes:
        raise CommandError(
            "nothing was forgotten: keys that this backup needs may be destroyed then; if it was deleted, with every "
            "copy of it, give --yes"
        )
    try:
        _with_register(config, lambda register: register.forget(name))
    except StoreLockedError:
        AdminClient.from_config(config, url).call("DELETE", f"/admin/store_backups/{quote(name, safe='')}")
    print_result({"forgotten": name}, f"{name} is forgotten: it keeps no old key any more", json=json)


@app.command(name="verify")
def verify(
    backup_path: BackupDirectory,
    *,
    flags: StoreFlags = StoreFlags(),
    master_key_file: MasterKeyFile = None,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Read back every file, every block of the store and every key of a backup; open every record if a key service
    answers.

    A record whose key was destroyed is no damage. Exit status: 0 good, 1 damaged, 2 it does not exist.
    """
    config = flags.load({"kms.master_key_file": master_key_file}, with_data=False).config
    path = _directory(backup_path, config)
    manifest = backup.verify(str(path))
    findings, counts, opened = _records(config, str(path / backup.STORE))
    records = counts.get("threads", 0) + counts.get("messages", 0)
    unread = [finding for finding in findings if finding.kind in ("damaged", "unreadable")]
    refused = sum(finding.kind == "unreadable" for finding in unread)
    damaged = [finding for finding in unread if api.CODE_KEY_DESTROYED not in finding.detail]
    if not json:
        files = counted(len(manifest.files), "file")
        print(f"{path}: each block of the store was read: {files}, {manifest.bytes:,} bytes")
        print(
            f"{records - refused:,} of {records:,} records were opened"
            if opened
            else f"none of {records:,} records was opened: no key service answered this user"
        )
    page: dict[str, Any] = {
        "backup": str(path),
        "files": len(manifest.files),
        "bytes": manifest.bytes,
        "records": records,
        "records_opened": records - refused if opened else 0,
        "damaged": [f"{finding.key}: {finding.detail}" for finding in damaged],
        "key_service": None,
    }
    if damaged:
        print_result(page, page["damaged"], json=json)
        return EXIT_FAILED
    if not (path / KMS_ARCHIVE).exists():
        text = f"no {KMS_ARCHIVE} in it: verify the key service's archive by itself, with minikms backup verify"
        print_result(page, text, json=json)
        return 0
    return _minikms(["verify", str(path / KMS_ARCHIVE)], config, master_key_fd, page if json else None)


def _records(config: Config, store: str) -> Report:
    """The report of a store that was read back. Without a key service that this user may ask, no record is opened."""
    try:
        return asyncio.run(examine(config, store))
    except (CommandError, KmsError, StoreUnavailableError):
        return asyncio.run(check_store(store, None, parse))


@app.command(name="restore")
def restore(
    backup_path: BackupDirectory,
    *,
    newer_keyring: Annotated[
        Path | None,
        Parameter(help="A keyring.json newer than the backup: keys that it shows as destroyed are not restored."),
    ] = None,
    flags: StoreFlags = StoreFlags(),
    master_key_file: MasterKeyFile = None,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Restore into the directories of the configuration, which must be empty. Nothing is overwritten."""
    if flags.load(with_data=False).config.store.url:
        raise CommandError(OF_A_DATABASE)
    config = flags.load({"kms.master_key_file": master_key_file}).config
    path = _directory(backup_path, config)
    backup.verify(str(path))
    if os.path.isdir(config.store_dir) and os.listdir(config.store_dir):
        raise CommandError(f"{config.store_dir} is not empty: move its files away first", EXIT_FAILED)
    archive = path / KMS_ARCHIVE
    page: dict[str, Any] = {"backup": str(path), "restored": str(config.store_dir), "key_service": None}
    if archive.exists():  # the key service first: it may refuse its archive
        words = ["restore", str(archive), "--data-dir", str(config.kms_data_dir), "--yes"]
        if newer_keyring is not None:
            words += ["--newer-keyring", str(newer_keyring)]
        page["key_service"], refused = _run_minikms(words, config, master_key_fd, json=json)
        if refused:
            return refused
    backup.restore(str(path), str(config.store_dir))
    lines = (
        f"Restored the store into {config.store_dir}. Start the server; if it says that it remembers a",
        "later state of the key service, once with --accept-restore.",
    )
    print_result(page, lines, json=json)
    return 0


def _directory(backup_path: Path, config: Config) -> Path:
    """The directory of a backup that a path or a name gives. Raises CommandError unless it is there."""
    path = backup_path if backup_path.is_dir() else config.backups_dir / backup_path
    if not path.is_dir():
        raise CommandError(f"there is no directory {path}")
    return path


def _with_register(config: Config, use: Callable[[Backups], Awaitable[T]]) -> T:
    """The result of `use` with the backups of a store in a database, or of one that no server has open. Raises
    StoreLockedError, StoreUnavailableError, BackupError."""
    logs.configure(config.logging.format, "error")  # the command itself prints what it has done
    if config.store.url and not config.store.single_node:
        print("waiting some seconds until standbys confirm without a gap", file=sys.stderr)
    place = config.store.url or str(config.store_dir)

    async def used() -> T:
        async with backup.open_register(place, single_node=config.store.single_node) as register:
            return await use(register)

    return asyncio.run(used())


def _minikms(words: list[str], config: Config, master_key_fd: int | None, page: dict[str, Any] | None) -> int:
    """Run `minikms backup …` as the last step. With a page, its result becomes part of it, and the page is printed."""
    result, exit_status = _run_minikms(words, config, master_key_fd, json=page is not None)
    if page is not None:
        page["key_service"] = result
        print_json(page)
    return exit_status


def _run_minikms(
    words: list[str], config: Config, master_key_fd: int | None, *, json: bool
) -> tuple[dict[str, Any] | None, int]:
    """Run `minikms backup …`: with `json` its result, else it prints its own output. A root key of our environment is
    passed as a descriptor, and closed here."""
    command = [sys.executable, "-P", "-m", "minikms", "backup", *words]
    key_file = config.kms.master_key_file or _development_key(config)
    if master_key_fd is not None:
        command += ["--master-key-fd", str(master_key_fd)]
    elif key_file:
        command += ["--master-key-file", key_file]
    if json:
        command.append("--json")
    sys.stdout.flush()
    passed = () if master_key_fd is None else (master_key_fd,)
    with subprocess.Popen(command, pass_fds=passed, stdout=subprocess.PIPE if json else None) as process:  # noqa: S603  our own program
        if master_key_fd is not None:
            os.close(master_key_fd)
        output, _ = process.communicate()
    return decoder.loads(output) if output else None, process.returncode


def _development_key(config: Config) -> str:
    path = api.development_key_path(config.kms_data_dir)
    return str(path) if path.exists() else ""
