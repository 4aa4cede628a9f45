"""Shares that several people enter: which are refused, when they are combined, and when they are zeroed."""

import os
from dataclasses import dataclass, field

import pytest

from minikms.api.errors import ArenaFullError, ConflictError, ShareTextError, WrongShareError
from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo
from minikms.keys.collected_shares import COLLECT_SECONDS_MAX, CollectedShares
from minikms.memory.arena import SecretArena

KEYRING = "kr_0123456789abcdef"
NOW = 1_000.0


@dataclass
class MadeSet:
    """A set of shares, and what a keyring knows of it."""

    set_id: str = "00112233445566aa"
    threshold: int = 3
    count: int = 5
    keyring_id: str = KEYRING
    root: bytes = field(default_factory=lambda: os.urandom(32))

    def __post_init__(self) -> None:
        coefficients = [memoryview(os.urandom(32)) for _ in range(self.threshold - 1)]
        self._shares = {number: memoryview(bytearray(32)) for number in range(1, self.count + 1)}
        shares.split(memoryview(self.root), coefficients, self._shares)

    def info(self, number: int) -> ShareInfo:
        return ShareInfo(self.keyring_id, self.set_id, number, self.threshold)

    def text(self, number: int, info: ShareInfo | None = None) -> memoryview:
        text = memoryview(bytearray(shares.TEXT_CHARS))
        shares.write_text(self._shares[number], info or self.info(number), [text])
        return text

    def flip(self, number: int, bit: int) -> None:
        self._shares[number][bit // 8] ^= 1 << bit % 8

    @property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(shares.digest(share, self.info(number)) for number, share in self._shares.items())


@dataclass
class Known:
    """What the keyring kept of a set when it was made."""

    set_id: str
    threshold: int
    count: int
    digests: tuple[bytes, ...]


def known(made: MadeSet) -> Known:
    return Known(made.set_id, made.threshold, made.count, made.digests)


@pytest.fixture
def made() -> MadeSet:
    return MadeSet()


@pytest.fixture
def collected(arena: SecretArena) -> CollectedShares:
    return CollectedShares(arena)


def add(collected: CollectedShares, made: MadeSet, number: int, *, now: float = NOW) -> ShareInfo:
    return collected.add([made.text(number)], KEYRING, [known(made)], now)


def test_the_threshold_of_shares_gives_the_root_key(collected: CollectedShares, made: MadeSet) -> None:
    for count, number in enumerate((5, 1, 3), start=1):
        assert not collected.complete
        assert add(collected, made, number) == made.info(number)
        assert len(collected.numbers) == count
    assert collected.complete and collected.numbers == (1, 3, 5)
    with collected.combine() as root:
        assert bytes(root.view) == made.root


def test_shares_stay_until_the_root_key_was_tried(
    arena: SecretArena, collected: CollectedShares, made: MadeSet
) -> None:
    """If it could not be, one is taken back, and completes the set again."""
    before = arena.in_use
    for number in (1, 2, 3):
        add(collected, made, number)
    collected.combine().release()
    collected.take_back(made.info(3))
    assert (arena.in_use, collected.numbers, collected.complete) == (before + 2, (1, 2), False)
    collected.take_back(made.info(3))
    add(collected, made, 4)
    with collected.combine() as root:
        assert bytes(root.view) == made.root
    collected.clear()
    assert (arena.in_use, collected.numbers, collected.set_id) == (before, (), "")


def test_fewer_shares_are_not_combined(collected: CollectedShares, made: MadeSet) -> None:
    with pytest.raises(WrongShareError):
        collected.combine()
    add(collected, made, 1)
    add(collected, made, 2)
    with pytest.raises(WrongShareError, match="3 shares are needed, and 2 were entered"):
        collected.combine()
    assert collected.numbers == (1, 2)


@pytest.mark.parametrize("bit", [0, 7, 100, 255])
def test_a_flipped_bit_in_a_share_is_named(collected: CollectedShares, made: MadeSet, bit: int) -> None:
    """The checksum is right: somebody wrote the wrong share down."""
    sets = [known(made)]
    made.flip(2, bit)
    with pytest.raises(WrongShareError, match="share 2 is wrong"):
        collected.add([made.text(2)], KEYRING, sets, NOW)
    assert collected.numbers == ()


def test_a_refused_share_changes_nothing(arena: SecretArena, collected: CollectedShares, made: MadeSet) -> None:
    foreign = MadeSet(keyring_id="kr_ffffffffffffffff")
    add(collected, made, 1)
    before = (arena.in_use, collected.numbers, collected.set_id, collected.expires_at)
    sets = [known(made), known(foreign)]
    mistyped = made.text(2)
    mistyped[50:51] = b"u"
    attempts: list[tuple[memoryview, type[Exception], str]] = [
        (mistyped, ShareTextError, "character 51"),
        (foreign.text(2), WrongShareError, "of the keyring kr_ffffffffffffffff"),
        (MadeSet(set_id="ee112233445566aa").text(2), WrongShareError, "does not open this keyring"),
        (made.text(1), ConflictError, "share 1 was entered already"),
        (made.text(2, made.info(2)._replace(threshold=2)), WrongShareError, "not one of the shares"),
        (made.text(2, made.info(9)), WrongShareError, "not one of the shares"),
        (made.text(2, made.info(4)), WrongShareError, "share 4 is wrong"),
    ]
    for text, error, match in attempts:
        with pytest.raises(error, match=match):
            collected.add([text], KEYRING, sets, NOW + 1)
        assert bytes(text) == bytes(len(text)), "the text is zeroed"
    assert (arena.in_use, collected.numbers, collected.set_id, collected.expires_at) == before


def test_shares_expire_ten_minutes_after_the_first(
    arena: SecretArena, collected: CollectedShares, made: MadeSet
) -> None:
    before = arena.in_use
    add(collected, made, 1)
    add(collected, made, 2, now=NOW + COLLECT_SECONDS_MAX - 1)
    assert collected.expires_at == NOW + COLLECT_SECONDS_MAX
    assert not collected.expire(NOW + COLLECT_SECONDS_MAX - 0.5)
    assert collected.expire(NOW + COLLECT_SECONDS_MAX)
    assert (arena.in_use, collected.numbers) == (before, ())
    assert not collected.expire(NOW + 2 * COLLECT_SECONDS_MAX)


def test_a_share_that_comes_too_late_begins_anew(collected: CollectedShares, made: MadeSet) -> None:
    add(collected, made, 1)
    add(collected, made, 2)
    add(collected, made, 3, now=NOW + COLLECT_SECONDS_MAX)
    assert collected.numbers == (3,)
    assert not collected.complete


def test_a_share_of_one_set_does_not_hinder_another(
    arena: SecretArena, collected: CollectedShares, made: MadeSet
) -> None:
    """Each set is complete by itself, expires by itself, and is dropped by itself if its root key is wrong."""
    other = MadeSet(set_id="ff112233445566aa", threshold=2, count=2)
    before = arena.in_use
    add(collected, other, 1)
    add(collected, made, 1, now=NOW + 1)
    add(collected, made, 2, now=NOW + 2)
    add(collected, other, 2, now=NOW + 3)
    assert collected.set_id == other.set_id and collected.complete
    with collected.combine() as root:
        assert bytes(root.view) == other.root
    collected.drop(other.info(2))
    collected.take_back(other.info(2))  # nothing of the other set has this number
    assert (collected.set_id, collected.numbers, collected.complete) == (made.set_id, (1, 2), False)
    add(collected, other, 1, now=NOW + 4)
    assert collected.expire(NOW + 1 + COLLECT_SECONDS_MAX)
    assert (collected.set_id, collected.numbers) == (other.set_id, (1,))
    collected.clear()
    assert (arena.in_use, collected.set_id) == (before, "")


def test_a_full_arena_refuses_the_share_and_zeroes_its_text(made: MadeSet) -> None:
    with SecretArena(1, force_fallback=True) as arena:
        collected = CollectedShares(arena)
        add(collected, made, 1)
        text = made.text(2)
        with pytest.raises(ArenaFullError):
            collected.add([text], KEYRING, [known(made)], NOW)
        assert bytes(text) == bytes(len(text))
        assert collected.numbers == (1,)


def test_the_largest_set_fits(collected: CollectedShares) -> None:
    large = MadeSet(threshold=16, count=16)
    for number in range(16, 0, -1):
        add(collected, large, number)
    with collected.combine() as root:
        assert bytes(root.view) == large.root
