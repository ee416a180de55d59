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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_launch import launch
from .triton_common import INTERPRETED, round_to

FILTER_TILE = {"BN": 128, "BV": 128, "BH": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def mark_live(
    p_dz, p_threshold, p_live, n, v, ld_dz, n_col_tiles, BN: tl.constexpr, BV: tl.constexpr
):
    """live[i, j] = 1 if max |dz| of tile (i, j) reaches the threshold, else 0.

    Args:
        p_dz: [n, v], row stride ld_dz. p_threshold: one element.
        p_live: int32 [⌈n / BN⌉, n_col_tiles], the result.

    Program (i, j) owns one tile [BN, BV] of dz.
    """
    i_row = tl.program_id(0)
    i_col = tl.program_id(1)
    o_rows = i_row * BN + tl.arange(0, BN)
    o_cols = i_col * BV + tl.arange(0, BV)
    m_tile = (o_rows < n)[:, None] & (o_cols < v)[None, :]
    p_tile = p_dz + o_rows.to(tl.int64)[:, None] * ld_dz + o_cols[None, :]
    b_abs = tl.abs(tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32))
    b_max = tl.max(tl.max(b_abs, 1), 0)
    tl.store(p_live + i_row * n_col_tiles + i_col, (b_max >= tl.load(p_threshold)).to(tl.int32))


