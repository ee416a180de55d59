"""Sampled targets: k draws from the teacher's full distribution, not its k likeliest tokens.

    p̂(v) = (number of draws that gave v) / k        E[p̂] = p

so the gradient q − p̂ of the forward KL is unbiased (Sparse Logit Sampling, arXiv 2503.16870).
log p̂ does not estimate log p: other divergences would be biased.

n tokens of this block · H hidden · V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.head import LMHead, blocks
from ...kernels.torch_slabs import Matmul, slabs
from ...losses.types import TopK

_TOKENS = 256  # whose logits are in memory at a time
_FP64_TOKENS = 16


@torch.no_grad()
def draw(
    hidden: Tensor,  # (N, H)
    head: LMHead,
    k: int,
    temperature: float,
    generator: torch.Generator,
) -> TopK:  # [N, k]
    """Draw k tokens per position and merge equal ones: logprobs are ln(count / k), no tail mass.

    The generator is on the CPU, so that a seed gives the same draws on every device.
    """
    answer = TopK.empty((len(hidden), k), temperature, device=hidden.device)
    for at in blocks(len(hidden), _TOKENS):
        u_Vn = _logits(hidden[at], head)
        for some in blocks(u_Vn.shape[1], _FP64_TOKENS):
            # fp64: rounding in a sum over 150,000 tokens would move draws from one to the next.
            cumulative = (u_Vn[:, some].t().double() / temperature).softmax(-1).cumsum(-1)
            u = torch.rand(len(cumulative), k, generator=generator, dtype=torch.float64).to(
                cumulative.device
            )
            drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
            drawn = drawn.clamp(max=cumulative.shape[-1] - 1).sort(-1).values
            first = at.start + some.start
            rows = torch.arange(first, first + len(drawn), device=hidden.device)
            answer.put(rows, _merged(drawn, k))
    return answer._replace(log_tail=torch.full_like(answer.logprobs[:, 0], -torch.inf))


def _logits(hidden_nH: Tensor, head: LMHead) -> Tensor:
    """Return logits [V, n] in fp32."""
    matmul, n = Matmul(head, hidden_nH), len(hidden_nH)
    u_Vn = hidden_nH.new_empty(head.vocab_size, n, dtype=head.dtype)
    for at in slabs(head, n):
        matmul.logits(at, u_Vn[at])
    return u_Vn


def _merged(drawn_nk: Tensor, k: int) -> TopK:
    """Merge sorted draws: each id once, with the logarithm of its share."""
    new = torch.ones_like(drawn_nk, dtype=torch.bool)
    new[:, 1:] = drawn_nk[:, 1:] != drawn_nk[:, :-1]
    slot = new.cumsum(-1) - 1
    ones = torch.ones(drawn_nk.shape, dtype=torch.float32, device=drawn_nk.device)
    counts = torch.zeros_like(ones).scatter_add_(-1, slot, ones)
    ids = torch.full_like(drawn_nk, -1).scatter_(-1, slot, drawn_nk)
    return TopK(ids, (counts / k).log(), ones.new_zeros(len(ones)))
