"""What the fuzzers do to bytes.

Owns: the kinds of one mutation. Which inputs and tokens there are is the fuzzer's.
"""

import random
from collections.abc import Sequence

COUNTS = (0, 1, 1, 1, 2, 3, 8)
"""Mutations of one case, drawn by lot."""


def mutated(rng: random.Random, content: bytes, tokens: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """`content` with up to eight changes: a bit or a byte, a token inserted or over what was there, bytes removed or
    repeated, or the end of one of `others` instead of its own."""
    data = bytearray(content)
    for _ in range(rng.choice(COUNTS)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                data[at:at] = rng.choice(tokens)
            case 3:
                del data[at : at + rng.choice((1, 2, 10, 50))]
            case 4:
                data[at:at] = data[at : at + rng.randrange(60)]
            case 5:
                token = rng.choice(tokens)
                data[at : at + len(token)] = token
            case _:
                other = rng.choice(others)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)
