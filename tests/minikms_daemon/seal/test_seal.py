"""Seal and unseal, against the real daemon."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms import api
from minikms.api import errors
from minikms.seal_files import ATTEMPTS_NAME, MARKER_NAME
from minikms_daemon.seal.unseal import FREE_FAILURES
from tests import needs
from tests.deploy import service_manager
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import verify_audit
from tests.harness.unix_http import unix_request
from tests.harness.waiting import wait_until
from tests.minikms.custody.rotation.crash_points import HELD, HELD_AFTER, Daemon, Injection, Point
from tests.minikms_daemon.server import foreign
from tests.minikms_daemon.service.asking import NO_KEY, ask, post

WAIT_SECONDS_MAX = 60.0


@pytest.fixture
def sealable(public: Path) -> Iterator[LiveDaemon]:
    with LiveDaemon(public) as daemon:
        yield daemon
        assert "internal error" not in daemon.log.read_text()


def unseal_with(daemon: LiveDaemon, root: str) -> Any:
    return post(daemon, "/unseal", {"root_hex": root})


# --- what is served --------------------------------------------------------------------------------------------------


def test_a_sealed_daemon_serves_what_needs_no_key_and_nothing_else(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        sealed = client.encrypt(key_id, b"text")
        assert client.ready() and client.unseal_status() == api.UnsealStatusAnswer(sealed=False)
        assert client.seal().sealed
        assert client.health()
        assert client.status().status == "sealed" and client.status().reason
        status = client.unseal_status()
        assert status.sealed and status.stays_sealed and status.from_source and status.by == f"peer_uid:{os.geteuid()}"
        assert client.seal().since == status.since
        others = {(verb.method, verb.path.format(key_id=NO_KEY, slot_id="s1", member_id="m2")) for verb in api.VERBS}
        others -= {("GET", "/status"), ("POST", "/seal"), ("GET", "/unseal"), ("POST", "/unseal")}
        others -= {("POST", "/audit/position")}  # of an auditor, which needs a role of its own
        for method, target in (*others, ("GET", "/ready"), ("GET", "/nowhere"), ("DELETE", "/status")):
            reply = unix_request(sealable.socket, target, method)
            assert (reply.status, json.loads(reply.body)["code"]) == (503, "sealed"), target
            assert reply.headers["retry-after"] == str(api.SEALED_RETRY_SECONDS)
        with pytest.raises(errors.SealedError):
            client.decrypt(key_id, sealed)
        assert client.unseal(root_hex=sealable.root().hex()) == api.UnsealStatusAnswer(sealed=False)
        assert client.ready() and client.decrypt(key_id, sealed) == b"text"
        with pytest.raises(errors.NotSealedError):
            client.unseal()


def test_no_body_holds_up_a_seal(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        for body in (None, b"", b"{", b'{"x":1}', b"\xff" * 1000):
            assert ask(sealable, "POST", "/seal", body).status == 200
            assert ask(sealable, "GET", "/ready").code == "sealed"
            client.unseal()


MALFORMED: tuple[object, ...] = (
    {},
    {"from_source": False},
    {"from_source": 1},
    {"root_hex": "0" * 63},
    {"root_hex": "g" * 64},
    {"root_hex": 7},
    {"root_hex": "0" * 64, "from_source": True},
    {"root_hex": "0" * 64, "another": 1},
    b'{"root_hex":"%b","root_hex":"%b"}' % (b"0" * 64, b"0" * 64),
    b'{"root_he\\u0078":"%b"}' % (b"0" * 64),
    b"[]",
    b"",
)


def test_a_malformed_unseal_is_refused_and_is_no_attempt(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        client.seal()
        for body in MALFORMED:
            assert post(sealable, "/unseal", body).code == "invalid_request", body
        assert client.unseal_status().failed_attempts == 0
        client.unseal()


def test_a_large_body_with_a_root_key_is_not_searched(sealable: LiveDaemon) -> None:
    """It is refused before it has arrived, or, if it came at once, before anything reads it."""

    def refuses(path: str) -> bool:
        whole = post(sealable, path, b'{"root_hex":"%b"}' % (b"0" * api.ROOT_BODY_BYTES_MAX))
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(sealable.socket))
            length = api.ROOT_BODY_BYTES_MAX + 1
            raw.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), length))
            return (whole.status, whole.code) == (413, "too_large") and raw.recv(4096).startswith(b"HTTP/1.1 413")

    assert refuses("/roots") and refuses("/roots/s1/test")
    with sealable.client() as client:
        client.seal()
        assert refuses("/unseal") and client.unseal_status().failed_attempts == 0
        client.unseal()


# --- seal under load -------------------------------------------------------------------------------------------------


def test_requests_in_flight_end_with_sealed_and_nothing_is_lost(sealable: LiveDaemon) -> None:
    """Readers, writers and creators run through three seals. Each gets its answer or `sealed`, and nothing else."""
    made: list[tuple[str, bytes]] = []
    found: list[BaseException] = []
    ends = threading.Event()

    def work() -> None:
        with sealable.client() as client:
            while not ends.is_set():
                try:
                    key_id = client.create_dek_for_thread("t").key_id
                    made.append((key_id, client.encrypt(key_id, b"text")))
                    assert client.decrypt(*made[-1]) == b"text"
                    client.retire_key(key_id)
                except errors.SealedError:
                    time.sleep(0.001)
                except BaseException as error:  # noqa: BLE001  reported by the test
                    found.append(error)
                    return

    def has_made_more(before: int) -> bool:
        return len(made) > before + 20 or bool(found)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    with sealable.client() as client:
        for _ in range(3):
            wait_until(partial(has_made_more, len(made)))
            client.seal()
            client.unseal()
        ends.set()
        for worker in workers:
            worker.join()
        assert found == []
        for key_id, sealed in made:
            assert client.decrypt(key_id, sealed) == b"text"
    sealable.stop()
    verify_audit(sealable.data_dir, sealable.root_file)
    assert len(sealable.events("unseal")) == len(sealable.events("seal")) == 3


def test_a_rotation_that_a_seal_interrupts_goes_on_after_the_unseal(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        keys = [client.create_dek_for_thread("t").key_id for _ in range(60)]
        sealed = [client.encrypt(key_id, b"text") for key_id in keys]
        client.rotate_kek(wait=False)
        client.seal()
        client.unseal()
        wait_until(lambda: client.status().rotation is None)
        client.seal()
        client.unseal()
        assert client.status().keks[-1].version == 2
        for key_id, ciphertext in zip(keys, sealed, strict=True):
            assert client.decrypt(key_id, ciphertext) == b"text"
        assert client.rotate_kek().kek_version == 3
    sealable.stop()
    verify_audit(sealable.data_dir, sealable.root_file)


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_stays_sealed_until_an_unseal(sealable: LiveDaemon, end: str) -> None:
    with sealable.client() as client:
        since = client.seal().since
        for _ in range(2):
            getattr(sealable, end)()
            sealable.start()
            status = client.unseal_status()
            assert (status.sealed, status.since, status.stays_sealed) == (True, since, True)
            with pytest.raises(errors.SealedError):
                client.create_dek_for_thread("t")
        client.unseal()
        getattr(sealable, end)()
        sealable.start()
        client.create_dek_for_thread("t")
    starts = sealable.events("start", "seal", "unseal")
    assert [event["type"] for event in starts] == ["start", "start", "seal", "unseal", "start"]


def test_the_flag_seals_every_start(public: Path) -> None:
    """A start without it adds the attempts of a sealed one to the audit log, and removes them."""
    with LiveDaemon(public) as daemon:
        daemon.stop()
        daemon.command += ["--sealed"]
        daemon.start()
        with daemon.client() as client:
            status = client.unseal_status()
            assert status.sealed and status.stays_sealed and status.by == ""
            client.unseal()
            client.create_dek_for_thread("t")
            daemon.kill()
            daemon.start()
            assert client.unseal_status().sealed
            assert unseal_with(daemon, "0" * 64).code == "wrong_root"
            daemon.stop()
            daemon.command.remove("--sealed")
            for _ in range(2):
                daemon.start()
                client.create_dek_for_thread("t")
                daemon.kill()
            assert not (daemon.data_dir / ATTEMPTS_NAME).exists()
    assert daemon.events("seal") == []
    assert [event["outcome"] for event in daemon.events("unseal_attempt")] == ["wrong_root"]


def test_a_sealed_start_without_a_keyring_is_refused(public: Path) -> None:
    (public / "root").touch(0o600)
    (public / "root").write_text("0" * 64)
    words = ("--socket", public / "s", "--data-dir", public / "d", "--master-key-file", public / "root", "--sealed")
    done = forked.run("minikms", *words)
    assert done.returncode != 0 and "there is no keyring" in done.stderr and "`minikms init`" in done.stderr
    assert not (public / "d" / "keyring.json").exists()


def test_a_sealed_start_on_a_directory_of_another_version_is_refused(public: Path) -> None:
    with LiveDaemon(public) as daemon:
        daemon.stop()
        file = daemon.data_dir / "keyring.json"
        file.write_bytes(file.read_bytes().replace(b'"version":5', b'"version":4', 1))
        done = forked.run(*daemon.words, "--sealed")
        assert done.returncode != 0 and "made before version 0.2.0" in done.stderr


def test_a_key_from_the_environment_is_read_from_its_source_once(public: Path) -> None:
    """Its descriptor is closed then, and the number may be another file's."""
    with LiveDaemon(public, "environment") as daemon, daemon.client() as client:
        client.seal()
        assert not client.unseal_status().from_source
        with pytest.raises(errors.ConflictError, match="restart"):
            client.unseal()
        client.unseal(root_hex=daemon.root().hex())
        client.create_dek_for_thread("t")
        daemon.stop()
        daemon.command += ["--sealed"]
        for way in ("another seal", "a given key"):  # each closes a source that was not read
            daemon.start()
            assert client.unseal_status().from_source, way
            if way == "a given key":
                client.unseal(root_hex=daemon.root().hex())
            client.seal()
            assert not client.unseal_status().from_source, way
            daemon.kill()


