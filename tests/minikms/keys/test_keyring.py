"""The keyring's content: each change returns the next body, and illegal changes and inconsistent bodies are refused."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms import api
from minikms.api.errors import ConflictError, StartError
from minikms.crypto import roots
from minikms.crypto.aead import NonceSource
from minikms.datadir import KEYRING_SLOTS
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import KEKS_OPEN_COUNT_MAX, VERSION_MAX, AuditState, Body
from minikms.keys.tombstones import TOMBSTONES_COUNT_MAX
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT, LATER, NEW_ROOT, ROOT, fresh


@pytest.fixture
def unlocked() -> Iterator[UnlockedKeyring]:
    with keyrings.arena() as arena:
        yield keyrings.fresh(arena)


def states(body: Body) -> dict[int, str]:
    return {kek.version: kek.state for kek in body.keks}


def test_a_new_keyring_has_one_key_of_each_kind_and_epoch_one(unlocked: UnlockedKeyring) -> None:
    """One root, one active KEK and one audit key."""
    body = unlocked.body
    assert states(body) == {1: "active"}
    assert (len(body.slots), len(body.audit_keys), body.epoch, body.rotation) == (1, 1, 1, None)
    assert body.wrapping_kek.version == 1


def test_every_change_raises_the_epoch(unlocked: UnlockedKeyring) -> None:
    first = unlocked.body
    begun = keyrings.begin(unlocked, NEW_ROOT)
    done = keyrings.promote(unlocked)
    bodies = [keyring.next_epoch(first, at=LATER), keyring.with_tombstones(first, 1, bytes(32), at=LATER), begun]
    assert {body.epoch for body in bodies} == {2}
    other = msgspec.structs.replace(done.slots[0], slot_id="s9", fingerprint="another")
    resealed = unlocked.make_resealed(fill_random, without=["s1"])
    audit_key = msgspec.structs.replace(done.audit_keys[0], version=2)
    removed = root_slots.remove_slots(done, resealed, "", audit_key, at=LATER)
    later = [keyring.destroy_kek(done, 1, at=LATER), removed, root_slots.add_slot(done, other, at=LATER)]
    assert done.epoch == 3
    assert {body.epoch for body in later} == {4}
    assert all(body.updated_at == LATER for body in later)


def test_during_a_rotation_new_keys_are_wrapped_under_the_pending_version(unlocked: UnlockedKeyring) -> None:
    begun = keyrings.begin(unlocked)
    assert states(begun) == {1: "active", 2: "pending"}
    assert begun.wrapping_kek.version == 2
    assert begun.rotation is not None
    assert (begun.rotation.from_version, begun.rotation.to_version, begun.rotation.slot_id) == (1, 2, "")
    done = keyrings.promote(unlocked)
    assert states(done) == {1: "retired", 2: "active"}
    assert done.rotation is None


def test_a_version_number_is_never_used_again(unlocked: UnlockedKeyring) -> None:
    keyrings.rotate(unlocked)
    keyrings.adopt(unlocked, keyring.destroy_kek(unlocked.body, 1, at=AT))
    assert states(keyrings.rotate(unlocked)) == {1: "destroyed", 2: "retired", 3: "active"}


def test_only_a_retired_kek_is_destroyed_and_its_wrapped_key_goes(unlocked: UnlockedKeyring) -> None:
    with pytest.raises(ConflictError):
        keyring.destroy_kek(unlocked.body, 1, at=AT)
    done = keyrings.rotate(unlocked)
    gone = keyring.destroy_kek(done, 1, at=LATER).kek(1)
    assert gone is not None
    assert (gone.state, gone.wrapped, gone.destroyed_at) == ("destroyed", b"", LATER)
    with pytest.raises(ConflictError):
        keyring.destroy_kek(done, 2, at=AT)


# --- slots ------------------------------------------------------------------------------------------------------------


def test_a_removed_root_is_revoking_until_a_later_kek_is_active(unlocked: UnlockedKeyring) -> None:
    """The KEK version that is pending when the slot goes is not enough: the removed root key could open it."""
    added = keyrings.add(unlocked, NEW_ROOT)
    keyrings.begin(unlocked)
    body = keyrings.remove(unlocked, added, at=LATER)
    name = roots.fingerprint(memoryview(NEW_ROOT))
    assert [(root.slot_id, root.fingerprint, root.kek_version) for root in body.revoking] == [(added, name, 3)]
    assert not body.revocation_due  # a rotation runs
    body = keyrings.promote(unlocked)
    assert (body.revocation_due, len(body.revoking), body.retired_roots) == (True, 1, ())
    body = keyrings.rotate(unlocked)
    assert (body.revocation_due, body.revoking) == (False, ())
    assert body.retired_roots == (keyring.RetiredRoot(name, LATER, line_owed=True),)


def test_the_last_slot_stays(unlocked: UnlockedKeyring) -> None:
    with pytest.raises(ConflictError, match="last root key"):
        keyrings.remove(unlocked, "s1")


def test_a_removal_ends_the_claim_of_a_running_rotation_to_the_slot(unlocked: UnlockedKeyring) -> None:
    begun = keyrings.begin(unlocked, NEW_ROOT)
    body = keyrings.remove(unlocked, begun.slots[-1].slot_id)
    assert body.rotation is not None
    assert body.rotation.slot_id == ""


def replacing(body: Body, *slots: tuple[str, str]) -> Body:
    """The body with these slots: (id, the slot that it replaces)."""
    first = body.slots[0]
    made = [msgspec.structs.replace(first, slot_id=one, fingerprint=one, replaces=other) for one, other in slots]
    return msgspec.structs.replace(body, slots=tuple(made))


def test_a_proved_slot_removes_what_it_replaces_and_its_older_rivals(unlocked: UnlockedKeyring) -> None:
    body = replacing(unlocked.body, ("s1", ""), ("s2", ""), ("s3", "s1"), ("s4", "s1"), ("s5", "s1"))
    assert root_slots.replaced_by(body, "s4") == {"s1", "s3"}
    assert root_slots.replaced_by(body, "s3") == {"s1"}
    assert root_slots.replaced_by(body, "s1") == root_slots.replaced_by(body, "s2") == frozenset()
    assert root_slots.replaced_by(replacing(unlocked.body, ("s1", ""), ("s2", "s1"), ("s3", "s2")), "s3") == {
        "s1",
        "s2",
    }
    assert root_slots.replaced_by(replacing(unlocked.body, ("s3", "s1"), ("s4", "s3")), "s9") == frozenset()


def test_a_newer_rival_replaces_the_proved_slot_next(unlocked: UnlockedKeyring) -> None:
    keyrings.begin(unlocked, NEW_ROOT)
    keyrings.promote(unlocked)
    new = unlocked.body.slots[-1].slot_id
    rival = keyrings.add(unlocked, bytes(range(7, 39)))
    slots = tuple(
        msgspec.structs.replace(slot, replaces="s1") if slot.slot_id == rival else slot for slot in unlocked.body.slots
    )
    unlocked.body = msgspec.structs.replace(unlocked.body, slots=slots)
    body = keyrings.remove(unlocked, *root_slots.replaced_by(unlocked.body, new), proved=new)
    assert [(slot.slot_id, slot.replaces) for slot in body.slots] == [(new, ""), (rival, new)]


def test_retired_roots_are_remembered_up_to_a_bound(unlocked: UnlockedKeyring) -> None:
    many = tuple(keyring.RetiredRoot(f"{number:016x}", AT) for number in range(keyring.RETIRED_ROOTS_MAX))
    added = keyrings.add(unlocked, NEW_ROOT)
    keyrings.remove(unlocked, added)
    unlocked.body = msgspec.structs.replace(unlocked.body, retired_roots=many)
    body = keyrings.rotate(unlocked)
    assert len(body.retired_roots) == keyring.RETIRED_ROOTS_MAX
    assert body.retired_roots[-1].fingerprint == roots.fingerprint(memoryview(NEW_ROOT))


def test_a_root_test_is_noted_in_the_slot(unlocked: UnlockedKeyring) -> None:
    body = root_slots.mark_tested(unlocked.body, "s1", at=LATER)
    assert (body.slots[0].tested_at, body.epoch) == (LATER, unlocked.body.epoch)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_change_beyond_a_bound_is_refused_with_advice(unlocked: UnlockedKeyring) -> None:
    kek, slot, audit_key = unlocked.body.keks[0], unlocked.body.slots[0], unlocked.audit.current
    full = msgspec.structs.replace(unlocked.body, keks=(kek,) * keyring.KEKS_OPEN_COUNT_MAX)
    with pytest.raises(ConflictError, match="/kek/prune"):
        keyring.check_has_room(full, kek=True, slot=False)
    full = msgspec.structs.replace(unlocked.body, slots=(slot,) * keyring.SLOTS_MAX)
    keyring.check_has_room(full, kek=True, slot=False)
    with pytest.raises(ConflictError, match="remove the unused ones"):
        keyring.check_has_room(full, kek=False, slot=True)
    full = msgspec.structs.replace(unlocked.body, audit_keys=(audit_key,) * keyring.AUDIT_KEYS_COUNT_MAX)
    with pytest.raises(ConflictError, match="audit keys"):
        keyring.add_audit_key(full, "", audit_key, at=AT)
    with pytest.raises(ConflictError, match="keys were destroyed"):
        keyring.with_tombstones(unlocked.body, TOMBSTONES_COUNT_MAX + 1, bytes(32), at=AT)


def test_a_root_key_that_opens_the_keyring_or_did_so_is_not_added_again(unlocked: UnlockedKeyring) -> None:
    """Whoever adds it: the service, or `minikms init` with recovery shares."""
    slot = unlocked.body.slots[0]
    again = msgspec.structs.replace(slot, slot_id="s9")
    with pytest.raises(ConflictError, match="opens the keyring already"):
        root_slots.add_slot(unlocked.body, again, at=AT)
    gone = (keyring.RetiredRoot("0" * 16, AT),)
    retired = msgspec.structs.replace(unlocked.body, retired_roots=gone)
    with pytest.raises(ConflictError, match="rotated away before"):
        root_slots.add_slot(retired, msgspec.structs.replace(again, fingerprint="0" * 16), at=AT)


def test_a_root_key_can_be_removed_every_day_for_years() -> None:
    """Each removal takes an audit key. An arena of the size that a start makes opens a keyring that is full of them."""
    with SecretArena(KEYRING_SLOTS, force_fallback=True) as arena:
        unlocked = fresh(arena)
        body = unlocked.body
        for version in range(2, keyring.AUDIT_KEYS_COUNT_MAX + 1):
            made = unlocked.make_audit_key(fill_random, version=version, at=AT)
            body = msgspec.structs.replace(body, audit_keys=(*body.audit_keys, made))
        unlocked.body = keyring.next_epoch(body, at=AT)
        assert len(body.audit_keys) > 365 * 2
        data = unlocked.encode(unlocked.body)
        assert len(data) < 1_000_000
        unlocked.release()
        again, _ = UnlockedKeyring.open(arena, memoryview(ROOT), data, nonces=NonceSource().next)
        again.make_resealed(fill_random, without=())
        with pytest.raises(ConflictError, match="no root key can be removed"):
            keyring.check_takes_audit_key(again.audit)
        again.release()


# --- contradictions ---------------------------------------------------------------------------------------------------


def _with(body: Body, **changes: Any) -> Body:
    return msgspec.structs.replace(body, **changes)


def contradictions(unlocked: UnlockedKeyring) -> dict[str, Body]:
    body = keyrings.rotate(unlocked, NEW_ROOT)
    begun = keyrings.begin(unlocked)
    assert begun.rotation is not None
    retired, active = body.keks
    old, new = body.slots
    change = msgspec.structs.replace
    many = change(active, version=99)
    log = body.tombstone_log
    gone = keyring.RevokingRoot("s99", "0" * 16, "file", AT, 9)
    return {
        "no epoch": _with(body, epoch=0),
        "no KEK": _with(body, keks=()),
        "two active KEKs": _with(body, keks=(change(retired, state="active"), active)),
        "no active KEK": _with(body, keks=(retired,)),
        "versions out of order": _with(body, keks=(active, retired)),
        "a version twice": _with(body, keks=(change(retired, version=active.version), active)),
        "version 0": _with(body, keks=(change(retired, version=0), active)),
        "a version beyond all": _with(body, keks=(retired, change(active, version=2**40))),
        "too many KEKs": _with(body, keks=(*(change(retired, version=n + 1) for n in range(65)), many)),
        "a rotation without a pending KEK": _with(body, rotation=begun.rotation),
        "a pending KEK without a rotation": _with(begun, rotation=None),
        "a rotation of other versions": _with(begun, rotation=change(begun.rotation, to_version=9)),
        "a rotation to a slot that is not there": _with(begun, rotation=change(begun.rotation, slot_id="s99")),
        "no slot": _with(body, slots=()),
        "a slot id twice": _with(body, slots=(change(old, slot_id=new.slot_id), new)),
        "a root key twice": _with(body, slots=(change(old, fingerprint=new.fingerprint), new)),
        "a provider without a name": _with(body, slots=(change(old, provider=""), new)),
        "a provider with a long name": _with(body, slots=(change(old, provider="x" * 33), new)),
        "a provider with a control character": _with(body, slots=(change(old, provider="a\n"), new)),
        "too many slots": _with(body, slots=(old,) * (keyring.SLOTS_MAX + 1)),
        "a slot that replaces none that is there": _with(body, slots=(old, change(new, replaces="s99"))),
        "a slot without a sealed key": _with(body, slots=(change(old, sealed=b""), new)),
        "a short public key": _with(body, slots=(change(old, public_key=old.public_key[:-1]), new)),
        "a short MAC": _with(body, slots=(change(old, mac=b""), new)),
        "a short commitment": _with(body, slots=(change(old, commitment=b"x"), new)),
        "a slot without its authentication key": _with(body, slots=(change(old, wrapped_auth=b""), new)),
        "a slot that replaces itself": _with(body, slots=(old, change(new, replaces=new.slot_id))),
        "a slot id with another form": _with(body, slots=(change(old, slot_id="../s1"), new)),
        "a share set of one": _with(body, slots=(change(old, shares=shares(1, 3)), new)),
        "a threshold above the count": _with(body, slots=(change(old, shares=shares(4, 3)), new)),
        "too many shares": _with(body, slots=(change(old, shares=shares(2, 17)), new)),
        "a share set with another id": _with(body, slots=(change(old, shares=change(shares(2, 3), set_id="x")), new)),
        "a digest too few": _with(body, slots=(change(old, shares=change(shares(2, 3), count=4)), new)),
        "a short digest": _with(body, slots=(change(old, shares=change(shares(2, 2), digests=(b"x",) * 2)), new)),
        "keyring key 0": _with(body, key_version=0),
        "a removed root key that opens": _with(body, revoking=(change(gone, fingerprint=old.fingerprint),)),
        "a removal from KEK 0 on": _with(body, revoking=(change(gone, kek_version=0),)),
        "too many removed root keys": _with(body, revoking=(gone,) * 65),
        "no audit key": _with(body, audit_keys=()),
        "a negative number of tombstones": _with(body, tombstone_log=change(log, count=-1)),
        "too many tombstones": _with(body, tombstone_log=change(log, count=TOMBSTONES_COUNT_MAX + 1)),
        "a short head of the tombstones": _with(body, tombstone_log=change(log, head=b"x")),
        "a member twice": _with(body, members=members("m1", "m1")),
        "two members with the audit log of the body": _with(body, members=members("m1", "m2")),
        "a member with another name": _with(body, members=members("x")),
        "audit keys out of order": _with(body, audit_keys=body.audit_keys * 2),
    }  # fmt: skip


def members(*ids: str) -> tuple[keyring.Member, ...]:
    return tuple(keyring.Member(member_id, f"host{n}", "s1", AT, 1) for n, member_id in enumerate(ids))


def shares(threshold: int, count: int) -> keyring.ShareSet:
    return keyring.ShareSet("00" * 8, threshold, count, (bytes(32),) * count)


def test_an_inconsistent_body_is_refused(unlocked: UnlockedKeyring) -> None:
    for what, body in contradictions(unlocked).items():
        try:
            keyring.check(body)
        except StartError as refused:
            assert "inconsistent" in str(refused), what
        else:
            pytest.fail(f"accepted: {what}")


def test_a_body_that_has_reached_every_bound_is_accepted(unlocked: UnlockedKeyring) -> None:
    """Else the change that reaches it would make a keyring that no start reads."""
    change, body = msgspec.structs.replace, keyrings.rotate(unlocked, NEW_ROOT)
    retired, active = body.keks
    (audit_key,), slot = body.audit_keys, body.slots[0]
    logs = AuditState(tuple(change(audit_key, version=n + 1) for n in range(keyring.AUDIT_KEYS_COUNT_MAX)), "")
    gone = [keyring.RevokingRoot(f"s{n}", f"{n:016x}", "file", AT, VERSION_MAX) for n in range(100, 164)]
    keyring.check(
        _with(
            body,
            keks=(
                change(retired, state="destroyed", version=1),
                *(change(retired, version=n) for n in range(2, KEKS_OPEN_COUNT_MAX + 1)),
                change(active, version=VERSION_MAX - 1),
            ),
            slots=tuple(
                change(slot, slot_id=f"s{n}", fingerprint=f"{n:016x}", replaces="", shares=shares(max(2, n), 16))
                for n in range(1, keyring.SLOTS_MAX + 1)
            ),
            revoking=tuple(gone[: keyring.RETIRED_ROOTS_MAX]),
            audit_keys=logs.audit_keys,
            tombstone_log=change(body.tombstone_log, count=TOMBSTONES_COUNT_MAX),
            members=tuple(
                keyring.Member(f"m{n}", f"host{n}", f"s{n}", AT, body.key_version, logs if n > 1 else None)
                for n in range(1, api.MEMBERS_MAX + 1)
            ),
        )
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def test_parsing_returns_the_body_and_its_exact_bytes(unlocked: UnlockedKeyring) -> None:
    keyrings.begin(unlocked, NEW_ROOT)
    body_bytes = keyring.encode_body(unlocked.body)
    assert keyring.parse_file(keyring.encode_file(body_bytes, b"t" * 40)) == (unlocked.body, body_bytes, b"t" * 40)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", b"[1]", b"\xff", b'{"body":{},"tag":""}', b'{"body":{', b"[" * 100_000]
)
def test_a_damaged_keyring_is_refused_with_the_advice_to_restore(data: bytes) -> None:
    with pytest.raises(StartError, match=r"restore keyring\.json from a backup"):
        keyring.parse_file(data)


def _altered(unlocked: UnlockedKeyring, **changes: object) -> bytes:
    body = json.loads(keyring.encode_body(unlocked.body)) | changes
    return keyring.encode_file(json.dumps(body).encode(), b"t" * 40)


@pytest.mark.parametrize("change", [{"format": "other"}, {"version": 6}])
def test_an_unknown_format_or_version_is_named(unlocked: UnlockedKeyring, change: dict[str, object]) -> None:
    with pytest.raises(StartError, match="this program"):
        keyring.parse_file(_altered(unlocked, **change))


@pytest.mark.parametrize("members", [{}, {"quorum": 2}, {"epoch": "a text"}])
def test_a_newer_format_says_to_start_the_newer_program(unlocked: UnlockedKeyring, members: dict[str, object]) -> None:
    """Whatever other members it has: the file is not damaged, so a backup is the second choice."""
    with pytest.raises(
        StartError, match=r"a newer program wrote the keyring: it has format version 6.*Start the newer"
    ):
        keyring.parse_file(_altered(unlocked, version=6, **members))


@pytest.mark.parametrize("members", [{}, {"links": [], "wraps_reserved": 1}])
def test_a_keyring_of_before_0_2_0_is_refused(unlocked: UnlockedKeyring, members: dict[str, object]) -> None:
    """Whatever other members it has: nothing of it is read."""
    for version in range(5):
        with pytest.raises(StartError, match=r"^the data directory was made before version 0\.2\.0"):
            keyring.parse_file(_altered(unlocked, version=version, **members))


def test_an_unknown_field_is_refused(unlocked: UnlockedKeyring) -> None:
    with pytest.raises(StartError, match="unknown format version"):
        keyring.parse_file(_altered(unlocked, quorum=2))


@given(data=st.data())
@settings(max_examples=100)
def test_a_damaged_file_is_refused_or_parses_never_anything_else(data: st.DataObject) -> None:
    """Parsing is not yet trust: what parses is authenticated next."""
    with keyrings.arena(32) as arena:
        unlocked = keyrings.fresh(arena)
        blob = bytearray(unlocked.encode(unlocked.body))
        for _ in range(data.draw(st.integers(1, 3))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(blob)))
        for candidate in (bytes(blob), bytes(blob[:cut])):
            try:
                keyring.parse_file(candidate)
            except StartError:
                continue


# --- sequences of changes ---------------------------------------------------------------------------------------------


@given(
    moves=st.lists(
        st.sampled_from(["begin", "begin root", "promote", "prove", "add", "remove", "destroy", "add tombstone"]),
        max_size=12,
    )
)
@settings(max_examples=60)
def test_any_changes_keep_the_invariants_and_open_under_the_roots(moves: list[str]) -> None:
    with keyrings.arena(512) as arena:
        unlocked = keyrings.fresh(arena)
        roots = [keyrings.ROOT]
        for number, move in enumerate(moves):
            _apply(unlocked, move, roots, number)
            keyring.check(unlocked.body)
        for root in roots:
            again, slot = keyrings.reopened(arena, unlocked, root)
            assert again.body == unlocked.body
            assert slot in again.body.slots
            for kek in again.body.keks:
                if kek.state != "destroyed":
                    assert bytes(again.kek(kek.version)) == bytes(unlocked.kek(kek.version))
            again.release()


def _apply(unlocked: UnlockedKeyring, move: str, roots: list[bytes], number: int) -> None:
    body = unlocked.body
    running = body.rotation is not None
    if move == "begin" and not running:
        keyrings.begin(unlocked)
    elif move == "begin root" and not running:
        roots.append(bytes([number + 1]) * 32)
        keyrings.begin(unlocked, roots[-1])
    elif move == "promote" and running:
        keyrings.promote(unlocked)
    elif move == "prove" and (gone := root_slots.replaced_by(body, body.slots[-1].slot_id)):
        roots[:] = [root for root, slot in zip(roots, body.slots, strict=True) if slot.slot_id not in gone]
        keyrings.remove(unlocked, *gone, proved=body.slots[-1].slot_id)
    elif move == "add":
        roots.append(bytes([number + 1]) * 32)
        keyrings.add(unlocked, roots[-1])
    elif move == "remove" and len(roots) > 1:
        place = number % len(roots)
        keyrings.remove(unlocked, body.slots[place].slot_id)
        del roots[place]
    elif move == "destroy" and (retired := body.kek_in_state("retired")):
        keyrings.adopt(unlocked, keyring.destroy_kek(body, retired.version, at=AT))
    elif move == "add tombstone":
        keyrings.adopt(unlocked, keyring.with_tombstones(body, number, bytes([number]) * 32, at=AT))
