"""Who does the runs: here or beside each other; each once, and in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from fastdistill.alignment.experiment import executors
from fastdistill.alignment.experiment.executors import Execution, run_all


@dataclass(frozen=True)
class Touch:
    """Leaves a file that says which process made it."""

    name: str

    def path(self, folder: Path) -> Path:
        return folder / self.name

    def is_done(self, folder: Path) -> bool:
        return self.path(folder).is_file()

    def run(self, folder: Path) -> None:
        if self.name == "broken":
            raise ValueError("broken: expected a run that works, got this one")
        with self.path(folder).open("x") as file:  # fails where it is done twice
            file.write(str(os.getpid()))


WORK = [Touch(f"run-{i}") for i in range(5)]


def test_everything_is_done_once_and_here(tmp_path):
    run_all(WORK[:2], tmp_path)
    run_all(WORK, tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.slow
def test_processes_beside_each_other(tmp_path):
    run_all(WORK, tmp_path, Execution(processes=2))
    made = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 5
    assert str(os.getpid()) not in made


@pytest.mark.slow
def test_a_run_that_fails_says_so_and_costs_no_other(tmp_path):
    with pytest.raises(ValueError, match="expected a run that works"):
        run_all([*WORK, Touch("broken")], tmp_path, Execution(processes=2))
    made = set(tmp_path.iterdir())
    run_all(WORK, tmp_path)
    assert made <= set(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 5


def test_machines_that_share_a_folder_begin_elsewhere(monkeypatch):
    orders = set()
    for pid in range(5):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        order = executors._rotate_by_pid(WORK)
        assert sorted(order, key=lambda one: WORK.index(cast(Touch, one))) == WORK
        orders.add(order[0])
    assert len(orders) == 5
