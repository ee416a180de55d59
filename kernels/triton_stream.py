"""Streaming pass in Triton alone: a GEMM whose epilogue is the reduction, without a slab.

    raw = W x on the matrix units, tile by tile; each tile goes from registers into the running sums

It is faster for small H: the slab of gpu_slabs.py costs 8 bytes of L2 traffic per logit for any
H, this kernel costs a GEMM somewhat slower than the library's. A program owns a block of tokens and
walks one part of the vocabulary (persistent: about one program per multiprocessor). The partial
sums [parts, N] are merged in a fixed order. Nothing of size V leaves the chip.

The ids of a row are sorted and distinct, so a cursor per row finds the slots of a tile: O(N·S) work
for the slots in all, plus one comparison per row and tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpu_launch import launch, scalars
from .head import LMHead, RunningLSE, Scanned, Top2
from .token_loss import ABSENT as _ABSENT
from .token_loss import NEG as _NEG
from .triton_common import INTERPRETED, NEG, shape_logits
from .triton_reduce import rescale

NO_ID = 2**31 - 1
END = tl.constexpr(NO_ID)
# The largest that ptxas compiles without a spill, without and with scores.
LIGHT = {"BN": 128, "BV": 128, "BH": 64, "num_warps": 8, "num_stages": 3}
HEAVY = LIGHT | {"BN": 64}
MAX_SPLITS = 16


@triton.jit
def stream(
    d_x,
    d_w,
    p_bias,
    p_ids,
    p_label_u,
    p_u_slots,
    p_max,
    p_sums,
    p_base_max,
    p_base_sum,
    p_best,
    p_best_id,
    p_n_above,
    n,
    v,
    H,
    S,
    n_tiles,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    BASE: tl.constexpr,
    BEST: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Products with the head and their reduction in one kernel: no slab of logits.

        top = max z;  s_i = Σ e^{z − top} (z − top)^i,  i = 0 .. MOMENTS,  per row and part of V

    Args:
        d_x: [n, H] 16-bit, tiles [BN, BH]. d_w: [≥ v, H] 16-bit, tiles [BV, BH].
        p_bias: [V] or None. p_ids: int32 [n, S], rising and distinct, END in empty slots.
        p_label_u: [n] or None, the label's u; needed for p_n_above.
        p_u_slots: [n, S], receives u of the ids. They take no part in the statistics.
        p_max: [parts, n]. p_sums: [parts, MOMENTS + 1, n].
        p_base_max, p_base_sum: [parts, n] each, the same at T = 1, if BASE.
        p_best: [parts, n, 2], the two largest u; p_best_id: int32 [parts, n], the id of the first;
            p_n_above: int32 [parts, n], how many u exceed the label's; if BEST.
        n_tiles: vocabulary tiles of BV columns per part.

    Program (i, part) owns BN rows and n_tiles tiles of the vocabulary.
    """
    i_row = tl.program_id(0) * BN
    i_part = tl.program_id(1)
    o_rows = i_row + tl.arange(0, BN)
    m_rows = o_rows < n
    scale = tl.full([], scale, tl.float32)
    inv_T = tl.full([], inv_T, tl.float32)
    p_row_ids = p_ids + o_rows.to(tl.int64) * S
    p_row_slots = p_u_slots + o_rows.to(tl.int64) * S
    i_first = i_part * n_tiles * BV
    i_last = tl.minimum(v, i_first + n_tiles * BV)
    b_max = tl.full([BN], NEG, tl.float32)
    b_s0 = tl.zeros([BN], tl.float32)
    b_s1 = tl.zeros([BN], tl.float32)
    b_s2 = tl.zeros([BN], tl.float32)
    b_base_max = tl.full([BN], NEG, tl.float32)
    b_base_sum = tl.zeros([BN], tl.float32)
    b_best = tl.full([BN], NEG, tl.float32)
    b_second = tl.full([BN], NEG, tl.float32)
    b_best_id = tl.zeros([BN], tl.int32)
    b_n_above = tl.zeros([BN], tl.int32)
    if BEST and p_label_u is not None:
        b_label_u = tl.load(p_label_u + o_rows, mask=m_rows, other=0.0)
    # The first slot of each row that is not before this part.
    b_cursor = tl.zeros([BN], tl.int32)
    i_step = tl.full([], 1, tl.int32)
    while i_step <= S:
        i_step *= 2
    while i_step > 0:
        b_ahead = b_cursor + i_step
        m_before = (
            tl.load(p_row_ids + b_ahead - 1, mask=m_rows & (b_ahead <= S), other=END) < i_first
        )
        b_cursor = tl.where(m_before, b_ahead, b_cursor)
        i_step = i_step // 2
    b_next_id = tl.load(p_row_ids + b_cursor, mask=m_rows & (b_cursor < S), other=END)
    for i_col in range(i_first, i_last, BV):
        b_acc = tl.zeros([BN, BV], tl.float32)
        for i_h in range(0, H, BH):
            b_x = d_x.load([i_row, i_h])
            b_w = d_w.load([i_col, i_h])
            if INTERPRETED:
                b_x = b_x.to(tl.float32)
                b_w = b_w.to(tl.float32)
            b_acc = tl.dot(b_x, b_w.T, b_acc)
        o_cols = i_col + tl.arange(0, BV)
        m_cols = o_cols < v
        b_u = shape_logits(b_acc, p_bias, o_cols, m_cols, scale, cap, CAP)
        b_u = tl.where(m_cols[None, :], b_u, NEG)
        while tl.min(b_next_id, 0) < i_col + BV:
            m_hit = b_next_id < i_col + BV
            m_at = m_hit[:, None] & (o_cols[None, :] == b_next_id[:, None])
            b_slot_u = tl.max(tl.where(m_at, b_u, NEG), 1)
            tl.store(p_row_slots + b_cursor, b_slot_u, mask=m_hit)
            b_u = tl.where(m_at, NEG, b_u)
            b_cursor += m_hit.to(tl.int32)
            b_next_id = tl.load(p_row_ids + b_cursor, mask=m_rows & (b_cursor < S), other=END)
        b_new_max = tl.maximum(b_max, tl.max(b_u, 1) * inv_T)
        b_shift, b_decay = rescale(b_max, b_new_max)
        b_d = tl.maximum(
            b_u * inv_T - b_new_max[:, None], -1e4
        )  # NEG² would overflow, and e^-1e4 is zero
        b_exp = tl.exp(b_d)
        if MOMENTS >= 2:
            b_s2 = b_decay * (b_s2 + 2 * b_shift * b_s1 + b_shift * b_shift * b_s0) + tl.sum(
                b_exp * b_d * b_d, 1
            )
        if MOMENTS >= 1:
            b_s1 = b_decay * (b_s1 + b_shift * b_s0) + tl.sum(b_exp * b_d, 1)
        b_s0 = b_decay * b_s0 + tl.sum(b_exp, 1)
        b_max = b_new_max
        if BASE:
            b_new_max = tl.maximum(b_base_max, tl.max(b_u, 1))
            _, b_decay = rescale(b_base_max, b_new_max)
            b_base_sum = b_decay * b_base_sum + tl.sum(
                tl.exp(tl.maximum(b_u - b_new_max[:, None], -1e4)), 1
            )
            b_base_max = b_new_max
        if BEST:
            b_tile_best = tl.max(b_u, 1)
            b_tile_id = i_col + tl.argmax(b_u, 1)
            b_tile_second = tl.max(tl.where(o_cols[None, :] == b_tile_id[:, None], NEG, b_u), 1)
            m_better = b_tile_best > b_best
            b_second = tl.where(
                m_better, tl.maximum(b_best, b_tile_second), tl.maximum(b_second, b_tile_best)
            )
            b_best_id = tl.where(m_better, b_tile_id, b_best_id)
            b_best = tl.maximum(b_best, b_tile_best)
            if p_label_u is not None:
                b_n_above += tl.sum((b_u > b_label_u[:, None]).to(tl.int32), 1)
    o_out = i_part.to(tl.int64) * n + o_rows
    tl.store(p_max + o_out, b_max, mask=m_rows)
    p_sums += i_part.to(tl.int64) * n * (MOMENTS + 1)
    tl.store(p_sums + o_rows, b_s0, mask=m_rows)
    if MOMENTS >= 1:
        tl.store(p_sums + n + o_rows, b_s1, mask=m_rows)
    if MOMENTS >= 2:
        tl.store(p_sums + 2 * n + o_rows, b_s2, mask=m_rows)
    if BASE:
        tl.store(p_base_max + o_out, b_base_max, mask=m_rows)
        tl.store(p_base_sum + o_out, b_base_sum, mask=m_rows)
    if BEST:
        tl.store(p_best + 2 * o_out, b_best, mask=m_rows)
        tl.store(p_best + 2 * o_out + 1, b_second, mask=m_rows)
        tl.store(p_best_id + o_out, b_best_id, mask=m_rows)
        tl.store(p_n_above + o_out, b_n_above, mask=m_rows)


