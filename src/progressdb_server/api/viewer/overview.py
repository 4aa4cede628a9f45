"""The charts of the overview: what the server has done lately. It must never judge whether that is well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.viewer.history import DAY_S, HOUR_S, History, Point, Totals
from progressdb_server.metrics import KmsMetrics

CHART_WIDTH: Final = 480
CHART_HEIGHT: Final = 120
_APPENDING: Final = re.compile(r"/v1/(threads/\{thread\}/)?messages")
_READING: Final = re.compile(r"/v1/.*")
_ENCRYPTING: Final = frozenset(("encrypt", "encrypt_batch"))
_DECRYPTING: Final = frozenset(("decrypt", "decrypt_batch"))


class Line(NamedTuple):
    """`points`: of an SVG polyline. `last`: the newest value."""

    name: str
    points: str
    last: float


class Chart(NamedTuple):
    title: str
    unit: str
    top: float
    lines: list[Line]


def totals(metrics: ApiMetrics, kms: KmsMetrics) -> Totals:
    requests, seconds, errors = metrics.answered()
    return Totals(
        appends=metrics.counted("POST", _APPENDING),
        reads=metrics.counted("GET", _READING),
        encryptions=kms.answered(_ENCRYPTING),
        decryptions=kms.answered(_DECRYPTING),
        errors=errors,
        requests=requests,
        seconds=seconds,
    )


# --- charts -----------------------------------------------------------------------------------------------------------


def charts(history: History, *, day: bool) -> list[Chart]:
    used, latency = history.rates("appends", "reads", day=day), history.latency(day=day)
    keys, errors = history.rates("encryptions", "decryptions", day=day), history.rates("errors", day=day)
    return [
        _chart("Messages", "a second", ("appends", "reads"), used, day=day),
        _chart("Exchanges with the key service", "a second", ("encryptions", "decryptions"), keys, day=day),
        _chart("Mean time of a request", "ms", ("time",), latency, day=day),
        _chart("Answers with an error of the server", "a second", ("errors",), errors, day=day),
    ]


def _chart(title: str, unit: str, names: Sequence[str], points: Sequence[Point], *, day: bool) -> Chart:
    top = max((value for point in points for value in point.values), default=0.0)
    end_s = points[-1].at_s if points else 0.0
    period_s = DAY_S if day else HOUR_S
    lines: list[Line] = []
    for number, name in enumerate(names):
        at = [
            (
                CHART_WIDTH * (1 - (end_s - point.at_s) / period_s),
                CHART_HEIGHT * (1 - point.values[number] / (top or 1.0)),
            )
            for point in points
        ]
        last = points[-1].values[number] if points else 0.0
        lines.append(Line(name, " ".join(f"{x:.1f},{y:.1f}" for x, y in at), last))
    return Chart(title, unit, top, lines)
