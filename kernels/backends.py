"""`get_backend`: the functions behind each `impl`. Only this file knows both backends."""

from __future__ import annotations

import functools

from . import (
    token_loss,
    torch_dense,
    torch_gather,
    torch_grads,
    torch_slabs,
    torch_token_loss,
    torch_token_scores,
)
from .engines import Backend

CPU_BLOCK_TOKENS = 1024


@functools.cache
def get_backend(impl: str) -> Backend:
    """Return the backend called `impl`; Triton is imported when its first kernel is launched."""
    if impl == "triton":
        from . import (
            gpu_dense,
            gpu_gather,
            gpu_rows,
            gpu_slabs,
            gpu_token_loss,
            gpu_token_scores,
            gpu_topk,
        )

        return Backend(
            gpu_slabs.scan,
            gpu_slabs.new_logits_buffer,
            gpu_token_loss.merge_answers,
            gpu_token_loss.token_loss,
            gpu_token_scores.token_scores,
            gpu_slabs.chunk_grads,
            gpu_slabs.recompute,
            gpu_gather.forward,
            gpu_gather.backward,
            gpu_topk.topk,
            gpu_topk.topk_memory,
            gpu_dense.dense_sums,
            gpu_dense.dense_grads,
            gpu_rows.scale_,
            gpu_slabs.SCAN_TOKENS,
        )
    return Backend(
        torch_slabs.scan,
        torch_slabs.new_logits_buffer,
        token_loss.merge_answers,
        torch_token_loss.token_loss,
        torch_token_scores.token_scores,
        torch_grads.chunk_grads,
        torch_grads.recompute,
        torch_gather.forward,
        torch_gather.backward,
        torch_slabs.topk,
        lambda *sizes: (CPU_BLOCK_TOKENS, None),
        torch_dense.dense_sums,
        torch_dense.dense_grads,
        torch_grads.scale_,
        CPU_BLOCK_TOKENS,
    )
