"""A disk that is nearly full shows before it is full: in the status, in the log, in the metrics."""

import subprocess
import sys
from pathlib import Path

from tests import needs

SCRIPT = """
mount -t tmpfs -o size=16m,mode=700 none "$1" && cd "$1" || exit 1
minikms="$2 -P -m minikms"
$minikms init --data-dir data --master-key-file root.key > /dev/null
$minikms --socket s --data-dir data --master-key-file root.key 2> log &
until grep -q "disk nearly full" log; do kill -0 $! || break; sleep 0.1; done
$minikms status --socket s
kill $!
wait
cat log
"""


def test_the_status_and_the_log_say_that_the_disk_is_nearly_full(tmp_path: Path) -> None:
    """A file system of 16 MiB in a mount namespace of its own."""
    needs.root()
    needs.program("mount")
    command = [needs.namespaces("mount"), "--mount", "sh", "-c", SCRIPT, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "KiB are free for the data directory or the audit log, so new keys are" in done.stdout, done.stdout
    assert done.stdout.count("disk nearly full") == 1
