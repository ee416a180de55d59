"""Attention on a CPU: transformers' sdpa next to eager, with gradients and without.

Four layers of SmolLM2-135M's sizes with random weights and no head, on N tokens in rows of K.
The last quarter of each row but the first is padding. bfloat16 is autocast, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from .data import device
from .rows import Row
from .rows import table as table
from .run import take_turns
from .shapes import Shape

SHAPE = Shape(N=512, H=576, V=512, K=512)
LENGTHS = (32, 128, 256, 512)
LAYERS = 4
TURNS = 5


def _model(attention: str, layers: int) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=SHAPE.H,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=SHAPE.V,
        attn_implementation=attention,
    )
    return LlamaModel(config).to(device())


def _work(model: LlamaModel, ids: Tensor, mask: Tensor, *, bf16: bool, train: bool) -> None:
    with (
        torch.set_grad_enabled(train),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16),
    ):
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    if train:
        hidden.float().square().mean().backward()
        model.zero_grad()


def rows(shape: Shape = SHAPE) -> list[Row]:
    """Measure; a `shape` other than SHAPE uses one layer and one length, for a test run."""
    whole = shape == SHAPE
    models = {name: _model(name, LAYERS if whole else 1) for name in ("sdpa", "eager")}
    results: list[Row] = []
    for length in LENGTHS if whole else LENGTHS[:1]:
        ids = torch.randint(SHAPE.V, (shape.N // length, length), device=device())
        mask = torch.ones_like(ids)
        mask[1:, length * 3 // 4 :] = 0
        for dtype in ("float32", "bfloat16"):
            for mode in ("forward", "both"):
                case = replace(SHAPE, N=ids.numel(), K=length)
                pair = [Row.at(case, f"attention_{mode}", name, mode, dtype) for name in models]
                works: dict[str, Callable[[], object]] = {
                    name: partial(
                        _work, model, ids, mask, bf16=dtype == "bfloat16", train=mode == "both"
                    )
                    for name, model in models.items()
                }
                for work in works.values():
                    work()
                take_turns(pair, works, TURNS if whole else 1)
                results += pair
    return results
