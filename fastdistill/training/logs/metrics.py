"""Turns sums over targets into the metrics that are logged and returned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction

from ..loss import EVAL_COLUMNS


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """Return means over targets and the perplexity, from rows [sequences, EVAL_COLUMNS]."""
    rows = prediction.predictions
    rows = np.concatenate(rows) if isinstance(rows, (list, tuple)) else rows
    totals = dict(zip(EVAL_COLUMNS, rows.sum(0, dtype=np.float64), strict=True))
    tokens = totals.pop("tokens")
    if not tokens > 0:
        raise ValueError("eval_dataset: expected a target token, got none in all of its examples")
    # Without a teacher, all values of a column are NaN; with one, NaN is a result.
    empty = {n for n, nan in zip(EVAL_COLUMNS, np.isnan(rows).all(0), strict=True) if nan}
    empty -= {"loss", "nll", "top1"}
    metrics = {name: float(v / tokens) for name, v in totals.items() if name not in empty}
    metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return metrics


def means(sums: dict[str, float], step: int, group_size: int) -> dict[str, float]:
    """Return means over the targets since the last log, and their number.

    With token selection, means are over the selected targets. Each group of `group_size` ranks
    counts the same targets.

    Raises:
        FloatingPointError: the loss is NaN or infinite, which the Trainer's own log would hide.
    """
    if not math.isfinite(sums.pop("loss")):
        raise FloatingPointError(
            f"loss: expected a finite number, got NaN or infinity in the steps up to {step}. "
            "Check the teacher's log-probabilities, lower the learning rate, or train in "
            "bfloat16 instead of float16"
        )
    counted = sums.pop("tokens")
    tokens, extra = max(counted, 1.0), {"target_tokens": counted / group_size}
    if "unaligned" in sums:  # targets that only one tokenizer has
        extra["aligned"] = counted / max(counted + sums.pop("unaligned"), 1.0)
    if "mapped_mass" in sums:
        extra["mapped_mass"] = sums.pop("mapped_mass") / max(sums.pop("mapped_positions"), 1.0)
    if "selected" in sums:
        selected = sums.pop("selected")
        extra["selected"] = selected / tokens
        tokens = max(selected, 1.0)
    return {name: value / tokens for name, value in sums.items()} | extra


def clamp_to_one(count: Tensor | int) -> Tensor | int:
    """Return a count, at least 1."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def one_per_group(group_size: int, gathered: Any) -> Any:
    """Return gathered rows, once per group of `group_size` ranks that have the same rows."""
    if isinstance(gathered, Tensor):
        return gathered.reshape(dist.get_world_size(), -1, *gathered.shape[1:])[
            ::group_size
        ].flatten(0, 1)
    return type(gathered)(one_per_group(group_size, part) for part in gathered)


def format_short(value: float) -> str:
    """Return a number as text: four decimals, or "> 1e6" above a million."""
    if math.isnan(value):
        return "not a number"
    return f"{value:.4f}" if value <= 1e6 else "> 1e6"
