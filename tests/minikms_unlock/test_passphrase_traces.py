"""What deriving a root key leaves in memory of the passphrase: nothing, although the library leaves a copy."""

import os
import subprocess
import sys

import pytest

from minikms_unlock.passphrase import PASSPHRASE_BYTES_MAX
from tests import needs
from tests.minikms.memory import scanner

MASK = 0x5A
PART_BYTES = 8
CHILD = """
import sys
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from minikms.crypto.aead import scrub
from minikms.memory import zero
from minikms_unlock.passphrase import Parameters, derive_into

def library_alone(passphrase, parameters, root):
    derivation = Argon2id(salt=b"0123456789abcdef", length=32, iterations=3, lanes=4, memory_cost=65536)
    derivation.derive_into(passphrase, root)

masked = bytes.fromhex(sys.stdin.readline())
passphrase, root = memoryview(bytearray(len(masked))), memoryview(bytearray(32))
for index, byte in enumerate(masked):
    passphrase[index] = byte ^ 0x5A
{derive}(passphrase, Parameters("0123456789abcdef", 65536, 3, 4), root)
print(bytes(byte ^ 0x5A for byte in root).hex(), flush=True)
zero(passphrase)
zero(root)
scrub()
print("ready", flush=True)
sys.stdin.readline()
"""

FREED_BEFORE = """
import ctypes, random
drawn, library, held = random.Random(1), ctypes.CDLL(None), []
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
for _ in range(20_000):
    if held and drawn.random() < 0.5:
        library.free(held.pop(drawn.randrange(len(held))))
    else:
        held.append(library.malloc(drawn.randrange(16, 2000)))
for _ in range(len(held) // 2):
    library.free(held.pop(drawn.randrange(len(held))))
"""


def traces_of(derive: str, size: int) -> set[str]:
    """The names of what root finds in a process that derived a root key from a passphrase of `size` bytes."""
    needs.root()
    passphrase = os.urandom(size)
    code = CHILD.replace("{derive}", derive)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdin is not None and it.stdout is not None
        it.stdin.write(bytes(byte ^ MASK for byte in passphrase).hex() + "\n")
        it.stdin.flush()
        root = bytes(byte ^ MASK for byte in bytes.fromhex(it.stdout.readline()))
        assert it.stdout.readline() == "ready\n"
        needles = list(scanner.forms_of("root key", root))
        for start in range(0, size - PART_BYTES + 1, PART_BYTES // 2):
            needles.append(scanner.Needle("passphrase", "part", passphrase[start : start + PART_BYTES]))
        hits = scanner.scan_process(it.pid, needles).hits
        it.kill()
    return {hit.name for hit in hits}


@pytest.mark.parametrize(
    "size",
    [
        *(16, 33, 100, PASSPHRASE_BYTES_MAX),
        *(pytest.param(size, marks=pytest.mark.torture) for size in (17, 24, 60, 64, 200, 300)),
    ],
)
def test_neither_passphrase_nor_root_key_is_left(size: int) -> None:
    assert traces_of("derive_into", size) == set()


def test_blocks_that_were_freed_before_do_not_keep_the_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CHILD", FREED_BEFORE + CHILD)
    assert traces_of("derive_into", 200) == set()


def test_the_copy_of_the_library_has_to_be_overwritten() -> None:
    """If this fails, the library clears its copy, and `_overwrite_freed_blocks` can go."""
    assert traces_of("library_alone", 60) == {"passphrase"}
