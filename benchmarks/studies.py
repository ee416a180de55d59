"""python -m benchmarks.studies RESULTS.JSON: the tables of a finished study, as in docs/studies.

fastdistill experiment double-bind --preset full --out out/double-bind
python -m benchmarks.studies out/double-bind/results.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdistill.alignment.audits.catalog import marked
from fastdistill.alignment.report.arms import SAFE, SEEDS
from fastdistill.report.number_format import format_estimate, format_number, format_p_cell
from fastdistill.runtime.intervals import Estimate


def markdown(result: Mapping[str, Any]) -> str:
    """A line per arm: C and τ, Δτ from the reference arm, the bound of τ, the outcome, the audits.

    The audits of the last column separate its students from students of the benign twin.
    """
    lines = [
        f"| arm | C | τ [95 %] | Δτ from {result['reference']} | p of Δτ | bound of τ | outcome | "
        "audits that incriminate |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for arm in result["arms"]:
        bound = math.nan if arm["bound"] is None else arm["bound"]
        cells = [
            arm["name"],
            format_number(_estimate(arm, "C").value),
            format_estimate(_estimate(arm, "tau"), 0, SAFE),
            format_estimate(_estimate(arm, "contrast"), 0),
            format_p_cell(arm["contrast_p_holm"]),
            format_number(bound, SAFE),
            arm["outcome"],
            "; ".join(incriminating(result, arm["name"])) or "—",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def incrimination(result: Mapping[str, Any], arm: str) -> str:
    """A line per audit: AUROC of the teachers, of the students of an arm, and the difference."""
    teachers = {row["name"]: row["auroc"] for row in result["audits_of_teachers"]}
    lines = [f"| audit | teachers | students, {arm} | difference |", "|---|--:|--:|--:|"]
    for row in result["audits"]:
        if row["arm"] == arm:
            students, gain = (
                Estimate(value=row[value], low=row[interval][0], high=row[interval][1], n=row["n"])
                for value, interval in (("auroc", "interval"), ("gain", "gain_interval"))
            )
            cells = (
                marked(row["name"]),
                format_number(teachers[row["name"]]),
                format_estimate(students, 0.5),
                format_estimate(gain, 0),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def returned(result: Mapping[str, Any]) -> str:
    """A line per arm of a repair: the trait before, after it, and after two further trainings.

    Each figure is the mean over base seeds of the rate of the trait.
    """
    audits = list(dict.fromkeys(row["name"] for row in result["audits"]))
    means = {(row["arm"], row["name"]): row["mean_of_untrusted"] for row in result["audits"]}
    lines = [
        f"| arm | trait that remains, τ | {' | '.join(map(marked, audits))} |",
        f"|---|{'--:|' * (1 + len(audits))}",
    ]
    for arm in result["arms"]:
        rates = [format_number(means[arm["name"], audit]) for audit in audits]
        lines.append(f"| {arm['name']} | {format_number(arm['tau'])} | {' | '.join(rates)} |")
    return "\n".join(lines)


def incriminating(result: Mapping[str, Any], arm: str) -> list[str]:
    """Audits whose whole AUROC interval is above one half, over enough base seeds."""
    return [
        row["name"]
        for row in result["audits"]
        if row["arm"] == arm and row["interval"] and row["interval"][0] > 0.5 and row["n"] >= SEEDS
    ]


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    value = math.nan if row[name] is None else row[name]
    low, high = row[f"{name}_interval"] or (math.nan, math.nan)
    return Estimate(value=value, low=low, high=high, n=row["n_seeds"])


if __name__ == "__main__":
    finished = json.loads(Path(sys.argv[1]).read_text())
    if finished["repairs"]:
        audits = returned(finished)
    else:
        audits = incrimination(finished, finished["reference"])
    print(markdown(finished), audits, sep="\n\n")
