"""Passes over the head in the Triton backend: library GEMMs, Triton kernels between them.

scan         one GEMM writes a stored chunk, one reduction reads it: 2NVH FLOPs, 8 bytes per logit.
             A pass without gradients reuses one slab of at most 2048 tokens: 4096 to 32768 columns
             (`forward_columns`), 32 MiB of fp32 at H = 4096
chunk_grads  a stored chunk [n, V] fp32 becomes dz in place; two GEMMs: 4NVH, 10–14 bytes per logit
recompute    vocabulary slabs outermost, the logits again: 8NVH in all; each dW slab is rounded
             once, dX is summed in fp32

With a 16-bit head, dz of the slots is rounded in the operand of the GEMMs. The rounding error of
the largest is added to dX in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu_gather
from .gpu_launch import add_product, product
from .gpu_rows import Running, grad_rows, move_to_scale
from .gpu_token_loss import merge_slots
from .head import (
    LMHead,
    Scanned,
    Stats,
    blocks,
    scaled_grads,
    sums_in_16_bits,
    vocabulary_slabs,
)

BLOCK_TOKENS = 2048
SCAN_TOKENS = 4 * BLOCK_TOKENS  # per scan without a buffer: so many rows of [n, S] mathematics
# Without a correction the error of dX is 0.5 to 0.7 % where rows of W share a direction, which Σ dz
# = 0 cancels; with 16 slots it is below 0.3 % (test_rows_of_the_head_that_share_a_direction).
CORRECTED_SLOTS = 16
RECOMPUTE_BYTES = 64 << 20
RECOMPUTE_TILE = (2048, 2048)  # tokens and columns of a slab, at least, if there are as many
SLAB_COLUMNS = (64, 4096)
# A library GEMM of this size takes about 80 µs on an H200 (770 TFLOP/s), longer than the host takes
# to launch it and the reduction.
SLAB_FLOPS = 80e-6 * 770e12
FORWARD_COLUMNS = 32768


def slab_columns(vocab: int) -> int:
    """A power of two that fits one program and is less than the vocabulary."""
    low, high = SLAB_COLUMNS
    return max(low, min(high, 1 << max(0, (vocab // 2).bit_length() - 1)))


def forward_columns(vocab: int, hidden_size: int, tokens: int) -> int:
    """Columns of a slab that no gradient needs: a power of two, the least of SLAB_FLOPS.

    A slab costs 2 · tokens · columns · H FLOPs: at 2048 tokens 4096 columns are enough for
    H ≥ 3672, and H = 1024 takes 16384: 128 MiB of fp32 instead of 32. There are at least
    `slab_columns`, and at most half of the vocabulary and FORWARD_COLUMNS.
    """
    columns = slab_columns(vocab)
    while columns < min(FORWARD_COLUMNS, vocab // 4 + 1) and (
        2 * tokens * columns * hidden_size < SLAB_FLOPS
    ):
        columns *= 2
    return columns


def new_logits_buffer(head: LMHead, tokens: int) -> Tensor:
    """Memory for the raw logits of up to `tokens` tokens; rows are aligned to 64 bytes."""
    return head.weight.new_empty(tokens, -(-head.vocab_size // 16) * 16, dtype=head.dtype)


def logits_view(head: LMHead, buffer: Tensor, tokens: int) -> Tensor:
    """The logits of n tokens in a buffer, [n, V]."""
    return buffer[:tokens, : head.vocab_size]


def all_products(head: LMHead, hidden_nH: Tensor, raw_nV: Tensor) -> None:
    """raw = x Wᵀ: one GEMM, or one per slab of a weight that is not dense."""
    V = head.vocab_size
    for at in vocabulary_slabs(head, slab_columns(V) if head.is_packed else max(1, V)):
        product(hidden_nH, head.weight[at].t(), raw_nV[:, at])


def scan(
    head: LMHead,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    *,
    moments: int = 0,
    base: bool = False,
    best: bool = False,
    label_u_n: Tensor | None = None,
    buffer: Tensor | None = None,
) -> Scanned:
    """One pass over the head; a buffer receives the raw products, with NEG in the slots.

    With a buffer it is one GEMM and one reduction, else one of each per slab.
    """
    n, V = hidden_nH.shape[0], head.vocab_size
    running = Running(head, ids_nS, moments, base, best, label_u_n)
    if buffer is not None:
        raw = logits_view(head, buffer, n)
        all_products(head, hidden_nH, raw)
        running.block(slice(0, n))(slice(0, V), raw)
        return running.scanned()
    size = min(n, BLOCK_TOKENS)
    columns = forward_columns(V, hidden_nH.shape[1], size)
    slab = head.weight.new_empty(size, columns, dtype=head.dtype)
    for rows in blocks(n, BLOCK_TOKENS):
        x, reduce = hidden_nH[rows], running.block(rows)
        for at in vocabulary_slabs(head, columns):
            raw = slab[: x.shape[0], : at.stop - at.start]
            product(x, head.weight[at].t(), raw)
            reduce(at, raw)
    return running.scanned()


def chunk_grads(
    head: LMHead,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    stats: Stats,
    grads: Stats,
    buffer: Tensor,
    *,
    first: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    carried: Tensor | None = None,
    filter_threshold: Tensor | None = None,
) -> Tensor | None:
    """Turn the stored logits of a chunk into dz, add its gradients, return the scale of dw and db.

    ids are distinct, and grads.z_ids is d(W x) of the slots.
    dx [n, H] is this chunk's part; dw and db belong to the whole head and start when `first`. Both
    products skip tiles whose |dz| is below filter_threshold (0-dim, optional). `carried` is the
    scale of dw and db so far, which is what the last chunk returned: None unless W is float16.
    """
    upstream, grad_scale = scaled_grads(head, grads, carried)
    if filter_threshold is not None and grad_scale is not None:
        filter_threshold = filter_threshold * grad_scale
    if dw is not None:
        dw = dw[: head.vocab_size]
    if db is not None:
        db = db[: head.vocab_size]
    move_to_scale(grad_scale, carried, dw, db)
    _add_grads(
        head, hidden_nH, ids_nS, stats, upstream, buffer, first, dx, dw, db, filter_threshold
    )
    if grad_scale is not None and dx is not None:
        dx.div_(grad_scale)
    return grad_scale


def _add_grads(
    head: LMHead,
    hidden_nH: Tensor,
    ids: Tensor,
    stats: Stats,
    upstream: Stats,
    buffer: Tensor,
    first: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    filter_threshold: Tensor | None,
) -> None:
    """`chunk_grads` with d(W x) of distinct ids in upstream.z_ids; dw, db without padding."""
    g_nS = upstream.z_ids
    in_place = g_nS if filter_threshold is None else torch.zeros_like(g_nS)
    dz = grad_rows(head, ids, in_place, stats, upstream)(
        logits_view(head, buffer, len(hidden_nH)), 0
    )
    weight = head.weight[: head.vocab_size]
    if filter_threshold is not None:
        from . import triton_filter

        live = triton_filter.live_tiles(dz, filter_threshold)
        if db is not None:
            db += dz.sum(0, dtype=db.dtype)
        if dw is not None:
            triton_filter.add_weight_product(dz, hidden_nH, live, dw, first)
        if dw is not None or db is not None:
            gpu_gather.weight_grad(hidden_nH, ids, g_nS, dw, db, add=True, spare=dx)
        if dx is not None:
            part = triton_filter.hidden_product(dz, weight, live)
            gpu_gather.hidden_grad(head, ids, g_nS, dx, base=part)
        return
    if db is not None:
        db += dz.sum(0, dtype=db.dtype)
    if dw is not None:
        add_product(dz.t(), hidden_nH, dw, first)
    if dx is None:
        return
    wide = dx
    if dx.dtype != head.dtype:
        wide = hidden_nH.new_empty(hidden_nH.shape, dtype=head.dtype)
    product(dz, weight, wide)
    if head.weight.dtype == head.dtype:
        return
    gpu_gather.hidden_grad(head, *_corrected(ids, g_nS), dx, base=wide, lost=True)


def _corrected(ids_nS: Tensor, g_nS: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, g) of the CORRECTED_SLOTS largest |g| of each row."""
    if ids_nS.shape[-1] > CORRECTED_SLOTS:
        largest = g_nS.abs().topk(CORRECTED_SLOTS, -1, sorted=False).indices
        ids_nS, g_nS = ids_nS.gather(-1, largest), g_nS.gather(-1, largest)
    return ids_nS, g_nS


