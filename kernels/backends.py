"""Which functions make up the Engine behind an `impl`: the one place that knows both backends."""

from __future__ import annotations

import functools

from . import torch_dense, torch_gather, torch_grads, torch_slabs
from .engines import Engine

CPU_BLOCK_TOKENS = 1024


@functools.cache
def engine(impl: str) -> Engine:
    """The backend called `impl`. Triton is imported when it is first asked for."""
    if impl == "triton":
        from . import triton_dense, triton_gather, triton_slabs

        return Engine(
            triton_slabs.scan,
            triton_slabs.new_keep,
            triton_slabs.chunk_grads,
            triton_slabs.recompute,
            triton_gather.forward,
            triton_gather.backward,
            triton_slabs.topk,
            triton_dense.dense_sums,
            triton_dense.dense_grads,
            triton_slabs.BLOCK_TOKENS,
            topk_keeps=True,
        )
    return Engine(
        torch_slabs.scan,
        torch_slabs.new_keep,
        torch_grads.chunk_grads,
        torch_grads.recompute,
        torch_gather.forward,
        torch_gather.backward,
        torch_slabs.topk,
        torch_dense.dense_sums,
        torch_dense.dense_grads,
        CPU_BLOCK_TOKENS,
        topk_keeps=False,
    )
