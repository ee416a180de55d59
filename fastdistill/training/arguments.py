"""Checks of the fields of transformers' TrainingArguments: supported and unsupported values.

docs/training/arguments.md lists every field; tests/training/test_training_arguments.py compares
that table with the installed version and with the names below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..runtime import checks

# Fields without their documented effect here: name -> (the only accepted value, the reason and
# what to use instead).
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the teacher's distribution already smooths the labels"),
    "use_liger_kernel": (False, "the loss here is fused already"),
    "liger_kernel_config": (None, "the loss here is fused already"),
    "use_cache": (False, "the student's forward pass keeps no keys and values"),
    "remove_unused_columns": (
        False,
        "the collator reads columns that the model's forward pass does not name",
    ),
    "label_names": (None, "the collator creates the labels, always with the name 'labels'"),
    "prediction_loss_only": (
        True,
        "evaluation gathers sums per sequence and never logits; predict() returns those sums",
    ),
    "batch_eval_metrics": (
        False,
        "evaluation gathers a few sums per sequence and needs no metric per batch",
    ),
    "include_for_metrics": (
        [],
        "the metrics are computed from sums per sequence, without inputs or losses",
    ),
    "eval_use_gather_object": (False, "the sums that evaluation gathers are tensors"),
    "logging_nan_inf_filter": (
        False,
        "it hides a loss that is not finite; nonfinite= sets the treatment of such a step",
    ),
    "fp16_full_eval": (
        False,
        "it casts the student itself, so later training and checkpoints are float16. Use "
        "fp16=True, or dtype='float16'",
    ),
    "bf16_full_eval": (
        False,
        "it casts the student itself, so later training and checkpoints are bfloat16. Use "
        "bf16=True, or dtype='bfloat16'",
    ),
}

# The metrics of `evaluate`: for some lower is better, for others higher.
LOWER_IS_BETTER = ("loss", "nll", "kl", "perplexity")
HIGHER_IS_BETTER = ("top1", "agreement", "teacher_mass", "student_mass", "acceptance_rate")
METRICS = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
TEACHER_METRICS = ("kl", "agreement", "teacher_mass", "student_mass", "acceptance_rate")

# Default intervals as fractions of a run, of at most MOST_STEPS steps each.
LOGGING_SHARE = 0.02
SAVING_SHARE = 0.2
MOST_STEPS = 500

SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")
# Options in optim_args that torch's own optimizers read; transformers ignores the others.
OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
# Minimum values: a smaller one fails late, or trains on no data.
_MINIMUM = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "dataloader_num_workers": 0,
    "eval_accumulation_steps": 1,
    "torch_empty_cache_steps": 1,
    "seed": 0,
}


def check_arguments(config: TrainingArguments) -> None:
    """Raise ValueError, with its name, for a field whose value is not supported."""
    for name, (expected, reason) in UNSUPPORTED.items():
        value = getattr(config, name, expected)
        # None and other empty values mean that the option is not set.
        if value != expected and (value or expected):
            expected_text = "it to be unset" if expected in (None, []) else repr(expected)
            checks.fail(name, expected_text, repr(value), reason)
    check_whole_rows(getattr(config, "parallelism_config", None))
    _check_numbers(config)
    for name in ("num_train_epochs", "max_steps"):
        value = getattr(config, name)
        if value == 0 or (name == "num_train_epochs" and value < 0):
            hint = "nothing would be trained. evaluate() needs no training"
            checks.fail(name, "more than 0", repr(value), hint)
    _check_names(config)
    if isinstance(config.accelerator_config, Mapping):
        known = [field.name for field in fields(AcceleratorConfig)]
        for name in config.accelerator_config:
            if name not in known:
                checks.fail("accelerator_config", f"some of {', '.join(known)}", repr(name))
    if _text(config.eval_strategy) == "no":
        hint = "nothing is evaluated, so no checkpoint can be the best; set eval_strategy='steps'"
        if config.load_best_model_at_end:
            checks.fail("load_best_model_at_end", "False", True, hint)
        if _text(config.save_strategy) == "best":
            checks.fail("save_strategy", "'steps', 'epoch' or 'no'", "'best'", hint)


def check_whole_rows(parallelism: Any) -> None:
    """Raise ValueError for accelerate's context or sequence parallelism."""
    for name, kind in (("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(parallelism, name, 1)
        if size is not None and size > 1:
            hint = f"{kind} parallelism splits each row over processes; the loss needs whole rows"
            checks.fail("parallelism_config", f"{name}=1", size, hint)


def _check_numbers(config: TrainingArguments) -> None:
    """Raise ValueError for a numeric field that is no number, not finite, or too small.

    Converts NumPy numbers to Python numbers. Fields that also accept other types, such as `debug`,
    are left to transformers.
    """
    # HfArgumentParser replaces `Field.type` of optional fields, but not the annotations.
    for name, hint in get_type_hints(TrainingArguments).items():
        types = {*(get_args(hint) or (hint,))}
        value: Any = getattr(config, name, None)
        if not types & {int, float} or types - {int, float, type(None)}:
            continue
        if value is None and type(None) in types:
            continue
        kind_text, kind = ("a number", Real) if float in types else ("an integer", Integral)
        number = isinstance(value, kind) and not isinstance(value, bool)
        no_clipping = name == "max_grad_norm" and value == math.inf
        if not number or not (math.isfinite(value) or no_clipping):
            checks.fail(name, kind_text, repr(value))
        least = _MINIMUM.get(name)
        if least is not None and value < least:
            checks.fail(name, f"{kind_text} of at least {least}", repr(value))
        if not isinstance(value, (int, float)):
            setattr(config, name, int(value) if isinstance(value, Integral) else float(value))


def _check_names(config: TrainingArguments) -> None:
    """Raise ValueError for names and options that transformers would ignore silently."""
    strategy = _text(getattr(config, "train_sampling_strategy", "random"))
    checks.choice("train_sampling_strategy", strategy, SAMPLING)
    optim, schedule = _text(config.optim), _text(config.lr_scheduler_type)
    for name in _names_of(config.optim_args):
        if name not in OPTIM_ARGS.get(optim, (name,)):
            known = ", ".join(OPTIM_ARGS[optim]) or "no value"
            checks.fail("optim_args", f"{known} with optim={optim!r}", repr(config.optim_args))
    low_rank = "galore" in optim or "apollo" in optim
    for name, is_read, reader in (
        ("optim_target_modules", low_rank, f"optim={optim!r}"),
        ("lr_scheduler_kwargs", not schedule.startswith("constant"), f"{schedule!r}"),
    ):
        value = getattr(config, name, None)
        if value and value != "{}" and not is_read:
            checks.fail(name, "no value", repr(value), f"{reader} does not read it")


def _names_of(optim_args: Any) -> list[str]:
    parts = [part.partition("=") for part in str(optim_args or "").replace(" ", "").split(",")]
    if optim_args and not all(name and equals and value for name, equals, value in parts):
        checks.fail("optim_args", "name=value,name=value", repr(optim_args))
    return [name for name, _, _ in parts if name]


def check_device(config: TrainingArguments) -> None:
    """Raise ValueError for a precision that this device does not support in training."""
    if config.fp16 and config.device.type == "cpu":
        hint = "half precision needs a GPU's loss scaling. Use bf16=True"
        checks.fail("fp16", "False on a CPU", True, hint)


def steps_in_backward(config: Any) -> bool:
    """Return whether the optimizer updates weights during the backward pass."""
    optim = _text(config.optim)
    return "lomo" in optim or optim.endswith("_layerwise")


def known_metric(name: str) -> str | None:
    """Return the metric of `evaluate` that a name ends with, or None.

    >>> known_metric("eval_held_out_kl")
    'kl'
    """
    return next((m for m in METRICS if name == m or name.endswith(f"_{m}")), None)


def direction_of(config: TrainingArguments) -> bool | None:
    """Return greater_is_better for the configured metric; None without a metric.

    Raises:
        ValueError: the configured direction is wrong for the metric, or missing for a metric that
            is not known here.
    """
    name: str | None = config.metric_for_best_model
    greater_is_better: bool | None = config.greater_is_better
    if name is None:
        watched = config.load_best_model_at_end or _text(config.save_strategy) == "best"
        if not watched and not _adapts_to_metric(config):
            return greater_is_better
        name = "loss"
    metric = known_metric(name)
    if metric is None:
        if greater_is_better is None:
            expected_name = f"a name that ends with one of {', '.join(METRICS)}"
            hint = "for a custom metric, set greater_is_better too"
            checks.fail("metric_for_best_model", expected_name, repr(name), hint)
        return greater_is_better
    expected = metric in HIGHER_IS_BETTER
    if greater_is_better is not None and bool(greater_is_better) != expected:
        hint = f"{'higher' if expected else 'lower'} is better"
        with_metric = f"{expected} with metric_for_best_model={name!r}"
        checks.fail("greater_is_better", with_metric, repr(greater_is_better), hint)
    return expected


def check_metric(config: TrainingArguments, sets: Any, has_teacher: bool) -> None:
    """Raise ValueError if evaluating these datasets will not produce the configured metric.

    Args:
        sets: the trainer's eval_dataset, one dataset or a mapping from names to datasets.
        has_teacher: False if the student is trained on the labels alone.
    """
    name = config.metric_for_best_model
    metric = None if name is None else known_metric(name)
    if name is None or metric is None:
        return
    names = [m for m in METRICS if has_teacher or m not in TEACHER_METRICS]
    if isinstance(sets, Mapping):
        names = [f"{set_name}_{m}" for set_name in sets for m in names]
    if name.removeprefix("eval_") not in names:
        hint = "" if has_teacher or metric not in TEACHER_METRICS else "it needs a teacher"
        checks.fail("metric_for_best_model", f"one of {', '.join(names)}", repr(name), hint)


def check_sampling(config: TrainingArguments, dataset: Any) -> None:
    """Raise ValueError if sampling by length is set and the rows have no readable length."""
    strategy = _text(getattr(config, "train_sampling_strategy", "random"))
    if strategy not in ("group_by_length", "batch_rebalance") or not hasattr(dataset, "__len__"):
        return
    if config.length_column_name in (getattr(dataset, "column_names", None) or ()):
        return
    if len(dataset) and "input_ids" not in dataset[0]:
        checks.fail(
            "train_sampling_strategy",
            f"rows with input_ids for {strategy!r}",
            sorted(dataset[0]),
            f"use 'random', or a datasets.Dataset with a column {config.length_column_name!r} "
            "(length_column_name)",
        )


def check_token_batches(config: Any) -> None:
    """Raise ValueError for options that max_tokens_per_batch would ignore or contradict."""
    accelerator = config.accelerator_config
    for name, value, expected in (
        ("per_device_train_batch_size", config.per_device_train_batch_size, 8),
        (
            "train_sampling_strategy",
            _text(getattr(config, "train_sampling_strategy", "random")),
            "random",
        ),
        ("dataloader_drop_last", config.dataloader_drop_last, False),
        ("auto_find_batch_size", config.auto_find_batch_size, False),
        ("lmbda", config.lmbda, 0.0),
        ("accelerator_config", bool(accelerator.split_batches), False),
        ("accelerator_config", bool(accelerator.dispatch_batches), False),
    ):
        if value != expected:
            checks.fail(
                name,
                "its default with max_tokens_per_batch",
                repr(value),
                "the budget alone determines the rows of a batch, from the lengths of the examples",
            )


def schedule_options(config: TrainingArguments) -> Any:
    """Return lr_scheduler_kwargs, with the direction of the metric for schedules that follow it."""
    options = config.lr_scheduler_kwargs
    if not _adapts_to_metric(config) or not config.greater_is_better:
        return options
    if isinstance(options, str) or "mode" in (options or {}):
        return options
    return {**(options or {}), "mode": "max"}


def scale_intervals(config: Any) -> None:
    """Derive unset intervals from those that the user set, before validation."""
    if _text(config.eval_strategy) != "steps":
        return
    if not config.eval_steps and config.logging_steps == LOGGING_SHARE:
        config.eval_steps = config.save_steps
    saves = _text(config.save_strategy) == "steps"
    if config.load_best_model_at_end and saves and config.save_steps == SAVING_SHARE:
        config.save_steps = config.eval_steps or config.logging_steps


def resolve_intervals(config: Any, state: Any) -> None:
    """Write a run's intervals into its state, once the number of steps is known."""
    state.compute_steps(config, state.max_steps)
    for name, share in (
        ("logging_steps", LOGGING_SHARE),
        ("save_steps", SAVING_SHARE),
        ("eval_steps", SAVING_SHARE),
    ):
        if getattr(config, name) == share:
            setattr(state, name, min(getattr(state, name), MOST_STEPS))


def _adapts_to_metric(config: TrainingArguments) -> bool:
    return _text(config.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")


def _text(option: Any) -> str:
    """Return an option, perhaps an Enum of transformers, as text."""
    return str(getattr(option, "value", option))
