"""Sampling with one random stream per row, independent of the other rows of a batch.

    u_t uniform in [0, 1)        token_t = the first with Σ_{v ≤ token} softmax(z / T)_v > u_t

With one generator per batch, the text of a prompt would change with the other prompts of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...runtime.checks import integer


class SeededSampling:
    """A logits processor that samples one token per row and masks all others.

    Greedy decoding then selects the sampled token.

    Args:
        begin: length of the prompts, padding included.
        steps: maximum number of new tokens.
        seed: 0 or more.
        streams: one per row. The seed and the stream determine the numbers of a row.
    """

    def __init__(
        self, begin: int, steps: int, *, temperature: float, seed: int, streams: Sequence[int]
    ) -> None:
        integer("seed", seed, 0)
        integer("streams", min(streams), 0)
        self.begin, self.temperature = begin, temperature
        rows = [np.random.default_rng([seed, stream]).random(steps) for stream in streams]
        self.uniform = torch.from_numpy(np.stack(rows)).float()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, t], [B, V] -> [B, V]
        mass = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
        drawn = self.uniform[:, input_ids.shape[1] - self.begin, None].to(mass)
        token = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)
        # Rounding may raise the product to the whole mass, beyond the last token.
        token.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
