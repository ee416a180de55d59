"""metrics.jsonl has all that a run logs, survives kills and resumes, and reads as one run."""

from __future__ import annotations

import json

import pytest
from training import build, ragged, train

from fastdistill.training.run_log import NAME, read_metrics

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def lines(folder):
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines() if line]


def test_everything_logged_is_in_the_file(tmp_path):
    trainer = build(tmp_path, eval_dataset=ragged(3), max_steps=2)
    trainer.train()
    trainer.evaluate()
    found = lines(tmp_path / "run")
    assert [e["event"] for e in found if "event" in e] == ["train_begin", "train_end"]
    for logged in trainer.state.log_history:
        assert any(logged.items() <= line.items() for line in found), logged
    assert len({line["run"] for line in found}) == 1


def test_a_resumed_run_reads_as_one(tmp_path):
    train(tmp_path, **SAVING)
    train_again = build(tmp_path, **SAVING | {"max_steps": 6})
    train_again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = read_metrics(tmp_path / "run")
    assert [e["step"] for e in found if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert len({e["run"] for e in found}) == 2


def test_a_new_run_in_the_same_folder_is_read_alone(tmp_path):
    train(tmp_path, max_steps=4)
    trainer = build(tmp_path, eval_dataset=ragged(3), max_steps=2)
    trainer.evaluate()
    trainer.train()
    found = read_metrics(tmp_path / "run")
    assert [e["step"] for e in found if "loss" in e] == [1, 2]
    assert [e["step"] for e in found if "eval_loss" in e] == [0]
    assert sum("loss" in e for e in lines(tmp_path / "run")) == 6  # nothing was thrown away


def test_half_a_line_does_not_spoil_the_next(tmp_path):
    train(tmp_path, max_steps=1)
    path = tmp_path / "run" / NAME
    path.write_text(path.read_text() + '{"run": "x", "st')
    train(tmp_path, max_steps=1)
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "loss" in e] == [1]


def test_what_is_no_number_is_null(tmp_path):
    trainer = build(tmp_path)
    trainer.log({"figure": float("nan"), "other": 1.5})
    assert lines(tmp_path / "run")[-1]["figure"] is None
    assert lines(tmp_path / "run")[-1]["other"] == 1.5


def test_nan_stops_the_run_and_is_not_averaged_away(tmp_path):
    """The Trainer's own log replaces a NaN loss by the mean of those before."""
    trainer = build(tmp_path, learning_rate=1e30, max_steps=5)
    with pytest.raises(FloatingPointError, match=r"expected a number, got NaN .* up to [2-5]"):
        trainer.train()
