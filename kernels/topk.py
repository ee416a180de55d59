"""linear_topk: the k largest log-probabilities of softmax(logits / T), and exact tails.

The tail is summed over the tokens outside the k: 1 − Σ exp would lose it in fp32 when the k hold
almost all mass. The logits of one chunk of tokens are stored for that (never [N, V]), or each slab
removes its own k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engines import Backend
from .head import LMHead, blocks
from .token_loss import ABSENT, log_tail_of

# Logits of one chunk: enough tokens to hide the reading of W behind the products.
CHUNK_BYTES = 512 << 20


def topk(
    backend: Backend, head: LMHead, hidden_NH: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 [N, k] by falling probability, logprobs [N, k], log_tail [N], −inf if k = V)."""
    N, V = hidden_NH.shape[0], head.vocab_size
    ids = hidden_NH.new_empty(N, k, dtype=torch.int64)
    logprobs = hidden_NH.new_empty(N, k, dtype=head.dtype)
    log_tail = hidden_NH.new_empty(N, dtype=head.dtype)
    step, buffer = backend.block_tokens, None
    if backend.topk_needs_buffer:
        step = max(1, min(CHUNK_BYTES // (V * head.dtype.itemsize), -(-N // 2)))
        buffer = backend.new_logits_buffer(head, min(step, N))
    for at in blocks(N, step):
        z, ids[at], lse_rest = backend.topk(head, hidden_NH[at], k, buffer)
        lse = torch.logaddexp(lse_rest, torch.logsumexp(z, -1))
        logprobs[at] = z - lse.unsqueeze(-1)
        log_rest = log_tail_of(logprobs[at], lse_rest - lse)
        log_tail[at] = torch.where(lse_rest < ABSENT, -torch.inf, log_rest)
    return ids, logprobs, log_tail
