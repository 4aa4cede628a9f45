"""The fakes of the store and the real server of the API's tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

for room in ("store", "api"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / room))
