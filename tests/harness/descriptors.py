"""What a process has open, read beside the running process."""

import os
from pathlib import Path


def open_files(pid: int) -> dict[Path, str]:
    """The target of each descriptor, by its path in /proc; without those that are closed during the listing."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = Path(f"/proc/{pid}/fd/{name}")
        try:
            found[path] = os.readlink(path)
        except FileNotFoundError:
            continue
    return found
