"""Gradient products that skip tiles of negligible dz: opt-in, and never the slots.

    dX = Σ_live dz_tile W_tile,   dW_tile = Σ_live dz_tileᵀ X_tile,   live: max |dz_tile| ≥ ε

Away from the asked ids dz is a multiple of the student's softmax, which a trained model puts on few
tokens: most tiles of 128 × 128 hold nothing above ε and cost one read of 2 bytes per entry instead
of 4H FLOPs. The slots' gradients, which would keep nearly every tile alive, go through the K-row
kernels in fp32 whatever ε is. Idea of filtering by blocks: Cut Your Losses (Wijmans et al.,
arXiv 2411.09009); there the label keeps its block alive.

Live tiles are listed first (a stable sort of flags, no host read), so that the loops over them have
run-time lengths and no branches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERPRETED, launch, narrowed

FILTER_TILE = {"BN": 128, "BV": 128, "BH": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def mark_live(dz, bar, live, n, v, ld, T, BN: tl.constexpr, BV: tl.constexpr):
    i = tl.program_id(0)
    j = tl.program_id(1)
    rows = i * BN + tl.arange(0, BN)
    cols = j * BV + tl.arange(0, BV)
    inside = (rows < n)[:, None] & (cols < v)[None, :]
    at = dz + rows.to(tl.int64)[:, None] * ld + cols[None, :]
    size = tl.abs(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    top = tl.max(tl.max(size, 1), 0)
    tl.store(live + i * T + j, (top >= tl.load(bar)).to(tl.int32))


@triton.jit
def filtered_hidden(
    dz, weight, order, count, dx, n, v, H, ld, ldw, T,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    rows = i * BN + tl.arange(0, BN)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    rows_dz = dz + rows.to(tl.int64)[:, None] * ld
    acc = tl.zeros([BN, BH], tl.float32)
    for t in range(tl.load(count + i)):
        cols = tl.load(order + i * T + t) * BV + tl.arange(0, BV)
        d = tl.load(
            rows_dz + cols[None, :], mask=(rows < n)[:, None] & (cols < v)[None, :], other=0.0
        )
        w = tl.load(
            weight + cols.to(tl.int64)[:, None] * ldw + h[None, :],
            mask=(cols < v)[:, None] & (h < H)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            d = d.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(d, w, acc)
    out = dx + rows.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(out, acc, mask=(rows < n)[:, None] & (h < H)[None, :])


@triton.jit
def filtered_weight(
    dz, hidden, order, count, dw, n, v, H, ld, ldx, ldw, B,
    FIRST: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    cols = j * BV + tl.arange(0, BV)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros([BV, BH], tl.float32)
    for t in range(tl.load(count + j)):
        rows = tl.load(order + j * B + t) * BN + tl.arange(0, BN)
        d = tl.load(
            dz + rows.to(tl.int64)[:, None] * ld + cols[None, :],
            mask=(rows < n)[:, None] & (cols < v)[None, :],
            other=0.0,
        )
        x = tl.load(
            hidden + rows.to(tl.int64)[:, None] * ldx + h[None, :],
            mask=(rows < n)[:, None] & (h < H)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            d = d.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(d.T, x, acc)
    at = dw + cols.to(tl.int64)[:, None] * ldw + h[None, :]
    inside = (cols < v)[:, None] & (h < H)[None, :]
    if not FIRST:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, narrowed(acc, dw.dtype.element_ty), mask=inside)


def live_tiles(dz_nv: Tensor, bar: Tensor) -> Tensor:
    """int32 [n / 128, v / 128]: 1 where some |dz| ≥ bar (0-dim)."""
    n, v = dz_nv.shape
    grid = (triton.cdiv(n, FILTER_TILE["BN"]), triton.cdiv(v, FILTER_TILE["BV"]))
    live = torch.zeros(grid, dtype=torch.int32, device=dz_nv.device)
    launch(
        mark_live,
        grid,
        dz_nv,
        dz_nv,
        bar,
        live,
        n,
        v,
        dz_nv.stride(0),
        grid[1],
        BN=FILTER_TILE["BN"],
        BV=FILTER_TILE["BV"],
        num_warps=FILTER_TILE["num_warps"],
    )
    return live


def _listed(live: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of flags: the live columns first, in rising order, and how many."""
    order = torch.sort(live, dim=1, descending=True, stable=True).indices
    return order.to(torch.int32).contiguous(), live.sum(1, dtype=torch.int32)


def hidden_product(dz_nv: Tensor, weight_vH: Tensor, live: Tensor) -> Tensor:
    """dz W over the live tiles, fp32 [n, H]."""
    (n, v), H = dz_nv.shape, weight_vH.shape[1]
    order, count = _listed(live)
    dx = dz_nv.new_empty(n, H, dtype=torch.float32)
    BH = min(FILTER_TILE["BH"], max(16, triton.next_power_of_2(H)))
    launch(
        filtered_hidden,
        (live.shape[0], triton.cdiv(H, BH)),
        dz_nv,
        dz_nv,
        weight_vH,
        order,
        count,
        dx,
        n,
        v,
        H,
        dz_nv.stride(0),
        weight_vH.stride(0),
        live.shape[1],
        **FILTER_TILE | {"BH": BH},
    )
    return dx


def add_weight_product(
    dz_nv: Tensor, hidden_nH: Tensor, live: Tensor, dw_vH: Tensor, first: bool
) -> None:
    """dw = (first) or += dzᵀ X over the live tiles, summed in fp32 and rounded once."""
    (n, v), H = dz_nv.shape, hidden_nH.shape[1]
    order, count = _listed(live.t())
    BH = min(FILTER_TILE["BH"], max(16, triton.next_power_of_2(H)))
    launch(
        filtered_weight,
        (live.shape[1], triton.cdiv(H, BH)),
        dz_nv,
        dz_nv,
        hidden_nH,
        order,
        count,
        dw_vH,
        n,
        v,
        H,
        dz_nv.stride(0),
        hidden_nH.stride(0),
        dw_vH.stride(0),
        live.shape[0],
        FIRST=first,
        **FILTER_TILE | {"BH": BH},
    )
