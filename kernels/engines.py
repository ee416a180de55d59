"""The interface of a backend. Losses are written once, over it (`backends.py` picks which).

    torch    vocabulary-major slabs, library GEMMs, ordinary PyTorch    (torch_*.py; CPU, CUDA)
    triton   token-major slabs, library GEMMs, Triton between them      (gpu_*.py; CUDA)

Every function takes the tensors of one block or chunk of tokens, and the LM head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .head import Scanned
from .token_loss import RowLosses

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Backend(NamedTuple):
    """The functions and sizes that the losses call.

    scan               one pass over the head for a block of tokens; can store its logits
    new_logits_buffer  memory for the logits of one chunk
    merge_answers      (distinct ids, log p, Σ p) of a teacher's answers
    token_loss         loss, statistics and gradients of a named divergence from those of a chunk
    token_scores       scores from the statistics of a block
    chunk_grads        turn the stored logits of a chunk into dz; add its share of dX, dW, db;
                       return the scale that dW and db carry, None if it is 1
    recompute          dX, dW, db of all tokens from upstream gradients; recomputes the logits
    gather             logits of the given ids alone; gather_grads is its backward
    topk               write the k largest of each row and the exact tail, at temperatures
    topk_memory        tokens per call of topk, and what its calls share
    dense_sums         D, Σψ and the label's logit of a chunk stored for both heads
    dense_grads        turn the same chunk into dz, and go on as chunk_grads
    scale_             multiply a gradient by a 0-dim factor in place; 1 costs no pass over it
    block_tokens       tokens per scan
    """

    scan: Callable[..., Scanned]
    new_logits_buffer: Callable[..., Tensor]
    merge_answers: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    token_loss: Callable[..., RowLosses]
    token_scores: Callable[..., Any]  # RowScores of row_scores.py
    chunk_grads: Callable[..., Tensor | None]
    recompute: Callable[..., Grads]
    gather: Callable[..., Tensor]
    gather_grads: Callable[..., Grads]
    topk: Callable[..., None]
    topk_memory: Callable[..., tuple[int, Any]]
    dense_sums: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    dense_grads: Callable[..., Tensor | None]
    scale_: Callable[[Tensor, Tensor], Tensor]
    block_tokens: int