def test_a_given_root_key_replaces_none_that_the_next_start_reads(public: Path) -> None:
    """The key file still holds the former one. So it stays, and no further root key takes its place."""
    second, third = "2" * 64, "3" * 64
    with LiveDaemon(public) as daemon, daemon.client() as client:
        first = daemon.root().hex()
        client.rotate_kek(new_kek_hex=second)
        for flags in (["--rewrite-master-key-file"], []):
            client.seal()
            client.unseal(root_hex=second)
            assert len(client.status().root.slots) == 2
            assert client.status().root.provider == "request"  # of its slot
            assert any("more than one root key" in text for text in client.status().warnings)
            refused = post(daemon, "/rotate_kek", {"new_kek_hex": third})
            assert (refused.status, refused.code) == (409, "wrong_slot") and "POST /roots" in refused.body["error"]
            assert client.rotate_kek().rewrapped == 0
            assert daemon.root_file.read_text().strip() == first
            daemon.stop()
            daemon.command += flags
            daemon.start()
            assert client.ready()
        client.seal()
        client.unseal(root_hex=first)  # the one of the source
        client.rotate_kek(new_kek_hex=third)
        assert daemon.root_file.read_text().strip() == third
        wait_until(lambda: len(client.status().root.slots) == 1)


# --- wrong keys and wrong callers ------------------------------------------------------------------------------------


