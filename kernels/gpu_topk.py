"""The exact top k of a chunk from the maxima of groups of columns: no sort of [n, V], one sweep.

Take the K groups with the largest maxima. Their maxima are K logits, each at least the smallest of
them; a logit outside these groups is at most that smallest maximum. So K logits inside are at least
as large as any outside, and the top K of the 64 · K members is a top K of the row. Where logits tie
it may be another one than torch.topk's; the same input gives the same ids.

bias and logit_scale are applied to members and maxima alike, with the same rounding; softcap and
temperature do not change the order. The log-sum-exp of all others is that of the groups left out
and of the members that lost: a sum of positive terms, exact however little remains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .gpu_launch import cdiv, launch, next_power_of_2, scalars
from .gpu_slabs import all_products, logits_view
from .head import LMHead

GROUP = 64
# 16 fp32 per thread.
GROUP_TILE = {"columns": 4096, "num_warps": 8}
CHUNK_BYTES = 512 << 20


def topk_memory(head: LMHead, tokens: int, k: int, temperatures: int) -> tuple[int, Tensor]:
    """(tokens per chunk, memory for their logits); all that a chunk needs fits in CHUNK_BYTES.

    There are at least two chunks, so that there is no [N, V]. Large ones have whole tiles of 128
    tokens for the library GEMM.
    """
    groups = cdiv(head.vocab_size, GROUP)
    copies = 1 if head.bias is None else 2
    members = copies * k if takes_groups(head.vocab_size, k) else 0
    per_row = (groups + members) * GROUP + (temperatures + 3) * groups + 12 * k
    step = max(1, CHUNK_BYTES // (per_row * head.dtype.itemsize))
    step = min(step if step < 128 else step // 128 * 128, max(1, -(-tokens // 2)))
    return step, head.weight.new_empty(step, groups * GROUP, dtype=head.dtype)


def takes_groups(vocab: int, k: int) -> bool:
    """Whether the members of k groups are less than half of the vocabulary; else all are taken."""
    return 2 * k * GROUP < vocab


def topk(
    head: LMHead, hidden_nH: Tensor, k: int, temperatures: Sequence[float], buffer: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per temperature (z [n, k] by falling value, ids int64 [n, k], lse_rest [n]).

    The ids are the same for all. Overwrites the buffer.
    """
    n, V = hidden_nH.shape[0], head.vocab_size
    n_groups = cdiv(V, GROUP)
    padding = n_groups * GROUP - V
    members, groups, lse = buffer[:n], None, None
    all_products(head, hidden_nH, logits_view(head, buffer, n))
    inv_T = torch.cat([buffer.new_full((1,), 1.0 / T) for T in temperatures])
    bias = None
    if head.bias is not None:
        bias = torch.nn.functional.pad(head.bias[:V].to(head.dtype), (0, padding))
    if padding:  # before logit_scale: what none exceeds
        members[:, V:] = math.copysign(math.inf, -head.logit_scale)
    if takes_groups(V, k):
        key = buffer.new_empty(n, n_groups)
        lse = _reduce(members, bias, head, inv_T, key)
        groups = key.topk(k, -1).indices
        del key
        members = members.unflatten(1, (n_groups, GROUP))
        members = members.gather(1, groups.unsqueeze(-1).expand(-1, -1, GROUP))
        if bias is not None:
            members += bias.view(n_groups, GROUP)[groups]
        members = members.flatten(1)
    elif bias is not None:
        members += bias
    if head.logit_scale != 1.0:
        members *= head.logit_scale
    best = members.topk(k, -1)
    members.scatter_(-1, best.indices, -torch.inf)
    lost = _reduce(members, None, head._replace(logit_scale=1.0), inv_T, None)
    del members
    ids = best.indices
    if groups is not None and lse is not None:
        lse.scatter_(-1, groups.expand_as(lost), lost)
        ids = (ids % GROUP).add_(groups.gather(-1, ids // GROUP), alpha=GROUP)
        lost = lse
    u = best.values
    if head.softcap is not None:
        u = head.softcap * torch.tanh(u / head.softcap)
    top = lost.amax(-1, keepdim=True)
    rest = lost.sub_(top).exp_().sum(-1).log_().add_(top[..., 0])
    return [(u / T, ids, rest[i]) for i, T in enumerate(temperatures)]


def _reduce(
    raw_nv: Tensor, bias: Tensor | None, head: LMHead, inv_T: Tensor, key: Tensor | None
) -> Tensor:
    """The log-sum-exp of each group [T, n, groups]; writes key [n, groups] if given."""
    n, n_groups, n_T = raw_nv.shape[0], raw_nv.shape[1] // GROUP, inv_T.shape[0]
    lse = raw_nv.new_empty(n_T, n, n_groups)
    BG = max(1, min(GROUP_TILE["columns"] // GROUP, next_power_of_2(n_groups) // 2))
    of_head = scalars(head)
    launch(
        "triton_topk:reduce_groups",
        (n, cdiv(n_groups, BG)),
        raw_nv,
        p_raw=raw_nv,
        p_bias=bias,
        p_inv_T=inv_T,
        p_key=key,
        p_lse=lse,
        ld_raw=raw_nv.stride(0),
        n=n,
        n_groups=n_groups,
        n_T=n_T,
        scale=of_head["scale"],
        cap=of_head["cap"],
        CAP=of_head["CAP"],
        GROUP=GROUP,
        BG=BG,
        num_warps=GROUP_TILE["num_warps"],
    )
    return lse
