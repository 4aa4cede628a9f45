"""Whether the time of a function depends on a secret: Welch's t-test over two classes of inputs, as dudect makes it.

Owns: the statistic, the measurement, and the functions that are measured. The method is that of Reparaz, Balasch and
Verbauwhede, "Dude, is my code constant time?" (DATE 2017): one class is a special secret, the other a random one; the
classes alternate at random, so that what else the machine does falls on both; the slowest measurements are left out
at several bounds, and the largest t counts. From LEAK_T on there is a leak. Unlike theirs there is no test of second
order. Run it by itself, at best on an idle machine: `python -m tests.torture.timing [COUNT]`.
"""

import asyncio
import gc
import hashlib
import hmac
import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from minikms import api
from minikms.api import base64
from minikms.api.errors import KmsRefusedError
from minikms.crypto import aead, shares
from minikms.crypto.shares import ShareInfo
from minikms.memory.arena import hex_decode_into, hex_encode_into
from progressdb_server.api.gate.keys import KeyTable
from tests.harness.limited import limited

LEAK_T = 10.0
"""The bound of dudect. Without a leak the largest t stays below it for any number of measurements."""
CROPS = 100
ENOUGH = 200
"""Measurements of each class, below which a bound is not looked at."""

Make = Callable[[random.Random, bool], "bytes | memoryview"]
"""The input of one measurement, of the special class or of the random one."""


class Target(NamedTuple):
    name: str
    make: Make
    act: Callable[[Any], object]


class Finding(NamedTuple):
    """The largest t, and the difference of the means and the mean there."""

    t: float
    difference_ns: float
    mean_ns: float


def largest_t(times: Sequence[int], special: Sequence[bool]) -> Finding:
    """Applies Welch's test to all measurements, and to the fastest of them at CROPS bounds.

    The bounds lie closer together towards the slowest, as in dudect.
    """
    ordered = sorted(zip(times, special, strict=True))
    shares_of_all = [1 - 0.5 ** (10 * number / CROPS) for number in range(1, CROPS + 1)]
    # A bound is a time, not a place in the order: equal times lie on one side of it.
    bounds = {ordered[int(len(ordered) * share)][0] for share in shares_of_all}
    count, total, squares = [0, 0], [0, 0], [0, 0]
    largest = Finding(0.0, 0.0, 0.0)
    for value, same in itertools.groupby([*ordered, (sys.maxsize, False)], key=itemgetter(0)):
        if (value in bounds or value == sys.maxsize) and min(count) >= ENOUGH:
            means = [total[kind] / count[kind] for kind in (0, 1)]
            errors = sum(
                (squares[kind] * count[kind] - total[kind] ** 2) / (count[kind] ** 2 * (count[kind] - 1))
                for kind in (0, 1)
            )
            difference = abs(means[1] - means[0])
            t = difference / math.sqrt(errors) if errors else math.inf if difference else 0.0
            largest = max(largest, Finding(t, difference, means[0]))
        for _, kind in same:
            count[kind] += 1
            total[kind] += value
            squares[kind] += value * value
    return largest


def measured(target: Target, count: int, rng: random.Random) -> Finding:
    """The statistic of `count` calls."""
    times, special = list[int](), list[bool]()
    make, act, clock = target.make, target.act, time.perf_counter_ns
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        while len(times) < count:
            kinds = [rng.random() < 0.5 for _ in range(1000)]
            for argument in [make(rng, kind) for kind in kinds]:
                copy = type(argument)(bytearray(argument))  # either kind lies in the cache, and at the same place
                begin = clock()
                act(copy)
                times.append(clock() - begin)
            special += kinds
    finally:
        if gc_was_on:
            gc.enable()
    return largest_t(times[1000:], special[1000:])  # the first fill the caches of the interpreter


# --- what is measured -------------------------------------------------------------------------------------------------


def secret(special: bytes, *, text: bool = False) -> Make:
    """A secret of these bytes, or a random one. `text`: in hexadecimal."""

    def make(rng: random.Random, kind: bool) -> memoryview:
        value = special if kind else rng.randbytes(len(special))
        return memoryview(bytearray(value.hex().encode() if text else value))

    return make


def wrong(value: bytes) -> Make:
    """Another value: it differs in its last byte alone, or in each one."""

    def make(rng: random.Random, kind: bool) -> bytes:
        changes = [1 + rng.randrange(255) for _ in value]
        if kind:
            changes[:-1] = [0] * (len(value) - 1)
        return bytes([byte ^ change for byte, change in zip(value, changes, strict=True)])

    return make


def share_text(rng: random.Random, kind: bool) -> memoryview:
    """The text of a share of zeros, or of a random one."""
    text = memoryview(bytearray(shares.TEXT_CHARS))
    shares.write_text(memoryview(bytes(32) if kind else rng.randbytes(32)), INFO, [text])
    return text


