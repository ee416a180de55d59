"""Who does the runs: here or beside each other; each once, and in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

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


def test_runs_start_in_their_order_and_leave_no_lock(tmp_path):
    done: list[Touch] = []

    class Recorded(Touch):
        def run(self, folder: Path) -> None:
            assert (folder / f"{self.name}.lock").is_file()
            done.append(self)
            super().run(folder)

    work = [Recorded(one.name) for one in WORK]
    run_all(work, tmp_path)
    assert done == work
    assert not [*tmp_path.glob("*.lock")]


def test_a_run_of_another_process_is_skipped_and_waited_for_at_the_end(tmp_path):
    held = FileLock(tmp_path / "run-1.lock")
    held.acquire()
    order = []

    class Other(Touch):
        def run(self, folder: Path) -> None:
            order.append(self.name)
            super().run(folder)
            if self.name == "run-4":  # the other process finishes meanwhile
                Touch("run-1").run(folder)
                held.release()

    run_all([Other(one.name) for one in WORK], tmp_path)
    assert order == ["run-0", "run-2", "run-3", "run-4"]
    assert (tmp_path / "run-1").is_file()


def test_a_run_that_another_process_left_unfinished_is_executed(tmp_path):
    """Its lock ends with the process; the file stays."""
    (tmp_path / "run-1.lock").touch()
    run_all(WORK, tmp_path)
    assert all(one.is_done(tmp_path) for one in WORK)
