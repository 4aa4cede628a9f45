"""`/encrypt` with an auditor on the same processors, of the same daemon without one.

A ratio: in turns, in one run, under the same h2load. The auditor starts and catches up before each of its turns, and
verifies the lines of the turn while it lasts; at the end it may be one step (2 s) behind.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from bench import programs
from bench.calls import Connection
from bench.encrypt import PLAINTEXT_BYTES, rate, target
from bench.report import Row, figure, say

CONNECTIONS = 64
TURNS = 5
REQUESTS_PER_TURN = 240_000
"""More than ten seconds, so that a step more or less counts little."""
REQUESTS_TO_WARM_UP = 20_000
FLOOR, GOAL = 0.8, 0.9
ORIGIN = "bench.example/audit"


def encrypt() -> list[Row]:
    """Raises MissingProgramError."""
    programs.need("h2load")
    with programs.workplace() as directory, programs.workplace() as beside:  # the daemon may not write in the second
        policy, log_dir = beside / "policy.toml", directory / "log"
        roles = 'roles = ["create", "encrypt", "monitor", "ship"]\nthreads = ["*"]\n'
        policy.write_text(f'version = 1\n[[grant]]\nprincipals = ["uid:{os.getuid()}"]\n{roles}')
        policy.chmod(0o600)
        log_dir.mkdir()
        log_dir.chmod(0o2750)
        with programs.minikms(directory, "--policy", str(policy), "--audit-dir", str(log_dir)) as path:
            config = _config(path, directory, log_dir)
            ours = target("minikms", path, directory)
            rate(ours, CONNECTIONS, REQUESTS_TO_WARM_UP)
            with_one: list[float] = []
            without: list[float] = []
            for turn in range(TURNS):
                without.append(rate(ours, CONNECTIONS, REQUESTS_PER_TURN))
                with programs.auditor(config, lambda: _caught_up(directory / "state")):
                    with_one.append(rate(ours, CONNECTIONS, REQUESTS_PER_TURN))
                rates = f"{figure(with_one[-1])}/s with an auditor, {figure(without[-1])}/s without"
                say(f"encrypt, turn {turn + 1}: {rates}")
    ours_s, theirs_s = statistics.median(with_one), statistics.median(without)
    return [
        Row(
            f"`/encrypt`, {PLAINTEXT_BYTES} B, {CONNECTIONS} connections, with an auditor, of without one",
            ours_s / theirs_s,
            "×",
            FLOOR,
            GOAL,
            note=f"{figure(ours_s)}/s to {figure(theirs_s)}/s, medians of {TURNS} turns",
        )
    ]


def _config(path: str, directory: Path, log_dir: Path) -> Path:
    """That of an auditor without witnesses, which trusts the log that the daemon writes."""
    (directory / "signer.key").touch(0o600)
    (directory / "signer.key").write_text(os.urandom(32).hex())
    with Connection(path) as connection:
        first = {"origin": ORIGIN, "log_id": "", "seq": 0, "mac": ""}
        public_key = connection.call("POST", "/audit/position", first)["public_key"]
    config = directory / "auditor.toml"
    config.write_text(
        f'version = 1\norigin = "{ORIGIN}"\nkms_socket = "{path}"\nkms_server_uids = [{os.getuid()}]\n'
        f'log_dir = "{log_dir}"\nstate_dir = "{directory / "state"}"\nsigners = ["file:signer.key"]\n'
        f'public_keys = ["{public_key}"]\n'
    )
    return config


def _caught_up(state: Path) -> bool:
    """Whether every durable line is under a tree checkpoint, as the auditor that runs now says."""
    try:
        status: dict[str, Any] = json.loads((state / "status.json").read_bytes())
    except FileNotFoundError:
        return False
    return bool(status["log_id"]) and status["position_seq"] > 0 and status["lag_lines"] == 0
