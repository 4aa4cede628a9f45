"""What making, typing and combining shares leaves in memory: no root key, no share, no text of a share."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo
from tests import needs
from tests.harness.terminal import OnTerminal
from tests.minikms.memory import scanner

KEYRING = "kr_0123456789abcdef"
MASK = 0x5A
TEXT_PART_CHARS = 12
MAKES = """
import sys
from minikms.memory import SecretArena
from minikms.roots import recovery_shares

def masked(view):
    return bytes(byte ^ 0x5A for byte in view).hex()

arena = SecretArena(64)
root = arena.allocate()
for index, byte in enumerate(bytes.fromhex(sys.stdin.readline())):
    root.view[index] = byte ^ 0x5A
with recovery_shares.new_shares(root.view, "kr_0123456789abcdef", 3, 5, arena) as made:
    for share in made:
        digest = share.digest
        with recovery_shares.share_text(share, arena) as text:
            print(share.info.set_id, share.info.number, masked(share.slot.view), flush=True)
            {leak}
{release}
print("ready", flush=True)
sys.stdin.readline()
"""
COLLECTS = """
import sys
from minikms.api.errors import KmsRefusedError
from minikms.keys.collected_shares import CollectedShares
from collections import namedtuple
from minikms.memory import SecretArena
from minikms.memory.terminal import typed_secret

ShareSet = namedtuple("ShareSet", "set_id threshold count digests")
set_id, *digests = sys.argv[1:]
known = [ShareSet(set_id, 3, 5, tuple(map(bytes.fromhex, digests)))]
arena = SecretArena(64)
collected = CollectedShares(arena)
while not collected.complete:
    try:
        with typed_secret("Share: ", 256, arena) as text:
            collected.add(text, "kr_0123456789abcdef", known, 0.0)
    except KmsRefusedError as error:
        print("refused:", type(error).__name__, flush=True)
