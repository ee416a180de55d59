"""linear_topk: the k largest log-probabilities of softmax(logits / T), and exact tails.

The tail is summed over the tokens outside the k: 1 − Σ exp would lose it in fp32 when the k hold
almost all mass. Several temperatures share the product with the head. The logits of one chunk of
tokens or of one slab are stored, never [N, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Backend
from .head import LMHead, blocks


class TopRows(NamedTuple):
    """ids int64 [N, k] by falling probability, logprobs [N, k], log_tail [N], −inf if k = V."""

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor


def topk(
    backend: Backend, head: LMHead, hidden_NH: Tensor, k: int, temperatures: Sequence[float]
) -> list[TopRows]:
    """The answers at each temperature; the head's own does not count."""
    N = hidden_NH.shape[0]
    answers = [
        TopRows(
            hidden_NH.new_empty(N, k, dtype=torch.int64),
            hidden_NH.new_empty(N, k, dtype=head.dtype),
            hidden_NH.new_empty(N, dtype=head.dtype),
        )
        for _ in temperatures
    ]
    step, memory = backend.topk_memory(head, N, k, temperatures)
    for at in blocks(N, step):
        parts = [TopRows(*(t[at] for t in answer)) for answer in answers]
        backend.topk(head, hidden_NH[at], temperatures, memory, parts)
    return answers
