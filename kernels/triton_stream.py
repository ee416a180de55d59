"""All-Triton streaming pass: a GEMM whose epilogue is the reduction, and no slab at all.

    raw = W x on the matrix units, tile by tile; each tile goes from registers into the running sums

Pays where H is small: the slab of triton_slabs.py costs 8 bytes of L2 traffic per logit whatever H
is, this costs a GEMM somewhat below the library's. A program keeps a block of tokens and walks a
share of the vocabulary (about one program per multiprocessor: persistent); the shares' partial sums
[splits, N] are merged in a fixed order. Nothing of size V leaves the chip.

Each row's ids come sorted and distinct, so that a cursor per row finds the slots of a tile: the
work on slots is O(N·S) in all, plus a look at one id per row and tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .head import Head, RunningLSE, Scanned, Top2
from .rows import ABSENT as _ABSENT
from .rows import NEG as _NEG
from .triton_common import INTERPRETED, NEG, launch, scalars, shaped
from .triton_reduce import merged

NO_ID = 2**31 - 1
END = tl.constexpr(NO_ID)
# By compute capability: hidden sizes up to which this beats the slab, by the model of break-even
# (8 bytes of L2 per logit against a GEMM at 0.65 of the library's; to be measured). Below 9 there
# is no copy engine, descriptors become loads that do not overlap, and slabs are used throughout.
# The tiles are the largest that ptxas compiles without a spill, without and with the scores.
STREAM_UP_TO: dict[int | str, int] = {9: 1024, 10: 1024}
LIGHT = {"BN": 128, "BV": 128, "BH": 64, "num_warps": 8, "num_stages": 3}
HEAVY = LIGHT | {"BN": 64}
MAX_SPLITS = 16


@triton.jit
def stream(
    x, w, bias, ids, label_u,
    u_slots, top, sums, base_top, base_sum, best, best_id, above,
    n, v, H, S, tiles,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    MOMENTS: tl.constexpr, BASE: tl.constexpr, BEST: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    n0 = tl.program_id(0) * BN
    part = tl.program_id(1)
    rows = n0 + tl.arange(0, BN)
    mine = rows < n
    scale = tl.full([], scale, tl.float32)
    inv_T = tl.full([], inv_T, tl.float32)
    my_ids = ids + rows.to(tl.int64) * S
    my_slots = u_slots + rows.to(tl.int64) * S
    first = part * tiles * BV
    last = tl.minimum(v, first + tiles * BV)
    m = tl.full([BN], NEG, tl.float32)
    s0 = tl.zeros([BN], tl.float32)
    s1 = tl.zeros([BN], tl.float32)
    s2 = tl.zeros([BN], tl.float32)
    b_m = tl.full([BN], NEG, tl.float32)
    b_s = tl.zeros([BN], tl.float32)
    one = tl.full([BN], NEG, tl.float32)
    two = tl.full([BN], NEG, tl.float32)
    who = tl.zeros([BN], tl.int32)
    more = tl.zeros([BN], tl.int32)
    if BEST and label_u is not None:
        bar = tl.load(label_u + rows, mask=mine, other=0.0)
    # The first slot of each row that is not before this share.
    cursor = tl.zeros([BN], tl.int32)
    step = tl.full([], 1, tl.int32)
    while step <= S:
        step *= 2
    while step > 0:
        ahead = cursor + step
        behind = tl.load(my_ids + ahead - 1, mask=mine & (ahead <= S), other=END) < first
        cursor = tl.where(behind, ahead, cursor)
        step = step // 2
    waiting = tl.load(my_ids + cursor, mask=mine & (cursor < S), other=END)
    for v0 in range(first, last, BV):
        acc = tl.zeros([BN, BV], tl.float32)
        for h in range(0, H, BH):
            a = x.load([n0, h])
            b = w.load([v0, h])
            if INTERPRETED:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
        cols = v0 + tl.arange(0, BV)
        real = cols < v
        u = shaped(acc, bias, cols, real, scale, cap, CAP)
        u = tl.where(real[None, :], u, NEG)
        while tl.min(waiting, 0) < v0 + BV:
            hit = waiting < v0 + BV
            at = hit[:, None] & (cols[None, :] == waiting[:, None])
            found = tl.max(tl.where(at, u, NEG), 1)
            tl.store(my_slots + cursor, found, mask=hit)
            u = tl.where(at, NEG, u)
            cursor += hit.to(tl.int32)
            waiting = tl.load(my_ids + cursor, mask=mine & (cursor < S), other=END)
        new = tl.maximum(m, tl.max(u, 1) * inv_T)
        down, fade = merged(m, new)
        d = tl.maximum(u * inv_T - new[:, None], -1e4)  # NEG² would overflow, and e^-1e4 is zero
        e = tl.exp(d)
        if MOMENTS >= 2:
            s2 = fade * (s2 + 2 * down * s1 + down * down * s0) + tl.sum(e * d * d, 1)
        if MOMENTS >= 1:
            s1 = fade * (s1 + down * s0) + tl.sum(e * d, 1)
        s0 = fade * s0 + tl.sum(e, 1)
        m = new
        if BASE:
            new = tl.maximum(b_m, tl.max(u, 1))
            _, fade = merged(b_m, new)
            b_s = fade * b_s + tl.sum(tl.exp(tl.maximum(u - new[:, None], -1e4)), 1)
            b_m = new
        if BEST:
            here = tl.max(u, 1)
            index = v0 + tl.argmax(u, 1)
            next_best = tl.max(tl.where(cols[None, :] == index[:, None], NEG, u), 1)
            better = here > one
            two = tl.where(better, tl.maximum(one, next_best), tl.maximum(two, here))
            who = tl.where(better, index, who)
            one = tl.maximum(one, here)
            if label_u is not None:
                more += tl.sum((u > bar[:, None]).to(tl.int32), 1)
    out = part.to(tl.int64) * n + rows
    tl.store(top + out, m, mask=mine)
    sums += part.to(tl.int64) * n * (MOMENTS + 1)
    tl.store(sums + rows, s0, mask=mine)
    if MOMENTS >= 1:
        tl.store(sums + n + rows, s1, mask=mine)
    if MOMENTS >= 2:
        tl.store(sums + 2 * n + rows, s2, mask=mine)
    if BASE:
        tl.store(base_top + out, b_m, mask=mine)
        tl.store(base_sum + out, b_s, mask=mine)
    if BEST:
        tl.store(best + 2 * out, one, mask=mine)
        tl.store(best + 2 * out + 1, two, mask=mine)
        tl.store(best_id + out, who, mask=mine)
        tl.store(above + out, more, mask=mine)


def pays(head: Head, hidden_nH: Tensor) -> bool:
    """Whether to stream: a small 16-bit head whose rows the copy engine can address."""
    if head.weight.element_size() != 2 or hidden_nH.shape[0] == 0:
        return False
    H = head.weight.shape[1]
    if H * 2 % 16 or head.weight.data_ptr() % 16 or hidden_nH.data_ptr() % 16:
        return False
    kind: int | str = "interpreted"  # in no table: tests put it there
    if hidden_nH.is_cuda:
        kind = torch.cuda.get_device_capability(hidden_nH.device)[0]
    return H <= STREAM_UP_TO.get(kind, 0)


def splits(blocks: int, tiles: int, device: torch.device) -> int:
    """Shares of the vocabulary such that one wave of programs fills the GPU."""
    units = 8
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MAX_SPLITS, units // blocks, tiles))


def sorted_slots(ids_nS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [n, S] rising and distinct, NO_ID behind; where each sorted slot went; order)."""
    ids, order = torch.sort(ids_nS, dim=-1, stable=True)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    new &= ids >= 0
    place = (new.cumsum(-1) - 1).clamp(min=0)
    packed = torch.full_like(ids, NO_ID)
    packed.scatter_reduce_(-1, place, torch.where(ids >= 0, ids, NO_ID), "amin")
    return packed.to(torch.int32), place, order


