"""Histograms of token scores in fixed bins, which can be summed over batches and processes.

bin 0: below 2⁻¹³ nats · half octaves 2^(i/2), i = −26 … 10 · last bin: from 2⁵ nats
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .targets import Targets

SCORES = ("nll", "forward_kl", "entropy", "margin")
EDGES = tuple(2.0 ** (i / 2) for i in range(-26, 11))
BINS = len(EDGES) + 1


@torch.no_grad()
def histograms(scores: Mapping[str, Tensor | None], targets: Targets) -> Tensor:
    """Return counts per sequence [B, len(SCORES) · BINS] in fp32; zero for scores that are None."""
    B = targets.shape[0]
    counts = torch.zeros(B * len(SCORES) * BINS, dtype=torch.float32, device=targets.rows.device)
    edges = torch.tensor(EDGES, dtype=torch.float32, device=targets.rows.device)
    for i, name in enumerate(SCORES):
        score = scores[name]
        if score is not None:
            bins = torch.bucketize(score.float(), edges, right=True)
            at = (targets.rows * len(SCORES) + i) * BINS + bins
            # Sums of ones are exact, so the result is deterministic on GPUs too.
            counts.index_add_(0, at, torch.ones_like(at, dtype=counts.dtype))
    return counts.view(B, -1)


def sum_histograms(rows: Any) -> dict[str, list[int]]:
    """Return {score: counts over all sequences}, from the rows of `histograms` or lists of them.

    Leaves out scores without tokens.
    """
    rows = np.concatenate(rows) if isinstance(rows, (list, tuple)) else np.asarray(rows)
    totals = rows.reshape(-1, len(SCORES), BINS).sum(0, dtype=np.float64)
    return {
        name: [int(count) for count in total]
        for name, total in zip(SCORES, totals, strict=True)
        if total.any()
    }
