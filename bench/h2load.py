"""h2load, the load generator where it is installed: in C, so that it takes little of the machine from what it measures.

Owns: its command line and the reading of its report. Invariant: a run in which any request was not answered with 2xx
has no figure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.programs import BenchError

RUN_SECONDS_MAX = 120


@dataclass(frozen=True)
class Run:
    """Requests a second, and how long each took, in ascending order."""

    per_second: float
    latencies_ms: list[float]


def installed() -> bool:
    return shutil.which("h2load") is not None


def post(
    uris: Sequence[str], body: bytes, headers: dict[str, str], *, connections: int, requests: int, directory: Path
) -> Run:
    """`requests` times POST over HTTP/1.1, each connection going through `uris` in turn. Raises BenchError."""
    listed, sent, log = directory / "h2load.uris", directory / "h2load.body", directory / "h2load.log"
    listed.write_text("".join(f"{uri}\n" for uri in uris))
    sent.write_bytes(body)
    log.unlink(missing_ok=True)
    command = ["h2load", "--h1", "-t", "1", "-c", str(connections), "-n", str(requests)]
    command += ["-i", str(listed), "-d", str(sent), f"--log-file={log}"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_SECONDS_MAX)
    rate = re.search(r"finished in .*?, ([0-9.]+) req/s", done.stdout)
    succeeded = re.search(r"status codes: (\d+) 2xx", done.stdout)
    if rate is None or succeeded is None or int(succeeded[1]) != requests:
        raise BenchError(
            f"not every request of h2load was answered with 2xx:\n{done.stdout[-600:]}{done.stderr[-600:]}"
        )
    took_us = (int(line.rsplit("\t", 1)[1]) for line in log.read_text().splitlines())
    return Run(float(rate[1]), sorted(us / 1000 for us in took_us))
