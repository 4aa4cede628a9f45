"""New shares of a root key, and their text, in the arena.

Owns: drawing the coefficients and the id of a set, and the slots that a share and its text need. Invariants: every slot
is zeroed at the end of the block that made it; before a set is handed out, each run of `threshold` neighbouring shares
is combined and compared with the root key. It must never write a share anywhere: a command does that.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from minikms.api.errors import InvalidRequestError, StartError
from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo
from minikms.memory.arena import SLOT_BYTES, SecretArena, SecretSlot, fill_random

SLOTS_COUNT_MAX: Final = 2 * shares.SHARES_COUNT_MAX
"""The slots of the arena for the largest set: its shares and coefficients, or its shares and the text of one."""
_OF: Final = re.compile(r"([0-9]{1,3})/([0-9]{1,3})", re.ASCII)


class Share(NamedTuple):
    """A share that was made, in a slot of the arena."""

    info: ShareInfo
    slot: SecretSlot

    @property
    def digest(self) -> bytes:
        """What the keyring keeps of it."""
        return shares.digest(self.slot.view, self.info)


def parse_counts(text: str) -> tuple[int, int]:
    """Threshold and count of a text such as `3/5`. Raises InvalidRequestError."""
    match = _OF.fullmatch(text)
    if match is None:
        raise InvalidRequestError("write shares as THRESHOLD/COUNT, such as 3/5: any three of five shares are enough")
    threshold, count = int(match[1]), int(match[2])
    shares.check_counts(threshold, count)
    return threshold, count


@contextlib.contextmanager
def new_shares(
    root: memoryview, keyring_id: str, threshold: int, count: int, arena: SecretArena
) -> Iterator[list[Share]]:
    """A new set of shares of `root`, zeroed at the end of the block.

    Raises InvalidRequestError for counts that are not possible, ArenaFullError, StartError and OSError of the random
    device.
    """
    shares.check_counts(threshold, count)
    set_id = secrets.token_hex(8)
    with contextlib.ExitStack() as cleaning:
        new = [
            Share(ShareInfo(keyring_id, set_id, number, threshold), cleaning.enter_context(arena.allocate()))
            for number in range(1, count + 1)
        ]
        with contextlib.ExitStack() as drawing:
            coefficients = [drawing.enter_context(arena.allocate()).view for _ in range(threshold - 1)]
            for coefficient in coefficients:
                fill_random(coefficient)
            shares.split(root, coefficients, {share.info.number: share.slot.view for share in new})
        for first in range(count - threshold + 1):
            chosen = {share.info.number: share.slot.view for share in new[first : first + threshold]}
            if not recombine(chosen, root, arena):
                raise StartError("the shares do not give the root key again: this machine computes wrongly")
        yield new


def recombine(shares_by_number: dict[int, memoryview], root: memoryview, arena: SecretArena) -> bool:
    """Whether these shares, by their numbers, give `root`."""
    with arena.allocate() as recombined:
        shares.combine(shares_by_number, recombined.view)
        return hmac.compare_digest(recombined.view, root)


@contextlib.contextmanager
def share_text(share: Share, arena: SecretArena) -> Iterator[list[memoryview]]:
    """The text of a share, in views of slots that the end of the block zeroes."""
    with contextlib.ExitStack() as cleaning:
        sizes = [min(SLOT_BYTES, shares.TEXT_CHARS - start) for start in range(0, shares.TEXT_CHARS, SLOT_BYTES)]
        text = [cleaning.enter_context(arena.allocate()).view[:size] for size in sizes]
        shares.write_text(share.slot.view, share.info, text)
        yield text


def reads_as(share: Share, text: Sequence[memoryview], arena: SecretArena) -> bool:
    """Whether the text is that of the share. Raises ShareTextError if it is no share."""
    with arena.allocate() as parsed:
        info = shares.read_text(text, parsed.view)
        return info == share.info and hmac.compare_digest(parsed.view, share.slot.view)
