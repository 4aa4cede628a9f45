"""A fuzzer for batches in MessagePack: mutated bodies, decoded and carried out.

Owns: the tokens, the inputs and the campaign. What must hold for every case: the body is refused with a 4xx, or each
of its items is answered; nothing else is raised; an answer has as many outcomes as the request has items; what was
accepted has the same meaning when it is encoded anew. A failing case is shown as bytes, with the seed. Run it by
itself: `python -m tests.torture.fuzz_msgpack SECONDS [SEED]`.
"""

import asyncio
import inspect
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from minikms import api
from minikms.api import ROLES, Verb
from minikms.api.errors import KmsRefusedError
from minikms.http import Response
from minikms.policy.principal import Principal
from minikms_daemon.server import strictmsgpack
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.records import RecordVerbs
from tests.harness.vaults import SilentAudit, opened_vault
from tests.torture.mutation import mutated

WHO = Principal(0, 0, "peer_uid:0", ROLES)
BATCHES: list[Verb[Any, Any]] = [verb for verb in api.VERBS if verb.is_batch]
DECODERS = {verb: strictmsgpack.Decoder(verb.request) for verb in BATCHES}
TOKENS = [
    b"\xc0", b"\xc1", b"\xc2", b"\xc4\x00", b"\xc4\x01x", b"\xc5\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc7\x01\x05x",
    b"\xca\x00\x00\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd6\xff\x00\x00\x00\x00", b"\xd9\x00", b"\xda\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xdc\x00\x01", b"\xdc\x04\x01", b"\xdd\xff\xff\xff\xff", b"\xde\x00\x01",
    b"\xdf\xff\xff\xff\xff", b"\x80", b"\x81\xa0\xa0", b"\x90", b"\x91", b"\x92", b"\x95", b"\x9f", b"\xa0",
    b"\xa1\xff", b"\xbf", b"\xff", b"\x00", b"\x91" * 300, b"\xdc\x08\x00" + b"\xc0" * 2048,
]  # fmt: skip


def seeds(key: str, other: str) -> dict[Verb[Any, Any], list[Any]]:
    """Valid requests of each verb, as arrays."""
    sealed, ids = bytes(40), ["t", "r" * 40]
    items = [[key, b"p" * 30], [key, b"", b"aad"], [other, b"p", None, None, ids[1]], [key, sealed, b"", *ids]]
    moved = [[sealed], [sealed, b"aad"], [b"", None]]
    return {
        api.ENCRYPT_BATCH: [[items], [[]], [items * 5]],
        api.DECRYPT_BATCH: [[items], [items * 5]],
        api.REENCRYPT_BATCH: [[key, other, moved], [key, key, []]],
        api.CHECK_BATCH: [[key, moved], [key, moved, "t"], [other, [], None]],
        api.MAC: [[key, moved], [key, moved, "t"], [other, [], None]],
    }


def fuzz_batches(seconds: float, seed: int) -> int:
    """As many cases as fit. Returns how many."""
    return asyncio.run(_fuzz_batches(seconds, seed))


async def _fuzz_batches(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="minikms-fuzz-") as directory:
        async with opened_vault(Path(directory) / "d") as one:
            table = VerbTable(SilentAudit())
            RecordVerbs(one.vault, table)
            key, other = await one.make(2)
            bodies = {
                verb: [msgspec.msgpack.encode(array) for array in arrays] for verb, arrays in seeds(key, other).items()
            }
            count = 0
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                verb = rng.choice(BATCHES)
                body = mutated(rng, rng.choice(bodies[verb]), TOKENS, bodies[verb])
                try:
                    await _carry_out(table, verb, body)
                except Exception as error:
                    raise AssertionError(f"seed {seed}: {verb.name} of {body!r}: {error!r}") from error
                one.vault.record_keys.end_turn()
                count += 1
            return count


async def _carry_out(table: VerbTable, verb: Verb[Any, Any], body: bytes) -> None:
    try:
        request = DECODERS[verb].decode(memoryview(body))
        if isinstance(request.items, list):
            again = DECODERS[verb].decode(msgspec.msgpack.encode(request))
            assert again == request, "it has another meaning when it is encoded anew"
        answer = table[verb](WHO, request, "")
        answer = await answer if inspect.isawaitable(answer) else answer
    except KmsRefusedError as error:
        assert 400 <= error.status < 500, error
        json.dumps(str(error))
        return
    assert isinstance(answer, Response) and answer.content_type == api.MSGPACK
    found = msgspec.msgpack.decode(answer.body, type=api.answer_array(verb))
    if isinstance(found, api.ItemsArray):
        assert len(found.items) == len(request.items)
    elif isinstance(found, api.CheckBatchAnswer):
        assert found.opened + len(found.refused) == len(request.items)


def main() -> None:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    print(f"{fuzz_batches(seconds, seed)} cases, seed {seed}")


if __name__ == "__main__":
    main()