def made_until_refused(daemon: LiveDaemon, body: Callable[[int], object], code: str) -> int:
    """How many attempts failed with `code` until one was not made. On a slow machine the first pause, of a second, may
    be over before the next attempt; each further one doubles it.
    """
    made = 0
    while (answer := post(daemon, "/unseal", body(made))).code == code:
        made += 1
    assert (answer.status, answer.code) == (429, "too_many_attempts")
    assert FREE_FAILURES <= made < 2 * FREE_FAILURES
    return made


def test_a_wrong_root_key_is_refused_recorded_and_slowed_down(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        client.seal()
        made = made_until_refused(sealable, lambda number: {"root_hex": f"{number:064x}"}, "wrong_root")
        sealable.kill()  # a restart forgets nothing
        sealable.start()
        assert client.unseal_status().failed_attempts == made
        wait_until(lambda: unseal_with(sealable, sealable.root().hex()).status == 200)
        client.create_dek_for_thread("t")
    attempts = sealable.events("unseal_attempt")
    assert [event["outcome"] for event in attempts] == ["wrong_root"] * made
    assert sorted(path.name for path in sealable.data_dir.iterdir() if "seal" in path.name) == []


def test_text_that_is_no_share_is_slowed_down_too(sealable: LiveDaemon) -> None:
    with sealable.client() as client:
        client.seal()
        made_until_refused(sealable, lambda number: {"share": "no share"}, "invalid_request")
        assert client.unseal_status().failed_attempts == 0


def test_a_key_file_with_another_key_leaves_the_daemon_sealed(sealable: LiveDaemon) -> None:
    right = sealable.root_file.read_text()
    with sealable.client() as client:
        client.seal()
        sealable.root_file.write_text("0" * 64 + "\n")
        with pytest.raises(errors.WrongRootError, match="source"):
            client.unseal()
        sealable.root_file.write_text("no key")
        with pytest.raises(errors.UnsealFailedError):
            client.unseal()
        assert "64 hexadecimal characters" in sealable.log.read_text()
        sealable.root_file.write_text(right)
        client.unseal()
        client.create_dek_for_thread("t")


def test_a_root_key_that_is_not_pinned_does_not_unseal(public: Path) -> None:
    """The pin file holds at an unseal as at a start."""
    needs.root()
    pin = public / "pin"
    with LiveDaemon(public) as daemon:
        daemon.stop()
        words = ("pin", "add", f"file:{daemon.root_file}", "--pin", pin, "--data-dir", daemon.data_dir)
        forked.run("minikms", *words).check_returncode()
        daemon.command += ["--pin", str(pin)]
        daemon.start()
        with daemon.client() as client:
            client.seal()
            with pytest.raises(errors.WrongRootError, match="pinned"):
                client.unseal(root_hex="0" * 64)
            client.unseal(root_hex=daemon.root().hex())
            client.create_dek_for_thread("t")


def test_a_damaged_data_directory_leaves_the_daemon_sealed(sealable: LiveDaemon) -> None:
    keyring = sealable.data_dir / "keyring.json"
    content = keyring.read_bytes()
    with sealable.client() as client:
        client.seal()
        keyring.write_bytes(content[:-10])
        with pytest.raises(errors.UnsealFailedError):
            client.unseal()
        keyring.write_bytes(content)
        client.unseal()
        client.create_dek_for_thread("t")


def test_callers_and_roles_are_those_of_the_unsealed_daemon(public: Path) -> None:
    needs.root()
    user = foreign.UID
    flags = ("--socket-mode", "0666", "--allowed-uids", f"{user}", "--admin-uids", f"{user + 1}")

    def codes() -> list[tuple[int, str]]:
        calls = (("GET", "/unseal"), ("POST", "/unseal"), ("POST", "/seal"), ("GET", "/status"), ("GET", "/ready"))
        return [(answer.status, answer.code) for answer in (ask(daemon, *call) for call in calls)]

    with LiveDaemon(public, "file", *flags, server_uids=[0]) as daemon:
        assert foreign.run_as(user, codes)[1:3] == [[403, "forbidden"]] * 2
        assert codes() == [(401, "unauthorized")] * 4 + [(200, "")]  # this is the daemon's own user
        assert foreign.run_as(user + 1, lambda: ask(daemon, "POST", "/seal").status) == 200
        found = foreign.run_as(user, codes)
        assert found == [[200, ""], [403, "forbidden"], [403, "forbidden"], [200, ""], [503, "sealed"]]
        assert codes() == [(401, "unauthorized")] * 4 + [(503, "sealed")]
        assert foreign.run_as(user + 2, codes) == [[401, "unauthorized"]] * 5
        assert foreign.run_as(user + 1, lambda: post(daemon, "/unseal", {"from_source": True}).status) == 200
        assert foreign.run_as(user, codes)[4] == [200, ""]
    refused = daemon.events("refused")
    assert {event["actor"] for event in refused} >= {"peer_uid:0", f"peer_uid:{user + 2}"}


# --- a disk that fails -----------------------------------------------------------------------------------------------


def test_a_marker_that_cannot_be_written_is_reported_and_written_later(sealable: LiveDaemon) -> None:
    """The daemon tries again by itself, after a wrong attempt to unseal too."""
    in_the_way = sealable.data_dir / MARKER_NAME
    in_the_way.mkdir()
    with sealable.client() as client:
        with pytest.raises(errors.StorageUnavailableError, match="restart would not stay sealed"):
            client.seal()
        assert client.unseal_status().sealed and not client.unseal_status().stays_sealed
        assert any("restart would not stay sealed" in text for text in client.status().warnings)
        with pytest.raises(errors.SealedError):
            client.create_dek_for_thread("t")
        assert unseal_with(sealable, "0" * 64).code == "wrong_root"
        in_the_way.rmdir()
        wait_until(lambda: client.unseal_status().stays_sealed)
        assert in_the_way.is_file() and client.status().warnings == []


def test_an_attempt_that_cannot_be_recorded_is_not_made(sealable: LiveDaemon) -> None:
    in_the_way = sealable.data_dir / ATTEMPTS_NAME
    with sealable.client() as client:
        client.seal()
        in_the_way.mkdir()
        with pytest.raises(errors.StorageUnavailableError, match="not made"):
            client.unseal()
        assert client.unseal_status().failed_attempts == 0
        in_the_way.rmdir()
        client.unseal()


@contextlib.contextmanager
def prepared(base: Path) -> Iterator[Daemon]:
    needs.program("strace")
    (base / "key").touch(0o600)
    (base / "key").write_text(os.urandom(32).hex() + "\n")
    daemon = Daemon(base)
    assert daemon.start(), daemon.log()
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.mark.parametrize("calls", ["openat", "write", "fsync", "rename,renameat,renameat2"])
def test_a_full_disk_does_not_hold_up_a_seal(public: Path, calls: str) -> None:
    with prepared(public) as daemon, daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        injection = Injection(daemon, Point("seal", calls, 1), "error=ENOSPC")
        with pytest.raises(errors.StorageUnavailableError, match="restart would not stay sealed"):
            client.seal()
        injection.end()
        assert injection.happened()
        with pytest.raises(errors.SealedError):
            client.encrypt(key_id, b"text")
        assert client.seal().sealed and client.unseal_status().stays_sealed
        client.unseal()
        client.encrypt(key_id, b"text")


@pytest.mark.parametrize(
    "point", [Point("seal", "unlink,unlinkat", 3, "sealed.json"), Point("seal", "fsync", 4, "/data>")], ids=str
)
def test_a_marker_that_cannot_be_removed_leaves_the_daemon_sealed(public: Path, point: Point) -> None:
    """Also if it is gone already, and only that is not durable: it is written again."""
    with prepared(public) as daemon, daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        client.seal()
        injection = Injection(daemon, point, "error=EIO")
        with pytest.raises(errors.UnsealFailedError):
            client.unseal()
        injection.end()
        assert injection.happened()
        with pytest.raises(errors.SealedError):
            client.encrypt(key_id, b"text")
        wait_until(lambda: client.unseal_status().stays_sealed)
        daemon.kill()
        assert daemon.start(), daemon.log()
        assert client.unseal_status().sealed
        client.unseal()
        client.encrypt(key_id, b"text")
    verify_audit(public / "data", public / "key")


def _is_sealed(client: minikms.Client) -> bool:
    try:
        return client.unseal_status().sealed
    except errors.SealedError:  # the question was in flight when the seal came
        return False


def test_keys_are_zeroed_while_the_disk_hangs(public: Path) -> None:
    """The marker waits for the disk; the verbs do not."""
    with prepared(public) as daemon, daemon.client() as client:
        injection = Injection(daemon, Point("seal", "fsync", 1), HELD)
        sealing = threading.Thread(target=client.seal)
        sealing.start()
        wait_until(lambda: _is_sealed(client))
        assert not client.unseal_status().stays_sealed
        injection.end()
        sealing.join()
        assert client.unseal_status().stays_sealed


def test_a_seal_during_an_unseal_wins(public: Path) -> None:
    with prepared(public) as daemon, daemon.client() as client, daemon.client() as other:
        client.seal()
        injection = Injection(daemon, Point("audit", "fdatasync", 1), HELD)
        outcomes: list[object] = []

        def unseal() -> None:
            try:
                outcomes.append(other.unseal())
            except errors.KmsError as error:
                outcomes.append(error)

        unsealing = threading.Thread(target=unseal)
        unsealing.start()
        wait_until((daemon.base / "data" / ATTEMPTS_NAME).exists)
        time.sleep(0.5)  # mostly it waits for the audit log then; a seal before that wins as well
        client.seal()
        injection.end()
        unsealing.join()
        assert isinstance(outcomes[0], errors.SealedError), outcomes
        assert client.unseal_status().sealed and client.unseal_status().stays_sealed
        client.unseal()
        assert client.ready()
    verify_audit(public / "data", public / "key")


def test_a_seal_before_an_unseal_has_begun_wins_too(public: Path) -> None:
    """The root key that was given is zeroed while the attempt is being recorded."""
    with prepared(public) as daemon, daemon.client() as client, daemon.client() as other:
        client.seal()
        injection = Injection(daemon, Point("seal", "fsync", 1), HELD)
        outcomes: list[object] = []

        def unseal() -> None:
            try:
                outcomes.append(other.unseal(root_hex=(public / "key").read_text().strip()))
            except errors.KmsError as error:
                outcomes.append(error)

        unsealing = threading.Thread(target=unseal)
        unsealing.start()
        wait_until(lambda: any((public / "data").glob(".tmp-*")))
        client.seal()
        injection.end()
        unsealing.join()
        assert isinstance(outcomes[0], errors.SealedError), outcomes
        assert client.unseal_status().sealed
        client.unseal()


def test_a_seal_while_the_key_file_is_rewritten_leaves_a_key_in_it(public: Path) -> None:
    """The worker writes the new key out; zeroed under it, it would write zeros."""
    with prepared(public) as daemon:
        daemon.stop()
        daemon.command += ["--rewrite-master-key-file"]
        assert daemon.start(), daemon.log()
        with daemon.client() as client, daemon.client() as other:
            new = os.urandom(32).hex()
            # The disk thread writes the keyring, then the key file: it is held up between making the file and its text.
            injection = Injection(daemon, Point("disk", "openat", 2), HELD_AFTER)

            def rotate() -> None:
                with contextlib.suppress(errors.KmsError):
                    other.rotate_kek(new_kek_hex=new)

            rotating = threading.Thread(target=rotate)
            rotating.start()
            wait_until((public / ".key.new").exists)
            client.seal()
            assert (public / ".key.new").exists()
            injection.end()
            rotating.join()
            wait_until(lambda: not (public / ".key.new").exists())
            assert (public / "key").read_text().strip() == new  # that it was written out shows that the point was hit
            client.unseal()
            assert client.ready()


# --- the service manager ---------------------------------------------------------------------------------------------


def test_a_sealed_start_is_ready_for_the_service_manager(public: Path) -> None:
    """Otherwise a start with Type=notify would time out before an operator comes. The socket is the manager's. It hears
    of each seal and unseal, and of a sign of life before an unseal, which may wait for the disk.
    """
    needs.root()
    with LiveDaemon(public) as daemon:
        daemon.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(public / "notify"))
            manager.settimeout(WAIT_SECONDS_MAX)
            daemon.environ["NOTIFY_SOCKET"] = str(public / "notify")
            daemon.command += ["--sealed"]
            daemon.start(sys.executable, service_manager.__file__, str(daemon.socket), "0")
            assert manager.recv(1000).startswith(b"READY=1\nSTATUS=sealed on ")
            with minikms.Client(daemon.socket) as client:
                assert client.unseal_status().sealed
                client.unseal()
                assert client.ready()
                client.seal()
            heard = [manager.recv(1000) for _ in range(3)]
            assert heard[0] == b"WATCHDOG=1"
            assert heard[1].startswith(b"STATUS=serving on ") and heard[2].startswith(b"STATUS=sealed on ")
