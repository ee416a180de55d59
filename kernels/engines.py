"""What a backend provides. Losses are written once, over an Engine (`backends.py` picks which).

    torch    vocabulary-major slabs, library GEMMs, ordinary PyTorch    (torch_*.py; CPU, CUDA)
    triton   token-major slabs, library GEMMs, Triton between them      (triton_*.py; CUDA)

Every function takes tensors of one block or chunk of tokens and the Head behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .head import Scanned

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Engine(NamedTuple):
    """scan            one pass over the head for a block of tokens, optionally kept
    new_keep        memory for one chunk's logits
    chunk_grads     a kept chunk becomes dz, and dX, dW, db get its share
    recompute       dX, dW, db of all tokens from upstream gradients, logits computed again
    gather          logits of the asked ids alone; gather_grads its backward
    topk            the k largest of each row and the log-sum-exp of the rest
    dense_sums      D, Σψ and the label's logit of a chunk kept for both heads
    dense_grads     the same chunk becomes dz, and dX, dW, db get its share
    block_tokens    how many tokens one scan takes
    topk_keeps      whether topk wants memory for a chunk's logits, or makes do with slabs
    """

    scan: Callable[..., Scanned]
    new_keep: Callable[..., Tensor]
    chunk_grads: Callable[..., None]
    recompute: Callable[..., Grads]
    gather: Callable[..., Tensor]
    gather_grads: Callable[..., Grads]
    topk: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dense_sums: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    dense_grads: Callable[..., None]
    block_tokens: int
    topk_keeps: bool
