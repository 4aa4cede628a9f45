"""Root reads the state of OpenSSL's random generator in the daemon's memory, and learns no key by it.

The generator is the CTR-DRBG of NIST SP 800-90A. Who reads its key and counter computes what it returns next.
"""

import base64
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from minikms.client import Client
from tests import needs
from tests.harness import decryptor
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms.memory import scanner
from tests.vectors import mlkem

DERIVATION_KEY = bytes(range(32))
"""A constant of the generator: SP 800-90A, section 10.3.2. Where its schedule is in memory, there is a generator."""
ZERO_KEY = bytes(32)
"""Of the cipher that scrubs the stack."""
DRAWS_MAX = 64
"""Of each generator, between the reading of the memory and the seal that is foretold."""


class Generator(NamedTuple):
    """The state of one: `key` and `counter`."""

    key: bytes
    counter: bytes

    def draws(self) -> Iterator[bytes]:
        """What its next calls return for 32 bytes each: SP 800-90A, section 10.2.1.5.1, without additional input."""
        key, counter = self
        for _ in range(DRAWS_MAX):
            first = int.from_bytes(counter, "big") + 1
            encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
            stream = encryptor.update(b"".join((first + i & (1 << 128) - 1).to_bytes(16, "big") for i in range(5)))
            yield stream[:32]
            key, counter = stream[32:64], stream[64:]


class Memory(NamedTuple):
    schedules: set[bytes]
    """The AES-256 keys whose schedule is in memory."""
    generators: set[Generator]


def memory_of(pid: int) -> Memory:
    """OpenSSL keeps in a structure: the length of the key, 1 for the use of a derivation function, key, counter."""
    state = re.compile(b"\x20" + bytes(7) + b"\x01" + bytes(3) + b"(.{32})(.{16})", re.DOTALL)
    schedules: set[bytes] = set()
    states: set[Generator] = set()
    for data in scanner.memory(pid, overlap=240):
        schedules |= {key for _, key in scanner.aes256_schedules(data)}
        states |= {Generator(*found.groups()) for found in state.finditer(data)}
    return Memory(schedules, {one for one in states if one.key in schedules})


def sealed_to(daemon: LiveDaemon, slot_id: str) -> tuple[bytes, bytes, bytes]:
    """The public key of the slot, and the two parts of the encapsulated key in it."""
    body: dict[str, Any] = decryptor.body_of((daemon.data_dir / "keyring.json").read_bytes())[0]
    [slot] = [one for one in body["slots"] if one["slot_id"] == slot_id]
    sealed = base64.b64decode(slot["sealed"])
    return base64.b64decode(slot["public_key"]), sealed[:1088], sealed[1088:1120]


class Seen(NamedTuple):
    memory: Memory
    """After an encryption, a decryption, and two roots that were added, one of which was removed."""
    seals: list[tuple[bytes, bytes, bytes]]
    """What was made afterwards: the seals to a root that was added, and to one that stayed when another was removed."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    needs.root()
    with LiveDaemon(tmp_path_factory.mktemp("daemon"), "file", forked=False) as daemon, daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        client.decrypt(key_id, client.encrypt(key_id, b"text"))
        first = add_root(client)  # so that each generator that a seal uses has been made
        client.remove_root(add_root(client))
        daemon.wait_for_event("root_removed")
        memory = memory_of(daemon.pid)
        slot_id = add_root(client)
        seals = [sealed_to(daemon, slot_id)]
        client.remove_root(first)
        wait_until(lambda: len(daemon.events("root_removed")) == 2)
        seals.append(sealed_to(daemon, slot_id))
    return Seen(memory, seals)


def test_who_reads_the_generator_can_not_compute_an_ephemeral_key(seen: Seen) -> None:
    """Neither of a root key that is added, nor of one that stays when another is removed.

    The message of ML-KEM can be computed, which shows that the method works. It opens nothing without the other half.
    """
    drawn = [draw for generator in seen.memory.generators for draw in generator.draws()]
    assert DERIVATION_KEY in seen.memory.schedules
    assert drawn
    publics = {X25519PrivateKey.from_private_bytes(draw).public_key().public_bytes_raw() for draw in drawn}
    for _, _, sent_x in seen.seals:
        assert sent_x not in publics
    public, sent_m, _ = seen.seals[0]
    assert any(mlkem.encapsulate(public[:1184], draw)[1] == sent_m for draw in drawn)


def test_every_schedule_of_an_aes_key_in_memory_is_known(seen: Seen) -> None:
    """Of whatever key, also of one that no test can compute. The rest belong to the generator, and to a zero key."""
    known = {DERIVATION_KEY, ZERO_KEY} | {generator.key for generator in seen.memory.generators}
    assert seen.memory.schedules - known == set()


def add_root(client: Client) -> str:
    return client.add_root(os.urandom(32).hex(), provider="file").slot_id


def test_a_planted_schedule_is_found() -> None:
    key = os.urandom(32)
    planted = os.urandom(1003) + b"".join(scanner.aes256_round_keys(key)) + bytes(100)
    assert list(scanner.aes256_schedules(bytes(5000) + planted)) == [(6003, key)]
    assert list(scanner.aes256_schedules(planted[:-101])) == []
