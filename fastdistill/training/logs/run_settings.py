"""Records the models, settings, versions and machine of a run, without secrets."""

from __future__ import annotations

import math
import re
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ...hf.lm_head import is_partitioned
from ...runtime.backend import describe, versions
from ..config import DistillConfig
from ..student import is_adapted, without_adapters
from .model_card import describe_teacher, name_of

# Values that mean unset: TrainingArguments converts some into others.
_UNSET: tuple[Any, ...] = (None, False, "", "none", [], {})


# Settings that the optimizer's state in a checkpoint overrides.
OPTIMIZER_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optim_args",
)
# Other settings of transformers that change the trained student. Those of DistillConfig do too,
# except _MANNER_SETTINGS.
_RESULT_SETTINGS = (
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
)
_MANNER_SETTINGS = (
    "impl",
    "backward",
    "packing",
    "show_panel",
    "check_data",
    "check_signal",
    "save_on_interrupt",
    "model_init_kwargs",
)


def result_settings(config: DistillConfig, student: Any, teacher: Any) -> dict[str, Any]:
    """Return JSON of the settings that determine the trained student, models by name."""
    own, inherited = ({f.name for f in fields(c)} for c in (DistillConfig, TrainingArguments))
    names = sorted(own - inherited - set(_MANNER_SETTINGS))
    values = config.to_dict()
    settings = {n: _to_json(values[n]) for n in (*OPTIMIZER_SETTINGS, *_RESULT_SETTINGS, *names)}
    return {name: v if v not in _UNSET else None for name, v in settings.items()} | {
        "student": _absolute(name_of(without_adapters(student))),
        "teacher": None if teacher is None else _absolute(describe_teacher(teacher)),
        "rows of an update": config.train_batch_size
        * config.gradient_accumulation_steps
        * config.world_size,
    }


def _absolute(name: str | None) -> str | None:
    """Return an existing path as an absolute path, and any other name unchanged."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def changed_settings(previous: dict[str, Any], current: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {name: [now, before]} for the settings in both dicts that differ."""
    return {
        name: [value, previous[name]]
        for name, value in current.items()
        if name in previous and previous[name] != value
    }


def settings_of(config: DistillConfig, student: Any, teacher: Any) -> dict[str, Any]:
    """Return JSON of a run: models, config, settings `changed` from defaults, versions, machine.

    Leaves out settings that hold secrets, and the output folder.
    """
    model = without_adapters(student)
    is_whole = not is_partitioned(model)  # a partition has only a part of the parameters
    environment = describe()
    values = {
        name: _to_json(value)
        for name, value in config.to_dict().items()
        if not name.endswith("_token") and name != "output_dir"
    }
    return {
        "started": round(time.time(), 3),
        "student": {
            "name": name_of(model),
            "class": type(model).__name__,
            "adapters": is_adapted(student),
            "parameters": model.num_parameters() if is_whole else None,
            "trainable": model.num_parameters(only_trainable=True) if is_whole else None,
        },
        "teacher": None if teacher is None else describe_teacher(teacher),
        "teacher_class": None if teacher is None else type(teacher).__name__,
        "config": values,
        "changed": _changed(config, values),
        "processes": config.world_size,
        "machine": {
            "gpus": [gpu["name"] for gpu in environment["cuda"]]
            if config.device.type == "cuda"
            else [],
            **{name: environment[name] for name in ("machine", "cpu_capability", "threads")},
        },
        "versions": versions(),
    }


def _changed(config: DistillConfig, values: dict[str, Any]) -> list[str]:
    changed = []
    for field in fields(config):
        if field.name not in values:
            continue
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        is_default = values[field.name] == _to_json(default) or (
            isinstance(value, AcceleratorConfig) and value == AcceleratorConfig()
        )
        if not is_default and not (values[field.name] in _UNSET and default in _UNSET):
            changed.append(field.name)
    return changed


def _to_json(value: Any) -> Any:
    """Convert a value to JSON types, without entries of dicts that may be secrets."""
    if isinstance(value, dict):
        secret = re.compile(r"token|.*(_token|_key|password)")  # use_auth_token, too
        return {str(k): _to_json(v) for k, v in value.items() if not secret.fullmatch(str(k))}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    value = getattr(value, "value", value)  # of an Enum
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    is_json = value is None or isinstance(value, (bool, int, float, str))
    return value if is_json else str(value)
