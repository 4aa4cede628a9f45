"""`minikms encrypt` and `minikms decrypt`: files and pipes of any size.

Owns: input and output; `Client.encrypt_stream` does the rest. Invariants: a file gets its name only after the whole
stream was processed; nothing is overwritten without `--force`; a failure after bytes went to a pipe shows in the exit
status.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

from cyclopts import Parameter

from minikms.cli.console import DaemonFlags, Json
from minikms.commands.output import print_json, progress_bar
from minikms.commands.usage import EXIT_FAILED, CommandError, PathText
from minikms.platform.sync import sync_file

if TYPE_CHECKING:
    from minikms.client.streams import StreamCopy, StreamSource

SUFFIX: Final = ".kms"

Source = Annotated[
    PathText,
    Parameter(help="A file, or - for standard input.", allow_leading_hyphen=True),  # for `-` itself; see `_check_usage`
]
Output = Annotated[
    PathText | None,
    Parameter(
        name=("--output", "-o"),
        help="Where to; - is standard output. Default: beside the file; from a pipe to a pipe.",
        allow_leading_hyphen=True,  # for `-` itself
    ),
]
Force = Annotated[bool, Parameter(name="--force", help="Replace a file that exists.", show_default=False)]


def encrypt(
    source: Source = "-",
    *,
    output: Output = None,
    key: Annotated[
        str | None, Parameter(help="A key of purpose data; default: the newest one, made at first use.")
    ] = None,
    force: Force = False,
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> None:
    """Encrypt a file to FILE.kms, or a pipe to a pipe.

    The result names its key, so `minikms decrypt` needs only the daemon. Exit status: 0 done, 1 refused, 2 something
    is missing.

    For example:
        minikms encrypt note
        tar c documents | minikms encrypt > documents.tar.kms
    """
    place = output or ("-" if source == "-" else source + SUFFIX)
    _check_usage(source, place, json=json, command="encrypt")
    with (
        daemon.client() as kms,
        _reading(source) as reading,
        _writing(place, output, force=force) as writing,
    ):
        copied = kms.encrypt_stream(reading, writing, key_id=key)
    _print_result(place, copied, json=json)


def decrypt(
    source: Source = "-",
    *,
    output: Output = None,
    force: Force = False,
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> None:
    """Decrypt what `minikms encrypt` made: FILE.kms to FILE, or a pipe to a pipe.

    An output file appears only after all of it was authenticated. Bytes written to a pipe are authenticated too, but
    the output is complete only if the exit status is 0. Exit status: 0 done, 1 the input was altered or cut short, or
    its key was refused, 2 something is missing.
    """
    place = output or ("-" if source.startswith("-") else _without_suffix(source))
    _check_usage(source, place, json=json, command="decrypt")
    with daemon.client() as kms, _reading(source) as reading, _writing(place, output, force=force) as writing:
        copied = kms.decrypt_stream(reading, writing)
    _print_result(place, copied, json=json)


def _print_result(place: str, copied: StreamCopy, *, json: bool) -> None:
    if json:
        print_json({"output": os.path.abspath(place), "bytes": copied.size, "key_id": copied.key_id})


def _check_usage(source: str, place: str, *, json: bool, command: str) -> None:
    """Refuses a source that is a mistyped flag, and two things on standard output. Raises CommandError."""
    if source.startswith("-") and source != "-":
        raise CommandError(
            f"unknown option: {source}; for a file of that name: ./{source}. See `minikms {command} --help`."
        )
    if json and place == "-":
        raise CommandError("--json goes to standard output, and so does the result: name a file with --output FILE")


def _without_suffix(source: str) -> str:
    if not source.endswith(SUFFIX) or source == SUFFIX:
        raise CommandError(f"{source} does not end in {SUFFIX}: say where to write with --output FILE, or --output -")
    return source[: -len(SUFFIX)]


@contextmanager
def _reading(source: str) -> Iterator[StreamSource]:
    """The source; a regular file with a progress bar, if standard error is a terminal. Raises CommandError."""
    if source == "-":
        if sys.stdin.isatty():
            raise CommandError("name a file, or pipe something in")
        with _progress(sys.stdin.buffer, source) as reading:
            yield reading
        return
    if os.path.isdir(source):
        raise CommandError(f"{source} is a directory; pack it first: tar c {source} | minikms encrypt")
    with _explained(source), open(source, "rb") as file, _progress(file, source) as reading:
        yield reading


@contextmanager
def _progress(file: BinaryIO, source: str) -> Iterator[StreamSource]:
    status = os.fstat(file.fileno())
    with progress_bar(Path(source).name, visible=stat.S_ISREG(status.st_mode), in_bytes=True) as report:
        yield _Reported(file, lambda done: report(done, status.st_size))


class _Reported:
    """A file that reports how many bytes were read."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file, self._report, self._done = file, report, 0

    def read(self, size: int, /) -> bytes:
        part = self._file.read(size)
        self._done += len(part)
        self._report(self._done)
        return part


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """A file that the caller named: an error about a file names this one, not one beside it, and gives no advice about
    the files of the key service. Raises CommandError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of the disk, or of a pipe
            raise
        raise CommandError(f"{error.strerror}: {place}") from None


@contextmanager
def _writing(place: str, flag: str | None, *, force: bool) -> Iterator[BinaryIO]:
    """Standard output, or a private file that gets its name at the end. `flag`: what --output says; only an explicit
    `-` writes to a terminal. Raises CommandError.
    """
    if place == "-":
        if flag is None and sys.stdout.isatty():
            raise CommandError(
                "this would write raw bytes to the terminal: name a file with --output FILE, or insist with --output -"
            )
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if not force and os.path.lexists(place):
        raise CommandError(f"{place} exists already; to replace it: --force", EXIT_FAILED)
    staging = f"{place}.{os.getpid()}.new"
    try:
        with _explained(place):
            with open(staging, "xb", opener=_private) as file:
                yield file
                file.flush()
                sync_file(file.fileno())
            (os.replace if force else os.link)(staging, place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staging)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
