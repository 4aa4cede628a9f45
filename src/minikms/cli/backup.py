"""`minikms backup`: create, verify, restore, list and prune archives.

Owns: flags, output, and the first lines of the audit log of a restored directory. A backup is an archive of the data
directory; the key files that a KEK rotation keeps are rotation backups (`minikms.custody.rotation_backups`).
Invariants: `create` and `verify` take no lock and change nothing but the register of archives; a restore needs an empty
directory and its lock; every archive is read back, and every key in it opened, before it is reported as good. It must
never show or keep a key.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter, validators

from minikms.cli.console import (
    AuditDir,
    DataDir,
    DataFiles,
    Json,
    RootKey,
    Yes,
    chosen_data_dir,
    complain,
    explained,
    found_data_dir,
    named_root,
)
from minikms.commands.output import (
    Facts,
    Table,
    confirm,
    name_list,
    print_result,
    progress_bar,
)
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError, RootSource

if TYPE_CHECKING:
    from minikms.archives.archive import ArchiveManifest, AuditHead
    from minikms.archives.create import RetiredKeys, Task
    from minikms.archives.restore import NewerKeyring, RestoredArchive
    from minikms.custody.archive_register import RegisteredArchive
    from minikms.keys.unlocked import UnlockedKeyring
    from minikms.roots.providers import RootProvider


app = App(name="backup", help="Create, verify, restore, list and prune backup archives.", version_flags=[])

Archive = Annotated[Path, Parameter(help="The archive's file.")]


@app.command
def create(
    archive: Archive,
    *,
    files: DataFiles = DataFiles(),
    json: Json = False,
    only_check: Annotated[bool, Parameter(show=False)] = False,
) -> int:
    """Make one archive of keyring and keys, also while the daemon serves.

    It holds wrapped keys, but no root key and no audit log: copy the log separately. Each root key that opens the
    keyring now opens the archive. For a message server, first back up its store (progressdb backup create). Exit
    status: 0 made and read back, 1 made, but some key files could not be read or its entry in the register was not
    completed, 2 not made.

    For example:
        minikms backup create monday.minikms --data-dir kms/data
    """
    from minikms.api.errors import StorageUnavailableError
    from minikms.archives.create import NewArchive, remove_failed, remove_leftover
    from minikms.archives.create import create as create_archive
    from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive, new_archive_id
    from minikms.datadir import read_keyring
    from minikms.platform import clock

    directory = files.directory
    data = read_keyring(directory)  # first: beside no keyring, a register is what an interrupted restore leaves
    root = files.root_key.required_provider(directory)
    if only_check:  # for a caller that makes something else first
        with _task(root, "", bar=False) as task, task.open_keyring(data):
            return EXIT_GOOD
    register = ArchiveRegister(directory)
    entry = RegisteredArchive(new_archive_id(), os.path.abspath(archive), time.time_ns() // 1_000_000)
    with _task(root, "copying keys", bar=not json) as task:
        register.put(entry)
        try:
            new = NewArchive(entry.archive_id, clock.rfc3339(clock.now_ns()), lambda: _audit_head(directory))
            good = create_archive(directory, str(archive), task, new)
        except BaseException:
            with contextlib.suppress(OSError, StorageUnavailableError):  # then the register names it
                if remove_failed(str(archive), entry.archive_id):
                    register.forget(entry.archive_id)
            raise
    manifest = good.manifest
    incomplete = ""
    try:
        remove_leftover(str(archive), entry.archive_id)
        size, ended_ms = os.path.getsize(archive), time.time_ns() // 1_000_000
        register.put(
            RegisteredArchive(
                entry.archive_id, entry.path, entry.begun_ms, ended_ms, manifest.keys, size, manifest.newest_key_id
            )
        )
    except (OSError, StorageUnavailableError) as error:
        incomplete = explained(error)[0]
    _print_manifest(good.manifest, archive, json=json, done="made, read back, every key opened")
    if incomplete:
        complain(
            f"the archive is made and good, but its entry in kms-archives could not be completed: {incomplete}. Until "
            "it is pruned, the receipt of every destroyed key names it"
        )
        return EXIT_FAILED
    if good.manifest.unreadable:
        unreadable = name_list(good.manifest.unreadable)
        complain(f"the archive lacks these keys, whose files can't be read: {unreadable}; see `minikms doctor`")
        return EXIT_FAILED
    return EXIT_GOOD


@app.command
def verify(
    archive: Archive,
    *,
    files: DataFiles = DataFiles(),
    json: Json = False,
) -> None:
    """Read a whole archive and open every key in it. No data directory is needed.

    The register of a data directory that has made the archive notes one that is not good, and `prune` keeps the newest
    of the others. Exit status: 0 good, 1 altered, damaged, or of another root key, 2 the archive or the root key is
    missing.
    """
    from minikms.archives.archive import ArchiveError, OtherRootError
    from minikms.archives.create import verify as verify_archive

    directory = found_data_dir(files.data_dir, look=False)
    root = _root_of(archive, files.root_key, directory)
    with _task(root, "opening keys", bar=not json) as task:
        try:
            good = verify_archive(str(archive), task)
        except (ArchiveError, OSError) as error:
            read_badly = isinstance(error, OSError) and error.errno == errno.EIO
            if read_badly or (isinstance(error, ArchiveError) and not isinstance(error, OtherRootError)):
                _note(archive, directory, damaged=True)
            raise
    _note(archive, directory, damaged=False)
    _print_manifest(good.manifest, archive, json=json, done="good: whole, authentic, every key opens")


@app.command
def restore(
    archive: Archive,
    *,
    data_dir: DataDir = None,
    newer_keyring: Annotated[
        Path | None,
        Parameter(
            help="A keyring.json that is newer than the archive, with the kms-tombstones of its directory beside it: "
            "keys destroyed by then are not restored, and only its root keys open the restored directory."
        ),
    ] = None,
    newer_master_key_file: Annotated[
        Path | None, Parameter(help="The root key of that keyring, if it is another one.")
    ] = None,
    newer_root: Annotated[
        RootSource | None, Parameter(show_choices=False, help="Its source, instead of --newer-master-key-file.")
    ] = None,
    audit_dir: AuditDir = None,
    root_key: RootKey = RootKey(),
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Restore an archive into a data directory that is empty or does not exist. Nothing is overwritten.

    It needs a root key that opened the keyring when the archive was made. A new audit log begins, which names the last
    line of the old one. Exit status: 0 restored, 1 refused or the archive is not good, 2 something is missing.
    """
    from minikms.archives import restore as restoring
    from minikms.archives.create import verify as verify_archive
    from minikms.custody.log_directory import claim_log_directory
    from minikms.platform import clock
    from minikms.platform.directory_lock import DataDirLock

    directory = chosen_data_dir(data_dir, must_exist=False)
    newer_source = _newer_source(newer_master_key_file, newer_root)
    root = _root_of(archive, root_key, directory)
    with ExitStack() as stack:
        task = stack.enter_context(_task(root, "", bar=False))
        newer = None
        if newer_keyring is not None:
            newer = stack.enter_context(_newer_keyring(newer_keyring, newer_source, directory, task))
        with progress_bar("opening keys", visible=not json) as progress:
            good = verify_archive(str(archive), task._replace(progress=progress))
        if newer is None:
            _confirm_return(good.retired, yes=yes)
        task = task._replace(progress=stack.enter_context(progress_bar("restoring keys", visible=not json)))
        with DataDirLock(directory) as lock, task.open_keyring(good.keyring) as unlocked:
            restoring.check_empty(lock.directory_fd, directory)
            log_dir = claim_log_directory(lock, audit_dir, empty=True)
            tombstones = restoring.all_tombstones(unlocked.body.keyring_id, good.tombstones, newer)
            target = restoring.Target(directory, lock.directory_fd, tombstones, _register_entry(archive, good.manifest))
            now = clock.rfc3339(clock.now_ns())
            begin_log = partial(_begin_log, log_dir, unlocked, good.manifest)
            done = restoring.restore(
                str(archive), good, task, unlocked, target, begin_log=begin_log, at=now, newer=newer
            )
    page = {"data_dir": directory, "archive_id": good.manifest.archive_id, **done._asdict()}
    print_result(page, _restored_lines(directory, done, newer), json=json)


