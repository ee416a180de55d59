"""Work that takes long says so, on a terminal and in a log; nobody has to listen."""

from __future__ import annotations

import io

import pytest

from fastdistill.runtime import progress
from fastdistill.training import progress as training_progress


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError


def steps(total):
    with training_progress.PhaseProgress() as bar:
        (callback,) = bar.phase("steps", total=total)
        for step in range(1, total + 1):
            callback.on_step_end(None, type("State", (), {"global_step": step}), None)


def rows(total):
    with progress.RowProgress("rows", total=total + 1, done=1, size=1_000_000) as bar:
        for _ in range(total):
            bar.advance(1, 1_000_000)


def items(total):
    assert list(progress.track(range(total), "items")) == list(range(total))


def labelled(total):
    assert list(progress.track(range(total), "item", label="abcd".__getitem__)) == [*range(total)]


WORK = {
    labelled: "item d: 4 of 4, about 0 min left",
    items: "items: 4 of 4, about 0 min left",
    rows: "rows: 5 of 5, 5 of 5 MB, about 0 min left",
    steps: "steps: 4 of 4, about 0 min left",
}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_long_work_leaves_lines_in_a_log(work, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    work(4)
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (4, WORK[work])
    monkeypatch.setattr(progress, "_SECONDS", 60.0)
    work(4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_log_that_cannot_be_written_ends_no_work(work, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", Gone())
    work(4)


def test_a_training_goes_on_when_nobody_reads_its_lines(monkeypatch):
    monkeypatch.setattr("sys.stderr", Gone())
    state = type("State", (), {"global_step": 1, "max_steps": 2, "is_world_process_zero": True})
    training_progress.TrainingProgress().on_log(None, state, None, logs={"loss": 1.0})


@pytest.mark.parametrize(
    ("loss", "text"), [(1.5, "1.5000"), (1e300, "> 1e6"), (float("nan"), "not a number")]
)
def test_a_line_of_training_names_a_loss_that_is_no_number(loss, text, capsys):
    state = type("State", (), {"global_step": 1, "max_steps": 2, "is_world_process_zero": True})
    training_progress.TrainingProgress().on_log(None, state, None, logs={"loss": loss})
    assert capsys.readouterr().err == f"step 1 of 2  loss {text}\n"
