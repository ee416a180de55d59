"""The Triton backend: which functions make up its Engine."""

from __future__ import annotations

from .engines import Engine
from .triton_dense import dense_grads, dense_sums
from .triton_gather import backward, forward
from .triton_slabs import BLOCK_TOKENS, chunk_grads, new_keep, recompute, scan, topk

TRITON = Engine(
    scan,
    new_keep,
    chunk_grads,
    recompute,
    forward,
    backward,
    topk,
    dense_sums,
    dense_grads,
    block_tokens=BLOCK_TOKENS,
)
