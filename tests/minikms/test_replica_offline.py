"""`minikms.offline`: the first of several hosts, a host that joins, and one that is alone again."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import ConflictError, InvalidRequestError, StartError
from minikms.crypto.aead import NonceSource
from minikms.custody import replica_file
from minikms.custody.replica_file import Mark
from minikms.keys import keyring, members
from minikms.keys.keyring import AuditState, Body
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from minikms.offline import init_replica, join_replica, leave_replica, rotate_audit_key
from minikms.platform.files import closed_after, open_directory
from minikms.roots.providers import KeyFile
from minikms_daemon.embedded import EmbeddedClient, EmbeddedError
from tests import needs
from tests.harness.vaults import key_file, opened_vault

CHANGING = (
    "mkdir",
    "rename",
    "replace",
    "link",
    "unlink",
    "write",
    "writev",
    "pwrite",
    "ftruncate",
    "fsync",
    "fdatasync",
)


def key(directory: Path) -> KeyFile:
    return KeyFile(key_file(directory))


def body_of(directory: Path) -> Body:
    return keyring.parse_file((directory / "keyring.json").read_bytes())[0]


def mark_of(directory: Path) -> Mark | None:
    with closed_after(open_directory(str(directory))) as descriptor:
        stored = replica_file.read(descriptor)
    return None if stored is None else stored.mark


def lines(directory: Path, kind: str) -> list[dict[str, object]]:
    events = [json.loads(line)["event"] for line in (directory / "minikms-audit.log").read_text().splitlines()]
    return [event["facts"] for event in events if event["type"] == kind]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of one host, with a key."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            await one.make(1)

    asyncio.run(main())
    return tmp_path / "d"


async def usable(directory: Path) -> None:
    """A start opens its keys and goes on with its log."""
    async with opened_vault(directory) as one:
        one.log.commit()
        assert one.vault.unlocked.member_id == ""
        key_ids = [path.stem for path in (directory / "kms-deks").iterdir()]
        assert len(one.keys(key_ids)) == 1


# --- the first host -------------------------------------------------------------------------------------------------


async def test_the_first_host_has_a_mark_that_may_fill_a_database(directory: Path) -> None:
    before = body_of(directory)
    mark = init_replica(str(directory), key(directory), "a")
    assert mark == mark_of(directory) == Mark(member_id="m1", name="a", begins=True)
    body = body_of(directory)
    [first] = body.members
    assert (first.name, first.slot_id, first.audit, body.epoch) == ("a", "s1", None, before.epoch + 1)
    assert body.audit_keys == before.audit_keys
    assert lines(directory, "replica_init") == [{"member_id": "m1", "name": "a"}]
    with pytest.raises(StartError, match="this is one of several"):
        init_replica(str(directory), key(directory), "b")
    with pytest.raises(StartError, match=r"the audit key changes only where .*minikms replica "):
        rotate_audit_key(str(directory), key(directory))
    with pytest.raises(EmbeddedError, match="host of several, of which one serves"):
        await EmbeddedClient.open(str(directory), master_key_file=key_file(directory))
    with pytest.raises(StartError, match="wrong root key"):
        leave_replica(str(directory), key(directory.with_name("another")))


@pytest.mark.parametrize("name", ["", "A", "a b", "a\n", "-a", "a" * 64])
async def test_the_name_of_a_host_is_one_of_a_host(directory: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        init_replica(str(directory), key(directory), name)
    with pytest.raises(InvalidRequestError):
        join_replica(str(tmp_path / "new"), key(tmp_path / "new"), invitation(), name)
    assert mark_of(directory) is None and not (tmp_path / "new").exists()


async def test_a_keyring_of_several_hosts_without_its_mark_is_refused(directory: Path) -> None:
    init_replica(str(directory), key(directory), "a")
    with_another_host(directory)
    (directory / replica_file.NAME).unlink()
    with pytest.raises(StartError, match="is missing: put it back"):  # it would serve beside the others
        await usable(directory)
    with pytest.raises(StartError, match="is missing: put it back"):
        init_replica(str(directory), key(directory), "a")


# --- alone again ----------------------------------------------------------------------------------------------------


def with_another_host(directory: Path, *, own: bool = False) -> None:
    """The keyring gets a second member. `own`: the directory becomes that of this one, and the log its own."""
    with SecretArena(64, force_fallback=True) as arena:
        data = (directory / "keyring.json").read_bytes()
        root = memoryview(bytes.fromhex(key_file(directory).read_text()))
        unlocked, slot = UnlockedKeyring.open(arena, root, data, nonces=NonceSource().next, member_id="m1")
        body = unlocked.body
        if own:
            audit = AuditState(body.audit_keys)
            body = keyring.with_audit(
                body, "m1", audit_keys=unlocked.make_member_audit(fill_random, at=body.updated_at).audit_keys
            )
        else:
            audit = unlocked.make_member_audit(fill_random, at=body.updated_at)
        other = keyring.Member("m7", "b", slot.slot_id, body.updated_at, body.key_version, audit)
        unlocked.body = keyring.next_epoch(body, at=body.updated_at, members=(*body.members, other))
        (directory / "keyring.json").write_bytes(unlocked.encode(unlocked.body))
        if own:
            with closed_after(open_directory(str(directory))) as descriptor:
                replica_file.write(descriptor, Mark(member_id="m7", name="b", number=5, term=2), unlocked)
        unlocked.release()


@pytest.mark.parametrize("own", [False, True])
async def test_a_host_that_leaves_is_as_any_single_one(directory: Path, own: bool) -> None:
    """The first one, and one that has joined: its log goes on under its own audit keys."""
    init_replica(str(directory), key(directory), "a")
    with_another_host(directory, own=own)
    before = body_of(directory).audit_of("m7" if own else "m1")
    left = leave_replica(str(directory), key(directory))
    assert (left.member_id, left.number) == (("m7", 5) if own else ("m1", 0))
    body = body_of(directory)
    assert (body.members, mark_of(directory)) == ((), None)
    assert body.audit_keys[:-1] == before.audit_keys, "and a fresh key, which no other host has seen"
    assert lines(directory, "replica_leave") == [{"member_id": left.member_id, "number": left.number}]
    await usable(directory)
    with pytest.raises(StartError, match="it is that of one host"):
        leave_replica(str(directory), key(directory))
    init_replica(str(directory), key(directory), "again")


async def test_a_mark_of_another_keyring_is_refused(directory: Path, tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "other"):
        pass
    for one in (directory, tmp_path / "other"):
        init_replica(str(one), key(one), "a")
    shutil.copy(tmp_path / "other" / replica_file.NAME, directory / replica_file.NAME)
    before = body_of(directory)
    with pytest.raises(StartError, match="belongs to another keyring"):
        leave_replica(str(directory), key(directory))
    assert body_of(directory) == before


# --- killed anywhere ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of a system call, and of all that follow."""


