"""Sampled tokens that depend on a row's own stream of numbers, not on its neighbours in a batch.

    u_t uniform in [0, 1)        token_t = the first with Σ_{v ≤ token} softmax(z / T)_v > u_t

One generator for a whole batch would give a prompt other words whenever its neighbours change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class SeededSampling:
    """A logits processor that leaves one token per row: greedy decoding then takes it.

    Args:
        begin: tokens of the prompts, padding included.
        steps: new tokens at the most.
        seed: 0 or more. streams: one per row; a row's numbers follow from the seed and its stream.
    """

    def __init__(
        self, begin: int, steps: int, *, temperature: float, seed: int, streams: Sequence[int]
    ) -> None:
        if seed < 0 or min(streams) < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}, with streams {min(streams)} …")
        self.begin, self.temperature = begin, temperature
        rows = [np.random.default_rng([seed, stream]).random(steps) for stream in streams]
        self.uniform = torch.from_numpy(np.stack(rows)).float()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, t], [B, V] -> [B, V]
        mass = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
        drawn = self.uniform[:, input_ids.shape[1] - self.begin, None].to(mass)
        token = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)
        # Rounding may lift the product to the whole mass, behind the last token.
        token.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
