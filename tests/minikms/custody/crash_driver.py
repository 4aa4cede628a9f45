"""A process that changes files, to be killed or failed at one of its system calls.

`crash_driver.py SCENARIO DIRECTORY` writes "begin" to stderr after its preparations. To stdout it writes each promise
after the call returned: "told", a name and its content, or "granted", a key and its count. After an error it writes
"refused" and tries once more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

from minikms.custody.files import FileWrite, open_directory, remove_file, replace_file, write_files
from minikms.custody.lease_store import LeaseStore
from minikms.errors import StorageUnavailableError


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def insist(change: Callable[[], object]) -> object:
    try:
        return change()
    except StorageUnavailableError:
        tell("refused")
    return change()


def replace(directory: int) -> None:
    insist(lambda: replace_file(directory, "f0", b"new"))
    tell("told f0 new")


def create(directory: int) -> None:
    insist(lambda: write_files(directory, [FileWrite("g0", b"new", exclusive=True)]))
    tell("told g0 new")


def many(directory: int) -> None:
    names = [f"f{number}" for number in range(5)]
    insist(lambda: write_files(directory, [FileWrite(name, b"new") for name in names]))
    for name in names:
        tell(f"told {name} new")


def remove(directory: int) -> None:
    insist(lambda: remove_file(directory, "f0"))
    tell("told f0 -")


def leases(directory: int) -> None:
    store = LeaseStore.open(directory, create=False)
    for numbers in ((1, 2), (1,), (), (1, 3), (2,)):
        if numbers:
            keys = [number.to_bytes(16, "big") for number in numbers]
            totals = insist(partial(store.reserve, keys))
            assert isinstance(totals, list)
            for number, total in zip(numbers, totals, strict=True):
                tell(f"granted {number} {total}")
        else:
            insist(store.merge)
    store.close()


if __name__ == "__main__":
    scenario = {"replace": replace, "create": create, "many": many, "remove": remove, "leases": leases}[sys.argv[1]]
    opened = open_directory(sys.argv[2])
    os.write(2, b"begin\n")
    scenario(opened)
    tell("end")