def scan(
    head: Head,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    *,
    moments: int,
    base: bool,
    best: bool,
    label_u_n: Tensor | None,
) -> Scanned:
    """What triton_slabs.scan returns, without a slab."""
    (n, H), S, T = hidden_nH.shape, ids_nS.shape[1], head.temperature
    base = base and T != 1.0
    tile = HEAVY if best else LIGHT
    BN, BV, BH = tile["BN"], tile["BV"], tile["BH"]
    tiles = triton.cdiv(head.vocab, BV)
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
        stream,
        (triton.cdiv(n, BN), parts),
        hidden_nH,
        TensorDescriptor.from_tensor(hidden_nH, [BN, BH]),
        TensorDescriptor.from_tensor(head.weight, [BV, BH]),
        head.bias,
        ids,
        label_u_n,
        u_slots,
        top,
        sums,
        base_rows[0] if base else None,
        base_rows[1] if base else None,
        best_u if best else None,
        best_id if best else None,
        above if best else None,
        n,
        head.vocab,
        H,
        S,
        each,
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
    """Sums about each part's top become sums about the highest, in the order of the parts."""
    top = top_pn.amax(0)
    gone = top_pn < _ABSENT
    down = torch.where(gone, 0.0, top_pn - top)
    fade = torch.where(gone, 0.0, down.exp())
    moved = [sums_pn[0]]
    if len(sums_pn) > 1:
        moved.append(sums_pn[1] + down * sums_pn[0])
    if len(sums_pn) > 2:
        moved.append(sums_pn[2] + 2 * down * sums_pn[1] + down.square() * sums_pn[0])
    return RunningLSE(top, [(fade * s).sum(0) for s in moved], temperature)


def _merge_best(u_pn2: Tensor, id_pn: Tensor, above_pn: Tensor) -> Top2:
    where = u_pn2[..., 0].argmax(0, keepdim=True)
    two = u_pn2.permute(1, 0, 2).flatten(1).topk(2, -1).values
    return Top2(two, id_pn.gather(0, where)[0].long(), above_pn.sum(0))
