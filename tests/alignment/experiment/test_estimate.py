"""The estimate before a study: what it counts, and that it leaves no models and threads behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fastdistill.alignment.experiment.estimate import announce
from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.job import Job, load
from fastdistill.alignment.strategies.strategy import Training
from helpers.small_study import SmallSource


@dataclass(frozen=True, kw_only=True)
class SlowSource(SmallSource):
    is_slow: ClassVar[bool] = True


def jobs(source: type[SmallSource]) -> list[Job]:
    training = Training(steps=3, batch_size=2, max_new_tokens=2)
    return [
        Job(source=source(seed=1), role=role, training=training, pool={"n": 5}, student_seed=seed)
        for role in ("untrusted", "benign")
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(("processes", "models"), [(1, 1), (2, 0)])
def test_it_counts_what_is_missing_and_frees_models_that_workers_load(
    processes, models, tmp_path, capsys
):
    load.cache_clear()
    threads = torch.get_num_threads()
    announce(jobs(SlowSource), tmp_path, Execution(processes=processes), 60.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("4 students: 20 answers (")  # two teachers, two seeds, five prompts
    assert ", 12 steps (" in line
    assert ", 16 readings (" in line
    # A minute of audits each; the rest takes seconds.
    assert f"About {4 // processes} min on {processes} process" in line
    assert load.cache_info().currsize == models
    assert torch.get_num_threads() == threads


def test_worlds_and_reports_are_not_announced(tmp_path, capsys):
    announce(jobs(SmallSource), tmp_path, Execution(), 1.0)
    announce(jobs(SlowSource), tmp_path, Execution(only_report=True), 1.0)
    assert not capsys.readouterr().err
