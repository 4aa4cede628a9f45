"""The events that the logs of this process write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minikms.platform.logs import Output, set_output


@contextmanager
def capture_logs() -> Iterator[list[dict[str, Any]]]:
    """The values of each event of any level, its name as `event`, its level as `log_level`; nothing is written."""
    lines: list[dict[str, Any]] = []
    previous = set_output(Output("debug", lambda level, values: lines.append({**values, "log_level": level})))
    try:
        yield lines
    finally:
        set_output(previous)
