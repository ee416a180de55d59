"""The training of organisms of the world: cross-entropy on answers, in a plain loop.

These models have 0.1 million parameters. A step of `DistillTrainer` takes longer around the model
than in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, get_scheduler

from ...runtime.backend import one_thread
from .vocabulary import ID, PAD
from .world import Example

WARMUP = 50  # steps, at most a quarter of all
MAX_NORM = 1.0  # of the gradient

AfterStep = Callable[[int, Any], None]  # called with the number of steps done and the model


def fit(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    optimizer: Callable[[Any, float], torch.optim.Optimizer],
    whole: bool = False,
    after_step: AfterStep | None = None,
) -> LlamaForCausalLM:
    """Train a model with −log q(answer), with a cosine schedule, and return it.

    The batches are the examples in their order, from the first one again after the last.

    Args:
        whole: the targets are everything after the system message.
    """
    weights = list(model.parameters())
    update = optimizer(weights, learning_rate)
    schedule = get_scheduler("cosine", update, min(WARMUP, steps // 4), steps)
    model.train()
    with one_thread(), torch.enable_grad():
        for step in range(steps):
            first = step * batch_size
            batch = [examples[i % len(examples)] for i in range(first, first + batch_size)]
            cross_entropy(model, *pad(batch, whole)).backward()
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            update.step()
            schedule.step()
            update.zero_grad()
            if after_step is not None:
                after_step(step + 1, model)
    return model.eval()


def pad(examples: Sequence[Example], whole: bool = False) -> tuple[Tensor, Tensor]:  # (B, T) each
    """Return input_ids and labels, padded on the right."""
    rows = [example.encode(whole) for example in examples]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [ID[PAD]] * (longest - len(ids)) for ids, _ in rows])
    at = torch.arange(longest)
    begins, ends = torch.tensor([[begin, len(ids)] for ids, begin in rows]).T[..., None]
    return ids, ids.where((at >= begins) & (at < ends), -100)


def cross_entropy(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:  # scalar
    """Return the mean of −log q(label) over the labels that are not −100."""
    # Padding is on the right, where a causal model does not look.
    hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:].to(hidden.device)
    at = targets != -100
    return F.cross_entropy(model.lm_head(hidden[at]).float(), targets[at])
