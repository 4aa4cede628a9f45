"""Kills, cut connections, rotation, compression and retention at once: every tree that was ever signed is one tree."""

import contextlib
import io
import json
import os
import random
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest

from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.note import Signature, parse_checkpoint
from minikms_auditor.signers import Signers
from minikms_daemon.audit.maintenance import LogRetention, compress_closed, remove_segments
from tests.harness import witness as cosigning
from tests.minikms.audit.logmaker import open_log, write_events
from tests.minikms_auditor.killing import InFile, a_step, forked, killed_before_call
from tests.minikms_auditor.rig import Rig, root_of

W1: Final = "witness.example/w1"
LIMITS: Final = LogLimits(segment_bytes=8000, reserve_bytes=0)
CALLS_OF_A_STEP: Final = 60
"""About as many as a step makes that change something."""
BYTES_OF_A_REQUEST: Final = 1500
"""About as many as a submission and its answer have."""


class WitnessProcess:
    """A witness in a process of its own, behind a wire, which `fault` cuts."""

    def __init__(self, directory: Path, logs: dict[str, bytes]) -> None:
        self._served = cosigning.Witness(str(directory), W1, logs)
        self.vkey = self._served.vkey
        self.fault: tuple[int, bool] | None = None
        """Bytes of a connection until it is cut, and whether the witness is killed then. None: no cut."""
        self._carrying = threading.Lock()
        self._pid = 0
        self._port = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._carry_all, daemon=True)
        self.start()
        self._thread.start()

    def start(self) -> None:
        """Once the last connection has ended, unless the witness runs still."""
        with self._carrying:
            if not self._pid:
                self._start()

    def _start(self) -> None:
        told, tell = os.pipe()

        def serve() -> None:
            sys.stderr = io.StringIO()  # where the server writes of each cut connection
            server = cosigning.serve(self._served)
            os.write(tell, str(server.server_address[1]).encode())
            signal.pause()

        self._pid = forked(serve)
        os.close(tell)
        with open(told) as file:
            self._port = int(os.read(file.fileno(), 16))

    def kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.kill()

    def _carry_all(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            address = ("127.0.0.1", self._port)
            with client, self._carrying, contextlib.suppress(OSError), socket.create_connection(address) as server:
                self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        left, kills = self.fault or (1 << 30, False)
        peers = {client: server, server: client}
        while True:
            for source in select.select(list(peers), [], [])[0]:
                data = source.recv(min(left, 65536))
                if not data:
                    return
                peers[source].sendall(data)
                left -= len(data)
                if left == 0:
                    if kills:
                        self.kill()
                    return


class Disturbed(Rig):
    """Its witness is a `WitnessProcess`."""

    process: WitnessProcess

    def start_witness(self, name: str) -> None:
        self.process = WitnessProcess(self.base / "w1", dict([cosigning.parse_vkey(self.vkey())]))

    def close(self) -> None:
        super().close()
        self.process.close()

    def witness(self, name: str) -> tuple[str, str]:
        return self.process.url, self.process.vkey


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The texts of all tree checkpoints that a signer was asked for, as lines of JSON: also those that nobody got."""
    path = tmp_path / "signed"
    path.touch()
    real = Signers.sign

    def sign(signers: Signers, text: str) -> tuple[Signature, ...]:
        with path.open("a") as file:
            file.write(json.dumps(text) + "\n")
        return real(signers, text)

    monkeypatch.setattr(Signers, "sign", sign)
    return path


def change_the_log(rig: Rig, chance: random.Random, taken_seq: int, truth: dict[int, bytes]) -> None:
    """More lines, in new segments; now and then older segments are compressed, and taken ones removed."""
    rig.clock.step = CHORES_NS
    log = open_log(rig.log_dir, clock=rig.clock, limits=LIMITS)
    write_events(log, chance.randrange(1, 120), per_commit=chance.randrange(1, 20))
    log.sign_and_sync()
    truth |= {json.loads(line)["event"]["seq"]: line for line in rig.lines()}
    if chance.random() < 0.3:
        remove_segments(log, LogRetention(bytes_max=8000, days_min=0), taken_seq)
    log.close()
    truth |= {json.loads(line)["event"]["seq"]: line for line in rig.lines()}
    if chance.random() < 0.3:
        compress_closed(str(rig.log_dir))


def member(path: Path, name: str, missing: Any) -> Any:
    """A member of a file in JSON; `missing` without the file."""
    return json.loads(path.read_text())[name] if path.exists() else missing


def check(base: Path, signed: Path, seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    truth: dict[int, bytes] = {}
    kills = cuts = 0
    with Disturbed(base, witnesses=1) as rig:
        rig.daemon.reports = reported = InFile(base / "reports")
        for number in range(rounds):
            change_the_log(rig, chance, reported.newest(), truth)
            rig.process.start()
            after = chance.randrange(1, BYTES_OF_A_REQUEST)
            rig.process.fault = (after, chance.random() < 0.5) if chance.random() < 0.5 else None
            call = chance.randrange(1, 2 * CALLS_OF_A_STEP)
            killed = killed_before_call(call, a_step(rig), (rig.daemon, "report_audit_position"))
            where = f"seed {seed}, round {number}"
            assert reported.newest() <= rig.published()[0], where
            assert rig.known_size(W1) <= member(rig.state_dir / "state.json", "size", 0), where
            assert member(rig.state_dir / "status.json", "alarm", "") == "", where
            kills, cuts = kills + killed, cuts + (rig.process.fault is not None)
        rig.process.fault = None
        rig.process.start()
        status = rig.steps()
        lines = [truth[seq] for seq in range(1, len(truth) + 1)]
        assert (status.alarm, status.errors) == ("", ()), f"seed {seed}"
        assert rig.published() == (len(lines), root_of(lines)), f"seed {seed}"
        assert len(rig.lines()) < len(lines), "retention removed lines meanwhile"
    trees = {parse_checkpoint(json.loads(text)) for text in signed.read_text().splitlines()}
    for tree in trees:
        assert tree.root == root_of(lines[: tree.size]), f"seed {seed}: the tree of {tree.size} is another one"
    assert len(trees) > rounds // 4 and kills and cuts


def test_every_tree_that_was_ever_signed_is_one_tree(tmp_path: Path, signed: Path) -> None:
    base = tmp_path / "rig"
    base.mkdir()
    check(base, signed, seed=2, rounds=12)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_every_tree_of_many_faults_is_one_tree(tmp_path: Path, signed: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    base = tmp_path / "rig"
    base.mkdir()
    check(base, signed, seed, rounds=300)
