"""`minikms doctor`: examines a data directory, the machine and the running daemon, and says what to do.

Owns: the checks and the shape of a finding. Invariants: each finding says what to do; files are opened for reading
only, without the lock, so that it works beside a running daemon, and a file that vanishes meanwhile is no finding;
memory is bounded but for the findings; without the root key, keyring and keys are parsed but not authenticated, and the
report says so. Exit status: 0 no problem (advice at most), 1 a problem, 2 there was nothing to examine. It must never
change or repair anything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from minikms import api
from minikms.api.errors import KmsRefusedError, StartError
from minikms.api.printable import clean
from minikms.audit.reader import LOG_NAME
from minikms.cli.console import (
    DataDir,
    Json,
    RootKey,
    ServerUid,
    Socket,
    chosen_data_dir,
    daemon_client,
    explained,
    found_data_dir,
)
from minikms.commands.output import NAMED_COUNT_MAX, Progress, name_list, print_json, progress_bar, terminal
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError, found_socket
from minikms.conditions import DAY_SECONDS, DISK_FULL_BYTES, DISK_LOW_BYTES, KEK_OLD_DAYS, NOTICE, reported, state
from minikms.custody import deks, journal, keyring_file, replica_file, rotation_backups, tombstone_file
from minikms.custody.log_directory import log_directory
from minikms.custody.replica_file import StoredMark
from minikms.custody.settled_keys import SettledKey, SettledKeys
from minikms.datadir import opened_keyring, opened_root
from minikms.keys import dek, keyring
from minikms.keys.dek import UNWRAPS_SLICE, DekRecord, Unwrapper
from minikms.keys.keyring import Body
from minikms.keys.tombstones import FILE_BYTES_MAX as TOMBSTONES_BYTES_MAX
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.platform.clock import rfc3339, unix_seconds
from minikms.platform.files import closed_after, is_stale_temp, open_directory, read_file_in
from minikms.roots.providers import KEPT_BY_PEOPLE

if TYPE_CHECKING:
    from minikms.roots.providers import RootProvider


class Diagnosis(msgspec.Struct, frozen=True):
    """A `problem` stops something from working or being safe; an `advice` does not. `do` is the next step. `condition`:
    the name of one of `minikms.conditions`; empty for what only the files show.
    """

    level: Literal["problem", "advice"]
    area: str
    what: str
    do: str
    condition: str = ""


def problem(area: str, what: str, do: str) -> Diagnosis:
    return Diagnosis("problem", area, what, do)


def advice(area: str, what: str, do: str) -> Diagnosis:
    return Diagnosis("advice", area, what, do)


FREE_FILES_MIN: Final = 10_000
CLOCK_SECONDS_MAX: Final = 60
_UNSEAL: Final = "when nobody needs the seal any more: minikms unseal"
_JOIN: Final = "to join anew, move the directory away: minikms replica join"
_OTHERS_MASK: Final = 0o077


def examine(
    directory: str, root: RootProvider | None, *, now: float, progress: Progress = lambda *_: None
) -> Iterator[Diagnosis]:
    """Every finding in a data directory. `progress` gets the keys that were read. Raises OSError when the directory
    can't be read.
    """
    yield from _permissions(directory)
    yield from _space(directory)
    yield from _seal(directory)
    mark: StoredMark | None = None
    try:
        with closed_after(open_directory(directory)) as directory_fd:
            mark = replica_file.read(directory_fd)
    except StartError as error:
        yield problem("hosts", str(error), _JOIN)
    body: Body | None = None
    try:
        data = read_file_in(directory, keyring_file.NAME, keyring.FILE_BYTES_MAX)
        if data is None and mark is not None and not mark.tag:
            yield advice(
                "hosts", "this host joins, and has no keys yet", f"minikms-replicator fetch --data-dir {directory}"
            )
            return
        if data is None:
            yield problem(
                "keyring", "keyring.json is missing", "restore it: minikms backup restore; new here? minikms init"
            )
        else:
            body = keyring.parse_file(data)[0]
            yield from _keyring(directory, body, now)
            yield from _root_keys(body, now)
            yield from _hosts(body, mark)
    except StartError as error:  # of a file that was read
        yield problem("keyring", str(error), "what the sentence says; the runbook has the steps")
    except KmsRefusedError as error:
        yield problem("keyring", str(error), "restore it from a backup: minikms backup restore")
    if mark is None or mark.tag:  # a host that joins has no log before its first start
        yield from _audit_log(directory)
    if body is None or data is None:
        return
    if root is None:
        yield advice(
            "root key", "no root key was given, so no key was opened", "to try every key: --master-key-file FILE"
        )
        yield from _keys(directory, body, now, None, None, progress=progress)
        return
    try:
        with opened_root(root) as (arena, key), opened_keyring(arena, key, data) as unlocked:
            yield from _mark(mark, unlocked)
            yield from _keys(directory, body, now, arena, unlocked, progress=progress)
    except StartError as error:
        yield problem("root key", str(error), "give the key file that the daemon uses")


# --- the directory ------------------------------------------------------------------------------------------------


def _permissions(directory: str) -> Iterator[Diagnosis]:
    owner = os.stat(directory).st_uid
    bad: list[str] = []
    foreign: list[str] = []
    temporary = 0
    for path, entry in _walk(directory):
        temporary += is_stale_temp(entry.name)
        if entry.st_mode & _OTHERS_MASK or stat.S_ISLNK(entry.st_mode):
            bad.append(path)
        elif entry.st_uid != owner:
            foreign.append(path)
    if bad:
        yield problem("permissions", f"others have access to {name_list(bad)}", f"chmod -R go= {directory}")
    if foreign:
        yield problem(
            "permissions",
            f"not owned by the directory's user, uid {owner}: {name_list(foreign)}",
            f"chown -R {owner} {directory}",
        )
    if temporary > NAMED_COUNT_MAX:
        yield advice(
            "disk", f"{temporary} half-written files of interrupted writes", "the next start of the daemon removes them"
        )


class _DirectoryEntry:
    def __init__(self, name: str, status: os.stat_result) -> None:
        self.name = name
        self.st_mode = status.st_mode
        self.st_uid = status.st_uid


def _walk(directory: str) -> Iterator[tuple[str, _DirectoryEntry]]:
    yield directory, _DirectoryEntry(os.path.basename(directory), os.lstat(directory))
    backups = os.path.join(directory, rotation_backups.DIRECTORY)
    stamps = rotation_backups.list_stamps(backups) if os.path.isdir(backups) else []
    batches = [os.path.join(rotation_backups.DIRECTORY, stamp) for stamp in stamps]
    for place in ("", deks.DIRECTORY, rotation_backups.DIRECTORY, *batches):
        try:
            with os.scandir(os.path.join(directory, place)) as entries:
                for entry in entries:
                    try:
                        yield (
                            os.path.join(place, entry.name),
                            _DirectoryEntry(entry.name, entry.stat(follow_symlinks=False)),
                        )
                    except FileNotFoundError:
                        continue  # replaced by the daemon meanwhile
        except FileNotFoundError:
            continue


def _space(directory: str) -> Iterator[Diagnosis]:
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if free < DISK_FULL_BYTES:
        yield diagnosis(state("disk_full", free=f"{free // 1024:,}"), "disk")
    elif free < DISK_LOW_BYTES:
        yield diagnosis(state("disk_low", free=f"{free // 1024**2:,}"), "disk")
    if room.f_files and room.f_favail < FREE_FILES_MIN:
        yield problem("disk", f"the file system has only {room.f_favail:,} free inodes", "remove files on it")


def _seal(directory: str) -> Iterator[Diagnosis]:
    from minikms.seal_files import MARKER_NAME, read_marker

    with closed_after(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        marker = read_marker(descriptor)
    if marker is not None:
        since = f", since {marker.at} by {marker.actor}" if marker.at else ""
        yield advice("seal", f"{MARKER_NAME} is there: a daemon starts sealed{since}", _UNSEAL)


# --- the keyring --------------------------------------------------------------------------------------------------


def _keyring(directory: str, body: Body, now: float) -> Iterator[Diagnosis]:
    active = body.kek_in_state("active")
    age = 0 if active is None else _age_days(active.created_at, now)
    if age > KEK_OLD_DAYS:
        yield diagnosis(state("kek_old", days=age), "key ages")
    if any(slot.replaces for slot in body.slots):
        yield advice(
            "root key",
            f"{len(body.slots)} root keys open the keyring, and the newest is to replace another one",
            "start the daemon once with the newest; then the other one is removed",
        )
    if body.rotation is not None:
        yield advice(
            "keyring",
            f"a KEK rotation that began at {body.rotation.started_at} has not ended",
            "it goes on while the daemon runs: minikms status",
        )
    if any(slot.provider == "dev" for slot in body.slots):
        yield advice("root key", "the root key is a development key, made by --dev", "for real data: --master-key-file")
    ahead = _seconds(body.updated_at) - now
    if ahead > CLOCK_SECONDS_MAX:
        yield problem(
            "clock",
            f"the keyring was written {int(ahead)} s in the future of this machine's clock",
            "set the clock: keys are ordered by time",
        )


def _hosts(body: Body, mark: StoredMark | None) -> Iterator[Diagnosis]:
    """What keyring and mark say of a key service on several hosts."""
    hosts = name_list([f"{member.name} ({member.member_id})" for member in body.members])
    if mark is None:
        if body.members:
            what = f"the keyring has several hosts, {hosts}, and {replica_file.NAME} is missing"
            yield problem("hosts", what, f"put the file back, or repeat an interrupted `minikms replica init`; {_JOIN}")
        return
    host = body.member(mark.mark.member_id)
    if host is None:
        what = f"the keyring has no host {mark.mark.member_id}, which this one is"
        yield problem("hosts", what, f"was it removed? {_JOIN}. Or repeat an interrupted `minikms replica leave`")
        return
    yield advice("hosts", f"this is {host.name} of {len(body.members)} hosts: {hosts}", "minikms replica list")
    if body.slot(host.slot_id) is None:
        what = f"the root key that {host.name} joined with was removed or replaced"
        yield advice("hosts", what, "minikms replica remove does not remove a later one: minikms root list")


def _mark(mark: StoredMark | None, unlocked: UnlockedKeyring) -> Iterator[Diagnosis]:
    try:
        if mark is not None:
            mark.check(unlocked)
    except StartError as error:
        yield problem("hosts", str(error), _JOIN)


def _root_keys(body: Body, now: float) -> Iterator[Diagnosis]:
    """The effect of a lost root key, and the root keys that nobody has tested recently."""
    if len(body.slots) == 1:
        yield advice(
            "root key",
            "only one root key opens the keyring: if it is lost, so is everything",
            "add another one, kept elsewhere: minikms root add SOURCE",
        )
    if all(slot.shares is None and slot.provider not in KEPT_BY_PEOPLE for slot in body.slots):
        yield advice(
            "root key",
            "no root key is kept by people, as shares or as a passphrase",
            "minikms root add shares:3/5, or minikms-unlock add passphrase:",
        )
    untested = [slot for slot in body.slots if _age_days(slot.tested_at, now) >= keyring.ROOT_TEST_DAYS_MAX]
    if untested:
        names = name_list([f"{slot.slot_id} ({slot.provider}, last on {slot.tested_at[:10]})" for slot in untested])
        yield advice(
            "root key",
            f"not tested for {keyring.ROOT_TEST_DAYS_MAX} days: {names}",
            "minikms root test SLOT --root SOURCE, with what is kept for an emergency",
        )


# --- the audit log ----------------------------------------------------------------------------------------------------


def _audit_log(data_dir: str) -> Iterator[Diagnosis]:
    try:
        directory = log_directory(data_dir)
    except StartError as error:
        yield problem("audit log", str(error), "write its path into that file, as --audit-dir of the daemon names it")
        return
    if not os.path.lexists(os.path.join(directory, LOG_NAME)):
        yield problem(
            "audit log",
            f"{LOG_NAME} is missing in {directory}",
            "put it back; to go on without it, start once with --accept-audit-loss",
        )
    if not os.path.isdir(directory):
        return
    if directory != data_dir:
        yield from _space(directory)
    with os.scandir(directory) as entries:
        torn = sorted(entry.name for entry in entries if ".torn-" in entry.name or ".aside-" in entry.name)
    if torn:
        yield advice(
            "audit log",
            f"parts were set aside after a crash or a loss: {name_list(torn)}",
            "the log has a line about each: minikms audit verify; then archive them",
        )


# --- the keys -----------------------------------------------------------------------------------------------------


def _keys(
    directory: str,
    body: Body,
    now: float,
    arena: SecretArena | None,
    unlocked: UnlockedKeyring | None,
    *,
    progress: Progress,
) -> Iterator[Diagnosis]:
    destroyed: set[bytes] = set()
    try:
        content = read_file_in(directory, tombstone_file.NAME, TOMBSTONES_BYTES_MAX)
        key = None if unlocked is None else unlocked.tombstone_key
        destroyed.update(tombstone_file.read_tombstones(content, body, key).keys())
    except KmsRefusedError as error:
        yield problem("destroyed keys", str(error), "put the file back, or restore a backup: the runbook")
    active: list[str] = []
    threads = array("q")
    """Hashes of the ids of their threads: a key takes 16 bytes here, and about 130 in all."""
    bad: list[str] = []
    oldest = rfc3339(int(now) * 1_000_000_000)
    with SettledKeys(directory) as settled:
        try:
            key_ids = settled.key_ids()
        except KmsRefusedError as error:
            yield problem("keys", str(error), 'the runbook, "One key file is damaged"')
            return
        # The next start removes the files of destroyed keys.
        present = (key_id for key_id in key_ids if dek.key_id_to_bytes(key_id) not in destroyed)
        judged = _judged(settled.each(present), body, arena, unlocked)
        for number, (key_id, _, record) in enumerate(judged, 1):
            progress(number, len(key_ids))
            if isinstance(record, KmsRefusedError):
                bad.append(f"{key_id}: {record}")
                continue
            if record.state == "active":
                oldest = min(oldest, record.created_at)
                if record.purpose == "thread":
                    active.append(key_id)
                    threads.append(hash(record.thread_id))
        lost, nameless = _lost(settled, key_ids, destroyed)
    if settled.unread:
        yield problem(
            "rotation backups",
            f"can't be read, or are damaged: {name_list(settled.unread)}",
            'the runbook, "A rotation backup or the journal can\'t be read"',
        )
    if lost or nameless:
        yield problem(
            "keys",
            f"damaged records of {journal.NAME} or of rotation backups name keys that have neither file nor tombstone: "
            f"{name_list(sorted(lost)) or 'none'}; {nameless} such records name no key",
            'restore the keys from a backup: the runbook, "One key file is damaged"',
        )
    if settled.recovered:
        yield advice(
            "keys",
            f"the files of {settled.recovered:,} keys are missing, half written or outdated, as after a crash; their "
            f"contents are in {journal.NAME}",
            "start the daemon, which completes the files; leave that file where it is",
        )
    for text in bad[:NAMED_COUNT_MAX]:
        yield problem("keys", text, "restore this file from a backup; until then its records can't be read")
    if len(bad) > NAMED_COUNT_MAX:
        yield problem("keys", f"{len(bad) - NAMED_COUNT_MAX} more keys can't be read", "restore them from a backup")
    orphans = _all_but_the_last(active, threads)
    if orphans:
        yield advice(
            "orphaned keys",
            f"more than one active key for the thread of {name_list(orphans)}: a request was interrupted, and perhaps "
            "nothing uses them",
            "the message server knows which ones: progressdb doctor --repair",
        )
    days = _age_days(oldest, now)
    if days > KEK_OLD_DAYS:
        yield advice("key ages", f"the oldest active key is {days} days old", "progressdb rotate-dek THREAD")


def _all_but_the_last(key_ids: list[str], threads: array[int]) -> list[str]:
    """The keys of each thread that has several of them, without its last."""
    shared = {one for one, next_one in itertools.pairwise(sorted(threads)) if one == next_one}
    keys_of: dict[int, list[str]] = {}
    for key_id, thread in zip(key_ids, threads, strict=True):
        if thread in shared:
            keys_of.setdefault(thread, []).append(key_id)
    return [key_id for keys in keys_of.values() for key_id in keys[:-1]]


def _has(key_ids: list[str], key_id: str) -> bool:
    return key_ids[(at := bisect_left(key_ids, key_id)) : at + 1] == [key_id]


def _lost(settled: SettledKeys, key_ids: list[str], destroyed: set[bytes]) -> tuple[set[str], int]:
    """The keys that damaged records name, without those of a record that names one of `key_ids`, which are in order, or
    a destroyed one; and the number of damaged records that name no key.
    """
    lost: set[str] = set()
    nameless = 0
    for named in settled.damaged():
        nameless += not named
        present = any(_has(key_ids, key_id) for key_id in named)
        if not present and destroyed.isdisjoint(map(dek.key_id_to_bytes, named)):
            lost |= named
    return lost, nameless


def _judged(
    keys: Iterator[SettledKey], body: Body, arena: SecretArena | None, unlocked: UnlockedKeyring | None
) -> Iterator[SettledKey]:
    """The keys, with an error in place of a record that does not unwrap."""
    while part := list(itertools.islice(keys, UNWRAPS_SLICE)):
        with contextlib.ExitStack() as stack:
            unwrapper = None
            if arena is not None and unlocked is not None:
                slot = stack.enter_context(arena.allocate())
                unwrapper = stack.enter_context(dek.Unwrapper(unlocked.kek_cipher, slot.view))
            for at, key in enumerate(part):
                try:
                    if not isinstance(key.record, KmsRefusedError):
                        _judge(key.record, body, unwrapper)
                except KmsRefusedError as error:
                    part[at] = key._replace(record=error.with_traceback(None))
        yield from part


def _judge(record: DekRecord, body: Body, unwrapper: Unwrapper | None) -> None:
    kek = body.kek(record.kek_version)
    if kek is None or kek.state == "destroyed":
        raise StartError(f"it is wrapped under KEK version {record.kek_version}, which the keyring does not have")
    if unwrapper is not None:
        unwrapper.unwrap(record)


def _seconds(text: str) -> float:
    return float(unix_seconds(text))


def _age_days(text: str, now: float) -> int:
    return int((now - _seconds(text)) // DAY_SECONDS)


def doctor(
    *,
    data_dir: DataDir = None,
    socket: Socket = None,
    server_uid: ServerUid = None,
    root_key: RootKey = RootKey(),
    json: Json = False,
) -> int:
    """Look for problems, and say what to do about each. --data-dir examines the files and the machine, even while the
    daemon runs; --socket examines the running daemon. Without either, both are examined at the paths of the systemd
    units.

    With the root key it also opens every key. Exit status: 0 no problem, 1 a problem, 2 there is nothing to examine.
    """
    directory, path = found_data_dir(data_dir, look=False), found_socket(socket, look=False)
    if directory is None and path is None:
        directory, path = found_data_dir(None), found_socket(None)
    if directory is None and path is None:
        raise CommandError("say what to examine: --data-dir DIR, --socket PATH, or both")
    found: list[Diagnosis] = []
    if directory is not None:
        directory = chosen_data_dir(directory)
        root = root_key.provider(directory)
        with progress_bar("reading keys", visible=not json) as progress:
            found += examine(directory, root, now=time.time(), progress=progress)
    found += machine()
    if path is not None:
        found += _daemon(path, server_uid, alone=directory is None)
    problems = sum(finding.level == "problem" for finding in found)
    if json:
        print_json({"problems": problems, "findings": found})
    else:
        _print(found, problems)
    return EXIT_FAILED if problems else EXIT_GOOD


def _print(found: list[Diagnosis], problems: int) -> None:
    console = terminal()
    for finding in sorted(found, key=lambda finding: finding.level != "problem"):
        style = "bold red" if finding.level == "problem" else "yellow"
        console.print(f"{finding.level}: {finding.area}: {clean(finding.what)}", style=style, soft_wrap=True)
        if finding.do:
            console.print(f"  do: {clean(finding.do)}", soft_wrap=True)
    kinds = f"{problems} problem(s), {len(found) - problems} piece(s) of advice"
    console.print(kinds if found else "nothing found", style="bold" if problems else "green")


def machine() -> Iterator[Diagnosis]:
    """What the kernel lacks for protecting keys in memory."""
    from minikms.memory.arena import SecretArena

    with SecretArena(1) as arena:
        backing = arena.backing
    if backing != "memfd_secret":
        yield advice(
            "memory",
            "the kernel has no memfd_secret: root can read keys in memory",
            "Linux 5.14 or newer; before 6.5 also the boot option secretmem.enable=1",
        )


# --- the running daemon -------------------------------------------------------------------------------------------


def _daemon(path: str, server_uid: int | None, *, alone: bool) -> Iterator[Diagnosis]:
    """`alone`: nothing else is examined. Raises KmsError then, if the daemon does not answer or refuses."""
    from minikms.api.errors import KmsError, KmsUnavailableError, UnauthorizedError

    with daemon_client(path, server_uid) as kms:
        try:
            status = kms.status()
            yield from status_findings(status)
        except KmsError as error:
            if alone:
                raise
            if isinstance(error, UnauthorizedError):
                do = (
                    "name this user in the daemon's --allowed-uids or policy file, or ask as one that it names: "
                    "minikms status"
                )
                yield problem("daemon", error.message, do)
            elif isinstance(error, KmsUnavailableError) and not isinstance(error.__cause__, PermissionError):
                do = "start it: minikms --socket … --data-dir …; its log says why it ended"
                yield problem("daemon", str(error), do)
            else:
                what, _, do = explained(error)[0].partition(". ")
                yield problem("daemon", what, do)


def status_findings(status: api.StatusAnswer) -> Iterator[Diagnosis]:
    for condition in reported(status):
        yield diagnosis(condition)
    for key_id, why in status.keys.unreadable_files.items():
        yield problem("keys", f"{key_id}: {why}", "restore this file from a backup")


def diagnosis(condition: api.Condition, area: str = "") -> Diagnosis:
    """The finding about a condition. `area`: of the files in which it was seen; empty for one that a daemon reports."""
    level: Literal["problem", "advice"] = "advice" if condition.severity == NOTICE else "problem"
    return Diagnosis(level, area or condition.name, condition.sentence, condition.action, condition.name)
