"""A daemon whose root key comes from the unlock service: the wait at a start, and the lease."""

import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api import errors
from minikms.platform.clock import boot_ns
from minikms.processes.handover import KEY
from minikms.seal_files import ATTEMPTS_NAME, LAPSE_NAME
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.unix_http import unix_request
from tests.harness.unlocking import AWAY, REFUSED, UnlockListener, daemon_asking, half_sent
from tests.harness.waiting import WAIT_S_MAX, wait_until
from tests.minikms_daemon.service.asking import ask

Asking = tuple[LiveDaemon, UnlockListener]
SHORT = ("--root-lease", "40")
"""4 s: see the harness."""


@pytest.fixture
def waiting(public: Path) -> Iterator[Asking]:
    with daemon_asking(public) as (daemon, listener):
        yield daemon, listener
        assert "internal error" not in daemon.log.read_text()


@pytest.fixture
def leased(public: Path) -> Iterator[Asking]:
    """It serves, under a lease."""
    with daemon_asking(public, *SHORT) as (daemon, listener):
        listener.answer = KEY + daemon.root()
        wait_until(functools.partial(serves, daemon))
        yield daemon, listener
        assert "internal error" not in daemon.log.read_text()


def serves(daemon: LiveDaemon) -> bool:
    return unix_request(daemon.socket, "/ready").status == 200


def why(daemon: LiveDaemon) -> str:
    """Why it does not serve, as it says to each request."""
    reply = unix_request(daemon.socket, "/keys")
    body = json.loads(reply.body)
    assert (reply.status, body["code"]) == (503, "sealed")
    return str(body["error"])


def wait_for_why(daemon: LiveDaemon, part: str) -> None:
    wait_until(lambda: part in why(daemon))


# --- a start ---------------------------------------------------------------------------------------------------------


def test_a_start_waits_for_the_root_key_and_goes_on(waiting: Asking) -> None:
    daemon, listener = waiting
    wait_for_why(daemon, "waits for the unlock service")
    wait_for_why(daemon, "the token is not plugged in")
    with daemon.client() as client:
        assert client.health() and not serves(daemon)
        assert client.status().reason == why(daemon)
        status = client.unseal_status()
        assert status.sealed and status.from_source and not status.stays_sealed and status.by == ""
        wait_until(lambda: len(listener.asked) >= 3)
        listener.answer = KEY + daemon.root()
        wait_until(lambda: serves(daemon))
        assert client.status().root.provider == "unlock" and client.status().root.lease is None
    *_, start, unsealed = daemon.events("start", "seal", "unseal", "unseal_attempt")
    assert (start["type"], unsealed["type"], unsealed["actor"]) == ("start", "unseal", "minikms")
    assert unsealed["facts"]["kind"] == "from_source" and not daemon.events("unseal_attempt", "seal")
    assert set(listener.purposes()) == {"start"}
    assert not (daemon.data_dir / ATTEMPTS_NAME).exists()
    assert daemon.log.read_text().count("no root key from the unlock service") == 1, "once for each reason"
    daemon.stop()


def test_another_root_key_is_none_and_the_next_one_counts(waiting: Asking) -> None:
    daemon, listener = waiting
    listener.answer = KEY + os.urandom(32)
    wait_for_why(daemon, "wrong root key")
    assert "put the root.json back" in why(daemon) and "--master-key-file" not in why(daemon)
    listener.answer = KEY + daemon.root()
    wait_until(lambda: serves(daemon))


def test_nothing_is_said_to_a_listener_of_another_user(public: Path) -> None:
    with daemon_asking(public, unlock_uids="77") as (daemon, listener):
        wait_for_why(daemon, "expected is uid 77")
        assert set(listener.asked) <= {None}


def test_a_seal_wins_while_the_root_key_is_half_sent(waiting: Asking) -> None:
    """Then the daemon asks no more, until an operator unseals it from its source, which asks once."""
    daemon, listener = waiting
    sent, rest = threading.Event(), threading.Event()
    listener.answer = half_sent(daemon.root(), sent, rest)
    assert sent.wait(WAIT_S_MAX)
    with daemon.client() as client:
        client.seal()
        rest.set()
        before = len(listener.asked)
        assert "unlock service" not in why(daemon)
        status = client.unseal_status()
        assert status.stays_sealed and status.by == f"peer_uid:{os.geteuid()}"
        listener.answer = AWAY
        with pytest.raises(errors.UnsealFailedError, match="the token is not plugged in"):
            client.unseal()
        listener.answer = KEY + daemon.root()
        client.unseal()
        assert serves(daemon) and len(listener.asked) == before + 2
    assert [event["type"] for event in daemon.events("seal", "unseal")][-2:] == ["seal", "unseal"]


def test_a_seal_wins_over_an_unseal_that_asks(waiting: Asking) -> None:
    daemon, listener = waiting
    with daemon.client() as client, daemon.client() as other:
        client.seal()
        sent, rest = threading.Event(), threading.Event()
        listener.answer = half_sent(daemon.root(), sent, rest)
        refused: list[Exception] = []

        def unseal() -> None:
            with pytest.raises(errors.SealedError) as found:
                other.unseal()
            refused.append(found.value)

        asking = threading.Thread(target=unseal)
        asking.start()
        assert sent.wait(WAIT_S_MAX) and client.seal().sealed
        rest.set()
        asking.join()
        assert refused and not serves(daemon)


