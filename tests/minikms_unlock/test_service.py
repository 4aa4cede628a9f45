"""`minikms-unlock serve`, started for connections as systemd does: who gets the root key, and when nobody does."""

import base64
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.processes.handover import AWAY, KEY, QUESTION_SECONDS_MAX, REFUSED, Purpose
from minikms.roots.pin import PinFile
from tests import needs
from tests.deploy import restricted
from tests.harness import forked
from tests.harness.activated_unlock import UID, UnlockService, read_answer
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign
from tests.minikms_unlock.conftest import KEYRING_ID, Provider

ROOT, THEIRS = os.urandom(32), os.urandom(32)


@pytest.fixture(scope="module")
def blobs(hsm: Provider) -> dict[bytes, bytes]:
    """Root keys as the provider has wrapped them."""
    return {root: hsm.wrap(root) for root in (ROOT, THEIRS)}


@contextlib.contextmanager
def serving(hsm: Provider, blobs: dict[bytes, bytes], **how: Any) -> Iterator[UnlockService]:
    """It gives ROOT to root, as the key service's user here."""
    hsm.give_to_service(how.get("uid", UID))
    with (
        tempfile.TemporaryDirectory(prefix="minikms-test-") as name,
        UnlockService(Path(name), environ=hsm.token.environ, **how) as made,
    ):
        made.write_config(hsm.source)
        PinFile(made.pin).add(memoryview(ROOT), KEYRING_ID)
        made.write_wrapped(source=hsm.source, keyring_id=KEYRING_ID, wrapped=text_of(blobs[ROOT]))
        (made.base / "theirs").write_text(text_of(blobs[THEIRS]))
        yield made


@pytest.fixture
def service(hsm: Provider, blobs: dict[bytes, bytes]) -> Iterator[UnlockService]:
    with serving(hsm, blobs) as made:
        yield made


def text_of(blob: bytes) -> str:
    return base64.b64encode(blob).decode()


