"""The command on a real daemon: what it unseals, what it refuses, and what it leaves in memory."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.errors import SealedError
from minikms.client import Client
from minikms_unlock.passphrase import Parameters, derive_into
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.terminal import OnTerminal
from tests.minikms.memory import scanner

SALT = "0123456789abcdef"
CONFIG = f"""version = 1
[passphrase]
salt = "{SALT}"
memory_kib = 65536
iterations = 3
lanes = 4
"""
PASSPHRASE = "seven wise mice eat " + os.urandom(12).hex()
KEPT_ALIVE = """
import sys
from minikms_unlock.command import app
from minikms_unlock.command import explained
try:
    app(sys.argv[1:], print_error=False, exit_on_error=False)
except SystemExit as ended:
    print("ended with", ended.code)
except Exception as error:
    print("ended:", explained(error))
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "unlock.toml"
    path.write_text(CONFIG)
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def root() -> bytes:
    """The root key of the passphrase."""
    key = memoryview(bytearray(32))
    derive_into(memoryview(bytearray(PASSPHRASE.encode())), Parameters(SALT, 64 * 1024, 3, 4), key)
    return bytes(key)


@pytest.fixture(scope="module")
def one_daemon(tmp_path_factory: pytest.TempPathFactory, root: bytes) -> Iterator[LiveDaemon]:
    """Its keyring opens under the root key of the passphrase."""
    with LiveDaemon(tmp_path_factory.mktemp("daemon"), "file", root=root) as made:
        yield made


@pytest.fixture
def daemon(one_daemon: LiveDaemon) -> LiveDaemon:
    """It is sealed."""
    with one_daemon.client() as kms:
        kms.seal()
    return one_daemon


def command(*words: str, alive: bool = False) -> list[str]:
    return [sys.executable, *(("-c", KEPT_ALIVE) if alive else ("-m", "minikms_unlock")), *words]


def unseal(daemon: LiveDaemon, config: Path, *, alive: bool = False) -> OnTerminal:
    return OnTerminal(
        command("unseal", "passphrase:", "--config", str(config), "--socket", str(daemon.socket), alive=alive)
    )


def serves(daemon: LiveDaemon) -> bool:
    with Client(daemon.socket, wait_s=0) as kms:
        try:
            kms.create_dek_for_thread("t")
        except SealedError:
            return False
        return True


def test_the_passphrase_unseals_the_daemon(daemon: LiveDaemon, config: Path) -> None:
    assert not serves(daemon)
    with unseal(daemon, config) as program:
        program.wait_for("Passphrase: ")
        program.type(PASSPHRASE)
        assert program.wait() == 0
    assert b"is unsealed, and serves" in program.shown
    assert PASSPHRASE[-20:].encode() not in program.shown
    assert serves(daemon)


def test_root_unseals_at_a_socket_that_is_another_users_alone(daemon: LiveDaemon, config: Path) -> None:
    needs.root()
    before = daemon.socket.stat()
    os.chown(daemon.socket, 12345, 12345)
    daemon.socket.chmod(0o600)
    try:
        with unseal(daemon, config) as program:
            program.wait_for("Passphrase: ")
            program.type(PASSPHRASE)
            assert program.wait() == 0, program.shown
    finally:
        os.chown(daemon.socket, before.st_uid, before.st_gid)
        daemon.socket.chmod(before.st_mode & 0o777)


def test_a_signal_ends_the_hardened_prompt_and_the_echo_is_back(daemon: LiveDaemon, config: Path) -> None:
    with unseal(daemon, config) as program:
        program.wait_for("Passphrase: ")
        assert not program.echoes()
        program.process.terminate()
        assert program.process.wait(60) == -signal.SIGTERM
        assert program.echoes()


def test_a_wrong_passphrase_is_refused(daemon: LiveDaemon, config: Path) -> None:
    with unseal(daemon, config) as program:
        program.wait_for("Passphrase: ")
        program.type(PASSPHRASE + "x")
        assert program.wait() == 1
    assert not serves(daemon)


@pytest.mark.parametrize(("typed", "match"), [("", b"at least 16 bytes"), ("x" * 401, b"at most 400 bytes")])
def test_a_passphrase_of_the_wrong_size_is_refused(daemon: LiveDaemon, config: Path, typed: str, match: bytes) -> None:
    with unseal(daemon, config) as program:
        program.wait_for("Passphrase: ")
        program.type(typed)
        assert program.wait() == 2
    assert match in program.shown


