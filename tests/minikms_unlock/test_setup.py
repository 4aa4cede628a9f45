"""`minikms-unlock configure`, `test` and `doctor`, beside a running daemon and with a real token."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.processes.handover import KEY
from minikms.roots.pin import PinFile
from tests import needs
from tests.harness import forked
from tests.harness.activated_unlock import UID, UnlockService
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms_unlock.conftest import AnyProvider, Provider


class Place:
    """A daemon with a pinned key file, and an unlock service that is not configured yet."""

    def __init__(self, base: Path, hsm: AnyProvider, **how: Any) -> None:
        """`how`: of the daemon."""
        self.hsm = hsm
        base.chmod(0o755)
        (base / "kms").mkdir()
        (base / "unlock").mkdir()
        self.service = UnlockService(base / "unlock", environ=hsm.environ)
        self.daemon = LiveDaemon(base / "kms", **how)
        with self.daemon.client() as kms:
            self.keyring_id = kms.status().keyring_id
        PinFile(self.service.pin).add(memoryview(self.daemon.root()), self.keyring_id)
        self.service.write_config(hsm.source)

    def words(self, *words: str) -> list[str]:
        ends = ["--config", str(self.service.config), "--socket", str(self.daemon.socket)]
        return ["minikms_unlock", *words, self.hsm.source, *ends]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, **self.hsm.environ}
        try:
            return forked.run(*self.words(*words), "--json", env=environ)
        finally:
            self.hsm.give_to_service()

    def configure(self) -> dict[str, Any]:
        ended = self.run("configure")
        assert ended.returncode == 0, ended.stderr
        made: dict[str, Any] = json.loads(ended.stdout)
        return made

    def use_service(self, *flags: str) -> None:
        """From the daemon's next start on."""
        flag = self.daemon.command.index("--master-key-file")
        source = ["--root", f"unlock:{self.service.socket}", "--pin", str(self.service.pin), *flags]
        self.daemon.command[flag : flag + 2] = source

    def slots(self) -> list[str]:
        """The providers of all root keys that open the keyring."""
        with self.daemon.client() as kms:
            return [root.provider for root in kms.list_roots().roots]


@pytest.fixture
def place(hsm: Provider) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        made = Place(Path(name), hsm)
        with made.service, made.daemon:
            yield made


def test_the_daemon_starts_by_the_provider_after_configure(place: Place) -> None:
    """A second run finds all done. The daemon then starts under the pinned key that the service gives."""
    made = place.configure()
    assert made["done"] == ["wrapped", "pinned", "added"]
    assert place.configure() == {**made, "done": []}
    assert place.slots() == ["file", "pkcs11"]
    found = place.service.wrapped.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (UID, UID, 0o600)
    assert place.run("test", made["slot_id"]).returncode == 0
    assert place.run("test", "s1").returncode == 1
    place.daemon.stop()
    place.use_service()
    place.daemon.start()
    with place.daemon.client() as kms:
        wait_until(lambda: kms.status().root.fingerprint == made["fingerprint"])  # it is sealed until it has the key
        kms.remove_root("s1")
    wait_until(lambda: place.service.statuses == [0])


DEFAULTS = """
from minikms_unlock import files, setup
setup.default_config = lambda source: files.Config(1, source, 0, {pin!r}, {directory!r})
from minikms_unlock.command import main
main()
"""
"""The paths of the package are not there."""


def test_without_a_configuration_it_is_made(place: Place) -> None:
    place.service.config.unlink()
    program = DEFAULTS.format(pin=str(place.service.pin), directory=str(place.service.directory))
    command = [sys.executable, "-c", program, *place.words("configure")[1:]]
    environ = {**os.environ, **place.hsm.environ}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    place.hsm.give_to_service()
    assert ended.returncode == 0, ended.stderr
    assert "minikms root remove s1  # if the daemon was started under s" in ended.stdout
    assert place.service.ask(place.keyring_id)[0] == KEY
    ended = forked.run(*place.words("configure"), env=environ)
    place.hsm.give_to_service()
    assert ended.stdout.startswith("Slot s") and "minikms.env" not in ended.stdout  # that of another service


def with_other_source(place: Place) -> None:
    place.service.write_config("tpm2:")


def with_wrapped_of_another_keyring(place: Place) -> None:
    place.configure()
    wrapped = json.loads(place.service.wrapped.read_text())
    place.service.write_wrapped(**{**wrapped, "keyring_id": "kr_" + "0" * 16})


REFUSED: dict[str, tuple[Callable[[Place], object], str]] = {
    "no pin file": (lambda place: place.service.pin.unlink(), "pin file"),
    "the root key in use is not pinned": (lambda place: pin_of(place, os.urandom(32)), "minikms pin add"),
    "pin file of another keyring": (
        lambda place: pin_of(place, place.daemon.root(), "kr_" + "0" * 16),
        "is for keyring kr_0000000000000000",
    ),
    "another source is configured": (with_other_source, "names another source"),
    "wrapped key of another keyring": (with_wrapped_of_another_keyring, "move it away"),
    "no directory": (lambda place: place.service.directory.rmdir(), "install -d -m 700"),
    "the token refuses": (lambda place: place.hsm.refuse(), "refused the PIN"),
}


