"""Handing out the shares of a new root key: on the terminal, once, or as one file a share.

Owns: what people read about their shares, and the files of shares. Invariants: what is shown or written is read again
and compared before the caller stores the root key's slot; a file has mode 0600 and never replaces another; no share is
written to a pipe, to standard output or to a log. It must never store anything itself: shares that were handed out, and
whose slot was not stored, open nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from minikms.cli.console import complain
from minikms.commands.usage import EXIT_FAILED, CommandError

if TYPE_CHECKING:
    from minikms import api
    from minikms.client import Client
    from minikms.keys.keyring import ShareSet
    from minikms.memory.arena import SecretArena, SecretSlot
    from minikms.roots.recovery_shares import Share

_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700

SharesDir = Annotated[
    Path | None,
    Parameter(name="--shares-dir", help="Write one file a share into this directory, instead of showing them."),
]


def check_can_hand_out(directory: Path | None, *, data_dir: str | None = None) -> None:
    """Call it before anything is made. Raises CommandError or StartError where the shares could not be handed out."""
    from minikms.memory.terminal import opened_terminal

    if directory is None:
        with opened_terminal():
            return
    from minikms.custody.keyring_file import NAME as KEYRING

    places = (directory.resolve(), *directory.resolve().parents)
    # A client of the daemon does not know its data directory, which has a keyring.
    if any(os.path.lexists(place / KEYRING) for place in places) or (data_dir and Path(data_dir).resolve() in places):
        raise CommandError(
            f"{directory} is in the data directory, and its backups would hold the shares: name another --shares-dir"
        )
    directory.mkdir(_DIRECTORY_MODE, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise CommandError(f"this user can't write in {directory}: name another --shares-dir")


def check_can_pin(pin: Path) -> None:
    """Call it before anything is made. Raises CommandError, or StartError for a pin file that is not good."""
    from minikms.roots.pin import PinFile

    if os.geteuid() != 0:
        raise CommandError("only root may add a pin: run this as root, or without --pin")
    PinFile(pin).read()


def hand_out(
    root: SecretSlot, keyring_id: str, counts: tuple[int, int], directory: Path | None, arena: SecretArena, *, yes: bool
) -> ShareSet:
    """Makes shares of `root` and gives them to people. Returns what the keyring keeps of them.

    `counts`: threshold and number of shares. On the terminal it asks whether they were written down, except with `yes`.
    Raises CommandError when they were not written down, or can't be read again; StartError when they don't give the
    root key again; OSError. Files are removed then.
    """
    from minikms.keys.keyring import ShareSet
    from minikms.roots.recovery_shares import new_shares

    threshold, count = counts
    with new_shares(root.view, keyring_id, threshold, count, arena) as shares:
        if directory is None:
            _show(shares, arena, yes=yes)
        else:
            _write_files(shares, directory, arena)
        return ShareSet(shares[0].info.set_id, threshold, count, tuple(share.digest for share in shares))


def add_shares(
    kms: Client, counts: tuple[int, int], directory: Path | None, pin: Path | None, *, yes: bool
) -> tuple[api.RootAnswer, ShareSet]:
    """Adds a fresh root key to the keyring of the daemon, after its shares were handed out and it was named in the file
    `pin`. Raises as `hand_out`, StartError, and KmsError: the slot may be stored then.
    """
    from minikms import api
    from minikms.api.base64 import encode_text
    from minikms.cli.key_text import slot_text
    from minikms.memory.arena import SecretArena, fill_random
    from minikms.roots.pin import PinFile
    from minikms.roots.recovery_shares import SLOTS_COUNT_MAX
    from minikms.roots.typed_shares import TypedShares

    with SecretArena(SLOTS_COUNT_MAX + 1) as arena, arena.allocate() as root:
        keyring_id = kms.status().keyring_id
        fill_random(root.view)
        shares = hand_out(root, keyring_id, counts, directory, arena, yes=yes)
        share_set = api.GivenShares(shares.set_id, shares.threshold, [encode_text(digest) for digest in shares.digests])
        try:
            if pin is not None:
                PinFile(pin).add(root.view, keyring_id)
            with slot_text(root) as text:
                return kms.add_root(text, provider=TypedShares.name, shares=share_set), shares
        except BaseException:
            complain(f"the shares of the set {shares.set_id} open nothing unless `minikms root list` shows that set")
            raise


def _show(shares: Sequence[Share], arena: SecretArena, *, yes: bool) -> None:
    from minikms.memory.terminal import confirmed, opened_terminal, show
    from minikms.roots.recovery_shares import reads_as, share_text

    info = shares[0].info
    with opened_terminal() as terminal:
        show(
            terminal,
            f"\nAny {info.threshold} of these {len(shares)} shares open the keyring {info.keyring_id}. They are shown "
            "only now.\nWrite each one on a sheet of its own, and give each sheet to another person.\n\n",
        )
        for share in shares:
            with share_text(share, arena) as text:
                if not reads_as(share, text, arena):
                    raise CommandError("a share can't be read again: this machine computes wrongly")
                show(terminal, f"share {share.info.number} of {len(shares)}, set {share.info.set_id}\n", *text, "\n\n")
        show(terminal, "Then clear this terminal and what it keeps of its output.\n")
        if not yes and not confirmed(terminal, "Is each share written down?"):
            raise CommandError("the shares were not stored, and those that were shown open nothing", EXIT_FAILED)


def _write_files(shares: Sequence[Share], directory: Path, arena: SecretArena) -> None:
    from minikms.platform.sync import sync_directory
    from minikms.roots.recovery_shares import share_text

    written: list[Path] = []
    try:
        for share in shares:
            path = directory / f"{share.info.keyring_id}-{share.info.set_id}-share-{share.info.number}.txt"
            with share_text(share, arena) as text:
                _write_file(path, text, written)
        sync_directory(directory)
        for share, path in zip(shares, written, strict=True):
            _check_file(path, share, arena)
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _write_file(path: Path, text: Sequence[memoryview], written: list[Path]) -> None:
    from minikms.platform.sync import sync_file

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    written.append(path)
    try:
        for view in (*text, memoryview(b"\n")):
            left = view
            while left:
                left = left[os.write(descriptor, left) :]
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def _check_file(path: Path, share: Share, arena: SecretArena) -> None:
    """Checks that the file holds the share. Raises CommandError."""
    from minikms.crypto.shares import TEXT_CHARS
    from minikms.memory.arena import SLOT_BYTES
    from minikms.roots.recovery_shares import reads_as

    with contextlib.ExitStack() as cleaning:
        slots = [cleaning.enter_context(arena.allocate()) for _ in range(0, TEXT_CHARS + 1, SLOT_BYTES)]
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        cleaning.callback(os.close, descriptor)
        count = os.readv(descriptor, [slot.view for slot in slots])
        parts = [slot.view[: max(0, count - start * SLOT_BYTES)] for start, slot in enumerate(slots)]
        if not reads_as(share, parts, arena):
            raise CommandError(f"{path} does not hold the share that was written to it: check the disk")
