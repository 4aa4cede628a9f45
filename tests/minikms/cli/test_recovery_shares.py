"""`minikms init --recovery-shares`: shares that were handed out open the keyring, and no others do."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minikms.api.errors import KmsRefusedError, StartError
from minikms.cli import recovery
from minikms.crypto import shares
from minikms.crypto.aead import NonceSource
from minikms.keys import keyring
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import verify_audit
from tests.harness.terminal import OnTerminal

SHARE = re.compile(r"mks1(?:-[0-9a-z]{5}){19}")
RUN_SECONDS_MAX = 60


def init_words(place: Path, *flags: str) -> list[str]:
    return ["minikms", "init", "--data-dir", str(place / "data"), "--master-key-file", str(place / "key"), *flags]


def init_command(place: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", *init_words(place, *flags)]


def init(place: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Without a terminal."""
    return forked.run(*init_words(place, *flags))


def body_of(place: Path) -> keyring.Body:
    return keyring.parse_file((place / "data" / "keyring.json").read_bytes())[0]


def opens_with(place: Path, texts: list[str]) -> bool:
    """Whether these shares open the keyring, and are those that its slot names."""
    typed: dict[int, memoryview] = {}
    body = body_of(place)
    [known] = [slot.shares for slot in body.slots if slot.shares is not None]
    for text in texts:
        share = memoryview(bytearray(32))
        info = shares.read_text([memoryview(text.encode())], share)
        assert (info.keyring_id, info.set_id, info.threshold) == (body.keyring_id, known.set_id, known.threshold)
        assert shares.digest(share, info) == known.digests[info.number - 1]
        typed[info.number] = share
    root = memoryview(bytearray(32))
    shares.combine(typed, root)
    with SecretArena(64, force_fallback=True) as arena:
        data = (place / "data" / "keyring.json").read_bytes()
        try:
            unlocked, slot = UnlockedKeyring.open(arena, root, data, nonces=NonceSource().next)
        except StartError:
            return False
        unlocked.release()
        return slot.provider == "shares"


