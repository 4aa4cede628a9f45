"""The keyring's content: each change returns the next body, and illegal changes and inconsistent bodies are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.errors import ConflictError, StartError
from minikms.keys import keyring
from minikms.keys.keyring import Body
from minikms.keys.unlocked import UnlockedKeyring
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT, LATER, NEW_ROOT


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
    bodies = [
        keyring.next_epoch(first, at=LATER),
        keyring.reserve_wraps(first, 1, 10, at=LATER),
        keyring.add_tombstone(first, "k_" + "0" * 26, at=LATER),
        keyring.after_restore(first, seen_epoch=1, at=LATER),
        begun,
    ]
    assert {body.epoch for body in bodies} == {2}
    later = [keyring.destroy_kek(done, 1, at=LATER), keyring.drop_slots_except(done, done.slots[-1].slot_id, at=LATER)]
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


def test_only_the_newest_slot_may_stay(unlocked: UnlockedKeyring) -> None:
    """Without the newest slot, to which the links lead, no slot would open the newest keyring key."""
    done = keyrings.rotate(unlocked, NEW_ROOT)
    old, new = done.slots
    with pytest.raises(ConflictError, match="newest"):
        keyring.drop_slots_except(done, old.slot_id, at=AT)
    alone = keyring.drop_slots_except(done, new.slot_id, at=LATER)
    assert (alone.slots, alone.links) == ((new,), ())
    assert alone.retired_roots == (keyring.RetiredRoot(old.fingerprint, LATER),)


def test_retired_roots_are_remembered_up_to_a_bound(unlocked: UnlockedKeyring) -> None:
    many = tuple(keyring.RetiredRoot(f"{number:016x}", AT) for number in range(keyring.RETIRED_ROOTS_MAX))
    done = keyrings.rotate(unlocked, NEW_ROOT)
    body = keyring.drop_slots_except(
        msgspec.structs.replace(done, retired_roots=many), done.slots[-1].slot_id, at=LATER
    )
    assert len(body.retired_roots) == keyring.RETIRED_ROOTS_MAX
    assert body.retired_roots[-1].fingerprint == done.slots[0].fingerprint


def test_a_change_beyond_a_bound_is_refused_with_advice(unlocked: UnlockedKeyring) -> None:
    kek, slot, audit_key = unlocked.body.keks[0], unlocked.body.slots[0], unlocked.body.audit_key
    full = msgspec.structs.replace(unlocked.body, keks=(kek,) * keyring.KEKS_OPEN_COUNT_MAX)
    with pytest.raises(ConflictError, match="/kek/prune"):
        keyring.check_has_room(full, new_root=False)
    full = msgspec.structs.replace(unlocked.body, slots=(slot,) * keyring.SLOTS_MAX)
    keyring.check_has_room(full, new_root=False)
    with pytest.raises(ConflictError, match="start once with the newest"):
        keyring.check_has_room(full, new_root=True)
    full = msgspec.structs.replace(unlocked.body, audit_keys=(audit_key,) * keyring.AUDIT_KEYS_COUNT_MAX)
    with pytest.raises(ConflictError, match="audit keys"):
        keyring.add_audit_key(full, audit_key, at=AT)
    stone = keyring.Tombstone("k_" + "0" * 26, AT)
    full = msgspec.structs.replace(unlocked.body, tombstones=(stone,) * keyring.TOMBSTONES_COUNT_MAX)
    with pytest.raises(ConflictError, match="destroyed keys"):
        keyring.add_tombstone(full, "k_" + "1" * 26, at=AT)


def test_after_a_restore_epoch_and_wraps_are_above_the_known_ones(unlocked: UnlockedKeyring) -> None:
    body = keyring.after_restore(unlocked.body, seen_epoch=70, at=AT)
    assert body.epoch == 71
    assert body.keks[0].wraps_reserved == keyring.RESTORE_WRAPS
    assert keyring.after_restore(msgspec.structs.replace(body, epoch=90), seen_epoch=70, at=AT).epoch == 91


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
        "the newest slot does not open the present key": _with(body, key_version=body.key_version + 1),
        "a missing link": _with(body, links=()),
        "a link too many": _with(body, links=(*body.links, keyring.Link(3, b""))),
        "a keyring key of version 0": _with(body, slots=(change(old, opens=0), new)),
        "a keyring key beyond all": _with(body, slots=(old, change(new, opens=2**62)), key_version=2**62),
        "no audit key": _with(body, audit_keys=()),
        "audit keys out of order": _with(body, audit_keys=body.audit_keys * 2),
    }  # fmt: skip


def test_an_inconsistent_body_is_refused(unlocked: UnlockedKeyring) -> None:
    for what, body in contradictions(unlocked).items():
        try:
            keyring.check(body)
        except StartError as refused:
            assert "inconsistent" in str(refused), what
        else:
            pytest.fail(f"accepted: {what}")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_parsing_returns_the_body_and_its_exact_bytes(unlocked: UnlockedKeyring) -> None:
    keyrings.begin(unlocked, NEW_ROOT)
    body_bytes = keyring.encode_body(unlocked.body)
    assert keyring.parse_file(keyring.encode_file(body_bytes, b"t" * 28)) == (unlocked.body, body_bytes, b"t" * 28)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"[1]", b"\xff", b'{"body":{},"tag":""}', b'{"body":{', b"[" * 100_000],
)
def test_a_damaged_keyring_is_refused_with_the_advice_to_restore(data: bytes) -> None:
    with pytest.raises(StartError, match=r"restore keyring\.json from a backup"):
        keyring.parse_file(data)


def _altered(unlocked: UnlockedKeyring, **changes: object) -> bytes:
    body = json.loads(keyring.encode_body(unlocked.body)) | changes
    return keyring.encode_file(json.dumps(body).encode(), b"t" * 28)


@pytest.mark.parametrize("change", [{"format": "other"}, {"version": 2}])
def test_an_unknown_format_or_version_is_named(unlocked: UnlockedKeyring, change: dict[str, object]) -> None:
    with pytest.raises(StartError, match="this program reads 1"):
        keyring.parse_file(_altered(unlocked, **change))


@pytest.mark.parametrize("members", [{}, {"quorum": 2}, {"epoch": "a text"}])
def test_a_newer_format_says_to_start_the_newer_program(unlocked: UnlockedKeyring, members: dict[str, object]) -> None:
    """Whatever other members it has: the file is not damaged, so a backup is the second choice."""
    with pytest.raises(
        StartError, match=r"a newer program wrote the keyring: it has format version 2.*Start the newer"
    ):
        keyring.parse_file(_altered(unlocked, version=2, **members))


def test_an_unknown_field_is_refused(
    unlocked: UnlockedKeyring,
) -> None:
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
    moves=st.lists(st.sampled_from(["begin", "begin root", "promote", "drop", "destroy", "add tombstone"]), max_size=12)
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
    elif move == "drop" and not running:
        keyrings.adopt(unlocked, keyring.drop_slots_except(body, body.slots[-1].slot_id, at=AT))
        del roots[:-1]
    elif move == "destroy" and (retired := body.kek_in_state("retired")):
        keyrings.adopt(unlocked, keyring.destroy_kek(body, retired.version, at=AT))
    elif move == "add tombstone":
        keyrings.adopt(unlocked, keyring.add_tombstone(body, f"k_{number:026d}", at=AT))
