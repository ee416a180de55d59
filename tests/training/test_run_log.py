"""The log has all that a run logs, survives kills and resumes, and reads as one run."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from transformers import TrainerCallback

from fastdistill.training.logs.run_files import NAME, SETTINGS, read_run
from fastdistill.training.logs.run_settings import settings_of
from helpers.training import build, config, llama, peaked, ragged, train

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def lines(folder):
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines() if line]


def test_everything_logged_is_in_the_file(tmp_path):
    trainer = build(tmp_path, eval_dataset=ragged(3), max_steps=2)
    trainer.train()
    trainer.evaluate()
    entries = lines(tmp_path / "run")
    events = [e["event"] for e in entries if "event" in e]
    assert events == ["train_begin", "first_batch", "train_end", "histograms"]
    for logged in trainer.state.log_history:
        assert any(logged.items() <= line.items() for line in entries), logged
    assert len({line["run"] for line in entries}) == 1


def test_a_resumed_run_reads_as_one(tmp_path):
    train(tmp_path, **SAVING)
    train_again = build(tmp_path, **SAVING | {"max_steps": 6})
    train_again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    metrics = read_run(tmp_path / "run").metrics
    assert [e["step"] for e in metrics if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert len({e["run"] for e in metrics}) == 2


def test_a_new_run_in_the_same_folder_is_read_alone(tmp_path):
    train(tmp_path, max_steps=4)
    trainer = build(tmp_path, eval_dataset=ragged(3), max_steps=2)
    trainer.evaluate()
    trainer.train()
    metrics = read_run(tmp_path / "run").metrics
    assert [e["step"] for e in metrics if "loss" in e] == [1, 2]
    assert [e["step"] for e in metrics if "eval_loss" in e] == [0]
    assert sum("loss" in e for e in lines(tmp_path / "run")) == 6  # nothing was thrown away


def test_a_resumed_run_keeps_what_was_before_its_training(tmp_path):
    watched = SAVING | {"eval_dataset": ragged(3), "eval_strategy": "steps", "eval_steps": 2}
    train(tmp_path, **watched, eval_on_start=True)
    again = build(tmp_path, **watched | {"max_steps": 6})
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [e["step"] for e in read_run(tmp_path / "run").metrics if "eval_kl" in e] == [0, 2, 4, 6]
    batches = read_run(tmp_path / "run").events("first_batch")
    assert [e["step"] for e in batches] == [0, 2]


def test_training_a_second_time_is_another_run(tmp_path):
    trainer = train(tmp_path, max_steps=3)
    trainer.train()
    assert [e["step"] for e in read_run(tmp_path / "run").metrics if "loss" in e] == [1, 2, 3]


class Deletes(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            (Path(args.output_dir) / NAME).unlink()


def logged(folder):
    """The metrics of a run, without those that two equal runs do not share."""
    changing = {"run", "time", "peak_process_memory_gib", "train_loss"}  # of its own steps
    ends = ("_per_second", "_runtime")
    return [
        {n: v for n, v in line.items() if n not in changing and not n.endswith(ends)}
        for line in read_run(folder).metrics
    ]


def test_metrics_of_a_deleted_file_are_written_again(tmp_path, caplog):
    watched = SAVING | {"eval_dataset": ragged(3), "eval_strategy": "steps", "eval_steps": 2}
    train(tmp_path / "whole", **watched)
    assert not caplog.records
    train(tmp_path / "parts", **watched, callbacks=[Deletes()])
    assert logged(tmp_path / "parts" / "run") == logged(tmp_path / "whole" / "run")
    again = build(tmp_path / "parts", **watched)
    (tmp_path / "parts" / "run" / NAME).unlink()
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "run" / "checkpoint-2"))
    assert logged(tmp_path / "parts" / "run") == logged(tmp_path / "whole" / "run")
    warnings = [r.getMessage() for r in caplog.records if "log of the steps before" in r.msg]
    assert len(warnings) == 2


def test_settings_name_models_changes_and_versions(tmp_path):
    train(tmp_path, max_steps=1, temperature=2.0)
    settings = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert settings["student"]["class"] == "LlamaForCausalLM"
    assert settings["student"]["parameters"] == llama(0).num_parameters()
    assert settings["teacher"] == "LlamaForCausalLM, given as an object"
    assert settings["config"]["temperature"] == 2.0
    assert {"temperature", "k", "max_steps", "optim"} <= set(settings["changed"])
    assert not {"accelerator_config", "report_to", "debug", "seed"} & set(settings["changed"])
    assert settings["versions"]["torch"] == importlib.metadata.version("torch")
    assert settings["run"] == lines(tmp_path / "run")[0]["run"]


def test_settings_hold_no_secrets(tmp_path):
    options = {
        "hub_token": "hf_secret",
        "model_init_kwargs": {"token": "hf_secret", "revision": "x"},
    }
    settings = settings_of(config(tmp_path, **options), llama(0), peaked())
    assert "hf_secret" not in json.dumps(settings)
    assert settings["config"]["model_init_kwargs"] == {"revision": "x"}
    assert settings["config"]["max_new_tokens"] == 128


def test_every_line_of_figures_has_the_peak_of_memory(tmp_path):
    train(tmp_path, max_steps=2)
    peaks = [e["peak_process_memory_gib"] for e in read_run(tmp_path / "run").metrics]
    assert len(peaks) == 3  # two steps and the end
    assert peaks == sorted(peaks)
    assert peaks[0] > 0.1


def test_target_tokens_are_those_since_the_last_line(tmp_path):
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 3}
    train(tmp_path, per_device_train_batch_size=4, **options)
    tokens = [e["target_tokens"] for e in read_run(tmp_path / "run").metrics if "loss" in e]
    assert tokens == [2 * 122, 2 * 122]


def test_half_a_line_does_not_spoil_the_next(tmp_path):
    train(tmp_path, max_steps=1)
    path = tmp_path / "run" / NAME
    path.write_text(path.read_text() + '{"run": "x", "st')
    train(tmp_path, max_steps=1)
    assert [e["step"] for e in read_run(tmp_path / "run").metrics if "loss" in e] == [1]


def test_what_is_no_number_is_null(tmp_path):
    trainer = build(tmp_path)
    trainer.log({"figure": float("nan"), "other": 1.5})
    assert lines(tmp_path / "run")[-1]["figure"] is None
    assert lines(tmp_path / "run")[-1]["other"] == 1.5


def test_nan_stops_the_run_and_is_not_averaged_away(tmp_path):
    """The Trainer's own log replaces a NaN loss by the mean of those before."""
    trainer = build(tmp_path, learning_rate=1e30, max_steps=5)
    with pytest.raises(
        FloatingPointError, match=r"expected a finite number, got NaN .* up to [2-5]"
    ):
        trainer.train()
