"""What tests of rotations share."""

import pytest

from minikms_daemon import rotation


@pytest.fixture
def quick_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits after a failure, and small batches."""
    monkeypatch.setattr(rotation, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setattr(rotation, "BATCH_FILES", 7)