def recompute(
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    stats: Stats,
    grads: Stats,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden_type: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [N, H] in hidden_type, dW like weight, db like bias), each None unless needed."""
    (N, H), V, wide = hidden_NH.shape, head.vocab_size, head.dtype
    dw = sum_db = None
    if need_weight:
        dw = torch.empty_like(head.weight)
        dw[V:] = 0
    if need_bias and head.bias is not None:
        sum_db = head.weight.new_zeros(len(head.bias), dtype=wide)
    dx = hidden_NH.new_empty(N, H, dtype=wide) if need_hidden else None
    narrow = None  # the returned dX, if it is not summed in its own type
    if need_hidden and hidden_type != wide:
        narrow = hidden_NH.new_empty(N, H, dtype=hidden_type)
    ids, g_NS = merge_slots(head, ids_NS, stats.z_ids, grads.z_ids)
    scaled_up, grad_scale = scaled_grads(head, grads._replace(z_ids=g_NS))
    g_NS = scaled_up.z_ids
    slab, wide_dw = _recompute_memory(head, N, need_weight, narrow)
    size, columns = slab.shape
    tiles = []
    for rows in list(blocks(N, max(size, 1))) or [slice(0, 0)]:
        part = Stats._make(None if t is None else t[rows] for t in stats)
        up = Stats._make(None if t is None else t[rows] for t in scaled_up)
        to_dz = grad_rows(head, ids[rows], g_NS[rows], part, up)
        tiles.append((rows, hidden_NH[rows], to_dz))
    for at in vocabulary_slabs(head, columns):
        weight = head.weight[at]
        dw_part = None if dw is None else dw[at] if wide_dw is None else wide_dw[: len(weight)]
        for rows, x, to_dz in tiles:
            raw = slab[: len(x), : len(weight)]
            product(x, weight.t(), raw)
            dz = to_dz(raw, at.start)
            if dx is not None:
                add_product(dz, weight, dx[rows], first=at.start == 0)
            if dw_part is not None:
                add_product(dz.t(), x, dw_part, first=rows.start == 0)
            if sum_db is not None:
                sum_db[at] += dz.sum(0, dtype=wide)
        if dw is not None and dw_part is not None and wide_dw is not None:
            torch.div(dw_part, 1.0 if grad_scale is None else grad_scale, out=dw[at])
    db = None
    if sum_db is not None and head.bias is not None:
        db = (sum_db if grad_scale is None else sum_db / grad_scale).to(head.bias.dtype)
    if dx is not None and head.weight.dtype != wide:
        dx = _rounded_hidden_grad(head, *_corrected(ids, g_NS), dx, narrow, grad_scale)
    return dx, dw, db


def _rounded_hidden_grad(
    head: LMHead,
    ids_NS: Tensor,
    g_NS: Tensor,
    dx: Tensor,
    narrow: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """dX with what dz of the slots lost to rounding, in the type of `narrow` (dx if None)."""
    if grad_scale is None:
        out = dx if narrow is None else narrow
        gpu_gather.hidden_grad(head, ids_NS, g_NS, out, base=dx, lost=True)
        return out
    gpu_gather.hidden_grad(head, ids_NS, g_NS, dx, base=dx, lost=True)
    dx.div_(grad_scale)  # before dX is rounded, or it would overflow
    return dx if narrow is None else narrow.copy_(dx)


def _recompute_memory(
    head: LMHead, N: int, need_weight: bool, narrow: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(fp32 slab [tokens, columns], fp32 dW of a slab or None if each dW slab is one product).

    A slab has all tokens if that fits in RECOMPUTE_BYTES or in `narrow`, the memory of the returned
    dX, which is free until the sum is complete.
    """
    V, H, wide = head.vocab_size, head.weight.shape[1], head.dtype
    least_tokens, least_columns = RECOMPUTE_TILE
    most = RECOMPUTE_BYTES // wide.itemsize
    free = 0 if narrow is None else narrow.nbytes // wide.itemsize
    fitting = max(least_columns, most // max(N, 1) // 256 * 256)
    columns = min(forward_columns(V, H, min(N, BLOCK_TOKENS)), fitting)
    sums = columns * H if need_weight and head.weight.dtype != wide else 0
    tokens, in_fp32 = N, sums > 0 and not sums_in_16_bits(head.weight.dtype)
    if N * columns + in_fp32 * sums > max(most, free):
        in_fp32 = sums > 0
        step = least_tokens // 8
        fitting = (max(most, free) - sums) // columns // step * step
        tokens = min(N, max(least_tokens, fitting))
    count = tokens * columns + in_fp32 * sums
    if narrow is not None and count <= free:
        memory = narrow.view(-1)[: count * (wide.itemsize // narrow.itemsize)].view(wide)
    else:
        memory = head.weight.new_empty(count, dtype=wide)
    slab = memory[: tokens * columns].view(tokens, columns)
    return slab, memory[tokens * columns :].view(columns, H) if in_fp32 else None
