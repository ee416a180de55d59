"""`fastdistill demo --model smollm2`: top-k KL next to labels, at equal steps and equal time."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.backends.cpu import get_cpu_capability as cpu_capability

from .....runtime.atomic_files import check_folder, write_json
from .....runtime.backend import versions
from .....runtime.checks import integer
from .....runtime.intervals import Estimate, mean_of_runs, paired_difference
from .....training.progress import PhaseProgress
from ..result import json_row
from .models import LAYERS, first_student, teacher_file
from .runs import BATCH, LABELS, TOP_K, K, Setting, StudentRun, measure, samples
from .setting import measure_costs, open_setting, steps_at_equal_time

KINDS = {"text": "Held-out prose", "chat": "Held-out chat answers"}
FIGURES = ("nll", "kl", "agreement", "top1")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The demo's result.

    Attributes:
        records: of the runs, as StudentRun.compute returns them.
        start, teacher: measurements of the student before training and of the teacher.
        samples: greedy answers by prompt and model.
        costs: CPU seconds of a step of each arm, and of the teacher's answers to all rows.
    """

    steps: int
    equal_time: int
    records: list[dict[str, Any]]
    start: dict[str, Any]
    teacher: dict[str, Any]
    samples: dict[str, dict[str, str]]
    costs: dict[str, float]
    facts: dict[str, Any]
    seconds: float

    def points(self, arm: str, step: int) -> dict[int, dict[str, Any]]:
        """Return the measurements of an arm after a step, by seed."""
        return {
            record["config"]["seed"]: point
            for record in self.records
            if record["config"]["arm"]["name"] == arm
            for point in record["points"]
            if point["step"] == step
        }

    def steps_of(self, arm: str) -> list[int]:
        """Return the steps after which an arm was measured."""
        return sorted(
            {
                point["step"]
                for record in self.records
                if record["config"]["arm"]["name"] == arm
                for point in record["points"]
            }
        )

    def estimate(self, arm: str, step: int, kind: str, figure: str) -> Estimate:
        """Return the mean over seeds."""
        points = self.points(arm, step)
        return mean_of_runs([points[seed][kind][figure] for seed in sorted(points)])

    def difference(self, labels_step: int, kind: str, figure: str) -> Estimate:
        """Return the paired difference of top-k KL from labels after a number of their steps."""
        ours, theirs = self.points(TOP_K.name, self.steps), self.points(LABELS.name, labels_step)
        seeds = sorted(ours.keys() & theirs.keys())
        a, b = ([of[seed][kind][figure] for seed in seeds] for of in (ours, theirs))
        return paired_difference(a, b)

    def as_json(self) -> dict[str, Any]:
        rows = []
        for kind in KINDS:
            for figure in FIGURES:
                for arm in (TOP_K.name, LABELS.name):
                    for step in self.steps_of(arm):
                        name = f"{kind}/{figure}/{arm}/{step} steps"
                        rows.append(json_row(name, self.estimate(arm, step, kind, figure)))
                for name, step in (("steps", self.steps), ("time", self.equal_time)):
                    estimate = self.difference(step, kind, figure)
                    rows.append(json_row(f"{kind}/{figure}/difference at equal {name}", estimate))
        return {
            "rows": rows,
            "start": self.start,
            "teacher": self.teacher,
            "samples": self.samples,
            "cpu_seconds": self.costs,
            "seconds": round(self.seconds, 1),
            **self.facts,
        }


def run_comparison(*, out: str | Path, seeds: int = 2, steps: int = 32) -> Comparison:
    """Run the demo and write report.html, results.json and a student to `out`.

    An interrupted demo continues after its last finished student.

    Args:
        out: output folder.
        seeds: orders of the rows; an interval needs two.
        steps: of a student of top-k KL, in batches of 4 rows.
    """
    integer("seeds", seeds, 1)
    integer("steps", steps, 1)
    folder = Path(out)
    check_folder("out", folder)
    teacher_file()  # raises before anything is loaded
    began = time.perf_counter()
    setting = open_setting(folder, steps=steps)
    costs = measure_costs(setting, (TOP_K, LABELS), folder, rounds=1)
    equal_time = max(steps, steps_at_equal_time(steps, costs, LABELS.name, TOP_K.name))
    student = first_student(setting.file)
    start = measure(student, setting)
    records = _train_students(setting, folder, seeds, steps, equal_time)
    by_model = {
        "teacher": samples(setting.teacher.model, setting),
        **{
            record["config"]["arm"]["name"]: record["samples"]
            for record in records
            if record["config"]["seed"] == 0
        },
        "before training": samples(student, setting),
    }
    result = Comparison(
        steps=steps,
        equal_time=equal_time,
        records=records,
        start=start,
        teacher=measure(setting.teacher.model, setting._replace(bf16=False)),
        samples={
            prompt: {name: texts[prompt] for name, texts in by_model.items()}
            for prompt in by_model["teacher"]
        },
        costs=costs,
        facts={
            "command": f"fastdistill demo --model smollm2 --seeds {seeds} --steps {steps}",
            "versions": versions(),
            "machine": f"{platform.machine()} CPU ({cpu_capability()}), "
            f"{torch.get_num_threads()} threads",
            "setting": _facts(setting, seeds, steps, equal_time),
        },
        seconds=time.perf_counter() - began,
    )
    from .report import comparison_report  # matplotlib is slow to import

    comparison_report(result).write(folder / "report.html")
    write_json(folder / "results.json", result.as_json())
    return result


def _train_students(
    setting: Setting, folder: Path, seeds: int, steps: int, equal_time: int
) -> list[dict[str, Any]]:
    curve = tuple(steps * i // 4 for i in (1, 2, 3) if steps * i // 4)
    records = []
    with PhaseProgress() as progress:
        for seed in range(seeds):
            for arm, ends in ((TOP_K, (steps,)), (LABELS, (steps, equal_time))):
                keep = folder / "student" if arm is TOP_K and seed == 0 else None
                run = StudentRun(
                    setting=setting,
                    arm=arm,
                    seed=seed,
                    steps=max(ends),
                    points=(*curve, *ends),
                    keep=keep,
                )
                if not run.is_done(folder):
                    bar = progress.phase(f"seed {seed + 1}, {arm.name}", total=max(ends))
                    run = replace(run, callbacks=tuple(bar))
                run.run(folder)
                records.append(run.result(folder))
    return records


def _facts(setting: Setting, seeds: int, steps: int, equal_time: int) -> dict[str, Any]:
    held_out = setting.rows.held_out
    return {
        "seeds": seeds,
        "steps": steps,
        "labels_steps_at_equal_time": equal_time,
        "rows_per_step": BATCH,
        "k": K,
        "learning_rate": TOP_K.learning_rate,
        "layers": LAYERS,
        "bf16": setting.bf16,
        "train_rows": len(setting.rows.train),
        "held_out_rows": {kind: len(rows) for kind, rows in held_out.items()},
    }


def seconds_of(costs: dict[str, float], arm: str, steps: int) -> float:
    """Return the CPU seconds of the steps of an arm, with the teacher's answers to the rows."""
    return steps * costs[arm] + (costs["cache"] if arm == TOP_K.name else 0.0)
