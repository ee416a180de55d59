"""Gradient products that skip tiles of negligible dz (opt-in; slots are never skipped).

    dX = Σ_live dz_tile W_tile,   dW_tile = Σ_live dz_tileᵀ X_tile,   live: max |dz_tile| ≥ ε

Outside the slots, dz is a multiple of the student's softmax, which a trained model concentrates on
few tokens: most tiles of 128 × 128 hold nothing above ε and cost one read of 2 bytes per entry
instead of 4H FLOPs. The gradients of the slots, which would make nearly every tile live, go through
the K-row kernels in fp32 for any ε. Filtering by blocks is from Cut Your Losses (Wijmans et al.,
arXiv 2411.09009), where the label makes its block live.

The live tiles are sorted first (a stable sort of flags, no host read): the loops over them have
run-time lengths and no branches.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_launch import launch
from .triton_common import INTERPRETED, round_to

# BM = BK: dW reads the tiles of dz transposed.
FILTER_TILE = {"BM": 128, "BK": 128, "BH": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def filtered_product(
    p_dz,
    p_b,
    p_order,
    p_count,
    p_out,
    m,
    k,
    H,
    ld_m,
    ld_k,
    ld_b,
    ld_out,
    n_tiles,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """out = or (ADD) += Σ dz_tile b_tile over the live tiles of each block of rows of dz.

    Args:
        p_dz: [m, k], dz or its transpose; ld_m and ld_k are its strides. p_b: [k, H], row stride
            ld_b.
        p_order: int32 [⌈m / BM⌉, n_tiles], live tiles of k first. p_count: int32 [⌈m / BM⌉], how
            many are live.
        p_out: [m, H], row stride ld_out; summed in fp32 and rounded once.

    Program (i, j) owns a tile [BM, BH] of out and walks the live tiles of its rows.
    """
    i_row = tl.program_id(0)
    o_m = i_row * BM + tl.arange(0, BM)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    p_rows = p_dz + o_m.to(tl.int64)[:, None] * ld_m
    b_acc = tl.zeros([BM, BH], tl.float32)
    for i_tile in range(tl.load(p_count + i_row)):
        o_k = (tl.load(p_order + i_row * n_tiles + i_tile) * BK + tl.arange(0, BK)).to(tl.int64)
        b_dz = tl.load(
            p_rows + o_k[None, :] * ld_k, mask=(o_m < m)[:, None] & (o_k < k)[None, :], other=0.0
        )
        b_b = tl.load(
            p_b + o_k[:, None] * ld_b + o_h[None, :],
            mask=(o_k < k)[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            b_dz = b_dz.to(tl.float32)
            b_b = b_b.to(tl.float32)
        b_acc = tl.dot(b_dz, b_b, b_acc)
    p_tile = p_out + o_m.to(tl.int64)[:, None] * ld_out + o_h[None, :]
    m_tile = (o_m < m)[:, None] & (o_h < H)[None, :]
    if ADD:
        b_acc += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_tile, round_to(b_acc, p_out.dtype.element_ty), mask=m_tile)


def live_tiles(dz_nv: Tensor, threshold: Tensor) -> Tensor:
    """int32 [n / 128, v / 128]: 1 for tiles with some |dz| ≥ threshold (0-dim).

    PyTorch reads dz once, as a kernel would; whole tiles and those at the ends separately.
    """
    (n, v), B = dz_nv.shape, FILTER_TILE["BM"]
    largest = dz_nv.new_empty(triton.cdiv(n, B), triton.cdiv(v, B), dtype=torch.float32)
    for rows, cols in itertools.product(_whole_and_rest(n, B), _whole_and_rest(v, B)):
        out = largest[rows.start // B : -(-rows.stop // B), cols.start // B : -(-cols.stop // B)]
        tiles = dz_nv[rows, cols].unflatten(0, (len(out), -1)).unflatten(2, (out.shape[1], -1))
        out.copy_(torch.linalg.vector_norm(tiles, torch.inf, (1, 3), dtype=torch.float32))
    return (largest >= threshold).to(torch.int32)


def _whole_and_rest(n: int, size: int) -> list[slice]:
    """The indices in whole tiles, and those of the last one; without empty slices."""
    whole = n // size * size
    return [at for at in (slice(0, whole), slice(whole, n)) if at.start < at.stop]


def hidden_product(dz_nv: Tensor, weight_vH: Tensor, live: Tensor) -> Tensor:
    """dz W over the live tiles, fp32 [n, H]."""
    dx = dz_nv.new_empty(len(dz_nv), weight_vH.shape[1], dtype=torch.float32)
    _multiply(dz_nv, weight_vH, live, dx, add=False)
    return dx


def add_weight_product(
    dz_nv: Tensor, hidden_nH: Tensor, live: Tensor, dw_vH: Tensor, first: bool
) -> None:
    """dw = (first) or += dzᵀ X over the live tiles, summed in fp32 and rounded once."""
    _multiply(dz_nv.t(), hidden_nH, live.t(), dw_vH, add=not first)


def _multiply(dz_mk: Tensor, b_kH: Tensor, live: Tensor, out_mH: Tensor, *, add: bool) -> None:
    """Launch filtered_product. A stable sort puts the live tiles first, in rising order."""
    order = torch.sort(live, dim=1, descending=True, stable=True).indices
    (m, k), H = dz_mk.shape, b_kH.shape[1]
    BH = min(FILTER_TILE["BH"], max(16, triton.next_power_of_2(H)))
    launch(
        "triton_filter:filtered_product",
        (live.shape[0], triton.cdiv(H, BH)),
        dz_mk,
        p_dz=dz_mk,
        p_b=b_kH,
        p_order=order.to(torch.int32).contiguous(),
        p_count=live.sum(1, dtype=torch.int32),
        p_out=out_mH,
        m=m,
        k=k,
        H=H,
        ld_m=dz_mk.stride(0),
        ld_k=dz_mk.stride(1),
        ld_b=b_kH.stride(0),
        ld_out=out_mH.stride(0),
        n_tiles=live.shape[1],
        ADD=add,
        **FILTER_TILE | {"BH": BH},
    )
