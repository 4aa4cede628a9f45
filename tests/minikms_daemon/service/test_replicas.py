"""Hosts that are added and removed: over a real directory, with the newcomer's own request and root key."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from minikms import api
from minikms.api import ROLES
from minikms.api.base64 import encode_text
from minikms.api.errors import (
    ConflictError,
    KmsRefusedError,
    NotFoundError,
    NotPinnedError,
    StartError,
)
from minikms.audit import Event
from minikms.crypto import roots, slots
from minikms.crypto.aead import NonceSource
from minikms.custody.vault import permitted
from minikms.keys import members, root_slots
from minikms.keys.keyring import Body
from minikms.keys.unlocked import UnlockedKeyring
from minikms.offline import init_replica, join_replica
from minikms.policy.principal import Principal
from minikms.roots.pin import PinFile
from minikms.roots.providers import KeyFile
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.replicas import ReplicaVerbs
from minikms_daemon.service.roots import RootVerbs
from tests import needs
from tests.harness.vaults import OpenedVault, SilentAudit, key_file, opened_vault
from tests.harness.verb_requests import example
from tests.harness.waiting import WAIT_S_MAX

SPARE = bytes(range(40, 72))


class KeptAudit(SilentAudit):
    """Keeps each event that a verb has written by itself."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def add_written(self, event: Event, *, durable: bool) -> None:
        assert durable
        self.events.append(event)


class Serving:
    """The first host, as it serves. Its mark is put aside: here is no database that would confirm a change first."""

    def __init__(self, one: OpenedVault, base: Path, pin: PinFile | None) -> None:
        self.one = one
        self.base = base
        self.audit = KeptAudit()
        table = VerbTable(self.audit)
        self.keks = keks = one.kek_verbs(table)
        keks.pin = pin
        self.roots = RootVerbs(keks=keks, in_use_slot_id="s1")
        self.verbs = ReplicaVerbs(keks=keks, seals=lambda: 3)

    @property
    def body(self) -> Body:
        return self.one.vault.keyring.body

    def invite(self) -> api.ReplicaInvitation:
        answer = self.verbs.invite(api.Request(), Event(type="invite_replica", actor="a"))
        return msgspec.json.decode(msgspec.json.encode(answer), type=api.ReplicaInvitation)

    def request(self, name: str = "b", invitation: api.ReplicaInvitation | None = None) -> api.AddReplicaRequest:
        """What the new host of this name asks for."""
        directory = self.base / name
        return join_replica(str(directory), KeyFile(key_file(directory)), invitation or self.invite(), name)

    async def add(self, request: api.AddReplicaRequest) -> Event:
        """The last audit event."""
        event = Event(type="add_replica", actor="a")
        await self.verbs.add(request, event, permitted)
        return event

    async def remove(self, member_id: str) -> api.ReplicaAnswer:
        return await self.verbs.remove(api.MemberRequest(member_id), Event(type="remove_replica", actor="a"), permitted)

    def opened_by(self, name: str) -> UnlockedKeyring:
        """The keyring as the host of this name opens it, with its own root key. Raises StartError."""
        root = memoryview(bytes.fromhex(key_file(self.base / name).read_text()))
        data = (self.one.directory / "keyring.json").read_bytes()
        [member_id] = [one.member_id for one in self.body.members if one.name == name] or [""]
        return UnlockedKeyring.open(self.one.arena, root, data, nonces=NonceSource().next, member_id=member_id)[0]


@asynccontextmanager
async def serving(base: Path, pin: PinFile | None = None) -> AsyncIterator[Serving]:
    directory = base / "a"
    async with opened_vault(directory):
        pass
    init_replica(str(directory), KeyFile(key_file(directory)), "a")
    (directory / "kms-replica.json").rename(base / "mark")
    async with opened_vault(directory, slots=256) as one:
        one.vault.unlocked.member_id = members.FIRST_ID
        made = Serving(one, base, pin)
        yield made
        await made.keks.stop()
        await one.removal.stop()


