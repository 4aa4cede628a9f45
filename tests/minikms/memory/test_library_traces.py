"""What the libraries leave in memory of a key after one call: the measurements that the design is based on.

Each is made in a small process, so that a different behaviour of a new library version is found here first.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest

from minikms.crypto.aead import LONG_TEXT_BYTES
from minikms.processes.flags import BIND_VARIABLE
from tests import needs
from tests.harness import decryptor
from tests.minikms.memory import scanner

USES = {
    "AES-GCM": "AESGCM(slot.view).encrypt(bytes(12), b'text' * 50, b'aad')",
    "AES-GCM of a long text": "AESGCM(slot.view).encrypt(bytes(12), bytes(20_000), b'aad')",
    "AES-GCM of a long text with a bad tag": "refused(lambda: AESGCM(slot.view).decrypt(bytes(12), bytes(5_000), b''))",
    "AES-GCM of long associated data": "AESGCM(slot.view).encrypt(bytes(12), b'', bytes(20_000))",
    "AES-GCM of a bad tag": "refused(lambda: AESGCM(slot.view).decrypt(bytes(12), bytes(200), b'aad'))",
    "unwrapping into the arena": "AESGCM(other.view).decrypt_into(bytes(12), sealed, b'aad', slot.view)",
    "wrapping from the arena": "AESGCM(other.view).encrypt(bytes(12), slot.view, b'aad')",
    "rewraps of a turn": "rewrapped(slot.view)",
    "derivation of a key": "Kdf(slot.view).derive_into(bytes(12), other.view)",
    "derivations by one object": "derived_by(Kdf(slot.view))",
    "XAES-256-GCM": "seal(slot.view, bytes(24), b'text' * 50, b'aad')",
    "HMAC": "hmac.digest(slot.view, b'text' * 50, 'sha256')",
    "HMAC of many texts": "macs_of(HMAC(slot.view, SHA256()), b'text' * 50)",
    "sealing with HPKE under an ephemeral key": "hpke.seal(public, b'info', other.view, random=given)",
    "sealing with HPKE": "hpke.seal(public, b'info', slot.view)",
    "Ed25519 signing": "Ed25519PrivateKey.from_private_bytes(slot.view).sign(b'text' * 50)",
    "Ed25519 public key": "Ed25519PrivateKey.from_private_bytes(slot.view).public_key().public_bytes_raw()",
}
PROCESSES_MAX = 10
"""Attempts to see a trace that a later call may overwrite."""
CHILD = textwrap.dedent("""
    import hmac, os, sys
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.hmac import HMAC
    from minikms.crypto import hpke, slots
    from minikms.crypto.aead import Kdf, XaesCipher, scrub, seal
    from minikms.keys import dek
    from minikms.memory import SecretArena, fill_random

    def refused(call):
        try:
            call()
        except InvalidTag:
            return

    def macs_of(keyed, text):
        for _ in range(9):
            copy = keyed.copy()
            copy.update(text)
            copy.finalize()

    def derived_by(kdf):
        for number in range(9):
            kdf.derive_into(bytes([number] * 12), other.view)

    def rewrapped(kek):
        with arena.allocate() as key, arena.allocate() as again:
            with dek.Rewrapper(lambda version: XaesCipher(kek), 2, key=key.view, again=again.view) as rewrapper:
                for _ in range(3):
                    rewrapper.rewrap(record, bytes(24))

    def given(view):
        view[:] = slot.view

    arena = SecretArena(4)
    slot, other = arena.allocate(), arena.allocate()
    fill_random(other.view)
    masked = bytes.fromhex(sys.stdin.readline())
    for index, byte in enumerate(masked):
        slot.view[index] = byte ^ 0x5A
    sealed = AESGCM(other.view).encrypt(bytes(12), slot.view, b"aad")
    public = slots.public_key(other.view, "kr_00112233445566ff", "s1")
    made = {"key_id": dek.make_key_id(0, bytes(10)), "thread_id": "t", "purpose": "thread", "created_at": ""}
    record = dek.new(**made, kek=XaesCipher(slot.view), kek_version=1, dek=other.view, nonce=bytes(24))
    for _ in range(100):
        {use}
    {scrub}
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
""")


ALL_SCRUBBED = "scrub()"
REGISTERS_SCRUBBED = "scrub(stack=False)"


def traces_of(use: str, *, scrub: str, environment: Mapping[str, str] = {}) -> set[str]:
    """In which regions root finds the key after a hundred uses of it."""
    needs.root()
    key = os.urandom(32)
    code = CHILD.replace("{use}", use).replace("{scrub}", scrub or "pass")
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(bytes(byte ^ 0x5A for byte in key).hex() + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        needles = scanner.ed25519_forms("key", key) + scanner.x25519_forms("key", key) + scanner.cmac_forms("key", key)
        for used in (key, *(decryptor.derived(key, bytes([number] * 12)) for number in range(9))):
            needles += scanner.forms_of("cipher's key", used) + scanner.ghash_forms("cipher's key", used)
        report = scanner.scan_process(process.pid, needles)
        process.kill()
    return {hit.where.split()[-1] for hit in report.hits}


@pytest.mark.parametrize("use", USES)
def test_no_key_remains_after_a_call_when_the_stack_is_scrubbed(use: str) -> None:
    assert traces_of(USES[use], scrub=ALL_SCRUBBED) == set()


def test_the_stack_has_to_be_scrubbed() -> None:
    """A key that was unwrapped stays there. Processors without AVX-512 showed no trace, so the test asks for it.

    If this fails, scrubbing has lost its reason. A call that happens to be as deep overwrites the key, so several
    processes may try.
    """
    needs.processor_flags("avx512f", "vaes")
    use = USES["unwrapping into the arena"]
    assert any(traces_of(use, scrub="") == {"[stack]"} for _ in range(PROCESSES_MAX))


def test_a_long_text_has_to_be_scrubbed_by_a_call_of_its_own() -> None:
    """If this fails, the argument of `scrub` has lost its reason."""
    needs.processor_flags("avx512f", "vaes", "vpclmulqdq")
    use = USES["AES-GCM of a long text"]
    assert any(traces_of(use, scrub=REGISTERS_SCRUBBED) == {"[stack]"} for _ in range(PROCESSES_MAX))


def test_up_to_the_bound_a_text_needs_no_call_of_its_own() -> None:
    use = f"AESGCM(slot.view).encrypt(bytes(12), bytes({LONG_TEXT_BYTES}), b'aad')"
    assert traces_of(use, scrub=REGISTERS_SCRUBBED) == set()


FIRST_CALLS = "_ < 99 or [AESGCM(slot.view).encrypt(bytes(12), bytes(16), b'aad'), os.getloadavg(), os.getgroups()]"
"""In the last turn, functions that the interpreter has not called before; the registers still hold the key schedule."""


def test_a_function_that_is_called_first_after_a_cipher_leaves_no_key() -> None:
    """If the symbols were bound at the start, as those of the daemon are: else the linker saves the registers."""
    needs.processor_flags("avx512f", "vaes")
    assert traces_of(FIRST_CALLS, scrub="", environment={BIND_VARIABLE: "1"}) == set()
    assert any(traces_of(FIRST_CALLS, scrub="") == {"[stack]"} for _ in range(PROCESSES_MAX))


def test_making_a_cipher_leaves_no_key_on_the_stack() -> None:
    """`scrub` uses a cipher that was made before, so it does not cover what making one would leave."""
    assert traces_of("AESGCM(slot.view)", scrub="", environment={BIND_VARIABLE: "1"}) == set()


def test_a_cipher_object_that_is_kept_would_be_found() -> None:
    assert traces_of("kept = AESGCM(slot.view)", scrub=ALL_SCRUBBED) != set()


def test_an_x25519_key_that_is_kept_would_be_found() -> None:
    assert traces_of("kept = X25519PrivateKey.from_private_bytes(slot.view)", scrub=ALL_SCRUBBED) != set()


def test_a_rewrapper_whose_block_does_not_end_would_be_found() -> None:
    use = "kept = dek.Rewrapper(lambda version: XaesCipher(slot.view), 2, key=other.view, again=other.view)"
    use += "; kept.rewrap(record, bytes(24))"
    assert traces_of(use, scrub=ALL_SCRUBBED) != set()


def test_an_hmac_object_that_is_kept_would_be_found() -> None:
    assert traces_of("kept = HMAC(slot.view, SHA256())", scrub=ALL_SCRUBBED) != set()
