"""linear_topk in PyTorch: the k largest log-probabilities of softmax(logits / T), and exact tails.

A chunk of tokens keeps its logits ([V, n], never [N, V]), so that the tail is summed over what is
left after the k are taken out: 1 − Σ exp would lose it in fp32 when the k hold almost everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import ABSENT, NEG
from .torch_slabs import Head, Matmul, RunningLSE, blocks, logits, slabs

CHUNK_BYTES = 64 << 20


def topk(head: Head, hidden_NH: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 [N, k] by falling probability, logprobs [N, k], log_tail [N], −inf if k = V)."""
    N, V = hidden_NH.shape[0], head.vocab
    ids = hidden_NH.new_empty(N, k, dtype=torch.int64)
    logprobs = hidden_NH.new_empty(N, k, dtype=head.dtype)
    log_tail = hidden_NH.new_empty(N, dtype=head.dtype)
    step = max(1, min(CHUNK_BYTES // (V * head.dtype.itemsize), -(-N // 2)))
    for at in blocks(N, step):
        n = at.stop - at.start
        matmul = Matmul(head, hidden_NH[at])
        z_Vn = hidden_NH.new_empty(V, n, dtype=head.dtype)
        for rows in slabs(V, n, head.dtype.itemsize):
            logits(head, matmul, rows, z_Vn[rows]).div_(head.temperature)
        best = z_Vn.t().contiguous().topk(k, dim=-1)
        z_Vn.scatter_(0, best.indices.t(), NEG)
        rest = RunningLSE(n, z_Vn, 1.0, 0)
        for rows in slabs(V, n, head.dtype.itemsize):
            rest.add(z_Vn[rows])
        lse_rest = rest.lse()
        lse = torch.logaddexp(lse_rest, torch.logsumexp(best.values, -1))
        ids[at], logprobs[at] = best.indices, best.values - lse.unsqueeze(-1)
        log_tail[at] = torch.where(lse_rest < ABSENT, -torch.inf, lse_rest - lse)
    return ids, logprobs, log_tail