def changed(path: Path, **members: object) -> None:
    """Replaces members of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def test_the_daemon_gets_the_key_and_the_process_is_gone(service: UnlockService) -> None:
    purposes: tuple[Purpose, ...] = ("start", "renew")
    for number, purpose in enumerate(purposes, 1):
        assert service.ask(KEYRING_ID, purpose) == (KEY, ROOT)
        service.wait_for_end(number)
        assert service.process is not None and service.process.poll() == 0
    assert [event["purpose"] for event in service.events() if event["event"] == "root key given"] == [*purposes]
    assert ROOT.hex() not in service.log.read_text()


def test_another_user_is_refused_and_logged_and_the_daemon_is_served(service: UnlockService) -> None:
    def connect() -> list[int]:
        return [len(service.ask(KEYRING_ID)[0]) for _ in range(3)]

    assert foreign.run_as(foreign.UID, connect) == [0, 0, 0]
    assert service.ask(KEYRING_ID) == (KEY, ROOT)
    service.wait_for_end()
    assert len(service.statuses) == 1
    assert [event["uid"] for event in service.events() if event["event"] == "peer refused"] == [foreign.UID]


def test_what_is_no_question_gets_no_answer_and_the_next_one_does(service: UnlockService) -> None:
    question = f"minikms-unlock/1 start {KEYRING_ID}\n".encode()
    for wrong in (b"\n", question.replace(b"/1", b"/2"), b"a" * 65, question[:-1] + b"a\n", question * 2, b"GET / H\n"):
        assert service.exchange(wrong) == (b"", b""), wrong
    with service.connected() as half, service.connected() as drip:
        half.sendall(question[:-1])
        half.shutdown(socket.SHUT_WR)
        assert read_answer(half) == (b"", b"")
        with contextlib.suppress(BrokenPipeError):  # closed by then
            for byte in question:
                drip.sendall(bytes([byte]))
                time.sleep(QUESTION_SECONDS_MAX * 1.2 / len(question))
        assert read_answer(drip) == (b"", b"")
    assert service.ask(KEYRING_ID) == (KEY, ROOT)
    service.wait_for_end()
    assert service.statuses == [0]


def test_without_a_question_it_ends(service: UnlockService) -> None:
    service.connected().close()
    service.wait_for_end()
    assert service.statuses == [0] and service.events()[-1]["event"] == "nobody asked"


Change = Callable[[UnlockService], Any]
WRONG: dict[str, tuple[Change, bytes]] = {
    "no pin file": (lambda one: one.pin.unlink(), b"pin file"),
    "pin of another key": (lambda one: changed(one.pin, pins={"0" * 16: "0" * 64}), b"does not name the root key"),
    "pin of another keyring": (lambda one: changed(one.pin, keyring_id="kr_" + "0" * 16), b"is for keyring kr_0000"),
    "pin file of another user": (lambda one: os.chown(one.pin, UID, UID), b"must belong to root"),
    "no root.json": (lambda one: one.wrapped.unlink(), b"root.json"),
    "root.json of another keyring": (lambda one: changed(one.wrapped, keyring_id="kr_" + "0" * 16), b"not of kr_a1"),
    "another source": (lambda one: changed(one.wrapped, source="pkcs11:/other"), b"by another source"),
    "a key of theirs": (
        lambda one: changed(one.wrapped, wrapped=(one.base / "theirs").read_text()),
        b"does not name the root key",
    ),
    "no base64": (lambda one: changed(one.wrapped, wrapped="?"), b"is damaged"),
    "another version": (lambda one: changed(one.wrapped, version=2), b"no wrapped root key of version 1"),
    "root.json of another user": (
        lambda one: os.chown(one.wrapped, foreign.UID, UID),
        b"must belong",
    ),
    "root.json that others write": (lambda one: one.wrapped.chmod(0o602), b"nobody else may write"),
    "directory that others write": (lambda one: one.directory.chmod(0o777), b"nobody else may write"),
    "too long": (lambda one: changed(one.wrapped, wrapped="A" * 40_000), b"is damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_key_is_given_where_what_it_reads_is_wrong(service: UnlockService, name: str) -> None:
    change, why = WRONG[name]
    change(service)
    kind, text = service.ask(KEYRING_ID)
    assert kind == AWAY and why in text, text
    service.wait_for_end()
    assert service.statuses == [1]
    assert str(service.events()[-1]["why"]).encode().startswith(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.config.unlink(),
        lambda one: one.config.chmod(0o666),
        lambda one: os.chown(one.config, foreign.UID, 0),
        lambda one: one.write_config("tpm2:", other="x"),
        lambda one: one.write_config("tpm2:", user="no-such-user"),
        lambda one: one.write_config("tpm2:", user=65534),
        lambda one: one.write_config("tpm2:\n"),
    ],
)
def test_a_wrong_configuration_is_an_answer_and_its_reason_is_logged(service: UnlockService, change: Change) -> None:
    """A process that ended without an answer would be started again at once."""
    change(service)
    kind, text = service.ask(KEYRING_ID)
    assert kind == AWAY and b"its log says why" in text
    assert service.events()[0]["event"] == "configuration refused" and service.events()[0]["why"]


def test_a_refusal_of_the_provider_has_another_answer_than_its_absence(service: UnlockService, hsm: Provider) -> None:
    """It is asked for each answer."""
    try:
        for change, kind, why in (
            (hsm.refuse, REFUSED, b"refused the PIN"),
            (hsm.go_away, AWAY, b"can't be read"),
            (hsm.restore, KEY, b""),
        ):
            change()
            found, text = service.ask(KEYRING_ID)
            assert found == kind and why in text
    finally:
        hsm.restore()
    service.wait_for_end(3)
    assert service.statuses == [1, 1, 0]


def test_without_a_socket_it_says_who_starts_it(tmp_path: Path) -> None:
    ended = forked.run("minikms_unlock", "serve", "--config", tmp_path / "missing")
    assert ended.returncode == 2 and "is started by its socket" in ended.stderr


def test_while_it_waits_it_is_hardened_and_shows_no_key(service: UnlockService) -> None:
    with service.connected() as connection:
        wait_until(lambda: "Seccomp:\t2" in service.proc("status"))
        for line in ("NoNewPrivs:\t1", "CapEff:\t0000000000000000", f"Uid:\t{UID}", "Threads:\t1"):
            assert line in service.proc("status")
        assert "Max core file size        0                    0" in service.proc("limits")
        assert service.process is not None
        assert Path(f"/proc/{service.process.pid}/environ").stat().st_uid == 0  # it is not dumpable
        shown = service.proc("environ") + service.proc("cmdline") + service.proc("task/*/children")
        connection.sendall(f"minikms-unlock/1 start {KEYRING_ID}\n".encode())
        assert read_answer(connection) == (KEY, ROOT)
    assert ROOT.hex() not in shown and "SOFTHSM2_CONF" in shown


def test_what_the_unit_forbids_is_not_needed(hsm: Provider, blobs: dict[bytes, bytes]) -> None:
    """The restrictions run it as root, without capabilities. A drop-in lets SoftHSM write in the token's directory."""
    needs.program("systemd-analyze")
    needs.program("mount")
    unshare = needs.namespaces("mount", "net", "ipc")
    under = [unshare, "--mount", "--net", "--ipc", sys.executable, restricted.__file__]
    unit = str(restricted.UNITS / "minikms-unlock.service")
    with serving(hsm, blobs, uid=0, under=[*under, unit, str(hsm.token.base)]) as made:
        assert made.ask(KEYRING_ID) == (KEY, ROOT), made.log.read_text()
        missing = {event["measure"] for event in made.events() if "measure" in event}
    assert missing <= {"memory_locked"}
