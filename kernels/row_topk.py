"""fastdistill::row_topk: the k largest logits of a row and the log-sum-exp of the others.

    values, ids   the k largest of z [n, V], by falling value
    lse_rest      log Σ e^z over all others; −inf if there are none

It is an operator, so that a device can have its own kernel: fastdistill/losses/cpu_kernels.py
registers that of the C++ extension for CPUs. The implementation below runs on all other devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import blocks
from .namespace import NAMESPACE
from .token_loss import ABSENT, NEG

_AT_ONCE = 8 << 20  # bytes of exponentials that logsumexp stores

library = torch.library.Library(NAMESPACE, "FRAGMENT")
library.define("row_topk(Tensor(a!) z, int k) -> (Tensor values, Tensor ids, Tensor lse_rest)")


def row_topk(z_nV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [n, k], ids int64 [n, k], lse_rest [n]) in z's type; z may be overwritten."""
    values, ids, lse_rest = getattr(torch.ops, NAMESPACE).row_topk(z_nV, k)
    return values, ids, lse_rest


def by_sorting(z_nV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch.topk, then a log-sum-exp without the k: 1 − Σ would lose a small rest."""
    best = z_nV.topk(k, dim=-1)
    z_nV.scatter_(-1, best.indices, NEG)
    rest = z_nV.new_empty(z_nV.shape[0])
    rows = max(1, _AT_ONCE // (z_nV.shape[1] * z_nV.element_size()))
    for at in blocks(z_nV.shape[0], rows):
        rest[at] = z_nV[at].logsumexp(-1)
    return best.values, best.indices, torch.where(rest < ABSENT, -torch.inf, rest)


library.impl("row_topk", by_sorting, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::row_topk", lib=library)  # type: ignore[untyped-decorator]
def _(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values = z.new_empty(z.shape[0], k)
    return values, torch.empty_like(values, dtype=torch.int64), z.new_empty(z.shape[0])
