"""The history of the overview: rates between samples, bounded, and nothing before there are two."""

from __future__ import annotations

import pytest

from progressdb_server.api.viewer.history import DAY_S, HOUR_S, SAMPLE_S, SAMPLES_MAX, History, Totals
from progressdb_server.api.viewer.overview import CHART_HEIGHT, CHART_WIDTH, charts


def test_rates_are_of_the_time_between_two_samples() -> None:
    history = History()
    assert history.rates("appends") == [] == history.latency()
    history.take(100.0, Totals())
    assert history.rates("appends") == []
    history.take(100.0 + SAMPLE_S, Totals(appends=30, reads=15, requests=4, seconds=0.5))
    (point,) = history.rates("appends", "reads")
    assert point.values == pytest.approx((30 / SAMPLE_S, 15 / SAMPLE_S))
    assert history.latency()[0].values == pytest.approx((125.0,))
    history.take(100.0 + 2 * SAMPLE_S, Totals(appends=30, reads=15, requests=4, seconds=0.5))
    assert history.latency()[-1].values == (0.0,)


def test_an_hour_and_a_day_are_kept_and_no_more() -> None:
    history = History()
    for number in range(int(2 * DAY_S / SAMPLE_S)):
        history.take(number * SAMPLE_S, Totals(appends=number))
    for day, period_s in ((False, HOUR_S), (True, DAY_S)):
        points = history.rates("appends", day=day)
        assert len(points) == SAMPLES_MAX
        assert points[-1].at_s - points[0].at_s == pytest.approx(period_s, rel=0.01)
        assert all(point.values == pytest.approx((1 / SAMPLE_S,)) for point in points)


def test_a_chart_stays_in_its_picture() -> None:
    history = History()
    assert all(not line.points for chart in charts(history, day=False) for line in chart.lines)
    for number in range(5):
        history.take(number * SAMPLE_S, Totals(appends=number**3, reads=number, errors=number))
    for chart in charts(history, day=False):
        for line in chart.lines:
            at = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
            assert len(at) == 4
            assert all(0 <= x <= CHART_WIDTH and 0 <= y <= CHART_HEIGHT for x, y in at)
            assert at[-1][0] == CHART_WIDTH