async def test_an_added_host_opens_the_keyring_under_its_own_root(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        request = host.request()
        event = await host.add(request)
        first, second = host.body.members
        assert (first.member_id, first.name, first.audit) == ("m1", "a", None)
        assert (second.member_id, second.name, second.slot_id) == (request.member_id, "b", request.slot_id)
        with open(tmp_path / "b.key") as file:
            assert file.read().strip() not in msgspec.json.encode(request).decode() + repr(request)
        opened = host.opened_by("b")
        assert opened.keyring_key.view == host.one.vault.unlocked.keyring_key.view
        assert [key.version for key in opened.audit.audit_keys] == [1]
        assert opened.audit.current.public_key != host.body.audit_keys[-1].public_key
        opened.release()
        facts = {"member_id": request.member_id, "name": "b", "fingerprint": request.fingerprint}
        [begun] = host.audit.events
        assert (begun.detail, begun.facts) == ("begun", facts | {"slot_id": request.slot_id})
        assert event.facts == begun.facts | {"epoch": host.body.epoch}


def digest(request: api.AddReplicaRequest) -> str:
    """What people compare."""
    return members.newcomer(request).digest


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("keyring_id", "kr_0000000000000000", "conflict"),
        ("member_id", "m1", "invalid_request"),
        ("member_id", "b", "invalid_request"),
        ("name", "a", "conflict"),
        ("name", "B", "invalid_request"),
        ("name", "", "invalid_request"),
        ("name", "b\n", "invalid_request"),
        ("slot_id", "s1", "invalid_request"),
        ("slot_id", "x", "invalid_request"),
        ("fingerprint", "", "invalid_request"),
        ("fingerprint", "0" * 15 + "G", "invalid_request"),
        ("provider", "", "invalid_request"),
        ("provider", "a" * 33, "invalid_request"),
        ("commitment", encode_text(bytes(31)), "invalid_request"),
        ("commitment", encode_text(bytes(33)), "too_large"),
        ("commitment", "=", "invalid_request"),
        ("public_key", "", "invalid_request"),
        ("public_key", encode_text(b"\xff" * 1216), ""),
        ("sealed_auth", "", "invalid_request"),
        ("sealed_auth", encode_text(bytes(slots.SEALED_BYTES)), ""),
    ],
)
async def test_an_altered_request_is_refused_and_changes_nothing(
    tmp_path: Path, field: str, value: object, code: str
) -> None:
    async with serving(tmp_path) as host:
        request, before, in_use = host.request(), host.body, host.one.arena.in_use
        with pytest.raises(KmsRefusedError) as refused:
            await host.add(msgspec.structs.replace(request, **{field: value}))
        assert refused.value.code == code or not code
        assert (host.body, host.one.arena.in_use) == (before, in_use)
        await host.add(request)  # and leaves nothing in the way of the true one


