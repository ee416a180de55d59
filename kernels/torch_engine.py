"""The PyTorch backend: which functions make up its Engine."""

from __future__ import annotations

from .engines import Engine
from .torch_dense import dense_grads, dense_sums
from .torch_gather import backward, forward
from .torch_grads import chunk_grads, recompute
from .torch_slabs import new_keep, scan, topk

TORCH = Engine(
    scan,
    new_keep,
    chunk_grads,
    recompute,
    forward,
    backward,
    topk,
    dense_sums,
    dense_grads,
    block_tokens=1024,
)