def pin_of(place: Place, root: bytes, keyring_id: str = "") -> None:
    place.service.pin.unlink()
    PinFile(place.service.pin).add(memoryview(root), keyring_id or place.keyring_id)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lock_the_keyring_or_lose_a_key_is_refused(place: Place, name: str) -> None:
    change, why = REFUSED[name]
    change(place)
    pin = place.service.pin.read_bytes() if place.service.pin.exists() else None
    slots = place.slots()
    try:
        ended = place.run("configure")
    finally:
        place.hsm.restore()
    assert ended.returncode != 0 and why in ended.stderr, ended.stderr
    assert place.slots() == slots
    assert (place.service.pin.read_bytes() if place.service.pin.exists() else None) == pin


def test_a_wrapped_key_that_nothing_names_is_replaced(place: Place, hsm: Provider) -> None:
    """What an interrupted run, or another user, has left opens nothing. What the pin file names is never replaced."""
    theirs = os.urandom(32)
    blob = hsm.wrap(theirs, place.keyring_id)
    place.hsm.give_to_service()
    members = {"source": place.hsm.source, "keyring_id": place.keyring_id, "wrapped": base64.b64encode(blob).decode()}
    place.service.write_wrapped(**members)
    assert place.configure()["done"] == ["wrapped", "pinned", "added"]
    assert not PinFile(place.service.pin).read().names(memoryview(theirs))


def test_only_root_configures(place: Place) -> None:
    ended = forked.run(*place.words("configure"), user=(UID, UID, ()), cwd="/")
    assert ended.returncode == 2 and ("only root" in ended.stderr or "key service" in ended.stderr)


KILLED = ("rename", "link,linkat", "pwrite64", "fsync", "sendto,sendmsg")
"""The system calls by which `configure` changes something."""
FIRST = [("rename", 1), ("pwrite64", 1), ("sendto,sendmsg", 4)]
EVERY = [(calls, number) for calls in KILLED for number in range(1, 9)]


@pytest.mark.parametrize(
    ("calls", "number"),
    [*FIRST, *(pytest.param(*point, marks=pytest.mark.torture) for point in EVERY if point not in FIRST)],
)
def test_a_run_that_was_killed_is_run_again_and_one_key_is_left(place: Place, calls: str, number: int) -> None:
    inject = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={number}"]
    command = [needs.program("strace"), *inject, sys.executable, "-m", *place.words("configure")]
    environ = {**os.environ, **place.hsm.environ}
    subprocess.run(command, env=environ, capture_output=True, timeout=400, check=False)
    place.hsm.give_to_service()
    assert place.slots()[0] == "file"
    assert PinFile(place.service.pin).read().names(memoryview(place.daemon.root()))
    made = place.configure()
    assert place.slots() == ["file", "pkcs11"] and set(os.listdir(place.service.directory)) == {"root.json"}
    kind, root = place.service.ask(place.keyring_id)
    assert kind == KEY and PinFile(place.service.pin).read().names(memoryview(root))
    assert place.run("test", made["slot_id"]).returncode == 0


def doctor(place: Place) -> dict[str, str]:
    """The level of each check."""
    words = ["minikms_unlock", "doctor", "--config", place.service.config, "--unlock-socket", place.service.socket]
    environ = {**os.environ, **place.hsm.environ}
    ended = forked.run(*words, "--json", env=environ, user=(UID, UID, ()), cwd="/")
    assert ended.returncode in (0, 1), ended.stderr
    found = json.loads(ended.stdout)
    levels = {check["area"]: check["level"] for check in found["checks"]}
    assert found["problems"] == list(levels.values()).count("problem")
    assert ended.returncode == bool(found["problems"])
    return levels


WRONG: dict[str, tuple[Callable[[Place], object], set[str]]] = {
    "nothing": (lambda _: None, set()),
    "configuration": (lambda place: os.chown(place.service.config, UID, UID), {"configuration"}),
    "socket": (lambda place: place.service.socket.chmod(0o666), {"socket"}),
    "directory": (lambda place: place.service.directory.chmod(0o777), {"root.json", "provider"}),
    "root.json": (lambda place: place.service.wrapped.unlink(), {"root.json", "provider"}),
    "pin file": (lambda place: place.service.pin.unlink(), {"pin file", "provider"}),
    "source": (lambda place: place.service.write_config("pkcs11:"), {"root.json", "source", "provider"}),
    "provider": (lambda place: place.hsm.go_away(), {"provider"}),
}


def test_the_doctor_names_what_is_wrong(place: Place) -> None:
    place.configure()
    place.service.socket.chmod(0o660)
    os.chown(place.service.socket, 0, 0)
    for name, (change, problems) in WRONG.items():
        kept = place.service.wrapped.read_bytes(), place.service.pin.read_bytes()
        change(place)
        found = doctor(place)
        assert {area for area, level in found.items() if level == "problem"} == problems, name
        place.service.write_config(place.hsm.source)
        os.chown(place.service.config, 0, 0)
        place.service.socket.chmod(0o660)
        place.service.directory.chmod(0o700)
        place.service.wrapped.write_bytes(kept[0])
        os.chown(place.service.wrapped, UID, UID)
        place.service.pin.write_bytes(kept[1])
        place.hsm.restore()
