"""Setting the unlock service up: `minikms-unlock configure`, `test` by its provider, and `doctor`.

Owns: the order of the steps of `configure`, and the checks of `doctor`. Each step can be interrupted, and a second run
goes on: the wrapped key is durable before anything names it, then root pins it, then the keyring takes it, then it is
proved. Invariants: no slot is removed; no wrapped key is replaced that the pin file or the keyring names; the root key
under which the key service runs is pinned already. A doctor changes nothing. It must never keep a root key.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from minikms.api.errors import StartError, StartLaterError
from minikms.commands.usage import system_error
from minikms.crypto import roots
from minikms.memory import SecretArena, fill_random
from minikms.memory.process import forbid_dumps
from minikms.platform.files import closed_after, open_directory
from minikms.platform.trusted_file import ROOT_UID
from minikms.roots.pin import PinFile
from minikms_tokens import TokenError, Wrapper, open_wrapper
from minikms_unlock.files import (
    NAME,
    Config,
    default_config,
    make_config,
    owner_of,
    read_config,
    read_wrapped,
    unwrap_into,
    write_wrapped,
)
from minikms_unlock.session import text_of

if TYPE_CHECKING:
    from minikms import api
    from minikms.client import Client
    from minikms.client.calls import OneTimeKey


class Configured(NamedTuple):
    """`slot`: opens under the wrapped key. `done`: the steps of this run. `others`: slots in use until now.
    `of_package`: its unlock service has the names of the package.
    """

    slot: api.RootAnswer
    done: list[str]
    others: list[str]
    of_package: bool


def configure(source: str, path: Path, kms: Client) -> Configured:
    """Makes, pins, adds and tests a root key. Errors say what to do; those of provider and disk pass through."""
    if os.geteuid() != ROOT_UID:
        raise StartError("only root may pin a root key: run this as root")
    forbid_dumps()
    is_new, done = not os.path.lexists(path), []
    config = default_config(source) if is_new else _config_for(source, path)
    owner_of(config.directory)
    pin, slots = PinFile(Path(config.pin)), kms.list_roots().roots
    keyring_id = _keyring_id(kms, pin, slots)
    with ExitStack() as stack:
        lock = stack.enter_context(closed_after(open_directory(config.directory)))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartLaterError("another `minikms-unlock configure` runs for this directory") from None
        key = stack.enter_context(stack.enter_context(SecretArena(1)).allocate()).view
        wrapper = open_wrapper(source)
        candidate = _found(config, keyring_id, wrapper, key)
        if not candidate or not (pin.read().names(key) or _slot_of(key, slots)):  # an earlier run did not get that far
            _make(config, keyring_id, wrapper, key)
            done.append("wrapped")
        if pin.add(key, keyring_id) != "known":
            done.append("pinned")
        slot = _slot_of(key, slots)
        if slot is None:
            with text_of(key) as text:
                slot = kms.add_root(text, provider=source.partition(":")[0])
            done.append("added")
        with text_of(key) as text:
            slot = kms.test_root(slot.slot_id, text)
    if is_new:
        make_config(path, config)
        done.append("configured")
    others = [each.slot_id for each in slots if each.in_use and each.slot_id != slot.slot_id]
    return Configured(slot, done, others, config.directory == default_config(source).directory)


@contextmanager
def root_of_provider(source: str, path: Path) -> Iterator[OneTimeKey]:
    """The text of the root key that the provider opens, zeroed at the end. Raises StartError, TokenError."""
    forbid_dumps()
    config = _config_for(source, path)
    with SecretArena(1) as arena, arena.allocate() as key:
        unwrap_into(config, None, key.view)
        with text_of(key.view) as text:
            yield text


def next_steps(configured: Configured, source: str, path: Path, unlock_socket: str) -> list[str]:
    """For people. A service with other names, such as that of a tenant, has other units."""
    opens = f"Slot {configured.slot.slot_id} opens under the root key {configured.slot.fingerprint} of this source."
    if not configured.of_package:
        return [opens]
    return [
        f"{opens} Next, as root:",
        "  systemctl enable --now minikms-unlock.socket",
        f"  echo PROGRESSDB_MINIKMS_ROOT=unlock:{unlock_socket} >> /etc/progressdb/minikms.env",
        "  systemctl restart minikms.service",
        f"  minikms-unlock test {configured.slot.slot_id} {shlex.quote(source)} --config {shlex.quote(str(path))}",
        *(
            f"  minikms root remove {slot_id}  "
            f"# if the daemon was started under {configured.slot.slot_id}: minikms root list"
            for slot_id in configured.others
        ),
    ]


def _config_for(source: str, path: Path) -> Config:
    config = read_config(path)
    if config.source != source:
        raise StartError(f"{path} names another source: for this one give a --config with another directory")
    return config


def _slot_of(key: memoryview, slots: list[api.RootAnswer]) -> api.RootAnswer | None:
    fingerprint = roots.fingerprint(key)
    return next((slot for slot in slots if slot.fingerprint == fingerprint), None)


def _keyring_id(kms: Client, pin: PinFile, slots: list[api.RootAnswer]) -> str:
    """The keyring id of the key service. Refuses where a restart of the key service with the pin file would fail."""
    keyring_id, pins = kms.status().keyring_id, pin.read()
    if keyring_id != pins.keyring_id:
        raise StartError(
            f"{pin.path} is for keyring {pins.keyring_id}, the key service has {keyring_id or 'none open'}"
        )
    for slot in slots:
        if slot.in_use and slot.fingerprint not in pins.pins:
            raise StartError(
                f"{pin.path} does not name the root key {slot.fingerprint}, under which the key service runs: first "
                "run, as root, `minikms pin add SOURCE`"
            )
    return keyring_id


def _found(config: Config, keyring_id: str, wrapper: Wrapper, into: memoryview) -> bool:
    """Whether there is a wrapped key, which is in `into` then. Raises StartError, TokenError."""
    if not os.path.lexists(Path(config.directory, NAME)):
        return False
    wrapped = read_wrapped(config)
    if wrapped.keyring_id != keyring_id:
        raise StartError(f"{NAME} in {config.directory} is for keyring {wrapped.keyring_id}: move it away")
    wrapper.unwrap(wrapped.blob, keyring_id, into)
    return True


def _make(config: Config, keyring_id: str, wrapper: Wrapper, key: memoryview) -> None:
    """A fresh key in `key`, wrapped in its file. Raises StartError if the provider does not give it back."""
    fill_random(key)
    blob = wrapper.wrap(key, keyring_id)
    with SecretArena(1) as arena, arena.allocate() as again:
        wrapper.unwrap(blob, keyring_id, again.view)
        if not hmac.compare_digest(key, again.view):
            raise StartError("the provider gives another key back than it got: nothing was changed")
    write_wrapped(config, keyring_id, blob)


# --- doctor -----------------------------------------------------------------------------------------------------------


class Check(msgspec.Struct, frozen=True):
    """What one check found."""

    level: Literal["ok", "problem"]
    area: str
    what: str


def examine(path: Path, socket: str) -> Iterator[Check]:
    """Every check, for the user of the service. Raises StartError where the configuration can't be read."""
    forbid_dumps()
    config = read_config(path)
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("configuration", lambda: _configuration(config, path)),
        ("socket", lambda: _socket(socket)),
        ("directory", lambda: _directory(config)),
        (NAME, lambda: f"of keyring {read_wrapped(config).keyring_id}"),
        ("pin file", lambda: f"of keyring {PinFile(Path(config.pin)).read().keyring_id}"),
        ("source", lambda: _source(config)),
        ("provider", lambda: _provider(config)),
    )
    for area, check in checks:
        try:
            yield Check("ok", area, check())
        except (StartError, TokenError) as error:
            yield Check("problem", area, str(error))
        except OSError as error:
            yield Check("problem", area, system_error(error))


def _configuration(config: Config, path: Path) -> str:
    if path.stat().st_uid != ROOT_UID:
        raise StartError(f"{path} does not belong to root: chown root: {path}")
    return f"the root key goes to uid {config.uid}"


def _socket(path: str) -> str:
    if not os.path.lexists(path):
        raise StartError(f"there is no {path}: systemctl enable --now minikms-unlock.socket")
    mode = os.lstat(path).st_mode
    if not stat.S_ISSOCK(mode) or mode & stat.S_IWOTH:
        raise StartError(f"{path} is no socket, or is open to all users: SocketMode=0660")
    return path


def _directory(config: Config) -> str:
    status = owner_of(config.directory)
    if status.st_uid != os.geteuid():
        raise StartError(f"{config.directory} belongs to uid {status.st_uid}: run this as that user, with runuser(1)")
    return config.directory


def _source(config: Config) -> str:
    open_wrapper(config.source)
    return f"{config.source.partition(':')[0]}: its library or program is there"


def _provider(config: Config) -> str:
    with SecretArena(1) as arena, arena.allocate() as key:
        unwrap_into(config, None, key.view)
    return "opens the root key, which the pin file names"