def test_an_operator_goes_on_without_the_unlock_service(waiting: Asking) -> None:
    daemon, listener = waiting
    with daemon.client() as client:
        client.unseal(root_hex=daemon.root().hex())
        before = len(listener.asked)
        key_id = client.create_dek_for_thread("t").key_id
        assert client.encrypt(key_id, b"text") and len(listener.asked) == before


# --- the lease -------------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_while_it_serves(leased: Asking) -> None:
    daemon, listener = leased
    with daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        wait_until(lambda: listener.purposes().count("renew") >= 2)
        assert client.encrypt(key_id, b"text")
        lease = client.status().root.lease
        assert lease is not None and lease.left_seconds <= 4 and lease.outcomes["granted"] >= 2
        assert lease.granted_at and not lease.last_failure
        page = unix_request(daemon.socket, "/metrics").body.decode()
    assert 'minikms_root_lease_questions_total{outcome="granted"}' in page and "minikms_root_lease_seconds " in page
    assert not daemon.events("seal")


@pytest.mark.parametrize(
    ("answer", "how", "said"),
    [
        (REFUSED, "refused", "AccessDeniedException"),
        (AWAY, "ended", "the token is not plugged in"),
        (KEY + bytes(32), "ended", "does not open the keyring in use"),
        (None, "ended", "has not answered before the end of the lease"),
    ],
    ids=["refused", "away", "another key", "slow"],
)
def test_without_a_grant_it_seals_itself_and_goes_on_with_one(
    leased: Asking, answer: bytes | None, how: str, said: str
) -> None:
    daemon, listener = leased
    ended = threading.Event()

    def late(connection: socket.socket) -> None:
        ended.wait()
        connection.sendall(KEY + daemon.root())

    with daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        sealed = client.encrypt(key_id, b"text")
        listener.answer = late if answer is None else answer
        wait_until((daemon.data_dir / LAPSE_NAME).exists)  # a request that sees the end first finds no failure yet
        wait_until(lambda: not serves(daemon))
        lease = client.status().root.lease
        assert lease is not None and (lease.left_seconds == 0 or how == "refused")
        assert lease.outcomes["refused" if how == "refused" else "away"]
        wait_until(lambda: f"lease={how}" in daemon.log.read_text())
        assert not client.unseal_status().stays_sealed
        renewals = listener.purposes().count("renew")
        ended.set()
        listener.answer = KEY + daemon.root()
        wait_until(lambda: serves(daemon))
        assert listener.purposes().count("renew") == renewals, "a late answer renews nothing"
        assert client.decrypt(key_id, sealed) == b"text"
    *_, line, unsealed = daemon.events("seal", "unseal")
    assert (line["type"], line["actor"], line["facts"]["lease"]) == ("seal", "minikms", how)
    assert said in line["detail"] and unsealed["type"] == "unseal"


def test_the_line_of_the_seal_by_a_lease_outlasts_a_stop_before_the_unseal(leased: Asking) -> None:
    daemon, listener = leased
    listener.answer = AWAY
    wait_until(lambda: not serves(daemon))
    wait_until((daemon.data_dir / LAPSE_NAME).exists)
    daemon.stop()
    listener.answer = KEY + daemon.root()
    daemon.start()
    wait_until(lambda: serves(daemon))
    assert [line["facts"].get("lease") for line in daemon.events("seal")] == ["ended"]
    assert not (daemon.data_dir / LAPSE_NAME).exists()


def test_a_stopped_process_does_not_serve_after_the_end(leased: Asking) -> None:
    """Not even the request that waits in its socket when it goes on."""
    daemon, listener = leased
    with daemon.client() as client, socket.socket(socket.AF_UNIX) as waiting:
        client.create_dek_for_thread("t")
        waiting.connect(str(daemon.socket))
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            listener.answer = AWAY
            waiting.sendall(b"GET /keys HTTP/1.1\r\nhost: x\r\n\r\n")
            end = boot_ns() + 5_000_000_000
            while boot_ns() < end:
                time.sleep(0.1)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        waiting.settimeout(WAIT_S_MAX)
        assert waiting.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
    assert ask(daemon, "GET", "/ready").code == "sealed"


def test_a_seal_by_an_operator_outlasts_a_grant(leased: Asking) -> None:
    daemon, listener = leased
    with daemon.client() as client:
        client.seal()
        before = len(listener.asked)
        client.unseal(root_hex=daemon.root().hex())
        assert len(listener.asked) == before
        wait_until(lambda: listener.purposes()[before:] == ["renew"])
        assert serves(daemon)


@pytest.mark.parametrize("seconds", ["29", "86401", "0"])
def test_a_lease_has_its_bounds_and_needs_the_unlock_service(tmp_path: Path, seconds: str) -> None:
    serve = ("minikms", "serve", "--socket", tmp_path / "s", "--data-dir", tmp_path)
    ended = forked.run(*serve, "--root", "unlock:/s", "--root-lease", seconds)
    assert (ended.returncode, "--root-lease" in ended.stderr) == (2, True)
    ended = forked.run(*serve, "--root", "file:/key", "--root-lease", "30")
    assert (ended.returncode, "give --root unlock:SOCKET" in ended.stderr) == (2, True)
