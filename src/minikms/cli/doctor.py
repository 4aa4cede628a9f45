"""`minikms doctor`: examines a data directory, the machine and the running daemon, and says what to do.

Owns: which examinations apply, the page, and the rebuilding of lost use counts. Invariants: it changes nothing unless
told to rebuild, which needs the lock and a confirmation; exit status 0 no problem (advice at most), 1 a problem, 2
there was nothing to examine. It must never repair on its own judgement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from minikms.cli import show
from minikms.cli.finding import Finding, advice, problem
from minikms.cli.flags import (
    DATA_DIR_VARIABLE,
    SOCKET_VARIABLE,
    DataDir,
    Json,
    MasterKeyFd,
    MasterKeyFile,
    ServerUid,
    Socket,
    Yes,
    chosen_data_dir,
)
from minikms.cli.outcome import EXIT_GOOD, EXIT_WANTING, CommandError

if TYPE_CHECKING:
    from minikms.client import Client

USES_WARN: Final = 2**31


def doctor(
    *,
    data_dir: DataDir = None,
    socket: Socket = None,
    server_uid: ServerUid = None,
    master_key_file: MasterKeyFile = None,
    rebuild_leases: Annotated[
        bool,
        Parameter(
            name="--rebuild-leases",
            help="Begin the use counts anew: keys of now only decrypt from then on. The daemon must be stopped.",
            negative=(),
            show_default=False,
        ),
    ] = False,
    yes: Yes = False,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Look for what is wrong or soon will be, each with what to do: files and machine with --data-dir, also beside a
    live daemon; the daemon itself with --socket.

    With the root key every key is opened, too. Exit status: 0 no problem, 1 a problem, 2 there is nothing to look at.
    """
    directory = chosen_data_dir(data_dir) if data_dir or os.environ.get(DATA_DIR_VARIABLE) else None
    if rebuild_leases:
        return _rebuild(directory, yes=yes)
    path = socket or os.environ.get(SOCKET_VARIABLE)
    if directory is None and not path:
        raise CommandError("say what to examine: --data-dir DIR, --socket PATH, or both")
    found: list[Finding] = []
    if directory is not None:
        from minikms.cli.examine import examine
        from minikms.cli.rootopening import chosen_source

        source = chosen_source(master_key_file, master_key_fd, directory)
        found += examine(directory, source, now=time.time())
    found += machine()
    if path:
        found += _daemon(path, server_uid, alone=directory is None)
    problems = sum(finding.level == "problem" for finding in found)
    if json:
        show.print_json({"problems": problems, "findings": found})
    else:
        _print(found, problems)
    return EXIT_WANTING if problems else EXIT_GOOD


def _print(found: list[Finding], problems: int) -> None:
    console = show.console()
    for finding in sorted(found, key=lambda finding: finding.level != "problem"):
        style = "bold red" if finding.level == "problem" else "yellow"
        console.print(f"{finding.level}: {finding.area}: {show.clean(finding.what)}", style=style, soft_wrap=True)
        console.print(f"  do: {show.clean(finding.do)}", soft_wrap=True)
    kinds = f"{problems} problem(s), {len(found) - problems} piece(s) of advice"
    console.print(kinds if found else "nothing found", style="bold" if problems else "green")


def machine() -> Iterator[Finding]:
    """What this machine lacks for keeping keys in memory."""
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


def _daemon(path: str, server_uid: int | None, *, alone: bool) -> Iterator[Finding]:
    """Raises KmsUnavailableError when the daemon is all there is to examine."""
    from minikms.cli.reach import reach
    from minikms.client.errors import KmsUnavailableError

    with reach(path, server_uid) as kms:
        try:
            told: dict[str, Any] = kms.status()
        except KmsUnavailableError as error:
            if alone:
                raise
            yield problem("daemon", str(error), "start it: minikms --socket … --data-dir …; its log says why it ended")
            return
        yield from judged(told)
        yield from _worn_keys(kms)


def judged(told: dict[str, Any]) -> Iterator[Finding]:
    """What a status says that needs somebody."""
    for measure in told["hardening"]:
        if not measure["in_force"]:
            yield advice("hardening", f"not in force: {measure['measure']}", measure["why"])
    if not told["audit"]["writable"]:
        yield problem(
            "audit log",
            f"it can't be written, so every request is refused: {told['audit']['unavailable_reason']}",
            "free space on its file system, see docs/runbook.md",
        )
    rotation = told["rotation"]
    if rotation is not None and rotation["last_error"]:
        yield problem(
            "rotation", f"it can't go on: {rotation['last_error']}", "mend the cause; the daemon tries again by itself"
        )
    for key_id, why in told["keys"]["unreadable_files"].items():
        yield problem("keys", f"{key_id}: {why}", "restore this file from a backup")
    for text in told["warnings"]:
        what, _, do = text.partition("; " if "; " in text else ": ")
        yield advice("daemon", what, do or "minikms status")


def _worn_keys(kms: Client) -> Iterator[Finding]:
    cursor: str | None = None
    while True:
        answer = kms.list_keys(state="active", cursor=cursor)
        for key in answer.keys:
            if key.uses_max >= USES_WARN:
                yield advice(
                    "key ages",
                    f"{key.key_id} has been used up to {key.uses_max:,} times and stops encrypting at 2^32",
                    f"give its thread a new key: progressdb rotate-dek {key.thread_id}",
                )
        cursor = answer.next_cursor
        if cursor is None:
            return


# --- repair -------------------------------------------------------------------------------------------------------


def _rebuild(directory: str | None, *, yes: bool) -> int:
    """Both lease files anew; every key made until now counts as spent. Raises StartError while a daemon runs."""
    from minikms.cli.examine import key_ids
    from minikms.custody.leasestore import LeaseStore
    from minikms.custody.lock import DataDirLock
    from minikms.custody.opening import newest_key_id
    from minikms.keys.ids import key_id_to_bytes

    if directory is None:
        raise CommandError(f"name the data directory: --data-dir DIR, or {DATA_DIR_VARIABLE}")
    with DataDirLock(directory) as lock:
        present = list(key_ids(directory))
        if not present:
            raise CommandError(f"there is no key in {directory}, so that there is nothing to count")
        show.confirm(
            f"Begin the use counts of {len(present):,} keys anew? Each of them only decrypts from then on, until its "
            "thread gets a new key.",
            yes=yes,
        )
        LeaseStore.rebuild(lock.directory_fd, key_id_to_bytes(newest_key_id(directory)))
    print(f"The use counts were begun anew. The {len(present):,} key(s) of now only decrypt. Give each thread")
    print("a new one: progressdb rotate-dek THREAD")
    return EXIT_GOOD