@pytest.mark.parametrize("right", [True, False])
def test_no_passphrase_and_no_key_are_left_in_memory(
    daemon: LiveDaemon, config: Path, root: bytes, right: bool
) -> None:
    """In minikms-unlock and in the daemon, after a right and after a wrong passphrase."""
    needs.root()
    passphrase = PASSPHRASE if right else PASSPHRASE[:-1] + "?"
    key = memoryview(bytearray(32))
    derive_into(memoryview(bytearray(passphrase.encode())), Parameters(SALT, 64 * 1024, 3, 4), key)
    assert (bytes(key) == root) == right
    needles = list(scanner.forms_of("root key", bytes(key)))
    needles += [
        scanner.Needle("passphrase", "part", passphrase[start : start + 12].encode())
        for start in range(0, len(passphrase) - 11, 4)
    ]
    with unseal(daemon, config, alive=True) as program:
        program.wait_for("Passphrase: ")
        program.type(passphrase)
        program.wait_for("ready")
        assert (b"is unsealed" in program.shown) == right
        for pid in (program.process.pid, daemon.pid):
            report = scanner.scan_process(pid, needles)
            assert report.bytes_read > 5_000_000
            assert {f"{hit.name}, {hit.form}, {hit.where}" for hit in report.hits} == set()


def test_the_process_is_hardened_before_it_asks(daemon: LiveDaemon, config: Path) -> None:
    with unseal(daemon, config) as program:
        program.wait_for("Passphrase: ")
        process = Path(f"/proc/{program.process.pid}")
        status = process.joinpath("status").read_text()
        limits = process.joinpath("limits").read_text()
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "Threads:\t1"):
        assert line in status
    assert "Max core file size        0                    0" in limits


def test_a_passphrase_is_added_tested_and_unseals(tmp_path: Path, config: Path) -> None:
    """Two different passphrases are not added."""
    place = tmp_path / "daemon"
    place.mkdir()
    ends = ("passphrase:", "--config", str(config), "--socket", str(place / "s"))
    with LiveDaemon(place, "file") as daemon:
        for again, status in ((PASSPHRASE + "x", 2), (PASSPHRASE, 0)):
            with OnTerminal(command("add", *ends)) as program:
                program.wait_for("Passphrase: ")
                program.type(PASSPHRASE)
                program.wait_for("The same again: ")
                program.type(again)
                assert program.wait() == status, program.shown
            assert (b"the two passphrases differ" in program.shown) == (status == 2)
        with daemon.client() as kms:
            added = kms.list_roots().roots[-1]
            assert added.provider == "passphrase"
            for typed, status in ((PASSPHRASE, 0), (PASSPHRASE + "x", 1)):
                with OnTerminal(command("test", added.slot_id, *ends)) as program:
                    program.wait_for("Passphrase: ")
                    program.type(typed)
                    assert program.wait() == status, program.shown
            kms.seal()
        with unseal(daemon, config) as program:
            program.wait_for("Passphrase: ")
            program.type(PASSPHRASE)
            assert program.wait() == 0
        assert serves(daemon)


def test_a_new_passphrase_that_is_short_is_refused(daemon: LiveDaemon, config: Path) -> None:
    with OnTerminal(command("add", "passphrase:", "--config", str(config), "--socket", str(daemon.socket))) as program:
        program.wait_for("Passphrase: ")
        program.type("fifteen letters")
        assert program.wait() == 2
    assert b"at least 16 bytes" in program.shown


def test_a_daemon_that_is_away_is_reported_before_anything_is_typed(config: Path) -> None:
    with OnTerminal(command("unseal", "passphrase:", "--config", str(config), "--socket", "/nowhere")) as program:
        assert program.wait() == 2
    assert b"no key service answers" in program.shown and b"Passphrase" not in program.shown


def test_without_a_terminal_it_asks_for_nothing(daemon: LiveDaemon, config: Path) -> None:
    done = subprocess.run(
        command("unseal", "passphrase:", "--config", str(config), "--socket", str(daemon.socket)),
        input=PASSPHRASE + "\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "typed and shown on a terminal only" in done.stderr


def test_minikms_unlock_runs_it_and_passes_no_key_on(config: Path) -> None:
    """As git runs git-NAME. The flag for a root key of the environment is not passed on."""
    words = [sys.executable, "-m", "minikms", "unlock", "unseal", "tpm2:", "--config", str(config)]
    done = subprocess.run(
        words,
        env={**os.environ, "PROGRESSDB_MINIKMS_MASTER_KEY": "ab" * 32},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minikms-unlock: 'tpm2:' is no source")
