"""Every field of transformers' TrainingArguments: as it is there, with another default, or refused.

The table is docs/training/arguments.md. A new field of a new version fails here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from transformers import HfArgumentParser, TrainingArguments

from fastdistill.training.arguments import HIGHER_IS_BETTER, LOWER_IS_BETTER, UNSUPPORTED
from fastdistill.training.config import DistillConfig
from fastdistill.training.loss import EVAL_COLUMNS
from helpers.training import build, config, llama, ragged, train, weights

TABLE = Path(__file__).resolve().parents[2] / "docs" / "training" / "arguments.md"
ROWS = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*)\|$", TABLE.read_text(), re.MULTILINE)
STATUS = {name: status for name, status, _ in ROWS}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
WATCHING = {"eval_strategy": "steps", "save_strategy": "steps"}


def test_the_table_has_every_field_once():
    missing = FIELDS.keys() - STATUS.keys()
    assert not missing, f"docs/training/arguments.md: decide what these mean here: {missing}"
    assert len(ROWS) == len(STATUS)
    assert set(STATUS.values()) == {"same", "default", "refused"}


def test_the_table_and_the_code_refuse_the_same():
    refused = {name for name, status in STATUS.items() if status == "refused"}
    assert refused == UNSUPPORTED.keys() & STATUS.keys()


def test_a_default_that_differs_is_in_the_table(tmp_path):
    ours, theirs = DistillConfig(str(tmp_path)), TrainingArguments(str(tmp_path))
    differ = {n for n, f in FIELDS.items() if f.init and getattr(ours, n) != getattr(theirs, n)}
    # Compared by identity, or by what another field sets.
    differ -= {"output_dir", "accelerator_config"}
    unexplained = {n for n in differ if STATUS[n] == "same"}
    assert not unexplained


OTHER: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "label_names": ["y"],
    "include_for_metrics": ["inputs"],
}


@pytest.mark.parametrize("name", [n for n in UNSUPPORTED if n in FIELDS])
def test_what_is_refused_is_refused_by_name(tmp_path, name):
    expected, _ = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got"):
        DistillConfig(str(tmp_path), **{name: OTHER.get(name, not expected)})
    DistillConfig(str(tmp_path), **{name: expected})


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_rows_in_parts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"parallelism_config: expected {name}=1, got 2"):
        DistillConfig(str(tmp_path), parallelism_config=SimpleNamespace(**{name: 2}))


def test_rows_in_parts_are_refused_if_the_launcher_splits_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    monkeypatch.setattr(ParallelismConfig, "get_device_mesh", lambda *_: None)
    monkeypatch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"parallelism_config: expected cp_size=1, got 2"):
            build(tmp_path)
    finally:
        AcceleratorState._reset_state()


def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="fp16: expected False on a CPU, got True"):
        DistillConfig(str(tmp_path), fp16=True, use_cpu=True)


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"num_train_epochs": 0}], ids=str)
def test_training_of_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="expected more than 0, got 0"):
        DistillConfig(str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": math.nan},
        {"learning_rate": "1e-4"},
        {"weight_decay": math.inf},
        {"max_grad_norm": math.nan},
        {"max_grad_norm": None},
        {"adam_epsilon": math.nan},
        {"neftune_noise_alpha": math.nan},
        {"max_steps": "2"},
        {"max_steps": 2.5},
        {"gradient_accumulation_steps": 0},
        {"per_device_eval_batch_size": 0},
        {"eval_accumulation_steps": 0},
        {"seed": -1},
        {"train_sampling_strategy": "by_length"},
        {"optim_args": "momentun=0.9"},
        {"optim_args": "momentum"},
        {"optim": "adamw_torch", "optim_args": "momentum=0.9"},
        {"optim_target_modules": "all-linear"},
        {"lr_scheduler_kwargs": {"num_cycles": 3}},
        {"accelerator_config": {"even_batch": False}},
    ],
    ids=str,
)
def test_a_value_that_would_mean_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"^{list(options)[-1]}: expected "):
        config(tmp_path, **options)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": math.inf},
        {"max_grad_norm": -1.0},
        {"per_device_train_batch_size": np.int64(12), "seed": np.int64(3)},
        {"learning_rate": np.float32(0.01)},
        {"optim_args": "momentum=0.9, nesterov=true"},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        {"train_sampling_strategy": "sequential"},
        {"learning_rate": 0},
    ],
    ids=str,
)
def test_usual_values_are_taken(tmp_path, options):
    train(tmp_path, **options)


class TestMetrics:
    def test_every_figure_has_a_direction(self):
        no_metric = {"tokens", "router_aux_loss"}  # balanced experts make no better student
        metrics = {*EVAL_COLUMNS, "perplexity"} - no_metric
        assert metrics == {*LOWER_IS_BETTER, *HIGHER_IS_BETTER}

    @pytest.mark.parametrize("name", LOWER_IS_BETTER)
    def test_less_is_better(self, tmp_path, name):
        for metric in (name, f"eval_{name}", f"eval_held_out_{name}"):
            args = config(tmp_path, metric_for_best_model=metric, **WATCHING)
            assert args.greater_is_better is False
        with pytest.raises(ValueError, match="greater_is_better: expected False with"):
            config(tmp_path, metric_for_best_model=name, greater_is_better=True)

    @pytest.mark.parametrize("name", HIGHER_IS_BETTER)
    def test_more_is_better(self, tmp_path, name):
        assert config(tmp_path, metric_for_best_model=f"eval_{name}").greater_is_better is True

    def test_one_of_the_users_own_says_its_direction(self, tmp_path):
        with pytest.raises(
            ValueError, match="metric_for_best_model: expected a name that ends with"
        ):
            config(tmp_path, metric_for_best_model="accuracy")
        assert config(tmp_path, metric_for_best_model="accuracy", greater_is_better=True)

    def test_the_best_is_kept(self, tmp_path):
        options = {
            **WATCHING,
            "eval_steps": 2,
            "save_steps": 2,
            "max_steps": 6,
            "learning_rate": 3e-2,
            "load_best_model_at_end": True,
            "optim": "adamw_torch",
            "metric_for_best_model": "eval_a_kl",
        }
        sets = {"a": ragged(5), "b": ragged(7)}
        trainer = train(tmp_path, eval_dataset=sets, **options)
        seen = [e["eval_a_kl"] for e in trainer.state.log_history if "eval_a_kl" in e]
        assert len(seen) == 3
        assert trainer.state.best_metric == min(seen) < max(seen)
        assert trainer.evaluate()["eval_a_kl"] == pytest.approx(min(seen), rel=1e-5)

    def test_one_that_evaluation_will_not_have_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected one of a_loss, .*, got 'kl'"):
            build(tmp_path, eval_dataset={"a": ragged(4)}, metric_for_best_model="kl")
        with pytest.raises(ValueError, match="got 'kl'; it needs a teacher"):
            build(tmp_path, teacher=None, ce_weight=1.0, metric_for_best_model="kl")

    @pytest.mark.parametrize(
        "options",
        [
            {"load_best_model_at_end": True, "save_strategy": "no"},
            {"save_strategy": "best", "metric_for_best_model": "kl"},
        ],
    )
    def test_a_best_model_without_evaluation_is_refused(self, tmp_path, options):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name}: expected .*; nothing is evaluated"):
            config(tmp_path, eval_strategy="no", **options)

    def test_a_schedule_follows_the_metric(self, tmp_path):
        options = {**WATCHING, "lr_scheduler_type": "reduce_lr_on_plateau"}
        args = config(tmp_path, metric_for_best_model="agreement", **options)
        assert args.lr_scheduler_kwargs == {"mode": "max"}
        assert not config(tmp_path, metric_for_best_model="kl", **options).lr_scheduler_kwargs


def test_a_parser_of_arguments_changes_no_check(tmp_path):
    """HfArgumentParser replaces the types of optional fields by the types without None."""
    parser = HfArgumentParser(DistillConfig)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert args.neftune_noise_alpha is None
    with pytest.raises(ValueError, match="neftune_noise_alpha: expected a number, got 'x'"):
        config(tmp_path, neftune_noise_alpha="x")


class TestEvaluation:
    def test_an_evaluation_is_one_of_all_examples(self, tmp_path):
        options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
        got = build(tmp_path, eval_dataset=ragged(11), **options).evaluate()
        want = build(tmp_path, eval_dataset=ragged(11)).evaluate()
        assert got["eval_kl"] == pytest.approx(want["eval_kl"], rel=1e-5)

    def test_an_evaluation_of_nothing_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="eval_dataset: expected an example, got none"):
            build(tmp_path, eval_dataset=[], check_data=False).evaluate()
        rows = [{"input_ids": r["input_ids"], "labels": r["labels"] * 0 - 100} for r in ragged(3)]
        with pytest.raises(ValueError, match="eval_dataset: expected a target token, got none"):
            build(tmp_path, eval_dataset=rows, check_data=False).evaluate()

    def test_training_on_no_batch_is_refused(self, tmp_path):
        trainer = build(tmp_path, data=ragged(5), dataloader_drop_last=True)
        with pytest.raises(ValueError, match=r"train_dataset: expected a batch of 12, got 5"):
            trainer.train()

    @pytest.mark.parametrize(
        "options", [{"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}], ids=str
    )
    def test_how_sums_are_gathered_changes_nothing(self, tmp_path, options):
        sizes = {"per_device_eval_batch_size": 4}
        got = build(tmp_path, eval_dataset=ragged(11), **sizes, **options).evaluate()
        want = build(tmp_path, eval_dataset=ragged(11), **sizes).evaluate()
        assert got["eval_kl"] == want["eval_kl"]


class TestIntervals:
    @pytest.mark.parametrize(
        ("steps", "logging", "saving"), [(3, 1, 1), (40, 1, 8), (450, 9, 90), (10**6, 500, 500)]
    )
    def test_a_short_run_shows_and_saves(self, tmp_path, steps, logging, saving):
        from transformers import TrainerState

        from fastdistill.training.arguments import resolve_intervals

        args = DistillConfig(str(tmp_path), max_steps=steps, eval_strategy="steps")
        state = TrainerState(max_steps=steps)
        resolve_intervals(args, state)
        assert (state.logging_steps, state.save_steps, state.eval_steps) == (
            logging,
            saving,
            saving,
        )

    def test_what_is_given_stays(self, tmp_path):
        args = config(tmp_path, logging_steps=7, eval_strategy="steps", save_steps=9)
        assert (args.logging_steps, args.eval_steps, args.save_steps) == (7, 7, 9)
        best = config(tmp_path, eval_steps=30, load_best_model_at_end=True, **WATCHING)
        assert best.save_steps == 30


def test_a_batch_by_length_needs_lengths(tmp_path):
    train(tmp_path, train_sampling_strategy="group_by_length")
    rows = [{"text": "a"}] * 4
    with pytest.raises(ValueError, match="train_sampling_strategy: expected rows with input_ids"):
        build(tmp_path, data=rows, check_data=False, train_sampling_strategy="group_by_length")


def test_noise_is_for_training_alone(tmp_path):
    quiet, noisy = train(tmp_path / "a"), train(tmp_path / "b", neftune_noise_alpha=5.0)
    assert not torch.equal(weights(quiet), weights(noisy))
    one, other = (
        build(tmp_path, eval_dataset=ragged(4), model=llama(0), **o).evaluate()
        for o in ({}, {"neftune_noise_alpha": 5.0})
    )
    assert one["eval_kl"] == other["eval_kl"]


def test_tokens_seen_are_counted(tmp_path):
    trainer = train(tmp_path, include_num_input_tokens_seen="non_padding", max_steps=1)
    assert trainer.state.num_input_tokens_seen == sum(len(r["input_ids"]) for r in ragged())


def test_the_folder_in_the_arguments_is_resumed_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    whole = train(tmp_path / "a", **options)
    folder = str(tmp_path / "a" / "run" / "checkpoint-1")
    again = train(tmp_path / "b", resume_from_checkpoint=folder, **options)
    assert torch.equal(weights(again), weights(whole))
    assert next(e["step"] for e in again.state.log_history if "loss" in e) == 1
