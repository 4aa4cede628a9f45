"""What the commands share: flags, and the daemon's client.

Owns: the rule from an error to its text and exit status (`minikms.commands.usage`), and the flags of several commands:
names, help, environment variables. `minikms.commands.output` shows results.

Invariants: an error text says what happened, why, and what to do next; it goes to standard error and holds no key. A
flag wins over its variable, an empty variable counts as unset; no flag takes a key itself, only the path of its file.

It must never turn an error into a success, use the files of a data directory in the place of a daemon that does not
answer, or import what makes a start slow.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from minikms.cli.rootkey import VARIABLE as MASTER_KEY_VARIABLE
from minikms.commands import usage
from minikms.commands.usage import (
    EXIT_FAILED,
    EXIT_MISSING,
    SOCKET_VARIABLE,
    SOCKET_VARIABLES,
    CommandError,
    PathText,
    RootSource,
    found_socket,
    say_chosen,
)
from minikms.processes.flags import DATA_USER_ADVICE, UNLOCK_UIDS, UNLOCK_UIDS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from minikms.api.errors import KmsError
    from minikms.client import Client
    from minikms.roots.providers import RootProvider

DATA_DIR_VARIABLE: Final = "PROGRESSDB_KMS_DATA_DIR"
MASTER_KEY_FILE_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_FILE"
MASTER_KEY_OWNER_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_OWNER"
ROOT_VARIABLE: Final = "PROGRESSDB_MINIKMS_ROOT"
PIN_VARIABLE: Final = "PROGRESSDB_MINIKMS_PIN"
URL_VARIABLE: Final = "PROGRESSDB_KMS_URL"
URL_FILES: Final = ("ca", "cert", "key", "token_file")
"""Arguments of a client of a gateway; the variables are named alike: PROGRESSDB_KMS_CA, …"""
LONG_LIVED_VARIABLE: Final = "PROGRESSDB_KMS_LONG_LIVED_CERT"
ID_DIGITS_MAX: Final = 10
"""The digits of a user or group id, which has 32 bits."""
DAEMON_WAIT_SECONDS: Final = 0.5
"""For a daemon that is starting; a person notices a longer wait."""
ANSWER_SECONDS: Final = 10.0
PACKAGE_DATA_DIR: Final = "/var/lib/progressdb/minikms"
PACKAGE_INDEX_DIR: Final = "/var/lib/progressdb/auditor/index"
"""The directory of the index in the units of `deploy/systemd`."""

Socket = usage.Socket
ServerUid = usage.ServerUid
Json = usage.Json
DataDir = Annotated[
    PathText | None, Parameter(name="--data-dir", help=f"Directory of keys and audit log [{DATA_DIR_VARIABLE}].")
]
AuditDir = Annotated[
    PathText | None,
    Parameter(name="--audit-dir", help="Directory of the audit log, for an auditor: mode 2750, group of the auditor."),
]
MasterKeyFile = Annotated[
    Path | None, Parameter(name="--master-key-file", help=f"File with the root key [{MASTER_KEY_FILE_VARIABLE}].")
]
Root = Annotated[
    RootSource | None,
    Parameter(
        name="--root",
        show_choices=False,
        help="Where the root key is, instead of --master-key-file: file:PATH, fd:NUMBER, dev:, systemd-credential:NAME "
        f"or unlock:SOCKET; except for `serve` also shares:, which asks for shares [{ROOT_VARIABLE}].",
    ),
]
MasterKeyFd = Annotated[int | None, Parameter(name="--master-key-fd", show=False)]
Yes = Annotated[bool, Parameter(name=("--yes", "-y"), help="Don't ask.", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class DaemonFlags:
    """The flags for a running daemon: its socket, and the user that must serve it."""

    socket: Socket = None
    server_uid: ServerUid = None

    def client(self) -> Client:
        """A client of the daemon, with the errors of `daemon_client`."""
        return daemon_client(self.socket, self.server_uid)


@Parameter(name="*")
@dataclass(frozen=True)
class RootKey:
    """The flags for the place of a root key. `master_key_fd`: of one that was in the environment."""

    master_key_file: MasterKeyFile = None
    root_source: Root = None
    master_key_fd: MasterKeyFd = None

    def provider(self, data_dir: str | None = None, keyring_id: Callable[[], str] | None = None) -> RootProvider | None:
        """The provider of `chosen_source`, with its errors; None when no place is given. With `data_dir`, a development
        key beside it serves then. `keyring_id`: as in `named_root`.
        """
        from minikms.roots.providers import DevelopmentKey

        source = chosen_source(self)
        if source is not None:
            return named_root(source, data_dir, keyring_id)
        development = None if data_dir is None else DevelopmentKey(data_dir)
        return development if development is not None and development.path.exists() else None

    def required_provider(
        self, data_dir: str | None = None, keyring_id: Callable[[], str] | None = None
    ) -> RootProvider:
        """The same. Raises CommandError also when no place is given."""
        root = self.provider(data_dir, keyring_id)
        if root is None:
            raise CommandError("give the root key, as for the daemon: --master-key-file FILE, or --root SOURCE")
        return root


@Parameter(name="*")
@dataclass(frozen=True)
class DataFiles:
    """The flags for a data directory, and for its root key."""

    data_dir: DataDir = None
    root_key: RootKey = RootKey()

    @property
    def directory(self) -> str:
        """The data directory, with the errors of `chosen_data_dir`."""
        return chosen_data_dir(self.data_dir)

    def opened(self) -> tuple[str, RootProvider]:
        """The data directory and the provider of its root key. Raises CommandError, StartError."""
        return self.directory, self.root_key.required_provider(self.directory)


def complain(text: str) -> None:
    """One sentence on standard error."""
    from minikms.api.printable import clean

    print(f"minikms: {clean(text)}", file=sys.stderr)


def explained(error: Exception) -> tuple[str, int]:
    """The text and the exit status of an error that ends a command. An error that is a defect is raised again."""
    from minikms.api.errors import KmsError

    if isinstance(error, CommandError):
        return str(error), error.exit_status
    if isinstance(error, KmsError):
        return _with_advice(error)
    text = usage.explained_system(error, "minikms")
    return text + (f". {DATA_USER_ADVICE}." if isinstance(error, PermissionError) else ""), EXIT_MISSING


def _with_advice(error: KmsError) -> tuple[str, int]:
    from minikms.api import errors

    advice: dict[type[Exception], str] = {
        errors.KmsTimeoutError: "The daemon hangs, or systemd starts it again and again: its log says why (`journalctl "
        "-u minikms -n 20`). The request may have been carried out",
        errors.KmsUntrustedServerError: usage.UNTRUSTED_ADVICE,
        errors.AuditUnavailableError: "Free space on the file system of the audit log; see the runbook",
        errors.AuditLaggingError: "See the runbook",
        errors.KeyNotFoundError: "List the keys with `minikms keys list`",
        errors.StandbyError: "`minikms replica list` shows which: run this there, or name all addresses",
    }
    next_step = next((advice[kind] for kind in type(error).__mro__ if kind in advice), "")
    if "https://" in str(error):  # of a gateway: the text says what to do
        next_step = ""
    missing = errors.KeyNotFoundError | errors.InvalidRequestError | errors.StorageUnavailableError | errors.StartError
    judged = isinstance(error, errors.KmsRefusedError | errors.KmsUntrustedServerError) and not isinstance(
        error, missing
    )
    judged |= isinstance(error, errors.StartLaterError)
    text = str(error)
    if isinstance(error, errors.StorageUnavailableError) and isinstance(error.__cause__, OSError):
        text += f": {usage.system_error(error.__cause__)}"
    return f"{text}. {next_step}." if next_step else text, EXIT_FAILED if judged else EXIT_MISSING


def found_data_dir(flag: str | None, *, look: bool = True) -> str | None:
    """The flag, else the variable, else that of the units: then it says so. Without `look` the last is left out."""
    named = flag or os.environ.get(DATA_DIR_VARIABLE)
    if named or not look or not os.path.lexists(PACKAGE_DATA_DIR):
        return named
    say_chosen("--data-dir", PACKAGE_DATA_DIR)
    return PACKAGE_DATA_DIR


def chosen_socket(flag: str | None, *, must_exist: bool = True) -> str:
    """The socket, from `found_socket`. Raises CommandError when it has none."""
    path = found_socket(flag, look=must_exist)
    if path is None:
        raise CommandError(f"name the daemon's socket: --socket PATH, or {SOCKET_VARIABLE}")
    return path


def chosen_data_dir(flag: str | None, *, must_exist: bool = True) -> str:
    """The absolute path. Raises CommandError when `found_data_dir` has none, or the directory is missing."""
    path = found_data_dir(flag, look=must_exist)
    if path is None:
        raise CommandError(f"name the data directory: --data-dir DIR, or {DATA_DIR_VARIABLE}")
    if must_exist:
        try:
            os.scandir(path).close()
        except PermissionError:
            raise CommandError(f"this user may not read the directory {path}. {DATA_USER_ADVICE}.") from None
        except OSError:
            raise CommandError(f"there is no directory {path}") from None
    return os.path.abspath(path)


def chosen_key_file(key: RootKey) -> Path | None:
    """The flag, else the variable, else None. Raises CommandError when the environment has the root key too."""
    variable = os.environ.get(MASTER_KEY_FILE_VARIABLE)
    file = key.master_key_file if key.master_key_file is not None else Path(variable) if variable else None
    if file is not None and key.master_key_fd is not None:
        raise CommandError(
            f"both a root key and a file of one are given; unset one of {MASTER_KEY_VARIABLE} and "
            f"{MASTER_KEY_FILE_VARIABLE} (or --master-key-file)"
        )
    return file


def chosen_source(key: RootKey, *, rewritable: bool = False) -> str | None:
    """The source of the root key, as text; None when no place is given. The variable of `--root` counts unless
    --master-key-file is given.

    Raises CommandError when the root key is given twice, or not as a file that is to be rewritten; StartError for a
    text that is no source.
    """
    from minikms.roots.sources import parse_source

    is_free = key.root_source is None and key.master_key_file is None
    variable = os.environ.get(ROOT_VARIABLE) if is_free else None
    if source := key.root_source or variable:
        if (
            key.master_key_file is not None
            or key.master_key_fd is not None
            or (variable and os.environ.get(MASTER_KEY_FILE_VARIABLE))
        ):
            raise CommandError(
                f"the root key is given twice: give --root ({ROOT_VARIABLE}) or --master-key-file "
                f"({MASTER_KEY_FILE_VARIABLE}), and unset {MASTER_KEY_VARIABLE}"
            )
        if parse_source(source).name != "file" and rewritable:
            raise CommandError("--rewrite-master-key-file needs a root key in a file, by --master-key-file or --root")
        return source
    file = chosen_key_file(key)
    if rewritable and file is None:
        raise CommandError("--rewrite-master-key-file needs the key file that it is to rewrite: give --master-key-file")
    return f"file:{file}" if file is not None else None if key.master_key_fd is None else f"fd:{key.master_key_fd}"


def named_root(source: str, data_dir: str | None = None, keyring_id: Callable[[], str] | None = None) -> RootProvider:
    """The provider of the text of a source. `data_dir`: whose shares may be typed, whose keyring the unlock service is
    asked for, and what `dev:` lies beside. `keyring_id`: of the keyring that is to be opened, if it lies elsewhere.
    Raises StartError, CommandError.
    """
    from functools import partial

    from minikms.datadir import read_keyring, root_provider
    from minikms.policy.policy import parse_uids
    from minikms.roots.key_file import FileOwner
    from minikms.roots.sources import Source, parse_source
    from minikms.roots.typed_shares import TypedShares

    parsed = parse_source(source)
    if parsed == Source("shares", ""):
        return TypedShares(None if data_dir is None or keyring_id else partial(read_keyring, data_dir))
    owner = key_file_owner()
    uids = parse_uids(os.environ.get(UNLOCK_UIDS_VARIABLE) or UNLOCK_UIDS, source=UNLOCK_UIDS_VARIABLE)
    shared = None if owner is None else FileOwner(*owner)
    return root_provider(parsed, data_dir, shared=shared, unlock_uids=uids, keyring_id=keyring_id)


def key_file_owner(flag: str | None = None) -> tuple[int, int] | None:
    """Owner and group of a key file that its group may read: the flag, else the variable. Raises CommandError."""
    text = flag or os.environ.get(MASTER_KEY_OWNER_VARIABLE)
    if not text:
        return None
    ids = text.split(":")
    if len(ids) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= ID_DIGITS_MAX for part in ids):
        raise CommandError(
            f"the owner and group of the key file are two numbers, such as 0:991 ({MASTER_KEY_OWNER_VARIABLE})"
        )
    return int(ids[0]), int(ids[1])


def chosen_server_uids(flag: int | None) -> frozenset[int] | None:
    """`usage.server_uids`. Raises CommandError."""
    try:
        return usage.server_uids(flag)
    except ValueError as error:
        raise CommandError(str(error)) from None


def daemon_client(socket: str | None, server_uid: int | None, *, timeout_s: float = ANSWER_SECONDS) -> Client:
    """A client of the running daemon, which checks the daemon's user before it sends anything. It connects at its first
    call. Without `socket`, of the gateway that the environment names. Raises CommandError for a path that can't be a
    socket's, or a URL that can't be a gateway's.
    """
    from minikms.client import Client

    url = os.environ.get(URL_VARIABLE)
    if url and not socket:
        return _gateway_client(url, timeout_s)
    path = chosen_socket(socket)
    try:
        return Client(path, server_uids=chosen_server_uids(server_uid), timeout_s=timeout_s, wait_s=DAEMON_WAIT_SECONDS)
    except ValueError as error:
        raise CommandError(f"{error}: {path}") from None


def _gateway_client(url: str, timeout_s: float) -> Client:
    from minikms.client import Client

    if set_variable := next(filter(os.environ.get, SOCKET_VARIABLES), None):
        raise CommandError(f"both {set_variable} and {URL_VARIABLE} are set: unset one of them")
    files: dict[str, Any] = {name: os.environ.get(f"PROGRESSDB_KMS_{name.upper()}") or None for name in URL_FILES}
    allowed = os.environ.get(LONG_LIVED_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")
    try:
        return Client(url, **files, long_lived_cert=allowed, timeout_s=timeout_s, wait_s=DAEMON_WAIT_SECONDS)
    except ValueError as error:
        names = ", ".join(f"PROGRESSDB_KMS_{name.upper()}" for name in URL_FILES)
        raise CommandError(f"{error} ({URL_VARIABLE}, {names})") from None