@triton.jit
def filtered_hidden(
    p_dz,
    p_w,
    p_order,
    p_count,
    p_dx,
    n,
    v,
    H,
    ld_dz,
    ld_w,
    n_col_tiles,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """dX = Σ dz_tile W_tile over the live tiles of each block of rows.

    Args:
        p_dz: [n, v], row stride ld_dz. p_w: [v, H], row stride ld_w.
        p_order: int32 [⌈n / BN⌉, n_col_tiles], live column tiles first. p_count: int32 [⌈n / BN⌉],
            how many are live.
        p_dx: fp32 [n, H], contiguous, the result.

    Program (i, j) owns a tile [BN, BH] of dX and walks the live tiles of its rows.
    """
    i_row = tl.program_id(0)
    o_rows = i_row * BN + tl.arange(0, BN)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    p_rows = p_dz + o_rows.to(tl.int64)[:, None] * ld_dz
    b_acc = tl.zeros([BN, BH], tl.float32)
    for i_tile in range(tl.load(p_count + i_row)):
        o_cols = tl.load(p_order + i_row * n_col_tiles + i_tile) * BV + tl.arange(0, BV)
        b_dz = tl.load(
            p_rows + o_cols[None, :], mask=(o_rows < n)[:, None] & (o_cols < v)[None, :], other=0.0
        )
        b_w = tl.load(
            p_w + o_cols.to(tl.int64)[:, None] * ld_w + o_h[None, :],
            mask=(o_cols < v)[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            b_dz = b_dz.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_acc = tl.dot(b_dz, b_w, b_acc)
    p_out = p_dx + o_rows.to(tl.int64)[:, None] * H + o_h[None, :]
    tl.store(p_out, b_acc, mask=(o_rows < n)[:, None] & (o_h < H)[None, :])


@triton.jit
def filtered_weight(
    p_dz,
    p_x,
    p_order,
    p_count,
    p_dw,
    n,
    v,
    H,
    ld_dz,
    ld_x,
    ld_dw,
    n_row_tiles,
    FIRST: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """dW = (FIRST) or += Σ dz_tileᵀ X_tile over the live tiles of each block of columns.

    Args:
        p_dz: [n, v], row stride ld_dz. p_x: [n, H] hidden states, row stride ld_x.
        p_order: int32 [⌈v / BV⌉, n_row_tiles], live row tiles first. p_count: int32 [⌈v / BV⌉],
            how many are live.
        p_dw: [v, H], row stride ld_dw; summed in fp32 and rounded once.

    Program (j, k) owns a tile [BV, BH] of dW and walks the live tiles of its columns.
    """
    i_col = tl.program_id(0)
    o_cols = i_col * BV + tl.arange(0, BV)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    b_acc = tl.zeros([BV, BH], tl.float32)
    for i_tile in range(tl.load(p_count + i_col)):
        o_rows = tl.load(p_order + i_col * n_row_tiles + i_tile) * BN + tl.arange(0, BN)
        b_dz = tl.load(
            p_dz + o_rows.to(tl.int64)[:, None] * ld_dz + o_cols[None, :],
            mask=(o_rows < n)[:, None] & (o_cols < v)[None, :],
            other=0.0,
        )
        b_x = tl.load(
            p_x + o_rows.to(tl.int64)[:, None] * ld_x + o_h[None, :],
            mask=(o_rows < n)[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            b_dz = b_dz.to(tl.float32)
            b_x = b_x.to(tl.float32)
        b_acc = tl.dot(b_dz.T, b_x, b_acc)
    p_out = p_dw + o_cols.to(tl.int64)[:, None] * ld_dw + o_h[None, :]
    m_out = (o_cols < v)[:, None] & (o_h < H)[None, :]
    if not FIRST:
        b_acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, round_to(b_acc, p_dw.dtype.element_ty), mask=m_out)


def live_tiles(dz_nv: Tensor, threshold: Tensor) -> Tensor:
    """int32 [n / 128, v / 128]: 1 for tiles with some |dz| ≥ threshold (0-dim)."""
    n, v = dz_nv.shape
    grid = (triton.cdiv(n, FILTER_TILE["BN"]), triton.cdiv(v, FILTER_TILE["BV"]))
    live = torch.zeros(grid, dtype=torch.int32, device=dz_nv.device)
    launch(
        "triton_filter:mark_live",
        grid,
        dz_nv,
        p_dz=dz_nv,
        p_threshold=threshold,
        p_live=live,
        n=n,
        v=v,
        ld_dz=dz_nv.stride(0),
        n_col_tiles=grid[1],
        BN=FILTER_TILE["BN"],
        BV=FILTER_TILE["BV"],
        num_warps=FILTER_TILE["num_warps"],
    )
    return live


def _sort_tiles(live: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of flags: columns in rising order, live ones first, and how many are live."""
    order = torch.sort(live, dim=1, descending=True, stable=True).indices
    return order.to(torch.int32).contiguous(), live.sum(1, dtype=torch.int32)


def hidden_product(dz_nv: Tensor, weight_vH: Tensor, live: Tensor) -> Tensor:
    """dz W over the live tiles, fp32 [n, H]."""
    (n, v), H = dz_nv.shape, weight_vH.shape[1]
    order, count = _sort_tiles(live)
    dx = dz_nv.new_empty(n, H, dtype=torch.float32)
    BH = min(FILTER_TILE["BH"], max(16, triton.next_power_of_2(H)))
    launch(
        "triton_filter:filtered_hidden",
        (live.shape[0], triton.cdiv(H, BH)),
        dz_nv,
        p_dz=dz_nv,
        p_w=weight_vH,
        p_order=order,
        p_count=count,
        p_dx=dx,
        n=n,
        v=v,
        H=H,
        ld_dz=dz_nv.stride(0),
        ld_w=weight_vH.stride(0),
        n_col_tiles=live.shape[1],
        **FILTER_TILE | {"BH": BH},
    )
    return dx


def add_weight_product(
    dz_nv: Tensor, hidden_nH: Tensor, live: Tensor, dw_vH: Tensor, first: bool
) -> None:
    """dw = (first) or += dzᵀ X over the live tiles, summed in fp32 and rounded once."""
    (n, v), H = dz_nv.shape, hidden_nH.shape[1]
    order, count = _sort_tiles(live.t())
    BH = min(FILTER_TILE["BH"], max(16, triton.next_power_of_2(H)))
    launch(
        "triton_filter:filtered_weight",
        (live.shape[1], triton.cdiv(H, BH)),
        dz_nv,
        p_dz=dz_nv,
        p_x=hidden_nH,
        p_order=order,
        p_count=count,
        p_dw=dw_vH,
        n=n,
        v=v,
        H=H,
        ld_dz=dz_nv.stride(0),
        ld_x=hidden_nH.stride(0),
        ld_dw=dw_vH.stride(0),
        n_row_tiles=live.shape[0],
        FIRST=first,
        **FILTER_TILE | {"BH": BH},
    )
