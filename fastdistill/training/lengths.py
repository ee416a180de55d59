"""How long the rows of a training may be: what student and teacher read, compared with every
example before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..data import attended_first
from ..examples import Encoder
from ..packing import rope_limit
from ..positions import RowLimit, check_new_tokens, check_row_lengths, row_limit, shortest_of
from .config import DistillConfig
from .data_checks import RowsWithoutTarget, sample_indices


def row_limits(student: nn.Module, teacher: Any, config: DistillConfig) -> tuple[RowLimit, ...]:
    """What student and teacher read; where rotary positions depend on a batch's longest row, also
    how long rows may be that share a batch."""
    limits = [row_limit("student", student), getattr(teacher, "row_limit", None)]
    shared = max(config.train_batch_size, config.eval_batch_size) > 1 or config.packing
    longest = rope_limit(student)
    if shared and longest != float("inf"):
        limits.append(
            RowLimit(
                tokens=int(longest),
                reader=f"the student ({type(student).__name__}), whose rotary positions depend on "
                "the longest row of a batch,",
                hint=", or set per_device_train_batch_size=1 and per_device_eval_batch_size=1 "
                "without packing",
            )
        )
    return tuple(limit for limit in limits if limit is not None)


def check_lengths(
    datasets: Mapping[str, Any],
    encoder: Encoder,
    limits: tuple[RowLimit, ...],
    config: DistillConfig,
) -> None:
    """Raise ValueError for the first example that is too long, with its number; on-policy also for
    a prompt that leaves no room for max_new_tokens. Warn of rows without a target where every
    example is read, unless `check_datasets` has found some."""
    for name, dataset in datasets.items():
        untaught = RowsWithoutTarget(name)
        check_row_lengths(name, dataset, encoder, limits, untaught.add)
        sampled = name == "train_dataset" and config.lmbda == 1.0
        if untaught.indices and not sampled:
            known = set(sample_indices(len(dataset))) & set(untaught.indices)
            if not known:
                untaught.warn()
    if config.lmbda > 0:
        _check_room(datasets["train_dataset"], encoder, limits, config.max_new_tokens)


def _check_room(dataset: Any, encoder: Encoder, limits: tuple[RowLimit, ...], new: int) -> None:
    shortest = shortest_of(limits)
    if shortest is None or not hasattr(dataset, "__len__"):
        return
    for index in range(len(dataset)):
        prompt = attended_first(encoder(dataset[index], index)).prompt_length
        check_new_tokens(shortest, prompt, new, f" (train_dataset, example {index})")
