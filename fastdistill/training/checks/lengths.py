"""Checks before the first step that student and teacher can read every example's length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...hf.collator import attended_first
from ...hf.encoder import Encoder
from ...hf.positions import RowLimit, check_new_tokens, check_row_lengths, row_limit, shortest_of
from ...hf.row_reader import rope_limit
from ..config import DistillConfig
from .dataset import RowsWithoutTarget, sample_indices


def row_limits(student: nn.Module, teacher: Any, config: DistillConfig) -> tuple[RowLimit, ...]:
    """Return the longest rows that student and teacher can read.

    Includes the limit for rows that share a batch, if rotary positions depend on the longest row.
    """
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
    """Raise ValueError for the first example that is too long.

    On-policy, also for the first prompt that leaves no room for max_new_tokens. Warns of rows
    without a target if every example is read and `check_datasets` has not found any.
    """
    for name, dataset in datasets.items():
        without_target = RowsWithoutTarget(name)
        check_row_lengths(name, dataset, encoder, limits, without_target.add)
        sampled = name == "train_dataset" and config.lmbda == 1.0
        indices = set(without_target.indices)
        if indices and not sampled and not indices & set(sample_indices(len(dataset))):
            without_target.warn()
    dataset, shortest = datasets["train_dataset"], shortest_of(limits)
    if config.lmbda > 0 and shortest is not None and hasattr(dataset, "__len__"):
        for index in range(len(dataset)):
            prompt = attended_first(encoder(dataset[index], index)).prompt_length
            where = f" (train_dataset, example {index})"
            check_new_tokens(shortest, prompt, config.max_new_tokens, where)
