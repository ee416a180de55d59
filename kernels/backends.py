"""`get_backend`: the functions behind each `impl`. Only this file knows both backends."""

from __future__ import annotations

import functools

from . import torch_dense, torch_gather, torch_grads, torch_slabs
from .engines import TRITON_BLOCK_TOKENS, Backend

CPU_BLOCK_TOKENS = 1024


@functools.cache
def get_backend(impl: str) -> Backend:
    """Return the backend called `impl`; Triton is imported on the first request."""
    if impl == "triton":
        from . import triton_dense, triton_gather, triton_slabs

        return Backend(
            triton_slabs.scan,
            triton_slabs.new_logits_buffer,
            triton_slabs.chunk_grads,
            triton_slabs.recompute,
            triton_gather.forward,
            triton_gather.backward,
            triton_slabs.topk,
            triton_dense.dense_sums,
            triton_dense.dense_grads,
            TRITON_BLOCK_TOKENS,
            topk_needs_buffer=True,
        )
    return Backend(
        torch_slabs.scan,
        torch_slabs.new_logits_buffer,
        torch_grads.chunk_grads,
        torch_grads.recompute,
        torch_gather.forward,
        torch_gather.backward,
        torch_slabs.topk,
        torch_dense.dense_sums,
        torch_dense.dense_grads,
        CPU_BLOCK_TOKENS,
        topk_needs_buffer=False,
    )