@contextlib.contextmanager
def killed_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`number` calls that change something succeed."""
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            if len(calls) >= number:
                raise Killed
            calls.append(name)
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    with monkeypatch.context() as patch:
        for name in CHANGING:
            counted(name)
        yield calls


async def prepared(directory: Path, change: str) -> None:
    if change == "leave":
        init_replica(str(directory), key(directory), "a")
        with_another_host(directory, own=True)


async def judge(place: Path, change: str, again: Callable[[], object]) -> None:
    """A change that was interrupted in `place` is done, or is done when it is repeated."""
    if (mark_of(place) is None) is (change == "init"):
        again()
    assert (mark_of(place) is None) is (change == "leave")
    assert [member.name for member in body_of(place).members] == ([] if change == "leave" else ["a"])
    if change == "leave":
        await usable(place)


@pytest.mark.parametrize("change", ["init", "leave"])
async def test_a_change_that_is_killed_anywhere_is_repeated(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    await prepared(directory, change)

    def act(place: Path) -> object:
        return init_replica(str(place), key(place), "a") if change == "init" else leave_replica(str(place), key(place))

    shutil.copy(key_file(directory), tmp_path / "killed.key")
    shutil.copy(key_file(directory), tmp_path / "left.key")
    killed, left = tmp_path / "killed", tmp_path / "left"
    for number in itertools.count():
        shutil.copytree(directory, killed)
        with killed_after(number, monkeypatch), contextlib.suppress(Killed):
            act(killed)
            break
        killed.rename(tmp_path / f"killed-{number}")
        shutil.copytree(tmp_path / f"killed-{number}", left)  # whose lock nobody holds
        await judge(left, change, partial(act, left))
        shutil.rmtree(left)
    assert number > 8


@pytest.mark.torture
@pytest.mark.parametrize("change", ["init", "leave"])
async def test_a_command_that_is_killed_at_a_call_is_repeated(directory: Path, tmp_path: Path, change: str) -> None:
    strace = needs.program("strace")
    await prepared(directory, change)
    words = [sys.executable, "-m", "minikms", "replica", change, *(["--name", "a"] if change == "init" else ["--yes"])]
    points = 0
    for calls in ("?rename,renameat,renameat2", "write,pwrite64", "fsync,fdatasync", "?unlink,unlinkat", "ftruncate"):
        for number in itertools.count(1):
            place = tmp_path / f"killed-{points}"
            shutil.copytree(directory, place)
            shutil.copy(key_file(directory), key_file(place))
            command = [*words, "--data-dir", str(place), "--master-key-file", str(key_file(place))]
            inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={number}"]
            done = subprocess.run(
                [strace, "-f", "-o", "/dev/null", *inject, *command], check=False, capture_output=True
            )
            await judge(place, change, partial(subprocess.run, command, check=True, capture_output=True))
            shutil.rmtree(place)
            if done.returncode == 0:
                break
            points += 1
    assert points > 8


# --- a host that joins ----------------------------------------------------------------------------------------------


def invitation(**changes: object) -> api.ReplicaInvitation:
    """Of a keyring that nobody has."""
    with SecretArena(64, force_fallback=True) as arena:
        unlocked = UnlockedKeyring.create(
            arena, memoryview(os.urandom(32)), keyring_id="kr_0011223344556677", provider="file",
            nonces=NonceSource().next, fill_random=fill_random, at="2026-11-24T15:00:00Z",
        )  # fmt: skip
        public_key = unlocked.invitation_key()
        unlocked.release()
    fields: dict[str, object] = {
        "format": members.INVITATION_FORMAT, "keyring_id": "kr_0011223344556677", "member_id": "m9", "slot_id": "s9",
        "public_key": public_key, "seals": 3,
    } | changes  # fmt: skip
    return api.ReplicaInvitation(**fields)  # type: ignore[arg-type]  # some are wrong on purpose


def test_a_host_that_joins_gets_a_mark_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "new"
    requests = [join_replica(str(place), key(place), invitation(), "b") for _ in range(2)]
    assert sorted(path.name for path in place.iterdir()) == ["kms-replica.json", "lock"]
    assert mark_of(place) == Mark(member_id="m9", name="b", seals=3)
    assert requests[0].sealed_auth != requests[1].sealed_auth
    one, two = ({**api_fields(request), "sealed_auth": ""} for request in requests)
    assert one == two
    with pytest.raises(StartError):  # it makes no keyring of its own
        leave_replica(str(place), key(place))


def api_fields(request: api.AddReplicaRequest) -> dict[str, str]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "minikms-keyring"},
        {"member_id": "m8"},
        {"slot_id": "9"},
        {"public_key": b""},
        {"seals": -1},
        {"public_key": b"\xff" * 1216},
    ],
)
def test_what_is_no_invitation_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        join_replica(str(tmp_path / "new"), key(tmp_path / "new"), invitation(**changes), "b")
    assert not (tmp_path / "new" / replica_file.NAME).exists()


async def test_a_host_joins_with_an_empty_directory_only(directory: Path) -> None:
    with pytest.raises(ConflictError, match="is not empty"):
        join_replica(str(directory), key(directory), invitation(), "b")


def test_a_host_that_joins_makes_the_key_file_that_is_missing(tmp_path: Path) -> None:
    place, made = tmp_path / "new", tmp_path / "root.key"
    join_replica(str(place), KeyFile(made), invitation(), "b", key_file=made)
    text = made.read_text()
    assert (len(text), made.stat().st_mode & 0o777) == (65, 0o600)
    join_replica(str(place), KeyFile(made), invitation(), "b", key_file=made)
    assert made.read_text() == text
