"""The root key source `shares:`: several shares are typed on one terminal, and wrong ones are named at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.terminal import OnTerminal

OPENS = """
import sys
from pathlib import Path
from minikms.crypto.aead import NonceSource
from minikms.api.errors import StartError
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory import SecretArena
from minikms.roots.typed_shares import TypedShares

keyring = Path(sys.argv[1]).read_bytes()
source = TypedShares((lambda: keyring) if sys.argv[2] == "known" else None)
with SecretArena(64, force_fallback=True) as arena:
    try:
        with source.read(arena) as root:
            unlocked, slot = UnlockedKeyring.open(arena, root.view, keyring, nonces=NonceSource().next)
            print("opened by", slot.provider, flush=True)
            unlocked.release()
    except StartError as error:
        print("failed:", error, flush=True)
    print("slots in use:", arena.in_use, flush=True)
"""


class Kit:
    """A data directory and its three shares, of which any two open it."""

    def __init__(self, place: Path, *, shares: bool = True) -> None:
        place.mkdir()
        self.keyring = place / "data" / "keyring.json"
        command = [sys.executable, "-m", "minikms", "init", "--data-dir", str(place / "data")]
        command += ["--master-key-file", str(place / "key")]
        if shares:
            command += ["--recovery-shares", "2/3", "--shares-dir", str(place / "shares")]
        subprocess.run(command, check=True, capture_output=True)
        self.texts = [file.read_text("ascii").strip() for file in sorted(place.glob("shares/*"))]

    def opening(self, known: bool = True) -> OnTerminal:
        return OnTerminal([sys.executable, "-c", OPENS, str(self.keyring), "known" if known else "unknown"])


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path / "one")


@pytest.mark.parametrize("known", [True, False])
def test_typed_shares_open_the_keyring(kit: Kit, known: bool) -> None:
    with kit.opening(known) as program:
        program.wait_for("Type the first share")
        program.type(kit.texts[2])
        program.wait_for("Share 3 is taken")
        program.wait_for("Type share 2 of 2")
        program.type(kit.texts[0].upper())
        assert program.wait() == 0
    assert b"opened by shares" in program.shown
    assert b"slots in use: 0" in program.shown
    assert kit.texts[0][20:].encode() not in program.shown.lower()


def test_a_refused_share_is_explained_and_asked_for_again(kit: Kit, tmp_path: Path) -> None:
    other = Kit(tmp_path / "other")
    with kit.opening() as program:
        for count, (line, answer) in enumerate(
            (
                (other.texts[0], "Refused: share 1 is of the keyring"),
                (kit.texts[0][:-3], "Refused: a share has 99 letters and digits"),
                ("x" * 300, "Refused: the line is longer than 256 bytes"),
                (kit.texts[0], "Share 1 is taken"),
                (kit.texts[0], "Refused: share 1 was entered already"),
            ),
            start=1,
        ):
            program.wait_for("(it is not shown)", times=count)
            program.type(line)
            program.wait_for(answer)
        program.wait_for("(it is not shown)", times=6)
        program.type(kit.texts[1])
        assert program.wait() == 0
    assert b"opened by shares" in program.shown


def test_shares_of_another_keyring_do_not_open_one_that_was_not_known(kit: Kit, tmp_path: Path) -> None:
    other = Kit(tmp_path / "other")
    with kit.opening(known=False) as program:
        for count, text in enumerate(other.texts[:2], start=1):
            program.wait_for("(it is not shown)", times=count)
            program.type(text)
        assert program.wait() == 0
    assert b"failed:" in program.shown and b"opened" not in program.shown


def test_a_keyring_without_shares_asks_for_none(tmp_path: Path) -> None:
    with Kit(tmp_path / "one", shares=False).opening() as program:
        assert program.wait() == 0
    assert b"has no shares" in program.shown
    assert b"Type" not in program.shown


def test_a_closed_terminal_ends_the_prompt(kit: Kit) -> None:
    with kit.opening() as program:
        program.wait_for("Type the first share")
        program.type(b"\x04", end=b"")
        assert program.wait() == 0
    assert b"failed: the line was cut off" in program.shown
    assert b"slots in use: 0" in program.shown