def splits(blocks: int, tiles: int, device: torch.device) -> int:
    """The number of vocabulary parts such that one wave of programs fills the GPU."""
    units = 8
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MAX_SPLITS, units // blocks, tiles))


def sorted_slots(ids_nS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [n, S] rising and distinct, then NO_ID; the place of each sorted slot; order)."""
    ids, order = torch.sort(ids_nS, dim=-1, stable=True)
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    is_new &= ids >= 0
    place = (is_new.cumsum(-1) - 1).clamp(min=0)
    packed = torch.full_like(ids, NO_ID)
    packed.scatter_reduce_(-1, place, torch.where(ids >= 0, ids, NO_ID), "amin")
    return packed.to(torch.int32), place, order


def scan(
    head: LMHead,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    *,
    moments: int,
    base: bool,
    best: bool,
    label_u_n: Tensor | None,
) -> Scanned:
    """The result of gpu_slabs.scan, computed without a slab."""
    (n, H), S, T = hidden_nH.shape, ids_nS.shape[1], head.temperature
    base = base and T != 1.0
    tile = HEAVY if best else LIGHT
    BN, BV, BH = tile["BN"], tile["BV"], tile["BH"]
    tiles = triton.cdiv(head.vocab_size, BV)
    parts = splits(triton.cdiv(n, BN), tiles, hidden_nH.device)
    each = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, each)
    ids, place, order = sorted_slots(ids_nS)
    new = head.weight.new_empty
    u_slots = torch.full((n, S), _NEG, dtype=head.dtype, device=ids.device)
    top, sums = new(parts, n, dtype=head.dtype), new(parts, moments + 1, n, dtype=head.dtype)
    base_rows = new(2, parts if base else 0, n, dtype=head.dtype)
    best_u = new(parts if best else 0, n, 2, dtype=head.dtype)
    best_id = new(parts if best else 0, n, dtype=torch.int32)
    above = torch.zeros_like(best_id)
    launch(
        "triton_stream:stream",
        (triton.cdiv(n, BN), parts),
        hidden_nH,
        d_x=TensorDescriptor.from_tensor(hidden_nH, [BN, BH]),
        d_w=TensorDescriptor.from_tensor(head.weight, [BV, BH]),
        p_bias=head.bias,
        p_ids=ids,
        p_label_u=label_u_n,
        p_u_slots=u_slots,
        p_max=top,
        p_sums=sums,
        p_base_max=base_rows[0] if base else None,
        p_base_sum=base_rows[1] if base else None,
        p_best=best_u if best else None,
        p_best_id=best_id if best else None,
        p_n_above=above if best else None,
        n=n,
        v=head.vocab_size,
        H=H,
        S=S,
        n_tiles=each,
        **scalars(head),
        MOMENTS=moments,
        BASE=base,
        BEST=best,
        **tile,
    )
    if S:
        u_sorted = torch.where(ids_nS.gather(-1, order) >= 0, u_slots.gather(-1, place), _NEG)
        u_slots = torch.empty_like(u_sorted).scatter_(-1, order, u_sorted)
    return Scanned(
        u_slots,
        _merge_parts(top, list(sums.unbind(1)), T),
        _merge_parts(base_rows[0], [base_rows[1]], 1.0) if base else None,
        _merge_best(best_u, best_id, above) if best else None,
    )


def _merge_parts(top_pn: Tensor, sums_pn: list[Tensor], temperature: float) -> RunningLSE:
    """Merge sums about the maximum of each part into sums about the largest, in order."""
    top = top_pn.amax(0)
    empty = top_pn < _ABSENT
    shift = torch.where(empty, 0.0, top_pn - top)
    decay = torch.where(empty, 0.0, shift.exp())
    moved = [sums_pn[0]]
    if len(sums_pn) > 1:
        moved.append(sums_pn[1] + shift * sums_pn[0])
    if len(sums_pn) > 2:
        moved.append(sums_pn[2] + 2 * shift * sums_pn[1] + shift.square() * sums_pn[0])
    return RunningLSE(top, [(decay * s).sum(0) for s in moved], temperature)


def _merge_best(u_pn2: Tensor, id_pn: Tensor, above_pn: Tensor) -> Top2:
    where = u_pn2[..., 0].argmax(0, keepdim=True)
    two = u_pn2.permute(1, 0, 2).flatten(1).topk(2, -1).values
    return Top2(two, id_pn.gather(0, where)[0].long(), above_pn.sum(0))
