"""The store's fakes serve here too: they implement the production protocols."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "store"))
