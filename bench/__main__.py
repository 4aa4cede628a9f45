"""`python -m bench [NAME …] [--runs N] [--million] [--save]`: run all benches, or those named, and print a Markdown
table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import (
    agents,
    audited,
    create,
    database,
    dek_rotation,
    encrypt,
    gateway,
    growth_keys,
    kek_rotation,
    messages,
    million,
    pairs,
    programs,
    report,
)
from bench.programs import BenchError, MissingProgramError
from bench.report import Missing, Row

BENCHES: dict[str, Callable[[], list[Row]]] = {
    "encrypt": encrypt.encrypt,
    "encrypt_fsync": encrypt.encrypt_fsync,
    "encrypt_batch": encrypt.encrypt_batch,
    "gateway": gateway.encrypt,
    "transit": gateway.transit,
    "audited": audited.encrypt,
    "append": messages.append,
    "append_added": messages.append_added,
    "list": messages.listing,
    "database": database.store,
    "create": create.create,
    "kek_rotation": kek_rotation.rotation,
    "dek_rotation": dek_rotation.rotation,
    "dek_rotation_foreground": dek_rotation.foreground,
    "checkpoint": agents.checkpoint,
}
"""What runs without any name."""
AGAINST: dict[str, Callable[[Path], list[Row]]] = {
    "append": messages.append_against,
    "list": messages.list_against,
    "verbs": pairs.verbs,
    "create": pairs.creates,
    "kek_rotation": pairs.rotation,
}
"""What runs with another checkout."""
LONG: dict[str, Callable[[], list[Row]]] = {
    "million": million.million,
    "growth_keys": growth_keys.starts,
    "growth_rotations": dek_rotation.growth,
}
"""What runs with its option, or when it is named."""
RUNS_MAX = 99
RUN_GB = 8
"""Disk space for one run of all benches: key files of 4 KiB, audit logs and stores. An upper estimate."""
MILLION_GB = 8
"""For one run with a million keys: each has its file, and a line in a rotation backup."""


def main() -> int:
    """0 when everything asked for was measured or lacks a program that is not installed; 1 when a bench failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure; a table goes to standard output.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES | LONG)}; all without any")
    parser.add_argument(
        "--peer",
        metavar="URL",
        help="compare `/encrypt` with a running service that has the same API: unix:PATH or http://HOST:PORT",
    )
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="run everything N times: medians and ranges")
    parser.add_argument("--million", action="store_true", help="also measure with 1,000,000 keys, which takes minutes")
    parser.add_argument(
        "--against",
        metavar="CHECKOUT",
        type=Path,
        help=f"compare with another checkout of this project, in which `make venv` was run: {', '.join(AGAINST)}, or "
        "those of them that are named",
    )
    parser.add_argument("--save", action="store_true", help="write the table into docs/benchmarks.md; runs all")
    asked = parser.parse_args()
    if not 1 <= asked.runs <= RUNS_MAX:
        parser.error(f"--runs is a number from 1 to {RUNS_MAX}")
    benches = BENCHES | LONG if asked.million else dict(BENCHES)
    if asked.peer is not None:
        if asked.names or asked.save or asked.million:
            parser.error("--peer runs one bench alone: name no other, and nothing is saved")
        try:
            encrypt.peer_address(asked.peer)
        except ValueError as error:
            parser.error(f"{asked.peer}: {error}")
        benches = {"peer": lambda: encrypt.against_peer(asked.peer)}
    if asked.against is not None:
        if asked.save or asked.million or asked.peer is not None:
            parser.error("--against runs its own benches alone, and nothing is saved")
        benches = {name: partial(bench, asked.against) for name, bench in AGAINST.items()}
    known = BENCHES | LONG if asked.against is None else benches
    unknown = [name for name in asked.names if name not in known]
    if unknown:
        parser.error(f"no bench named {', '.join(unknown)}; there are {', '.join(known)}")
    if asked.save and asked.names:
        parser.error("--save keeps whole tables only: name no bench")
    if asked.names:
        benches = {name: known[name] for name in dict.fromkeys([*asked.names, *(LONG if asked.million else ())])}

    needed = asked.runs * (RUN_GB * (benches.keys() >= BENCHES.keys()) + MILLION_GB * len(LONG.keys() & benches.keys()))
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < needed:
        parser.error(f"the files of all runs stay until the end: {needed} GB, and {free:.0f} GB are free")
    with programs.workplaces_kept():
        return _measure(asked, benches)


def _measure(asked: argparse.Namespace, benches: dict[str, Callable[[], list[Row]]]) -> int:
    load_before = os.getloadavg()[0]
    runs: list[list[Row | Missing]] = []
    failed = False
    for number in range(asked.runs):
        if asked.runs > 1:
            report.say(f"run {number + 1} of {asked.runs}")
        results, well = _one_run(benches)
        runs.append(results)
        failed |= not well
    text = f"{report.heading(load_before, asked.runs)}\n\n{report.table(report.merged(runs))}"
    print(text)
    if failed:
        return 1
    if asked.save:
        report.save(text)
        report.say(f"saved: {report.DOCUMENT}")
    return 0


def _one_run(benches: dict[str, Callable[[], list[Row]]]) -> tuple[list[Row | Missing], bool]:
    """The figures, and whether no bench failed."""
    results: list[Row | Missing] = []
    well = True
    for name, bench in benches.items():
        try:
            results += bench()
        except MissingProgramError as missing:
            results.append(Missing(name, str(missing)))
        except (OSError, BenchError) as error:
            well = False
            report.say(f"{name} failed: {error}")
            results.append(Missing(name, "failed"))
    return results, well


if __name__ == "__main__":
    sys.exit(main())
