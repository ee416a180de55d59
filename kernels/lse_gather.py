"""linear_lse_gather: z_ids [N, S] and lse_rest [N] from hidden states, in blocks of tokens.

    z_ids[n, s] = z[n, ids_ns]          lse_rest[n] = log Σ_{v ∉ ids_n} e^{z[n, v]}

2NVH FLOPs over one reused slab; no [N, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engines import Backend
from .head import LMHead, Stats, blocks


def lse_gather(
    backend: Backend, head: LMHead, hidden_NH: Tensor, ids_NS: Tensor, *, moment: bool, base: bool
) -> Stats:
    """Return the statistics of all tokens."""
    parts = [
        backend.scan(head, hidden_NH[at], ids_NS[at], moments=int(moment), base=base).stats()
        for at in blocks(max(1, hidden_NH.shape[0]), backend.block_tokens)
    ]
    if len(parts) == 1:
        return parts[0]

    def join(pieces: list[Tensor | None]) -> Tensor | None:
        return None if pieces[0] is None else torch.cat([p for p in pieces if p is not None])

    z_ids, lse_rest, mean_rest, lse_base = (join([part[i] for part in parts]) for i in range(4))
    assert z_ids is not None
    assert lse_rest is not None
    return Stats(z_ids, lse_rest, mean_rest, lse_base)
