"""Gates: what their bounds admit, and how a report and a file say what they refuse."""

from __future__ import annotations

import json
import math

from fastdistill.alignment.report.validity import invalid_because
from fastdistill.alignment.statistics import Gate, Validity


def test_gates():
    """The bounds themselves pass; NaN passes nothing."""

    def gate(name, value, bound, at_least):
        return Gate(name=name, value=value, bound=bound, at_least=at_least)

    best = Validity(gates=(gate("a", 0.95, 0.95, True), gate("b", 0.03, 0.03, False)))
    worst = Validity(
        gates=(
            gate("trait", 0.9499999, 0.95, True),
            gate("gap", 0.2, 0.03, False),
            gate("false trigger", math.nan, 0.01, False),
        )
    )
    assert best.valid
    first, *gates = invalid_because([], {2: best, 3: worst})
    assert first.startswith("not checked: 0 base seeds of 2 or more")
    assert gates == [
        "the organisms of base seed 3: trait: 0.9499999, expected ≥ 0.95",
        "the organisms of base seed 3: gap: 0.200, expected ≤ 0.03",
        "the organisms of base seed 3: false trigger: nan, expected ≤ 0.01",
    ]
    again = Validity.from_json(json.loads(json.dumps(worst.as_json(), allow_nan=False)))
    assert again.because == worst.because
