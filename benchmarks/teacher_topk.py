"""Whole answers of a teacher from token ids: K ids, logprobs and the tail.

A causal language model of Qwen3-0.6B's shape with random weights (time and memory do not depend on
them), 4 rows of 256 tokens. The first two materialize the logits, as usual with transformers; ours
stream the head. Contenders take turns. Memory is that of one answer, `output_mb` that of the model.
The error is the share of ids that differ from transformers in bf16; ours in full precision is
rejected above what bf16 logits explain.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

import fastdistill as fd
from fastdistill.kernels.row_topk import row_topk
from fastdistill.quant.model import targets

from . import quant_peers
from .data import device
from .memory import held_mb, peak_mb
from .registry import GateError, attempt, misplaced
from .rows import Row
from .rows import table as table
from .run import take_turns
from .shapes import Shape

SHAPE = Shape(N=1024, H=1024, V=151936, K=64)
ROW = 256
TURNS = 3
MOST_MISPLACED = 0.1  # of ours in full precision: bf16 swaps neighbors in a flat tail
CONFIG = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def materialized(model: nn.Module, k: int = SHAPE.K) -> Callable[[torch.Tensor], Any]:
    """Top K of the log_softmax of all logits, and the tail."""

    def answer(ids: torch.Tensor) -> Any:
        z = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        return row_topk(z.log_softmax(-1), k)[1]

    return answer


def _bitsandbytes(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    for name, linear in list(targets(model)):
        model.set_submodule(name, quant_peers.bnb4_eval(linear.get_parameter("weight").detach()))
    return materialized(model)


def _ours(quant: str | None, compute: str) -> Callable[[nn.Module], Callable[[torch.Tensor], Any]]:
    def make(model: nn.Module) -> Callable[[torch.Tensor], Any]:
        teacher = fd.load_teacher(model, quant=quant, compute=compute)
        return lambda ids: teacher.topk(ids, k=SHAPE.K).ids.flatten(0, 1)

    return make


def _warm_peak_mb(work: Callable[[], Any]) -> float:
    work()
    return peak_mb(work)


CONTENDERS: dict[str, Callable[[Any], Callable[[torch.Tensor], Any]]] = {
    "transformers": materialized,
    "transformers, bnb NF4": _bitsandbytes,
    "ours": _ours(None, "auto"),
    "ours, nf4 exact": _ours("nf4", "exact"),
    "ours, nf4 int8": _ours("nf4", "int8"),
    "ours, int8 int8": _ours("int8", "int8"),
}


@torch.no_grad()
def rows(shape: Shape = SHAPE) -> list[Row]:
    """Measure; a `shape` smaller than SHAPE uses two layers and two rows, for a test run."""
    config = copy.deepcopy(CONFIG)
    if shape != SHAPE:
        config.num_hidden_layers = 2
    torch.manual_seed(0)
    full = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    full = full.to(device()).eval()
    ids = torch.randint(config.vocab_size, (shape.N // ROW or 2, ROW), device=device())
    sizes = Shape(ids.numel(), config.hidden_size, config.vocab_size, SHAPE.K)
    results: list[Row] = []
    works: dict[str, Callable[[], Any]] = {}
    top_ids: dict[str, torch.Tensor] = {}
    for name, make in CONTENDERS.items():
        row = Row.at(sizes, "teacher_topk", name, "forward")
        results.append(row)
        model = copy.deepcopy(full)
        answer, reason = attempt(partial(make, model))
        if reason is None:
            row.output_mb = held_mb(model)
            row.peak_mb, reason = attempt(partial(_warm_peak_mb, partial(answer, ids)))
        row.set_reason(reason)
        if not row.missing:
            works[name] = partial(answer, ids)
            top_ids[name] = answer(ids)
            row.grad_error = misplaced(top_ids[name], top_ids["transformers"])
        if name == "ours" and not (row.grad_error or 0.0) <= MOST_MISPLACED:
            raise GateError(f"teacher_topk: {row.grad_error:.1%} of our ids are not transformers'")
        gc.collect()
    take_turns(results, works, TURNS if shape == SHAPE else 1)
    return results