def test_files_of_shares_open_the_keyring(tmp_path: Path) -> None:
    done = init(tmp_path, "--recovery-shares", "3/5", "--shares-dir", str(tmp_path / "shares"), "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["shares"]
    files = sorted((tmp_path / "shares").iterdir())
    assert [file.name for file in files] == [
        f"{body_of(tmp_path).keyring_id}-{made['set_id']}-share-{number}.txt" for number in range(1, 6)
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    texts = [file.read_text("ascii") for file in files]
    assert all(SHARE.fullmatch(text.strip()) for text in texts)
    assert opens_with(tmp_path, texts[:3]) and opens_with(tmp_path, texts[2:])
    assert not opens_with(tmp_path, texts[:2])
    assert not SHARE.search(done.stdout + done.stderr)
    verify_audit(tmp_path / "data", tmp_path / "key")
    slot = body_of(tmp_path).slot(made["slot_id"])
    assert slot is not None and slot.tested_at


def test_shares_are_shown_once_on_the_terminal_and_nowhere_else(tmp_path: Path) -> None:
    command = init_command(tmp_path, "--recovery-shares", "2/3", "--json")
    with OnTerminal(command, output=False) as program:
        program.wait_for("[y/N]")
        program.type("yes")
        assert program.wait() == 0
        assert program.process.stdout is not None
        output = program.process.stdout.read().decode()
    texts = SHARE.findall(program.shown.decode())
    assert len(set(texts)) == len(texts) == 3
    assert opens_with(tmp_path, texts[1:])
    assert json.loads(output)["shares"]["count"] == 3
    assert not SHARE.search(output)
    assert not any(text.encode() in file.read_bytes() for file in every_file(tmp_path) for text in texts)


def every_file(place: Path) -> list[Path]:
    return [file for file in place.rglob("*") if file.is_file()]


@pytest.mark.parametrize("answer", ["", "n", "x", "\x03"])
def test_shares_that_were_not_written_down_are_not_stored(tmp_path: Path, answer: str) -> None:
    with OnTerminal(init_command(tmp_path, "--recovery-shares", "2/3")) as program:
        program.wait_for("[y/N]")
        program.type(answer)
        assert program.wait() == 1
    shown = program.shown.decode()
    assert "was made, but without recovery shares" in shown
    assert "minikms root add shares:2/3" in shown
    assert "audit log" in shown, "what a person must keep is shown all the same"
    assert [slot.shares for slot in body_of(tmp_path).slots] == [None]
    verify_audit(tmp_path / "data", tmp_path / "key")


def test_without_a_terminal_nothing_is_made(tmp_path: Path) -> None:
    done = init(tmp_path, "--recovery-shares", "3/5", "--yes")
    assert done.returncode == 2
    assert "typed and shown on a terminal only" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--recovery-shares", "5/3"], "5 of 3 shares is not possible"),
        (["--recovery-shares", "3"], "THRESHOLD/COUNT"),
        (["--shares-dir", "somewhere"], "--recovery-shares"),
        (["--recovery-shares", "2/2", "--shares-dir", "{data}"], "is in the data directory"),
        (["--recovery-shares", "2/2", "--shares-dir", "{data}/shares"], "is in the data directory"),
        (["--recovery-shares", "2/2", "--shares-dir", "/dev/null"], "/dev/null"),
    ],
)
def test_wrong_flags_make_nothing(tmp_path: Path, flags: list[str], match: str) -> None:
    done = init(tmp_path, *(flag.replace("{data}", str(tmp_path / "data")) for flag in flags))
    assert done.returncode == 2
    assert match in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_share_and_no_slot(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the text of a share is longer. SIGXFSZ is ignored, so the write
    fails.
    """
    place = tmp_path / "shares"
    place.mkdir(0o700)
    code = (
        "import os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from minikms.cli import recovery\n"
        "from minikms.memory.arena import SecretArena, fill_random\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with SecretArena(64, force_fallback=True) as arena, arena.allocate() as root:\n"
        "    fill_random(root.view)\n"
        "    recovery.hand_out(root, 'kr_0123456789abcdef', (2, 3), Path(sys.argv[1]), arena, yes=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert list(place.iterdir()) == []


def test_a_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.roots.recovery_shares.secrets.token_hex", lambda size: "ab" * size)
    with SecretArena(64, force_fallback=True) as arena, arena.allocate() as root:
        root.view[:] = os.urandom(32)
        taken = tmp_path / f"kr_0123456789abcdef-{'ab' * 8}-share-2.txt"
        taken.write_text("somebody's")
        with pytest.raises(FileExistsError):
            recovery.hand_out(root, "kr_0123456789abcdef", (2, 3), tmp_path, arena, yes=True)
    assert [file.name for file in tmp_path.iterdir()] == [taken.name]
    assert taken.read_text() == "somebody's"


def test_a_file_that_does_not_hold_its_share_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def damaged(descriptor: int, data: memoryview) -> int:
        return write(descriptor, bytes([data[0] ^ 1]) + bytes(data[1:]))

    monkeypatch.setattr(os, "write", damaged)
    with SecretArena(64, force_fallback=True) as arena, arena.allocate() as root:
        root.view[:] = os.urandom(32)
        with pytest.raises(KmsRefusedError):
            recovery.hand_out(root, "kr_0123456789abcdef", (2, 3), tmp_path, arena, yes=True)
    assert list(tmp_path.iterdir()) == []


# --- through the running daemon ---------------------------------------------------------------------------------------


def minikms(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *words)


def type_shares(program: OnTerminal, texts: list[str]) -> None:
    for count, text in enumerate(texts, start=1):
        program.wait_for("(it is not shown)", times=count)
        program.type(text)


def test_shares_are_added_tested_and_open_the_keyring_offline(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        socket = ("--socket", daemon.socket)
        done = minikms("root", "add", "shares:2/3", "--shares-dir", tmp_path / "shares", *socket, "--json")
        assert done.returncode == 0, done.stderr
        added = json.loads(done.stdout)
        assert (added["provider"], added["shares"]["threshold"], added["shares"]["count"]) == ("shares", 2, 3)
        texts = [file.read_text("ascii").strip() for file in sorted((tmp_path / "shares").iterdir())]
        tested = [sys.executable, "-m", "minikms", "root", "test", added["slot_id"], "--root", "shares:"]
        with OnTerminal([*tested, *map(str, socket)]) as program:
            type_shares(program, texts[1:])
            assert program.wait() == 0
        assert f"opens slot {added['slot_id']}".encode() in program.shown
        event = daemon.events("add_root")[-1]
        assert event["facts"]["slot_id"] == added["slot_id"]
        daemon.stop()
    verify = [
        sys.executable,
        "-m",
        "minikms",
        "audit",
        "verify",
        "--data-dir",
        str(daemon.data_dir),
        "--root",
        "shares:",
    ]
    with OnTerminal(verify) as program:
        type_shares(program, [texts[2], texts[0]])
        assert program.wait() == 0, program.shown


def test_shares_for_the_daemon_are_shown_before_they_are_stored(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        command = [sys.executable, "-m", "minikms", "root", "add", "shares:2/2", "--socket", str(daemon.socket)]
        for answer, status in (("no", 1), ("yes", 0)):
            with OnTerminal(command) as program:
                program.wait_for("[y/N]")
                with daemon.client() as kms:
                    assert len(kms.list_roots().roots) == 1
                program.type(answer)
                assert program.wait() == status, program.shown
            assert len(SHARE.findall(program.shown.decode())) == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("add", "shares:"), "THRESHOLD/COUNT"),
        (("add", "shares:9/3"), "is not possible"),
        (("add", "file:/nowhere", "--shares-dir", "somewhere"), "shares:3/5"),
        (("add", "shares:2/3"), "on a terminal only"),
        (("test", "s1", "--root", "shares:"), "on a terminal only"),
        (("test", "s1", "--root", "shares:2/3"), "shares"),
    ],
)
def test_other_uses_of_shares_are_refused(words: tuple[str, ...], match: str) -> None:
    done = minikms("root", *words, "--socket", "/nowhere")
    assert done.returncode == 2
    assert match in done.stderr


def test_a_daemon_never_asks_for_shares(tmp_path: Path) -> None:
    done = minikms("serve", "--root", "shares:", "--socket", tmp_path / "s", "--data-dir", tmp_path / "data")
    assert done.returncode == 2
    assert "takes no root key from shares" in done.stderr


# --- killed half-way --------------------------------------------------------------------------------------------------

KILLED_AT = ("rename,renameat,renameat2", "fsync,fdatasync")


def init_killed(place: Path, calls: str, number: int) -> bool:
    """Runs init under strace, and kills it at that call; False if it ended first."""
    place.mkdir()
    strace = ["strace", "-f", "-o", str(place / "strace"), "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:signal=KILL:when={number}"]
    done = subprocess.run(
        [*strace, *init_command(place, "--recovery-shares", "2/2", "--shares-dir", str(place / "shares"))],
        capture_output=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    return done.returncode != 0


def judge_killed(place: Path) -> None:
    """A slot that was stored has its shares, whole; and the directory starts under the key file, or init goes on."""
    if not (place / "data" / "keyring.json").exists():
        assert init(place).returncode == 0
        return
    if any(slot.shares for slot in body_of(place).slots):
        assert opens_with(place, [file.read_text("ascii").strip() for file in sorted((place / "shares").iterdir())])
    base = place / "run"
    base.mkdir()
    with LiveDaemon(base, "file") as daemon:
        daemon.stop()
        daemon.command[daemon.command.index("--data-dir") + 1] = str(place / "data")
        daemon.command[daemon.command.index("--master-key-file") + 1] = str(place / "key")
        daemon.start()
    verify_audit(place / "data", place / "key")


@pytest.mark.parametrize("number", [1, 2])
def test_an_init_killed_at_a_rename_leaves_no_slot_without_shares(tmp_path: Path, number: int) -> None:
    needs.program("strace")
    assert init_killed(tmp_path / "it", KILLED_AT[0], number)
    judge_killed(tmp_path / "it")


def test_shares_of_an_interrupted_init_are_named_void(tmp_path: Path) -> None:
    """They were written, and their slot was not: a second init names them, and no shares of a slot."""
    flags = ("--recovery-shares", "2/2", "--shares-dir", str(tmp_path / "shares"))
    assert init(tmp_path, *flags).returncode == 0
    good, _ = sorted((tmp_path / "shares").iterdir())
    body = body_of(tmp_path)
    void = good.with_name(f"{body.keyring_id}-s_0123456789abcdef-share-1.txt")
    void.touch()
    said = init(tmp_path, *flags).stderr
    assert "has a keyring already" in said
    assert "root add shares:2/2" in said
    assert (void.name in said, good.name in said) == (True, False)


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("calls", KILLED_AT)
def test_no_system_call_of_init_leaves_a_slot_without_shares(tmp_path: Path, calls: str) -> None:
    needs.program("strace")
    number = 1
    while init_killed(tmp_path / f"at{number}", calls, number):
        judge_killed(tmp_path / f"at{number}")
        number += 1
    assert number > 2
