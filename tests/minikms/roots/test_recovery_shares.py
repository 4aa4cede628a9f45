"""New shares: independent, proved, and zeroed at the end of their block."""

from collections.abc import Iterator

import pytest

from minikms.api.errors import ArenaFullError, InvalidRequestError, StartError
from minikms.crypto import shares
from minikms.memory.arena import SecretArena, SecretSlot, fill_random
from minikms.roots import recovery_shares

KEYRING = "kr_0123456789abcdef"


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with SecretArena(recovery_shares.SLOTS_COUNT_MAX + 1, force_fallback=True) as made:
        yield made


@pytest.fixture
def root(arena: SecretArena) -> SecretSlot:
    slot = arena.allocate()
    fill_random(slot.view)
    return slot


@pytest.mark.parametrize(("text", "counts"), [("3/5", (3, 5)), ("2/2", (2, 2)), ("16/16", (16, 16))])
def test_counts_are_read(text: str, counts: tuple[int, int]) -> None:
    assert recovery_shares.parse_counts(text) == counts


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "/5", "3/5/7", " 3/5", "+3/5", "3/5\n", "1/5", "5/3", "2/17", "9" * 99]
)
def test_other_counts_are_refused_with_advice(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"such as 3/5|is not possible"):
        recovery_shares.parse_counts(text)


@pytest.mark.parametrize(("threshold", "count"), [(2, 2), (3, 5), (16, 16)])
def test_a_set_can_be_read_from_its_texts(arena: SecretArena, root: SecretSlot, threshold: int, count: int) -> None:
    """The largest set needs no more slots than the constant says."""
    with recovery_shares.new_shares(root.view, KEYRING, threshold, count, arena) as made:
        assert [share.info.number for share in made] == list(range(1, count + 1))
        assert len({share.info.set_id for share in made}) == 1
        texts = []
        for share in made:
            with recovery_shares.share_text(share, arena) as text:
                texts.append(b"".join(map(bytes, text)))
    typed = {}
    for line in texts[-threshold:]:
        target = memoryview(bytearray(32))
        info = shares.read_text([memoryview(line)], target)
        assert (info.keyring_id, info.threshold) == (KEYRING, threshold)
        typed[info.number] = target
    assert recovery_shares.recombine(typed, root.view, arena)
    typed[info.number][0] ^= 1
    assert not recovery_shares.recombine(typed, root.view, arena)


def test_two_sets_of_one_root_key_have_nothing_in_common(arena: SecretArena, root: SecretSlot) -> None:
    kinds = []
    for _ in range(2):
        with recovery_shares.new_shares(root.view, KEYRING, 2, 3, arena) as made:
            kinds.append((made[0].info.set_id, {bytes(share.slot.view) for share in made}, made[0].digest))
    assert kinds[0][0] != kinds[1][0]
    assert not kinds[0][1] & kinds[1][1]
    assert kinds[0][2] != kinds[1][2]


def test_shares_and_texts_are_zeroed_at_the_end_of_their_blocks(arena: SecretArena, root: SecretSlot) -> None:
    before = arena.in_use
    with recovery_shares.new_shares(root.view, KEYRING, 3, 5, arena) as made:
        assert arena.in_use == before + 5, "the coefficients are gone"
        kept = [share.slot.view[:] for share in made]
        with recovery_shares.share_text(made[0], arena) as text:
            kept += [part[:] for part in text]
    assert arena.in_use == before
    for part in kept:
        assert bytes(part) == bytes(len(part))


def test_a_full_arena_leaves_no_share(arena: SecretArena, root: SecretSlot) -> None:
    held = [arena.allocate() for _ in range(30)]
    before = arena.in_use
    with pytest.raises(ArenaFullError), recovery_shares.new_shares(root.view, KEYRING, 8, 8, arena):
        pass
    assert arena.in_use == before
    assert len(held) == 30


def test_shares_that_give_another_root_are_not_handed_out(
    arena: SecretArena, root: SecretSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = shares.split

    def wrong(secret: memoryview, coefficients: list[memoryview], made: dict[int, memoryview]) -> None:
        split(secret, coefficients, made)
        made[3][7] ^= 1

    monkeypatch.setattr(shares, "split", wrong)
    before = arena.in_use
    with (
        pytest.raises(StartError, match="computes wrongly"),
        recovery_shares.new_shares(root.view, KEYRING, 2, 3, arena),
    ):
        pass
    assert arena.in_use == before