@app.command(name="list")
def list_archives(*, data_dir: DataDir = None, json: Json = False) -> None:
    """List the archives of a data directory. Those whose files are gone are marked as missing."""
    from minikms.custody.archive_register import ArchiveRegister

    archives = ArchiveRegister(chosen_data_dir(data_dir)).listed()
    table = Table(
        ("archive", "made", "keys", "bytes", "file"),
        ((entry.archive_id, _when(entry), f"{entry.keys:,}", f"{entry.bytes:,}", _where(entry)) for entry in archives),
        right=("keys", "bytes"),
    )
    print_result({"archives": archives}, table, json=json)


@app.command
def prune(
    *,
    keep: Annotated[int, Parameter(help="How many of the newest archives stay.", validator=validators.Number(gte=1))],
    forget_missing: Annotated[
        bool,
        Parameter(
            help="Also forget the archives whose files are gone. Use it only if no copy of them exists.",
            show_default=False,
        ),
    ] = False,
    data_dir: DataDir = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Remove the oldest archives of a data directory, and the leftovers of interrupted ones.

    The newest archive that was verified stays, however old it is: creation verifies, and `verify` notes a damaged one.
    A moved archive stays listed as missing, because it may still hold keys that are destroyed later.
    """
    from minikms.archives.create import remove_leftover
    from minikms.custody.archive_register import ArchiveRegister

    register = ArchiveRegister(chosen_data_dir(data_dir))
    listed = register.listed()
    present = [entry for entry in listed if os.path.isfile(entry.path)]
    missing = [entry for entry in listed if not os.path.isfile(entry.path)]
    good = [entry for entry in present if entry.ended_ms and not entry.damaged][-1:]
    removed = [entry for entry in present[:-keep] if entry not in good]
    if removed:
        confirm(f"Remove {name_list([entry.path for entry in removed])}?", yes=yes)
    for entry in removed:
        _remove_archive(entry)
        if remove_leftover(entry.path, entry.archive_id):
            register.forget(entry.archive_id)
    forgotten = [
        entry
        for entry in missing
        if (forget_missing or not entry.ended_ms)
        and remove_leftover(entry.path, entry.archive_id)
        and not os.path.lexists(entry.path)  # its backup may have ended since
    ]
    for entry in forgotten:
        register.forget(entry.archive_id)
    lines = [
        *(f"removed {entry.path}" for entry in removed),
        *(f"forgot {entry.archive_id}, whose file {entry.path} is gone" for entry in forgotten),
        *(f"kept {entry.path}: the newer ones are damaged" for entry in good if entry in present[:-keep]),
        f"{len(present) - len(removed)} archive(s) stay",
    ]
    print_result({"removed": removed, "forgotten": forgotten}, lines, json=json)


def _confirm_return(retired: RetiredKeys, *, yes: bool) -> None:
    """Names the keys that may have been destroyed since the backup, before they come back. Raises CommandError."""
    if retired.keys:
        more = f" and {retired.keys - len(retired.named):,} more" if retired.keys > len(retired.named) else ""
        complain(
            f"the archive has {retired.keys:,} retired key(s): those that were destroyed after the backup come back "
            f"with it, and need to be destroyed again: {', '.join(retired.named)}{more}"
        )
    confirm(
        "Restore without a newer keyring? Keys that were destroyed after the backup come back with it, and so do "
        "root keys that were removed.",
        yes=yes,
    )


# --- shared -------------------------------------------------------------------------------------------------------


def _root_of(archive: Path, key: RootKey, directory: str | None) -> RootProvider:
    """The root key for an archive. The unlock service is asked for that of the archive's keyring, so that no data
    directory is needed. `directory`: what `dev:` lies beside. Raises StartError, CommandError.
    """
    from minikms.archives.archive import read_keyring_id

    return key.required_provider(directory, partial(read_keyring_id, archive))


def _note(archive: Path, directory: str | None, *, damaged: bool) -> None:
    """Notes the result of a verification in the register of the data directory that has made the archive, if any."""
    from msgspec.structs import replace

    from minikms.api.errors import StorageUnavailableError
    from minikms.custody.archive_register import ArchiveRegister

    if directory is None:
        return
    register = ArchiveRegister(directory)
    try:
        for entry in register.listed():
            if entry.ended_ms and entry.path == os.path.abspath(archive) and entry.damaged != damaged:
                register.put(replace(entry, damaged=damaged))
    except (OSError, StorageUnavailableError) as error:
        if damaged:
            complain(f"kms-archives does not note that this archive is damaged: {explained(error)[0]}")


@contextmanager
def _task(root: RootProvider, what: str, *, bar: bool) -> Iterator[Task]:
    """The task of one command: the opened root key, and a progress bar on a terminal. Raises StartError."""
    from minikms.archives.create import Task
    from minikms.datadir import opened_keyring, opened_root

    with opened_root(root) as (arena, key), progress_bar(what, visible=bar) as progress:
        yield Task(arena, key, lambda data: opened_keyring(arena, key, data), progress)


def _audit_head(directory: str) -> AuditHead | None:
    """The last whole line of the audit log; None when there is none that can be read."""
    from minikms.api.base64 import encode_text
    from minikms.api.errors import KmsRefusedError
    from minikms.archives.archive import AuditHead
    from minikms.audit.following import last_lines
    from minikms.audit.record import parse_line
    from minikms.custody.log_directory import log_directory

    with contextlib.suppress(OSError, KmsRefusedError, ValueError):
        for line in last_lines(log_directory(directory), 1):
            event, _, sig = parse_line(line)
            return AuditHead(event.seq, encode_text(sig))
    return None


def _begin_log(log_dir: str, unlocked: UnlockedKeyring, manifest: ArchiveManifest) -> None:
    """A new audit log. Its first line names the head of the old one, its second what was restored."""
    from minikms.api.base64 import decode_exact
    from minikms.audit import AuditLog, Event, ExpectedLog
    from minikms.audit.record import MAC_BYTES, LineRef
    from minikms.datadir import audit_keys

    head = manifest.audit_head
    sig = None if head is None else decode_exact(head.sig, MAC_BYTES)
    expected = ExpectedLog(exists=True, head=None if head is None or sig is None else LineRef(head.seq, sig))
    log = AuditLog(log_dir, audit_keys(unlocked), expected=expected, accept_loss=True)
    try:
        facts: dict[str, str | int] = {"archive": manifest.archive_id, "epoch": unlocked.body.epoch}
        log.add(Event(type="restore", actor="minikms", pid=os.getpid(), facts=facts))
        log.commit(durable=True)
    finally:
        log.close()


def _register_entry(archive: Path, manifest: ArchiveManifest) -> RegisteredArchive:
    """The entry for the archive in the register of the restored directory: it may hold each of its keys."""
    from minikms.custody.archive_register import RegisteredArchive

    now_ms = time.time_ns() // 1_000_000
    begun_ms = int(datetime.fromisoformat(manifest.created_at).timestamp() * 1000)
    size = os.path.getsize(archive)
    path, newest = os.path.abspath(archive), manifest.newest_key_id
    return RegisteredArchive(manifest.archive_id, path, begun_ms, now_ms, manifest.keys, size, newest)


def _newer_source(key_file: Path | None, source: str | None) -> str | None:
    """The source of the root key of the newer keyring. Raises CommandError if it is given twice."""
    if key_file is not None and source is not None:
        raise CommandError("the root key of the newer keyring is given twice: as --newer-root and as a file")
    return source if key_file is None else f"file:{key_file}"


@contextmanager
def _newer_keyring(path: Path, source: str | None, directory: str, task: Task) -> Iterator[NewerKeyring]:
    """The keyring at `path`, opened under the root key of `source` or the archive's, and the tombstones beside it.

    It gets an arena of its own, because two keyrings may not have room in one. Raises StartError, OSError.
    """
    from minikms.api.errors import UnknownRootError
    from minikms.archives.restore import NewerKeyring
    from minikms.crypto import roots
    from minikms.custody.tombstone_file import load, read_tombstones
    from minikms.datadir import KEYRING_SLOTS, opened_keyring, opened_root
    from minikms.keys.keyring import FILE_BYTES_MAX, parse_file
    from minikms.memory.arena import SecretArena
    from minikms.platform import files

    with open(path, "rb") as file:
        data = file.read(FILE_BYTES_MAX + 1)
    with files.closed_after(files.open_directory(path.parent)) as descriptor:
        content = load(descriptor)
    with ExitStack() as stack:
        if source is None:
            arena, root = stack.enter_context(SecretArena(KEYRING_SLOTS)), task.root
        else:
            provider = named_root(source, directory, keyring_id=lambda: parse_file(data)[0].keyring_id)
            arena, root = stack.enter_context(opened_root(provider))
        try:
            unlocked = stack.enter_context(opened_keyring(arena, root, data))
        except UnknownRootError:
            if source is not None:
                raise
            raise UnknownRootError(
                f"the newer keyring {path} does not open under the root key of the backup, "
                f"{roots.fingerprint(root.view)}: give its root key with --newer-master-key-file or --newer-root"
            ) from None
        yield NewerKeyring(unlocked, read_tombstones(content, unlocked.body, unlocked.tombstone_key).stones())


def _remove_archive(entry: RegisteredArchive) -> None:
    """Removes the file if it is an archive. Raises CommandError otherwise."""
    from minikms.archives.archive import MAGIC, is_archive

    with open(entry.path, "rb") as file:
        if not is_archive(file.read(len(MAGIC))):
            raise CommandError(f"{entry.path} is not a backup archive; it was not removed", EXIT_FAILED)
    os.unlink(entry.path)


def _restored_lines(directory: str, done: RestoredArchive, newer: NewerKeyring | None) -> Iterator[str]:
    yield f"Restored {done.keys:,} key(s) into {directory}, epoch {done.epoch}."
    if done.left_out:
        yield f"Left out {done.left_out:,} key(s) that were destroyed."
    if done.roots_removed:
        yield f"These root keys were removed after the backup, and don't open it: {', '.join(done.roots_removed)}."
    yield f"It opens under {' or '.join(done.roots)}."
    if newer is None:
        yield "A root key that was removed after the backup opens it again: minikms root list, minikms root remove."
    yield "Next: start the daemon; minikms doctor; then the message server: once with --accept-restore if it says that"
    yield "it remembers a later state. progressdb check names what was made after the backup and can't be read."


def _print_manifest(manifest: ArchiveManifest, archive: Path, *, json: bool, done: str) -> None:
    from msgspec.structs import asdict

    if not json:
        print(f"{archive}: {done}")
    head = manifest.audit_head
    facts = [
        ("archive", manifest.archive_id),
        ("made", manifest.created_at),
        ("keyring", f"{manifest.keyring_id}, epoch {manifest.epoch}"),
        ("root key", manifest.root_fingerprint),
        ("keys", f"{manifest.keys:,}"),
        ("audit head", "none" if head is None else f"{head.seq}:{head.sig}"),
    ]
    print_result({"archive": str(archive), **asdict(manifest)}, Facts(facts, 2), json=json)


def _when(entry: RegisteredArchive) -> str:
    from minikms.platform import clock

    return clock.rfc3339(entry.begun_ms * 1_000_000) if entry.ended_ms else "interrupted"


def _where(entry: RegisteredArchive) -> str:
    if not os.path.isfile(entry.path):
        return f"{entry.path} (missing)"
    return f"{entry.path} (damaged)" if entry.damaged else entry.path