root = collected.combine()
print("fingerprint", sum(root.view), flush=True)
root.release()
collected.clear()
print("ready", flush=True)
sys.stdin.readline()
"""


def needles_of(root: bytes, made: dict[int, bytes], set_id: str) -> Iterator[scanner.Needle]:
    """Root key and shares in every form of a key; and the texts of the shares, by parts, in both cases."""
    yield from scanner.forms_of("root key", root)
    for number, share in made.items():
        yield from scanner.forms_of(f"share {number}", share)
        yield from text_needles(number, text_of(share, ShareInfo(KEYRING, set_id, number, 3)))


def text_needles(number: int, text: bytes) -> Iterator[scanner.Needle]:
    """The characters of the secret, between head and checksum."""
    secret = text[len(text) * 19 // 59 + 2 : len(text) * 51 // 59 - 2]
    for start in range(0, len(secret) - TEXT_PART_CHARS, TEXT_PART_CHARS):
        part = secret[start : start + TEXT_PART_CHARS]
        yield scanner.Needle(f"share {number}", "text", part)
        yield scanner.Needle(f"share {number}", "text", part.upper())


def text_of(share: bytes, info: ShareInfo) -> bytes:
    text = memoryview(bytearray(shares.TEXT_CHARS))
    shares.write_text(memoryview(share), info, [text])
    return bytes(text)


def traces_of_making(*, release: bool, leak: str = "pass") -> set[str]:
    needs.root()
    root = os.urandom(32)
    code = MAKES.replace("{release}", "root.release()" if release else "").replace("{leak}", leak)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdin is not None and it.stdout is not None
        it.stdin.write(bytes(byte ^ MASK for byte in root).hex() + "\n")
        it.stdin.flush()
        made, set_id = {}, ""
        while (line := it.stdout.readline()) != "ready\n":
            set_id, number, share = line.split()
            made[int(number)] = bytes(byte ^ MASK for byte in bytes.fromhex(share))
        assert len(made) == 5
        hits = scanner.scan_process(it.pid, needles_of(root, made, set_id)).hits
        it.kill()
    return {f"{hit.name}, {hit.form}" for hit in hits}


@pytest.mark.parametrize("release", [False, True])
def test_making_shares_leaves_nothing(release: bool) -> None:
    """Also while the root key is still in the arena."""
    assert traces_of_making(release=release) == set()


def test_a_text_that_is_kept_would_be_found() -> None:
    found = traces_of_making(release=True, leak="kept = b''.join(map(bytes, text)) if share.info.number < 3 else kept")
    assert found == {"share 2, text"}


def typed_shares() -> tuple[bytes, dict[int, bytes], str, list[str]]:
    """A root key, its shares, their set and their digests."""
    root, set_id = os.urandom(32), os.urandom(8).hex()
    views = {number: memoryview(bytearray(32)) for number in range(1, 6)}
    shares.split(memoryview(root), [memoryview(os.urandom(32)) for _ in range(2)], views)
    made = {number: bytes(view) for number, view in views.items()}
    digests = [shares.digest(view, ShareInfo(KEYRING, set_id, number, 3)).hex() for number, view in views.items()]
    return root, made, set_id, digests


def test_typing_and_combining_shares_leaves_nothing() -> None:
    """Right, mistyped, repeated, of another set, and wrong with a right checksum."""
    needs.root()
    root, made, set_id, digests = typed_shares()
    _, others, other_set, _ = typed_shares()
    texts = {number: text_of(share, ShareInfo(KEYRING, set_id, number, 3)) for number, share in made.items()}
    wrong = bytes([made[4][0] ^ 1]) + made[4][1:]
    typed = [
        texts[5],
        texts[2][:-1],
        texts[2].replace(b"-", b"").upper(),
        texts[5],
        text_of(others[1], ShareInfo(KEYRING, other_set, 1, 3)),
        text_of(wrong, ShareInfo(KEYRING, set_id, 4, 3)),
        texts[1],
    ]
    with OnTerminal([sys.executable, "-c", COLLECTS, set_id, *digests]) as program:
        for count, line in enumerate(typed, start=1):
            program.wait_for("Share: ", times=count)
            program.type(line)
        program.wait_for("ready")
        assert f"fingerprint {sum(root)}".encode() in program.shown
        refused = [line.split()[1].decode() for line in program.shown.splitlines() if line.startswith(b"refused")]
        assert refused == ["ShareTextError", "ConflictError", "WrongShareError", "WrongShareError"]
        needles = [*needles_of(root, made, set_id), *needles_of(root, others, other_set)]
        needles += list(needles_of(root, {4: wrong}, set_id))
        hits = scanner.scan_process(program.process.pid, needles).hits
    assert {f"{hit.name}, {hit.form}" for hit in hits} == set()


def test_init_keeps_the_shares_that_it_shows_out_of_its_memory(tmp_path: Path) -> None:
    """While it waits for the answer, and the shares and their root key are in the arena."""
    needs.root()
    command = [sys.executable, "-m", "minikms", "init", "--data-dir", str(tmp_path / "data")]
    command += ["--master-key-file", str(tmp_path / "key"), "--recovery-shares", "3/5"]
    with OnTerminal(command) as program:
        program.wait_for("[y/N]")
        made, root = {}, memoryview(bytearray(32))
        for text in re.findall(rb"mks1(?:-[0-9a-z]{5}){19}", program.shown):
            share = memoryview(bytearray(32))
            info = shares.read_text([memoryview(text)], share)
            made[info.number] = share
        assert len(made) == 5
        shares.combine(made, root)
        needles = list(scanner.forms_of("root key", bytes(root)))
        for number, share in made.items():
            needles += scanner.forms_of(f"share {number}", bytes(share))
            needles += text_needles(number, text_of(bytes(share), info._replace(number=number)))
        hits = scanner.scan_process(program.process.pid, needles).hits
        assert {f"{hit.name}, {hit.form}" for hit in hits} == set()
        program.type("yes")
        assert program.wait() == 0
