"""Agents beside restarts of the key service and rotations of their keys: nothing is lost, and no key leaks to them."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from minikms_adapters.langgraph import EncryptedSaver
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms.memory import scanner
from tests.minikms_adapters.langgraph import agents_program
from tests.minikms_adapters.langgraph.conftest import TYPED

AGENTS = agents_program.AGENTS
PROJECT = Path(__file__).parents[3]


class Agents:
    """The process with the agents, and the turns that it has reported for each."""

    def __init__(self, socket: Path, database: Path) -> None:
        command = [sys.executable, "-m", agents_program.__name__, str(socket), str(database)]
        self.process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns = [0] * AGENTS
        self.end = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() in ("stopped", "failed"):
                self.end = line.strip()
                continue
            agent, turn = map(int, line.split())
            self.turns[agent] = turn + 1

    def are_ahead_of(self, before: list[int]) -> bool:
        return all(now > then for now, then in zip(self.turns, before, strict=True))

    def finish(self) -> None:
        """The agents end their turns; the process stays."""
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        wait_until(lambda: self.end or self.process.poll() is not None)
        assert self.end == "stopped"

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def rotate(daemon: LiveDaemon) -> None:
    """Each agent gets another key."""
    with daemon.client() as kms:
        for agent in range(AGENTS):
            thread = f"langgraph.agent-{agent}"
            old = kms.get_or_create_dek_for_thread(thread, purpose="data").key_id
            kms.create_dek_for_thread(thread, replaces=old, purpose="data")


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.torture)])
def test_agents_lose_nothing_beside_restarts_and_new_keys(tmp_path: Path, seconds: int) -> None:
    database = tmp_path / "agents.sqlite"
    with LiveDaemon(tmp_path) as daemon:
        agents = Agents(daemon.socket, database)
        try:
            wait_until(lambda: min(agents.turns) >= 1)
            until_s = time.monotonic() + seconds
            while True:
                before = list(agents.turns)
                daemon.stop()
                daemon.start()
                rotate(daemon)
                wait_until(partial(agents.are_ahead_of, before))
                if time.monotonic() >= until_s:
                    break
            agents.finish()
            if os.geteuid() == 0:
                needles = [needle for name, key in daemon.keys().items() for needle in scanner.forms_of(name, key)]
                assert len(needles) > 2 * AGENTS
                assert scanner.scan_process(agents.process.pid, needles).hits == []
        finally:
            agents.close()
        stored = b"".join(each.read_bytes() for each in tmp_path.glob("agents.sqlite*"))
        assert TYPED.encode() not in stored
        with daemon.client() as kms, SqliteSaver.from_conn_string(str(database)) as inner:
            saver = EncryptedSaver(inner, kms)
            for agent, turns in enumerate(agents.turns):
                found = saver.get_tuple({"configurable": {"thread_id": f"agent-{agent}", "checkpoint_ns": ""}})
                assert found is not None
                messages = found.checkpoint["channel_values"]["messages"]
                assert messages[::2] == [f"{TYPED}, turn {turn}" for turn in range(turns)]
