"""Checks that a server's numbers are log-probabilities at the requested temperature.

Temperature     log p_T(a) − log p_T(b) = (log p₁(a) − log p₁(b)) / T for all ids a, b.
Normalization   1 = Σ p ≤ Σ p of the listed ids + (V − k) · p of the last of them, for any V.
"""

from __future__ import annotations

import torch

from ...losses.types import TopK

VOCABULARY = 1 << 20  # upper bound of vocabulary sizes
LOGITS = "These look like logits: start vLLM without --logprobs-mode raw_logits or processed_logits"
_ALLOWED = 0.05  # share of the difference between both temperatures, for rounding in 16 bits
_ROUNDING = 1e-3  # of a sum of probabilities


def is_tempered(plain: TopK, tempered: TopK, temperature: float) -> bool:  # [N, K] each, N, K > 1
    """Whether `tempered` is `plain` at that temperature; False if that cannot be decided."""
    miss = gap = 0.0
    for at in range(len(plain.ids)):
        first = dict(zip(plain.ids[at].tolist(), plain.logprobs[at].tolist(), strict=True))
        second = dict(zip(tempered.ids[at].tolist(), tempered.logprobs[at].tolist(), strict=True))
        both = [i for i in first if i in second and min(first[i], second[i]) > -1e3]
        if len(both) < 2:
            continue
        before = torch.tensor([first[i] for i in both], dtype=torch.float64).diff()
        after = torch.tensor([second[i] for i in both], dtype=torch.float64).diff()
        miss += (after - before / temperature).abs().sum().item()
        gap += (before - before / temperature).abs().sum().item()
    return gap > 0 and miss <= _ALLOWED * gap


def are_logits(answer: TopK) -> bool:  # [N, K], the K likeliest
    """Whether some position's numbers are too large or too small for log-probabilities."""
    logprobs = answer.logprobs.double()
    listed = logprobs.exp().sum(-1)
    others = (VOCABULARY - logprobs.shape[-1]) * logprobs.amin(-1).exp()
    return bool(((listed > 1 + _ROUNDING) | (listed + others < 1 - _ROUNDING)).any())
