"""What one user can take from the others: connections, and memory of answers that wait to be read. Real daemons."""

import base64
import contextlib
import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minikms.http.accepting import DESCRIPTORS_RESERVED_COUNT
from minikms.http.limits import UNREAD_GROUP_BYTES_MAX
from minikms_daemon.server.admission import KEPT_CONNECTIONS_SHARE, SEALER_CONNECTIONS_MAX, UID_CONNECTIONS_SHARE
from tests.harness.callers import OTHER, ROOT_GRANT, USER, Caller, PolicyDaemon
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign, patient_daemon

pytestmark = pytest.mark.usefixtures("as_root")

BOUND = 40
KEPT = BOUND // KEPT_CONNECTIONS_SHARE
OF_A_UID = BOUND // UID_CONNECTIONS_SHARE
FEW = {resource.RLIMIT_NOFILE: (DESCRIPTORS_RESERVED_COUNT + BOUND,) * 2}
BOTH = f'[[grant]]\nprincipals = ["uid:{USER}", "uid:{OTHER}"]\nroles = ["encrypt"]\nthreads = ["*"]\n'


def first_status(daemon: PolicyDaemon, uid: int) -> int:
    """Of a new connection of a user."""

    def ask() -> int:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(60)
            one.connect(str(daemon.socket))
            with contextlib.suppress(BrokenPipeError):
                one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            return int(one.recv(4096).split()[1])

    return int(foreign.run_as(uid, ask))


def test_users_who_take_all_places_do_not_keep_an_operator_out(public: Path) -> None:
    """Nor themselves: each new connection of a user takes the place of the one that has waited longest."""
    with PolicyDaemon(public, ROOT_GRANT + BOTH, limits=FEW) as daemon:
        wait_until(lambda: daemon.status()["http"]["connections"] == 1)
        oldest = daemon.caller(USER)
        time.sleep(1)  # it is known to half a second
        held = [daemon.caller(USER) for _ in range(OF_A_UID - 1)]
        wait_until(lambda: first_status(daemon, USER) == 200)
        assert oldest.sock.recv(1) == b""
        held += [daemon.caller(OTHER) for _ in range(BOUND - OF_A_UID - KEPT)]
        wait_until(lambda: first_status(daemon, OTHER) == 200)
        operator = [daemon.caller() for _ in range(SEALER_CONNECTIONS_MAX)]
        wait_until(lambda: first_status(daemon, 0) == 200)  # the rest is for other operators
        assert daemon.caller().post("/seal", {}).status == 200
        for caller in (*operator, *held):
            caller.close()


def test_connections_of_a_user_who_lost_all_grants_are_closed(public: Path) -> None:
    """Idle, in the middle of a request, and with answers that nobody reads."""
    with PolicyDaemon(public, ROOT_GRANT + BOTH) as daemon:
        idle, begun, deaf, other = (daemon.caller(uid) for uid in (USER, USER, USER, OTHER))
        begun.sock.sendall(b"POST /encrypt HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        deaf.sock.sendall(large_batch(daemon.new_key("t")))
        wait_until(lambda: daemon.status()["http"]["unread_bytes"] > 0)
        daemon.use_policy(ROOT_GRANT + BOTH.replace(f'"uid:{USER}", ', ""))
        wait_until(lambda: daemon.status()["http"]["connections"] == 2)
        assert daemon.status()["http"]["unread_bytes"] == 0
        assert idle.sock.recv(1) == b""
        assert other.get("/health").status == 200


def large_batch(key_id: str) -> bytes:
    """A request whose answer has about as many bytes."""
    items = [{"key_id": key_id, "plaintext": base64.b64encode(bytes(4096)).decode()}] * 1000
    body = json.dumps({"items": items}).encode()
    return b"POST /encrypt_batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def test_answers_that_one_user_does_not_read_are_bounded(public: Path) -> None:
    """Others do not notice. What the user asked for meanwhile is answered once it reads."""
    patient = "-m", patient_daemon.__name__
    with PolicyDaemon(public, ROOT_GRANT + BOTH, launcher=patient) as daemon, ThreadPoolExecutor(12) as threads:
        key_id = daemon.new_key("t")
        request = large_batch(key_id)
        other = daemon.caller(OTHER)
        callers = [daemon.caller(USER) for _ in range(12)]
        reads = threading.Event()

        def ask(caller: Caller) -> int:
            caller.sock.settimeout(600)
            caller.sock.sendall(request)
            reads.wait(600)
            return len(caller.receive().body["items"])

        answers = [threads.submit(ask, caller) for caller in callers]
        try:
            # The last request counts until its answer does, so that what stays may be less than the bound again.
            wait_until(lambda: daemon.status()["http"]["unread_bytes"] > UNREAD_GROUP_BYTES_MAX - 2 * len(request))
            for _ in range(10):
                assert other.post("/encrypt", {"key_id": key_id, "plaintext": ""}).status == 200
                assert daemon.status()["http"]["unread_bytes"] < UNREAD_GROUP_BYTES_MAX + 2 * len(request)
        finally:
            reads.set()
        assert [answer.result(600) for answer in answers] == [1000] * len(callers)
        wait_until(lambda: daemon.status()["http"]["unread_bytes"] == 0)