def refused(act: Callable[[Any], object]) -> Callable[[Any], None]:
    """A call that the key service refuses."""

    def call(argument: Any) -> None:
        try:
            act(argument)
        except KmsRefusedError:
            return
        raise AssertionError("the key service accepts it")

    return call


def combine_without_zeros(share: memoryview) -> None:
    """A planted leak: it does nothing for a byte that is zero."""
    for index, value in enumerate(share):
        TARGET[index] = shares.multiply(value, 7) if value else 0


def compare_to_the_first_difference(presented: bytes) -> bool:
    """A planted leak: it ends at the first byte that differs."""
    return all(one == other for one, other in zip(presented, TOKEN, strict=True))


INFO = ShareInfo("kr_0123456789abcdef", "fedcba9876543210", 1, 2)
KNOWN, KEY = memoryview(bytes(range(32))), memoryview(bytearray(range(32)))
TARGET, TEXT, SHARE_TEXT = (memoryview(bytearray(size)) for size in (32, 64, shares.TEXT_CHARS))
TOKEN = hashlib.sha256(b"token").hexdigest().encode()
TABLE = KeyTable(backend=[TOKEN.decode()], admin=[hashlib.sha256(b"other").hexdigest()])
SIGNATURE = hmac.digest(TOKEN, b"user", "sha256").hex().encode()
TAG = aead.authenticate(KEY, bytes(range(24)), b"data")
ZEROS, ONE_VALUE = bytes(32), b"\xa7" * 32

CONTROL = Target("control", lambda rng, _: rng.randbytes(64), TABLE.find)
PLANTED = [
    Target("combine_without_zeros", secret(ZEROS), combine_without_zeros),
    Target("compare_to_the_first_difference", wrong(TOKEN), compare_to_the_first_difference),
]
CONSTANT = [
    CONTROL,
    Target("shares.combine, one value", secret(ONE_VALUE), lambda share: shares.combine({1: share, 3: KNOWN}, TARGET)),
    Target("base64.encode, zeros", secret(bytes(1024)), base64.encode),
    Target("aead.check_authentic", wrong(TAG), refused(lambda tag: aead.check_authentic(KEY, tag, b"data"))),
    Target("KeyTable.find", wrong(TOKEN), TABLE.find),
    Target("KeyTable.verifies", wrong(SIGNATURE), lambda signature: TABLE.verifies("user", signature)),
]
VARIABLE = [
    Target("shares.combine, zeros", secret(ZEROS), lambda share: shares.combine({1: share, 3: KNOWN}, TARGET)),
    Target("shares.write_text, zeros", secret(ZEROS), lambda share: shares.write_text(share, INFO, [SHARE_TEXT])),
    Target("shares.read_text, zeros", share_text, lambda text: shares.read_text([text], TARGET)),
    Target("hex_decode_into, zeros", secret(ZEROS, text=True), lambda text: hex_decode_into(text, TARGET)),
    Target("hex_decode_into, one value", secret(ONE_VALUE, text=True), lambda text: hex_decode_into(text, TARGET)),
    Target("hex_encode_into, zeros", secret(ZEROS), lambda key: hex_encode_into(key, TEXT)),
]
"""CPython shifts a zero faster than another integer, and its small integers lie in several lines of the cache."""


@asynccontextmanager
async def policy_lookup(directory: Path) -> AsyncIterator[Target]:
    """A key out of scope, or one that does not exist."""
    async with limited(
        directory, '[[grant]]\nprincipals = ["uid:1"]\nroles = ["encrypt"]\nthreads = ["mine-*"]\n'
    ) as made:
        foreign = await made.one.make(50, "other1")
        unknown = [key_id[:-1] + ("0" if key_id[-1] != "0" else "1") for key_id in foreign]
        who = made.table.entered(made.who(1), api.ENCRYPT)

        def make(rng: random.Random, kind: bool) -> bytes:
            return rng.choice(foreign if kind else unknown).encode()

        def look_up(key_id: bytes) -> object:
            return made.access.keys(who, api.ENCRYPT).opened(key_id.decode())

        yield Target("policy: a key out of scope", make, refused(look_up))


async def findings(count: int, directory: Path, seed: int) -> dict[str, Finding]:
    """Of all targets but the planted ones."""
    rng = random.Random(seed)
    async with policy_lookup(directory) as lookup:
        return {target.name: measured(target, count, rng) for target in (*CONSTANT, lookup, *VARIABLE)}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory(prefix="minikms-timing-") as directory:
        for name, found in asyncio.run(findings(count, Path(directory) / "d", random.randrange(2**32))).items():
            print(f"{name:32} t {found.t:7.1f}  {found.difference_ns:8.1f} ns of {found.mean_ns:8.0f}")


if __name__ == "__main__":
    main()
