"""Whether a server's numbers are what they are taken for: measured, not believed.

Temperature     log p_T(a) − log p_T(b) = (log p₁(a) − log p₁(b)) / T for all ids a, b of a place.
Normalization   1 = Σ p ≤ p of the listed ids + (V − k) · p of the last of them, whatever V is.
"""

from __future__ import annotations

import torch

from ..outputs import TopK

VOCABULARY = 1 << 20  # no tokenizer has more tokens
LOGITS = "These look like logits: start vLLM without --logprobs-mode raw_logits or processed_logits"
_ALLOWED = 0.05  # of the distance between the two rules: weights in 16 bits round differently
_ROUNDING = 1e-3  # of a sum of probabilities


def is_tempered(plain: TopK, tempered: TopK, temperature: float) -> bool:  # [N, K] each, N, K > 1
    """Whether `tempered` is `plain` at that temperature; False where nothing shows it."""
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
    """Whether some position's numbers are too large for log-probabilities, or too small."""
    logprobs = answer.logprobs.double()
    listed = logprobs.exp().sum(-1)
    others = (VOCABULARY - logprobs.shape[-1]) * logprobs.amin(-1).exp()
    return bool(((listed > 1 + _ROUNDING) | (listed + others < 1 - _ROUNDING)).any())
