"""`minikms encrypt` and `minikms decrypt`: files and pipes of any size.

Owns: input, output, and the choice of the key; the format is `minikms.crypto.stream`. Invariants: each stream has a
data key of its own, made by the daemon, and the copy of it here is zeroed at the end (the client's answer is another
object, see docs/threat-model.md); a file gets its name only after the whole stream was processed; nothing is
overwritten without `--force`; a failure after bytes went to a pipe shows in the exit status.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

from cyclopts import Parameter

from minikms.cli.console import DaemonFlags, Json
from minikms.commands.output import print_json, progress_bar
from minikms.commands.usage import EXIT_FAILED, CommandError, PathText
from minikms.platform.sync import sync_file

if TYPE_CHECKING:
    from minikms.client import Client

DATA_KEY_OWNER: Final = "minikms.files"
"""The thread id of the key of purpose `data` that is made when none is chosen."""
READ_BYTES: Final = 64 * 1024
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
    from minikms.crypto.stream import WRAP_AAD, StreamHeader, seal_stream

    place = output or ("-" if source == "-" else source + SUFFIX)
    _check_usage(source, place, json=json, command="encrypt")
    with (
        daemon.client() as kms,
        _reading(source) as reading,
        _writing(place, output, force=force) as writing,
    ):
        key_id = key or _data_key_owner(kms)
        made = kms.generate_data_key(key_id, aad=WRAP_AAD)
        if not isinstance(made.plaintext, bytes):
            raise CommandError("the daemon gave no data key", EXIT_FAILED)
        with _zeroed(made.plaintext) as data_key:
            header = StreamHeader(key_id, made.ciphertext)
            size = _copy(seal_stream(data_key, header, _parts(reading, source)), writing)
    if json:
        print_json({"output": os.path.abspath(place), "bytes": size, "key_id": key_id})


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
    from minikms.crypto.stream import WRAP_AAD, open_stream, split_header

    place = output or ("-" if source.startswith("-") else _without_suffix(source))
    _check_usage(source, place, json=json, command="decrypt")
    with daemon.client() as kms, _reading(source) as reading:
        header, rest = split_header(_parts(reading, source))
        opened = kms.decrypt(header.key_id, header.wrapped_key, aad=WRAP_AAD)
        with _zeroed(opened) as data_key, _writing(place, output, force=force) as writing:
            size = _copy(open_stream(data_key, header, rest), writing)
    if json:
        print_json({"output": os.path.abspath(place), "bytes": size, "key_id": header.key_id})


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


def _data_key_owner(kms: Client) -> str:
    """The newest active key of DATA_KEY_OWNER; a new one at the first use."""
    newest, cursor = "", None
    while True:
        answer = kms.list_keys(thread_id=DATA_KEY_OWNER, state="active", cursor=cursor)
        newest = max([newest, *(key.key_id for key in answer.keys if key.purpose == "data")])
        cursor = answer.next_cursor
        if cursor is None:
            return newest or kms.create_dek_for_thread(DATA_KEY_OWNER, purpose="data").key_id


@contextmanager
def _zeroed(key: bytes) -> Iterator[memoryview]:
    """A view of a copy of the key, zeroed at the end."""
    copy = bytearray(key)
    view = memoryview(copy)
    try:
        yield view
    finally:
        view[:] = bytes(len(copy))


@contextmanager
def _reading(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        if sys.stdin.isatty():
            raise CommandError("name a file, or pipe something in")
        yield sys.stdin.buffer
        return
    if os.path.isdir(source):
        raise CommandError(f"{source} is a directory; pack it first: tar c {source} | minikms encrypt")
    with _explained(source), open(source, "rb") as file:
        yield file


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
def _writing(place: str, given: str | None, *, force: bool) -> Iterator[BinaryIO]:
    """Standard output, or a private file that gets its name at the end. `given`: what --output says; only an explicit
    `-` writes to a terminal. Raises CommandError.
    """
    if place == "-":
        if given is None and sys.stdout.isatty():
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


def _parts(file: BinaryIO, source: str) -> Iterator[bytes]:
    """The file, part by part; with a progress bar if it is a regular file and standard error is a terminal."""
    status = os.fstat(file.fileno())
    done = 0
    with progress_bar(Path(source).name, shown=stat.S_ISREG(status.st_mode), in_bytes=True) as progress:
        while part := file.read(READ_BYTES):
            yield part
            done += len(part)
            progress(done, status.st_size)


def _copy(parts: Iterable[bytes], writing: BinaryIO) -> int:
    """The number of bytes that were written."""
    size = 0
    for part in parts:
        size += writing.write(part)
    return size
