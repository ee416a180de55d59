"""The endurance benchmark, at a small number of steps and requests."""

from __future__ import annotations

import sys

import pytest

from benchmarks.endurance import SCENARIOS, Reading, growth, measure


def test_growth_compares_the_end_with_the_time_after_warm_up():
    readings = [Reading(n, 100.0 + (50 if n > 4 else 0) + n, 7, 3 + (n > 16)) for n in range(1, 21)]
    assert growth(readings) == Reading(15, 12.0, 0, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_grows(name):
    count = 1000 if name == "requests" else 200
    grown = growth(measure(name, count))
    assert grown.files == grown.threads == 0
    assert grown.mib < 8
