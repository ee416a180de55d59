"""The exact top k of a chunk from the maxima of groups of columns: no sort of [n, V], one sweep.

Take the K groups with the largest maxima. Their maxima are K logits, each at least the smallest of
them; a logit outside these groups is at most that smallest maximum. So K logits inside are at least
as large as any outside, and the top K of the 64 · K members is a top K of the row. Where logits tie
it may be another one than torch.topk's; the same input gives the same ids.

bias and logit_scale are applied to members and maxima alike, with the same rounding; softcap and
temperature do not change the order. A second kernel removes the k winners and sums all others: the
other groups and the other members. All terms are positive, so even a small sum is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gpu_launch import SLOT_TILE, cdiv, launch, next_power_of_2, scalars
from .gpu_slabs import all_products, logits_view
from .head import SHARE_OF_GPU, LMHead, gpu_memory
from .topk import TopRows

GROUP = 64
# 16 fp32 per thread.
GROUP_TILE = {"columns": 4096, "num_warps": 8}
FINISH_TILE = {"BV": 1024, "num_warps": 8}
CHUNK_BYTES = 512 << 20


class Memory(NamedTuple):
    """What the chunks of a call share: memory for logits, 1 / T [T], the padded bias or None."""

    logits: Tensor
    inv_T: Tensor
    bias: Tensor | None


def topk_memory(
    head: LMHead, tokens: int, k: int, temperatures: Sequence[float]
) -> tuple[int, Memory]:
    """Return (tokens per chunk, memory); a chunk fits in CHUNK_BYTES and SHARE_OF_GPU.

    There are at least two chunks, so that there is no [N, V]. Large ones have whole tiles of 128
    tokens for the library GEMM.
    """
    V, new = head.vocab_size, head.weight.new_full
    groups = cdiv(V, GROUP)
    copies = 1 if head.bias is None else 2
    members = copies * k if takes_groups(V, k) else 0
    per_row = (groups + members) * GROUP + (len(temperatures) + 3) * groups + 12 * k
    most = int(min(CHUNK_BYTES, SHARE_OF_GPU * gpu_memory(head.weight)))
    step = max(1, most // (per_row * head.dtype.itemsize))
    step = min(step if step < 128 else step // 128 * 128, max(1, -(-tokens // 2)))
    inv_T = [new((1,), 1.0 / T, dtype=head.dtype) for T in temperatures]
    bias = None
    if head.bias is not None:
        bias = torch.nn.functional.pad(head.bias[:V].to(head.dtype), (0, groups * GROUP - V))
    logits = head.weight.new_empty(step, groups * GROUP, dtype=head.dtype)
    return step, Memory(logits, inv_T[0] if len(inv_T) == 1 else torch.cat(inv_T), bias)


def takes_groups(vocab: int, k: int) -> bool:
    """Whether the members of k groups are less than half of the vocabulary; else all are taken."""
    return 2 * k * GROUP < vocab


def topk(
    head: LMHead,
    hidden_nH: Tensor,
    temperatures: Sequence[float],
    memory: Memory,
    out: Sequence[TopRows],
) -> None:
    """Write the answers at each temperature to `out`; the ids are the same for all."""
    (n, k), V = out[0].ids.shape, head.vocab_size
    n_groups = cdiv(V, GROUP)
    bias, members, groups, lse = memory.bias, memory.logits[:n], None, None
    all_products(head, hidden_nH, logits_view(head, memory.logits, n))
    if n_groups * GROUP > V:  # before logit_scale: never the maximum
        members[:, V:] = math.copysign(math.inf, -head.logit_scale)
    if takes_groups(V, k):
        key = members.new_empty(n, n_groups)
        lse = members.new_empty(len(temperatures), n, n_groups)
        _reduce(members, head, memory, key, lse)
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
    of_head = scalars(head)
    for i, answer in enumerate(out):
        launch(
            "triton_topk:finish_topk",
            (n,),
            members,
            p_members=members,
            p_best=best.indices,
            p_values=best.values,
            p_groups=groups,
            p_lse=None if lse is None else lse[i],
            p_ids=answer.ids,
            p_logprobs=answer.logprobs,
            p_log_tail=answer.log_tail,
            ld_members=members.stride(0),
            n_members=members.shape[1],
            K=k,
            n_groups=n_groups,
            inv_T=1.0 / temperatures[i],
            cap=of_head["cap"],
            CAP=of_head["CAP"],
            GROUP=GROUP,
            SB=min(SLOT_TILE, next_power_of_2(k)),
            **FINISH_TILE,
        )


def _reduce(raw_nv: Tensor, head: LMHead, memory: Memory, key: Tensor, lse: Tensor) -> None:
    """Write the maximum of each group [n, groups] and its log-sum-exp [T, n, groups]."""
    n_T, n, n_groups = lse.shape
    BG = max(1, min(GROUP_TILE["columns"] // GROUP, next_power_of_2(n_groups) // 2))
    of_head = scalars(head)
    launch(
        "triton_topk:reduce_groups",
        (n, cdiv(n_groups, BG)),
        raw_nv,
        p_raw=raw_nv,
        p_bias=memory.bias,
        p_inv_T=memory.inv_T,
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
