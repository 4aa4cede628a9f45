"""What every test shares: the Hypothesis profile, and `tests/` on the import path (so that `import needs` works).

Owns no fixture of a room; each room keeps its own beside its tests. Never start a process or touch the network here.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# The machine is shared and slow at times: a deadline per example would fail tests for the load of others. Under CI the
# examples are derived from the test itself, so that a run that failed can be had again.
settings.register_profile("shared", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("shared"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "shared")


@pytest.fixture(autouse=True)
def _environment_of_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the configuration that the person who runs it has set for the two programs."""
    for name in [name for name in os.environ if name.startswith(("PROGRESSDB_", "MINIKMS_"))]:
        monkeypatch.delenv(name)
