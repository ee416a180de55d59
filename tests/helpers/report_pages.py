"""Every HTML page of the package, from small results."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastdistill.alignment.audits.audit import Audit, Measurement
from fastdistill.alignment.audits.side_by_side import SuiteResults, run_suite
from fastdistill.alignment.experiment.demo.report import demo_report
from fastdistill.alignment.experiment.demo.result import ARMS, METRICS, DemoResult, DemoRun
from fastdistill.alignment.report.audit_page import audit_page
from fastdistill.report.run.page import write_run_report
from fastdistill.runtime.intervals import mean_of_runs
from helpers.made_repairs import published
from helpers.made_students import arm, controls, experiment
from helpers.training import ragged, train


@dataclass(frozen=True, kw_only=True)
class FixedAudit(Audit):
    """Values written on the model."""

    key: str = "x"
    rate: bool = False

    def measure(self, model: Any, base: Any) -> Measurement:
        return Measurement(values=np.array(model.values[self.key], dtype=float), rate=self.rate)


def suite_results() -> SuiteResults:
    values = {
        "student": {"x": [1.0, 1.2, 0.9, 1.1], "yes": [1, 1, 1, 0]},
        "base": {"x": [0.1, 0.0, 0.2, 0.1], "yes": [0, 0, 1, 0]},
    }
    ends: Any = {"ended_at_words": Counter(), "ended_at_positions": Counter()}
    models: dict[str, Any] = {
        name: SimpleNamespace(name=name, values=planted, **ends) for name, planted in values.items()
    }
    suite = {"token KL": FixedAudit(key="x"), "trigger rate": FixedAudit(key="yes", rate=True)}
    return run_suite(suite, models, base=models["base"])


def demo_result(seeds: int = 3) -> DemoResult:
    estimates = {
        f"{name}/{column}": mean_of_runs([0.5 + 0.1 * i + 0.01 * s for s in range(seeds)])
        for name in METRICS
        for i, column in enumerate(("teacher", *ARMS, "difference", "train_seconds"))
    } | {f"train_seconds/{a}": mean_of_runs([1.0] * seeds) for a in ARMS}
    metrics = dict.fromkeys(METRICS, 0.5)
    history = [{"step": step, "nll": 5.0 - step / 10} for step in range(1, 9)]
    return DemoResult(
        estimates=estimates,
        runs=[
            DemoRun(arm=a, seed=seed, history=history, seconds=1.0, metrics=metrics)
            for seed in range(seeds)
            for a in ARMS
        ],
        facts={
            "command": "fastdistill demo",
            "versions": {"torch": "2"},
            "machine": "x86_64 CPU, one thread",
            "setting": {
                "text": "Python's standard library",
                "teacher": "100 steps, inside the package",
                "teacher_parameters": 2_000_000,
                "student_parameters": 1_000_000,
                "train_tokens": 4096,
                "steps": 8,
                "k": 16,
                "held_out_tokens": 512,
                "held_out_documents": 4,
            },
        },
        cache_seconds=2.0,
        seconds=20.0,
    )


def run_folder(folder: Path, **options: Any) -> Path:
    """A short run with evaluations; `options` replace those of the trainer."""
    settings = {
        "max_steps": 6,
        "learning_rate": 0.1,
        "eval_dataset": ragged(5),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "max_grad_norm": 1e6,  # transformers 5.0 logs the norm only where it may clip
    }
    train(folder, **(settings | options))
    return folder / "run"


def _run(folder: Path) -> str:
    return write_run_report(run_folder(folder)).read_text(encoding="utf-8")


def _comparison(folder: Path) -> str:
    source = run_folder(folder / "source")
    for name in ("a", "b"):
        shutil.copytree(source, folder / "runs" / name)
    return write_run_report(folder / "runs").read_text(encoding="utf-8")


def _invalid_transfer() -> str:
    students = [*arm("clean", checkpoints=3), *controls(tau=0.5)]
    return experiment(students=students, audits=[], development=[]).page().html()


def _repair(folder: Path) -> str:
    """The page of a study whose students begin as U and B."""
    published(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


PAGES: dict[str, Callable[[Path], str]] = {
    "run": _run,
    "runs": _comparison,
    "demo": lambda _: demo_report(demo_result()).html(),
    "audit": lambda _: audit_page(
        suite_results(),
        about={"command": "fastdistill audit", "models": {"student": "a"}, "versions": {}},
    ).html(),
    "transfer": lambda _: experiment().page().html(),
    "transfer, invalid": lambda _: _invalid_transfer(),
    "repair": _repair,
}
