"""`python -m bench [NAME …] [--save]`: run all benches, or those named, and print a Markdown table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from bench import create, dek_rotation, encrypt, kek_rotation, messages, report
from bench.programs import BenchError, MissingProgramError
from bench.report import Missing, Row

BENCHES: dict[str, Callable[[], list[Row]]] = {
    "encrypt": encrypt.encrypt,
    "encrypt_fsync": encrypt.encrypt_fsync,
    "encrypt_batch": encrypt.encrypt_batch,
    "append": messages.append,
    "append_added": messages.append_added,
    "list": messages.listing,
    "create": create.create,
    "kek_rotation": kek_rotation.rotation,
    "dek_rotation": dek_rotation.rotation,
    "dek_rotation_foreground": dek_rotation.foreground,
}


def main() -> int:
    """0 when everything asked for was measured or lacks a program that is not installed; 1 when a bench failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure; a table goes to standard output.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}; all without any")
    parser.add_argument(
        "--peer",
        metavar="URL",
        help="compare `/encrypt` with a running service that has the same API: unix:PATH or http://HOST:PORT",
    )
    parser.add_argument("--save", action="store_true", help="write the table into docs/benchmarks.md; runs all")
    asked = parser.parse_args()
    benches = dict(BENCHES)
    if asked.peer is not None:
        if asked.names or asked.save:
            parser.error("--peer runs one bench alone: name no other, and nothing is saved")
        try:
            encrypt.peer_address(asked.peer)
        except ValueError as error:
            parser.error(f"{asked.peer}: {error}")
        benches = {"peer": lambda: encrypt.against_peer(asked.peer)}
    unknown = [name for name in asked.names if name not in BENCHES]
    if unknown:
        parser.error(f"no bench named {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if asked.save and asked.names:
        parser.error("--save keeps whole tables only: name no bench")

    load_before = os.getloadavg()[0]
    results: list[Row | Missing] = []
    failed = False
    for name in asked.names or benches:
        try:
            results += benches[name]()
        except MissingProgramError as missing:
            results.append(Missing(name, str(missing)))
        except OSError as error:
            failed = True
            report.say(f"{name} failed: {error}")
            results.append(Missing(name, "failed"))
        except BenchError as error:
            failed = True
            report.say(f"{name} failed: {error}")
            results.append(Missing(name, "failed"))
    text = f"{report.heading(load_before)}\n\n{report.table(results)}"
    print(text)
    if failed:
        return 1
    if asked.save:
        report.save(text)
        report.say(f"saved: {report.DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
