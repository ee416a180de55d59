"""Whether a server honours the temperature: asked, not believed.

log p_T(a) − log p_T(b) = (log p₁(a) − log p₁(b)) / T for all ids a, b at a position.
"""

from __future__ import annotations

import torch

from ..outputs import TopK

_ALLOWED = 0.05  # of the distance between the two rules: weights in 16 bits round differently


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
