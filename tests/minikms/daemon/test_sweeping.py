"""Temporary files that a crash left are removed after a start."""

from __future__ import annotations

import os
import time
from pathlib import Path

from minikms.custody.backup.register import DIRECTORY, TEMP_AGE_NS_MIN
from tests.harness.live_daemon import LiveDaemon

WAIT_S_MAX = 60.0


def test_old_temporary_files_of_the_archive_register_are_swept(public: Path) -> None:
    """A young one may belong to a backup that runs beside the daemon."""
    archives = public / "data" / DIRECTORY
    archives.mkdir(mode=0o700, parents=True)
    (public / "data").chmod(0o700)
    with LiveDaemon(public, "file") as daemon:
        daemon.kill()
        old, young, entry = (archives / name for name in (".tmp-0123456789abcdef-1", ".tmp-1", "a_0.json"))
        for path in (old, young, entry):
            path.write_text("left")
        past_ns = time.time_ns() - TEMP_AGE_NS_MIN
        os.utime(old, ns=(past_ns, past_ns))
        daemon.start()
        deadline = time.monotonic() + WAIT_S_MAX
        while old.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sorted(archives.iterdir()) == sorted([young, entry])
