"""Both packages import on a system that lacks the calls of Linux; what needs one of them says so where it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.rocks import engine as rocks

LACKING = """
import fcntl, os, select, signal, socket, sys
import asyncio, selectors  # the standard library decides by what there is, so it comes first
removed = {
    os: ("memfd_create", "MFD_", "pipe2", "posix_fallocate", "fdatasync", "O_TMPFILE", "O_PATH", "sched_", "pidfd_",
         "eventfd", "EFD_", "copy_file_range", "splice", "setns", "unshare", "close_range"),
    fcntl: ("F_SEAL_", "F_ADD_SEALS", "F_GET_SEALS"),
    socket: ("SO_PEERCRED", "SO_PEERPIDFD", "TCP_USER_TIMEOUT", "SOCK_CLOEXEC", "SOCK_NONBLOCK"),
    signal: ("pidfd_send_signal",),
}
for module, names in removed.items():
    for name in [name for name in dir(module) if name.startswith(names)]:
        delattr(module, name)
"""
IMPORTS = (
    LACKING
    + """
import importlib, pkgutil
import minikms, progressdb_server
count = 0
for package in (minikms, progressdb_server):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            count += 1
print(count)
"""
)
TAKES = (
    LACKING
    + """
from progressdb_server.kms import root_key
try:
    print(root_key.take())
except root_key.MasterKeyError as error:
    print(error)
"""
)


def ran(program: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_the_calls_of_linux() -> None:
    assert int(ran(IMPORTS)) > 150


def test_without_sealed_memory_a_key_in_the_environment_is_refused() -> None:
    key = "5a" * 32
    text = ran(TAKES, PROGRESSDB_MINIKMS_MASTER_KEY=key)
    assert "can't be used on this system" in text
    assert "PROGRESSDB_MINIKMS_MASTER_KEY_FILE" in text
    assert key not in text
    assert "not by this program" in ran(TAKES, PROGRESSDB_MINIKMS_MASTER_KEY_FD="3")
    assert ran(TAKES) == "None\n"


def test_without_posix_fallocate_a_full_disk_is_still_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    engine = rocks.RocksEngine(str(tmp_path / "store"))
    try:
        engine.probe()
        monkeypatch.setattr(rocks, "PROBE_BYTES", 1 << 62)
        with pytest.raises(EngineUnavailableError, match="No space left"):
            engine.probe()
    finally:
        engine.close()