async def test_the_slot_and_the_member_have_the_numbers_of_the_invitation(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        request = host.request()
        for number in (0, 1, host.body.epoch + 2, 10**19 - 1):
            other = msgspec.structs.replace(request, slot_id=f"s{number}", member_id=f"m{number}")
            with pytest.raises(KmsRefusedError):
                await host.add(other)
        assert len(host.body.members) == 1


async def test_each_altered_field_changes_what_people_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host that serves can't tell an attacker's public key from the true one: the fingerprint of a root key says
    nothing about it.
    """
    async with serving(tmp_path) as host:
        invitation = host.invite()
        request = host.request("b", invitation)
        with monkeypatch.context() as forging:
            forging.setattr(roots, "fingerprint", lambda root: request.fingerprint)
            forged = host.request("c", invitation)
        changes = [{field: getattr(forged, field)} for field in ("commitment", "public_key", "sealed_auth")]
        changes += [{"keyring_id": "kr_0"}, {"slot_id": "s9", "member_id": "m9"}, {"fingerprint": "0" * 16}, {}]
        assert len({digest(msgspec.structs.replace(request, **change)) for change in changes}) == len(changes)
        await host.add(msgspec.structs.replace(forged, name="b"))
        with pytest.raises(StartError, match="does not belong to this root key"):
            host.opened_by("b")


async def test_a_request_adds_one_host_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        invitation = host.invite()
        request = host.request("b", invitation)
        await host.add(request)
        with pytest.raises(ConflictError, match="opens the keyring already"):
            await host.add(request)
        with pytest.raises(ConflictError, match="the invitation is used already"):
            await host.add(host.request("c", invitation))
        with pytest.raises(ConflictError, match="has the name b already"):
            await host.add(msgspec.structs.replace(host.request("c"), name="b"))
        await host.remove(request.member_id)
        with pytest.raises(ConflictError):
            await host.add(request)
        assert [member.name for member in host.body.members] == ["a"]


async def test_a_request_for_the_invitation_of_another_keyring_is_refused(tmp_path: Path) -> None:
    """Also if it names this keyring: what was sealed for the other one does not open here."""
    (tmp_path / "other").mkdir()
    async with serving(tmp_path / "other") as other:
        foreign = other.invite()
    async with serving(tmp_path) as host:
        with pytest.raises(ConflictError, match="for another keyring"):
            await host.add(host.request("b", foreign))
        mixed = msgspec.structs.replace(host.invite(), public_key=foreign.public_key)
        with pytest.raises(KmsRefusedError):
            await host.add(host.request("c", mixed))
        assert len(host.body.members) == 1


async def test_there_is_a_limit_of_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MEMBERS_MAX", 2)
    async with serving(tmp_path) as host:
        await host.add(host.request("b"))
        with pytest.raises(ConflictError, match="has 2 hosts"):
            await host.add(host.request("c"))


async def test_a_removed_host_goes_with_its_root_key_in_one_change(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        await host.one.make(1)
        request = host.request()
        await host.add(request)
        before = host.body
        removed = await host.remove(request.member_id)
        assert (removed.name, removed.fingerprint) == ("b", request.fingerprint)
        body = host.body
        assert body.key_version == before.key_version + 1
        assert body.epoch == before.epoch + 2, "the second one says that the log uses its fresh audit key"
        assert ([member.name for member in body.members], [slot.slot_id for slot in body.slots]) == (["a"], ["s1"])
        assert [root.fingerprint for root in body.revoking] == [request.fingerprint]
        with pytest.raises(StartError):
            host.opened_by("b")
        assert [event.detail for event in host.audit.events] == ["begun", "begun"]
        async with asyncio.timeout(WAIT_S_MAX):
            while host.body.revoking:  # until the KEK rotation has ended
                await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            await host.remove(request.member_id)


async def test_a_host_whose_slot_is_gone_is_removed_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        request = host.request()
        await host.add(request)
        await host.one.removal.remove(lambda body: (request.slot_id,))
        assert (await host.remove(request.member_id)).fingerprint == ""
        assert [member.name for member in host.body.members] == ["a"]


async def test_a_root_key_that_replaces_that_of_a_host_goes_with_the_host(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        request = host.request()
        await host.add(request)
        unlocked = host.one.vault.unlocked

        def replaced(body: Body) -> Body:
            slot = unlocked.make_slot(
                memoryview(SPARE), "file", slot_id=root_slots.next_slot_id(body), at=body.updated_at,
                replaces=request.slot_id,
            )  # fmt: skip
            return root_slots.add_slot(body, slot, at=body.updated_at)

        new = (await host.one.vault.keyring.change(replaced)).slots[-1]
        await host.one.removal.remove(lambda body: root_slots.replaced_by(body, new.slot_id), proved=new.slot_id)
        assert host.body.members[1].slot_id == new.slot_id
        assert (await host.remove(request.member_id)).fingerprint == new.fingerprint
        assert [slot.slot_id for slot in host.body.slots] == ["s1"]


async def test_the_host_that_serves_and_unknown_ones_are_not_removed(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        with pytest.raises(ConflictError, match="minikms replica promote"):
            await host.remove("m1")
        for unknown in ("m2", "", "a", "m1\n"):
            with pytest.raises(NotFoundError):
                await host.remove(unknown)


async def test_the_key_service_of_one_host_says_how_to_have_several() -> None:
    table = VerbTable(SilentAudit())
    NoMember().add_verbs(table, cast("Any", None))
    caller = Principal(0, 0, "peer_uid:0", ROLES)
    for verb in (api.INVITE_REPLICA, api.ADD_REPLICA, api.REMOVE_REPLICA, api.PROMOTE_REPLICA, api.REPLICA_NEXT):
        with pytest.raises(ConflictError, match="minikms replica init"):
            act: Any = table[cast("Any", verb)]
            answer = act(caller, example(verb, ""), "")
            assert isinstance(answer, Awaitable)
            await answer


async def test_with_a_pin_file_root_names_the_request_and_no_other_passes(tmp_path: Path) -> None:
    """The pin of a root key alone would let an attacker add a public key of their own under its fingerprint."""
    needs.root()
    (tmp_path / "pins").mkdir(0o755)
    pin = PinFile(tmp_path / "pins" / "pin")
    async with serving(tmp_path, pin) as host:
        request, other = host.request(), host.request("c")
        with pytest.raises(NotPinnedError, match="minikms pin add-host"):
            await host.add(request)
        with pytest.raises(StartError):
            pin.add_host(request.fingerprint, digest(request), host.body.keyring_id)
        pin.add(memoryview(bytes.fromhex(key_file(tmp_path / "a").read_text())), host.body.keyring_id)
        pin.add_host(request.fingerprint, digest(request), host.body.keyring_id)
        with pytest.raises(NotPinnedError):
            await host.add(msgspec.structs.replace(request, public_key=other.public_key))
        await host.add(request)
        assert [root.pinned for root in host.roots.list_roots(api.Request(), Event(type="", actor="")).roots] == [
            True,
            None,
        ]
        root = memoryview(bytes.fromhex(key_file(tmp_path / "b").read_text()))
        with pytest.raises(StartError, match="does not name the root key"):  # on this host
            pin.check_opens(root, host.body.keyring_id)
