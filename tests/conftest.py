"""What every test shares: the Hypothesis profile, a clean environment, `tests/` on the import path (`import needs`).

Owns no fixture of a room; each room keeps its own beside its tests. Never start a process or touch the network here.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The machine is shared and slow at times: a deadline per example would fail tests for the load of others. Under CI the
# examples are derived from the test itself, so that a run that failed can be had again.
settings.register_profile("shared", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("shared"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "shared")

# No test sees what the person who runs it has configured for the two programs.
for _name in [name for name in os.environ if name.startswith(("PROGRESSDB_", "MINIKMS_"))]:
    del os.environ[_name]
