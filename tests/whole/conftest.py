"""The real server of the API's tests, and the store's provider with keys of its own, serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

for room in ("api", "store"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / room))
