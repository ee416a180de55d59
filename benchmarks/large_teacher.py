"""Top-64 answers of a large teacher from token ids: tokens per second and memory.

Models of published shapes with random weights. The first two contenders are transformers with
materialized logits; ours stream the head. Each is alone on the GPU, since two do not fit: they run
one after the other, not in turns. peak_mb is the memory of an answer, output_mb that of the model;
grad_error is the share of ids that differ from transformers in bf16. Ours in bf16 is rejected if it
exceeds what rounded logits explain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastdistill.teachers.local import Teacher

from .data import device
from .large_models import CONFIGS, Replace, build, narrow, ours
from .memory import held_mb, peak_mb, release
from .quant_peers import bnb4_eval
from .registry import GateError, attempt, misplaced
from .rows import Row
from .run import take_turns
from .shapes import Shape
from .teacher_topk import MOST_MISPLACED, materialized

SHAPE = Shape(N=8192, H=4096, V=151936, K=64)
ROW = 2048
TURNS = 3
IN_ALL = 150  # seconds after which no contender starts
MODELS = ("llama-3.1-8b", "qwen3-8b", "qwen3-32b")

# How the layers are built, and whether transformers returns all logits.
CONTENDERS: dict[str, tuple[Replace | None, bool]] = {
    "transformers": (None, True),
    "transformers, bnb NF4": (bnb4_eval, True),
    "ours": (None, False),
    "ours, int8": (ours("int8", "auto"), False),
    "ours, nf4": (ours("nf4", "exact"), False),
    "ours, nf4 fp8": (ours("nf4", "fp8"), False),
}


def rows(shape: Shape = SHAPE, models: tuple[str, ...] = MODELS) -> list[Row]:
    """Measure; a `shape` smaller than SHAPE uses one narrow layer per model, for a test run."""
    results = []
    end = time.monotonic() + IN_ALL
    for name in models:
        config = CONFIGS[name]()
        if shape != SHAPE:
            config = narrow(config, shape)
        results += _of(f"answers_{name}", config, shape, end)
    return results


@torch.no_grad()
def _of(op: str, config: Any, shape: Shape, end: float) -> list[Row]:
    tokens = torch.randint(
        config.vocab_size,
        (max(1, shape.N // ROW), min(ROW, shape.N)),
        generator=torch.Generator().manual_seed(0),
    ).to(device())
    sizes = Shape(tokens.numel(), config.hidden_size, config.vocab_size, shape.K)
    truth: torch.Tensor | None = None
    results = []
    for name, (replace, all_logits) in CONTENDERS.items():
        row = Row.at(sizes, op, name, "forward")
        results.append(row)
        if time.monotonic() > end:
            row.set_reason("not run, out of time")
            continue
        ids, reason = attempt(partial(_measured, row, config, replace, tokens, shape.K, all_logits))
        row.set_reason(reason)
        if ids is not None and name == "transformers":
            truth = ids
        if ids is not None and truth is not None:
            row.grad_error = misplaced(ids, truth)
            if name == "ours" and not row.grad_error <= MOST_MISPLACED:
                raise GateError(f"{op}: {row.grad_error:.1%} of our ids are not transformers'")
        release()
    return results


def _measured(
    row: Row, config: Any, replace: Any, tokens: torch.Tensor, k: int, all_logits: bool
) -> torch.Tensor:
    """Fill the row and return the top ids."""
    model = build(config, replace)
    teacher = Teacher(model)
    answer: Callable[[torch.Tensor], torch.Tensor] = (
        materialized(model, k)
        if all_logits
        else lambda ids: teacher.topk(ids, k=k).ids.flatten(0, 1)
    )
    ids = answer(tokens)
    row.output_mb = held_mb(model)
    row.peak_mb = peak_mb(lambda: answer(tokens))
    take_turns([row], {row.impl: lambda: answer(tokens)}, TURNS)
    return ids


def table(rows: list[Row]) -> str:
    lines = ["model, contender: thousand tokens/s, MB of the model, MB that an answer adds"]
    for row in rows:
        if row.missing or row.ms_median is None:
            lines.append(f"{row.op:22} {row.impl:22} missing: {row.reason}")
            continue
        lines.append(
            f"{row.op:22} {row.impl:22} {row.N / row.ms_median:8.2f} {row.output_mb:9.0f} "
            f"{row.peak_mb:9.0f}"
        )
    return "\n".join(lines)
