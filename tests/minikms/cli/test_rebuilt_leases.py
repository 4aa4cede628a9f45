"""`minikms doctor --rebuild-leases`: what is not known is spent, also for a key whose file is missing at the moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

from minikms.cli.doctor import rebuild
from minikms.custody.files import open_directory
from minikms.custody.lease_format import USES_MAX
from minikms.custody.lease_store import LeaseStore
from minikms.keys.dek import key_id_to_bytes, make_key_id


def test_a_key_that_exists_as_a_backup_only_is_spent_too(tmp_path: Path) -> None:
    """It may be put back; its uses are as unknown as those of the others."""
    now_ms = time.time_ns() // 1_000_000
    present, missing, ahead = (make_key_id(now_ms + later_ms, os.urandom(10)) for later_ms in (-2, -1, 10_000_000))
    directory = tmp_path / "d"
    for path in (directory, directory / "kms-deks", directory / "kms-deks-backup"):
        path.mkdir(mode=0o700)
    (directory / "kms-deks" / f"{present}.json").touch()
    for key_id in (missing, ahead):
        (directory / "kms-deks-backup" / f"{key_id}.json.20260101T000000").touch()
    assert rebuild(str(directory), yes=True) == 0
    descriptor = open_directory(directory)
    store = LeaseStore.open(descriptor, create=False)
    try:
        assert {store.total(key_id_to_bytes(key_id)) for key_id in (present, missing, ahead)} == {USES_MAX}
    finally:
        store.close()
        os.close(descriptor)
