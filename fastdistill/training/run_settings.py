"""What a run was asked to do, and where it ran: models, settings, versions, machine. No secrets."""

from __future__ import annotations

import math
import time
from dataclasses import MISSING, fields
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from ..backend import describe, versions
from ..heads import is_partitioned
from .config import DistillConfig
from .model_card import name_of, teacher_in_words
from .student import is_adapted, without_adapters

# Ways to say nothing: TrainingArguments turns one into another.
_NOTHING: tuple[Any, ...] = (None, False, "", "none", [], {})


def settings_of(config: DistillConfig, student: Any, teacher: Any) -> dict[str, Any]:
    """JSON of a run: student, teacher, config, which settings are `changed` from their defaults,
    versions and machine. Settings that hold tokens are left out, and the folder itself."""
    inner = without_adapters(student)
    here = describe()
    values = {
        name: _plain(value)
        for name, value in config.to_dict().items()
        if not name.endswith("_token") and name != "output_dir"
    }
    return {
        "started": round(time.time(), 3),
        "student": {
            "name": name_of(inner),
            "class": type(inner).__name__,
            "adapters": is_adapted(student),
            # Partitions say little of the whole.
            "parameters": None if is_partitioned(inner) else inner.num_parameters(),
            "trainable": None
            if is_partitioned(inner)
            else inner.num_parameters(only_trainable=True),
        },
        "teacher": None if teacher is None else teacher_in_words(teacher),
        "teacher_class": None if teacher is None else type(teacher).__name__,
        "config": values,
        "changed": _changed(config, values),
        "processes": config.world_size,
        "machine": {
            "gpus": [gpu["name"] for gpu in here["cuda"]] if config.device.type == "cuda" else [],
            **{name: here[name] for name in ("machine", "cpu_capability", "threads")},
        },
        "versions": versions(),
    }


def _changed(config: DistillConfig, values: dict[str, Any]) -> list[str]:
    found = []
    for field in fields(config):
        if field.name not in values:
            continue
        given = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        as_made = isinstance(given, AcceleratorConfig) and given == AcceleratorConfig()
        same = values[field.name] == _plain(default)
        empty = values[field.name] in _NOTHING and default in _NOTHING
        if not (same or empty or as_made):
            found.append(field.name)
    return found


def _plain(value: Any) -> Any:
    """As JSON has it, with what may be a secret left out of dicts."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not _secret(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    value = getattr(value, "value", value)  # of an Enum
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    known = value is None or isinstance(value, (bool, int, float, str))
    return value if known else str(value)


def _secret(name: str) -> bool:
    return name in ("token", "use_auth_token") or name.endswith(("_token", "_key", "password"))
