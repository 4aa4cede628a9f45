"""Root opens no store of another user for writing."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import StoreLockedError
from progressdb_server.store.rocks.opening import open_engine, open_reader
from tests import needs

OTHER_UID = 54321
HOLDER = """
import fcntl, sys
with open(sys.argv[1], "r+b") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print(end=".", flush=True)
    sys.stdin.read()
"""


def test_root_makes_no_files_in_a_store_of_another_user(tmp_path: Path) -> None:
    """Its user could not open them. Reading leaves nothing behind, so that root may read. A store in use is reported as
    such: then a command asks the server.
    """
    needs.root()
    path = tmp_path / "store"
    asyncio.run(open_engine(str(path))).close()
    for name in ("", *os.listdir(path)):
        os.chown(path / name, OTHER_UID, OTHER_UID)
    before = sorted(os.listdir(path))
    for make in (True, False):
        with pytest.raises(EngineUnavailableError, match=f"belongs to uid {OTHER_UID}.*run this as that user"):
            asyncio.run(open_engine(str(path), make=make))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path / "LOCK"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.read(1) == b"."
        with pytest.raises(StoreLockedError, match="in use by another process"):
            asyncio.run(open_engine(str(path)))
        holder.kill()
    with open_reader(str(path)):
        pass
    assert sorted(os.listdir(path)) == before
    assert {os.stat(path / name).st_uid for name in before} == {OTHER_UID}
