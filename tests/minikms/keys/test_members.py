"""The hosts of a replicated key service in the keyring: their audit keys, a later keyring, and how a host joins."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import DecryptionError, ReplicaForkedError, ReplicaRolledBackError, StartError
from minikms.crypto import slots
from minikms.crypto.aead import NonceSource
from minikms.crypto.slots import Newcomer
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import Body, Member
from minikms.keys.unlocked import NEVER, NeedsRootError, UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT, LATER, NEW_ROOT, ROOT

THIRD_ROOT = bytes(range(200, 232))


def newcomer(arena: SecretArena, unlocked: UnlockedKeyring, root: bytes = NEW_ROOT) -> Newcomer:
    """As a new host makes it from its invitation."""
    slot_id = root_slots.next_slot_id(unlocked.body)
    with arena.allocate() as auth:
        invited = unlocked.invitation_key()
        return slots.newcomer(memoryview(root), auth.view, unlocked.body.keyring_id, slot_id, invited)


def joined(arena: SecretArena, unlocked: UnlockedKeyring, root: bytes = NEW_ROOT) -> str:
    """Adds a host; its member id. The first time, the host that the keyring was made on is a member too."""
    body = unlocked.body
    slot = unlocked.make_slot_for(newcomer(arena, unlocked, root), "file", at=AT)
    first = () if body.members else (Member("m1", "a", "s1", AT, body.key_version),)
    member_id = f"m{slot.slot_id[1:]}"
    audit = unlocked.make_member_audit(fill_random, at=AT)
    made = Member(member_id, f"host{member_id}", slot.slot_id, AT, body.key_version, audit)
    body = root_slots.add_slot(msgspec.structs.replace(body, members=(*body.members, *first, made)), slot, at=AT)
    keyrings.adopt(unlocked, body)
    return member_id


@dataclass
class Two:
    """`a`: the host that the keyring was made on; `b`: another one, with the same body. Each has an arena."""

    a: UnlockedKeyring
    b: UnlockedKeyring


def opened(arena: SecretArena, of: UnlockedKeyring, root: bytes, member_id: str) -> UnlockedKeyring:
    data = of.encode(of.body)
    return UnlockedKeyring.open(arena, memoryview(root), data, nonces=NonceSource().next, member_id=member_id)[0]


@pytest.fixture
def two(arena: SecretArena) -> Two:
    first = keyrings.fresh(arena)
    member_id = joined(arena, first)
    return Two(opened(arena, first, ROOT, "m1"), opened(arena, first, NEW_ROOT, member_id))


def audit_key(unlocked: UnlockedKeyring, version: int) -> list[bytes]:
    return [bytes(part) for part in unlocked.audit_key(version)]


def versions(body: Body, member_id: str) -> list[int]:
    return [key.version for key in body.audit_of(member_id).audit_keys]


# --- audit keys -------------------------------------------------------------------------------------------------------


def test_each_member_opens_the_audit_keys_of_its_own_log_only(arena: SecretArena, two: Two) -> None:
    assert two.a.audit.current.public_key != two.b.audit.current.public_key
    assert audit_key(two.a, 1) != audit_key(two.b, 1)
    two.a.make_audit_key(fill_random, version=2, at=AT)
    two.a.settle()
    with pytest.raises(KeyError):
        two.a.audit_key(2)
    used = arena.in_use
    again = opened(arena, two.a, ROOT, "m1")
    assert arena.in_use - used == 1 + 1 + 2 + 1 + 2, "keyring key, KEK, audit key, tombstone key, two slots"
    again.release()


def test_a_host_that_the_keyring_does_not_name_is_refused(arena: SecretArena, two: Two) -> None:
    """It would write its log under the audit keys of the first host."""
    used = arena.in_use
    with pytest.raises(StartError, match=r"keyring\.json has no member m9"):
        opened(arena, two.a, ROOT, "m9")
    assert arena.in_use == used


def test_an_audit_key_of_a_member_changes_no_other_log(two: Two) -> None:
    made = two.b.make_audit_key(fill_random, version=2, at=AT)
    body = keyring.add_audit_key(two.b.body, two.b.member_id, made, at=AT)
    assert (versions(body, "m1"), versions(body, two.b.member_id)) == ([1], [1, 2])
    body = keyring.with_audit_origin(body, two.b.member_id, "log.example/b", at=AT)
    assert (body.audit_origin, body.audit_of(two.b.member_id).audit_origin) == ("", "log.example/b")
    body = keyring.without_audit_keys(body, two.b.member_id, before=2)
    assert (versions(body, "m1"), versions(body, two.b.member_id)) == ([1], [2])


def test_the_removal_of_a_root_key_keeps_the_audit_keys_of_every_member(arena: SecretArena, two: Two) -> None:
    """It gives a fresh one to the member that does it only, and leaves nothing of the others in the arena."""
    third = joined(arena, two.b, THIRD_ROOT)
    gone = two.b.body.slots[-1].slot_id
    before, used = audit_key(two.a, 1), arena.in_use
    keyrings.remove(two.b, gone)
    assert arena.in_use == used + 2 - 1, "the fresh audit key, and the slot that is gone"
    assert {member.member_id: (member.key_version, member.unconfirmed) for member in two.b.body.members} == {
        "m1": (1, False),
        two.b.member_id: (2, True),
        third: (1, False),
    }
    assert (versions(two.b.body, "m1"), versions(two.b.body, two.b.member_id)) == ([1], [1, 2])
    again = opened(arena, two.b, ROOT, "m1")
    assert audit_key(again, 1) == before
    assert audit_key(opened(arena, two.b, NEW_ROOT, two.b.member_id), 2) == audit_key(two.b, 2)


def test_a_member_takes_over_with_one_change(two: Two) -> None:
    unlocked, member_id = two.b, two.b.member_id
    slot_id = unlocked.body.slots[-1].slot_id
    assert unlocked.body.slots[-1].tested_at == NEVER
    body = root_slots.taken_over(unlocked.body, member_id, slot_id, None, oldest=0, in_use=1, at=LATER)
    assert (body.epoch, body.slots[-1].tested_at) == (unlocked.body.epoch + 1, LATER)
    assert versions(body, member_id) == [1]
    made = unlocked.make_audit_key(fill_random, version=2, at=LATER)
    later = root_slots.taken_over(body, member_id, slot_id, made, oldest=1, in_use=1, at=LATER)
    assert (versions(later, member_id), versions(later, "m1"), later.epoch) == ([1, 2], [1], body.epoch + 1)
    assert versions(
        root_slots.taken_over(later, member_id, slot_id, None, oldest=2, in_use=2, at=LATER), member_id
    ) == [2]


# --- a later keyring --------------------------------------------------------------------------------------------------


def destroys(unlocked: UnlockedKeyring) -> Body:
    retired = unlocked.body.kek_in_state("retired")
    return unlocked.body if retired is None else keyring.destroy_kek(unlocked.body, retired.version, at=AT)


def begins(unlocked: UnlockedKeyring) -> Body:
    return unlocked.body if unlocked.body.rotation else keyrings.begin(unlocked)


def ends(unlocked: UnlockedKeyring) -> Body:
    return keyrings.promote(unlocked) if unlocked.body.rotation else unlocked.body


def adds_root(unlocked: UnlockedKeyring) -> Body:
    if len(unlocked.body.slots) < keyring.SLOTS_MAX:
        keyrings.add(unlocked, bytes([100 + len(unlocked.body.slots)]) * 32)
    return unlocked.body


def changes_audit_key(unlocked: UnlockedKeyring) -> Body:
    version = unlocked.audit.current.version + 1
    made = unlocked.make_audit_key(fill_random, version=version, at=AT)
    return keyring.add_audit_key(unlocked.body, unlocked.member_id, made, at=AT)


CHANGES: list[Callable[[UnlockedKeyring], Body]] = [
    lambda a: keyring.next_epoch(a.body, at=LATER),
    lambda a: keyring.with_tombstones(a.body, a.body.tombstone_log.count + 1, bytes(32), at=LATER),
    lambda a: keyring.with_audit_origin(a.body, a.member_id, "log.example/a", at=LATER),
    lambda a: root_slots.taken_over(a.body, a.member_id, "s1", None, oldest=0, in_use=1, at=LATER),
    begins,
    ends,
    destroys,
    adds_root,
    changes_audit_key,
]


@given(
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=9),
    followed=st.sets(st.integers(0, 8)),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_member_takes_each_later_keyring_and_no_other(
    changes: list[Callable[[UnlockedKeyring], Body]], followed: set[int], data: st.DataObject
) -> None:
    """Whatever has changed, and how many at a time. What the follower has open is what a start would open."""
    with keyrings.arena() as arena, keyrings.arena() as of_b:
        first = keyrings.fresh(arena)
        member_id = joined(arena, first)
        a, b = opened(arena, first, ROOT, "m1"), opened(of_b, first, NEW_ROOT, member_id)
        files = [a.encode(a.body)]
        for number, change in enumerate(changes):
            keyrings.adopt(a, change(a))
            files.append(a.encode(a.body))
            if number in followed:
                keyrings.adopt(b, b.advance(files[-1]))
        used = of_b.in_use
        wrong, of_body = bytearray(files[-1]), files[-1].index(b',"tag":')
        wrong[data.draw(st.integers(8, of_body - 1))] ^= data.draw(st.integers(1, 255))
        with pytest.raises((ReplicaForkedError, ReplicaRolledBackError, NeedsRootError)):
            b.advance(bytes(wrong))
        b.settle()
        assert of_b.in_use == used, "nothing of it stays"
        keyrings.adopt(b, b.advance(files[-1]))
        assert b.advance(files[-1]) == b.body == a.body
        for older in files:
            if keyring.parse_file(older)[0].epoch < b.body.epoch:
                with pytest.raises(ReplicaRolledBackError):
                    b.advance(older)
        used = of_b.in_use
        again = opened(of_b, b, NEW_ROOT, member_id)
        assert of_b.in_use == 2 * used
        assert [bytes(again.kek(kek.version)) for kek in again.body.keks if kek.state != "destroyed"] == [
            bytes(b.kek(kek.version)) for kek in b.body.keks if kek.state != "destroyed"
        ]


def test_a_member_gets_an_audit_key_of_its_own_from_a_later_keyring(two: Two) -> None:
    """Where it was not known whether its change was stored, before it followed."""
    made = two.b.make_audit_key(fill_random, version=2, at=AT)
    later = two.b.encode(keyring.add_audit_key(two.b.body, two.b.member_id, made, at=AT))
    key = audit_key(two.b, 2)
    two.b.settle()
    keyrings.adopt(two.b, two.b.advance(later))
    assert audit_key(two.b, 2) == key


def test_a_fresh_keyring_key_needs_the_root_key(two: Two) -> None:
    before = two.a.encode(two.a.body)
    keyrings.add(two.a, THIRD_ROOT)
    keyrings.remove(two.a, two.a.body.slots[-1].slot_id)
    with pytest.raises(NeedsRootError):
        two.b.advance(two.a.encode(two.a.body))
    with pytest.raises(ReplicaRolledBackError, match="before the removal of a root key"):
        two.a.advance(before)


def test_a_keyring_with_another_history_is_refused(arena: SecretArena, two: Two) -> None:
    first = two.a.encode(keyring.next_epoch(two.a.body, at=AT))
    second = two.a.encode(keyring.next_epoch(two.a.body, at=LATER))
    keyrings.adopt(two.b, two.b.advance(first))
    other = keyrings.fresh(arena, NEW_ROOT)
    alone = msgspec.structs.replace(two.a.body, members=two.a.body.members[:1])
    for data, why in (
        (second, "two keyrings of epoch"),
        (other.encode(other.body), "of another key service"),
        (two.a.encode(keyring.next_epoch(keyring.next_epoch(alone, at=AT), at=AT)), "this host was removed"),
        (b"", "damaged"),
    ):
        with pytest.raises(ReplicaForkedError, match=why):
            two.b.advance(data)


# --- joining ----------------------------------------------------------------------------------------------------------


def test_a_new_host_opens_the_keyring_with_its_own_root_key(arena: SecretArena, two: Two) -> None:
    """Its root key never leaves it, and the first host's own key pair is another one."""
    assert bytes(two.b.keyring_key.view) == bytes(two.a.keyring_key.view)
    assert two.b.invitation_key() == two.a.invitation_key() != two.a.body.slots[0].public_key
    keyrings.remove(two.a, two.b.body.slots[-1].slot_id)
    with pytest.raises(StartError, match="was removed or rotated away"):
        opened(arena, two.a, NEW_ROOT, two.b.member_id)


def test_what_a_new_host_sends_can_not_be_exchanged(arena: SecretArena, two: Two) -> None:
    """The digest, which people compare, shows each exchange; and the authentication key opens for no other slot."""
    asked, other = newcomer(arena, two.a, THIRD_ROOT), newcomer(arena, two.a, bytes([9]) * 32)
    assert len(asked.digest) == slots.DIGEST_HEX_CHARS
    used = arena.in_use
    for field in set(Newcomer._fields) - {"slot_id"}:
        change: dict[str, Any] = {field: "kr_0" if field == "keyring_id" else getattr(other, field)}
        changed = asked._replace(**change)
        assert changed.digest != asked.digest, field
        with pytest.raises(DecryptionError):
            two.a.make_slot_for(changed, "file", at=AT)
        two.a.settle()
        assert arena.in_use == used
    with pytest.raises(DecryptionError):
        two.a.make_slot_for(asked._replace(slot_id="s99"), "file", at=AT)


def test_a_removal_of_a_root_key_ends_an_invitation(arena: SecretArena, two: Two) -> None:
    asked = newcomer(arena, two.a, THIRD_ROOT)
    keyrings.remove(two.a, two.b.body.slots[-1].slot_id)
    with pytest.raises(DecryptionError):
        two.a.make_slot_for(asked, "file", at=AT)
