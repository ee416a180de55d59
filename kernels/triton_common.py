"""Shared by all Triton kernels: names, the shape of a logit, tile sizes, launching.

    u = c · tanh(s / c),   s = logit_scale · (raw + b)        (raw = W x from the library GEMM)

Slabs are token-major, [n, v]: one program owns one row. Scalars of a head are fp64 arguments that
the kernel casts to the type of the logits, so a new temperature or scale compiles nothing.

Names inside a kernel:

    p_x    pointer: a tensor argument, or an address in it that belongs to this program
    d_x    tensor descriptor (a tile is loaded by its offsets)
    ld_x   elements from one row of p_x to the next
    n_x    run-time count; n, v, H, S are the rows, columns, hidden size and slots of the call
    i_x    scalar index or position: of the program, of a loop
    o_x    block of offsets: columns, rows, slots
    m_x    mask or condition
    b_x    value in registers: a loaded or computed block, or a scalar of the row
    CAPS   compile-time constant; BN, BV, BH, SB are tile sizes in rows, columns, hidden, slots

Kernels are launched by keyword. A pointer documented as optional may be None; that compiles a
variant without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import LMHead
from .token_loss import ABSENT as _ABSENT
from .token_loss import NEG as _NEG

NEG = tl.constexpr(_NEG)
ABSENT = tl.constexpr(_ABSENT)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Columns per program and its warps: 16 fp32 per thread.
ROW_TILE = {"BV": 4096, "num_warps": 8}
SLOT_TILE = 64  # slots per block


@triton.jit
def shape_logits(b_raw, p_bias, o_cols, m_cols, scale, cap, CAP: tl.constexpr):
    """u of raw products, in their type; o_cols are the columns in the bias."""
    b_u = b_raw
    if p_bias is not None:
        b_u += tl.load(p_bias + o_cols, mask=m_cols, other=0.0).to(b_raw.dtype)
    b_u *= scale
    if CAP:
        c = tl.full([], cap, b_raw.dtype)
        b_exp = tl.exp(-2.0 * tl.abs(b_u) / c)  # tanh |y| = (1 − e) / (1 + e): no overflow
        b_u = tl.where(b_u < 0.0, -c, c) * ((1.0 - b_exp) / (1.0 + b_exp))
    return b_u


@triton.jit
def round_to(x, to: tl.constexpr):
    """x in the type `to`, rounded to nearest even (the interpreter truncates to bfloat16)."""
    if INTERPRETED and to == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= -65536
        return bits.to(tl.float32, bitcast=True).to(to)
    else:
        return x.to(to)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Run `kernel` on the device of `like`; do nothing for an empty grid."""
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](**arguments)


def scalars(head: LMHead) -> dict[str, float | bool]:
    return {
        "scale": float(head.logit_scale),
        "cap": 0.0 if head.softcap is None else float(head.softcap),
        "CAP": head.softcap is not None,
        "inv_T": 1.0 / head.temperature,
    }


@contextmanager
def sums_at_scale(
    grad_scale: Tensor | None, first: bool, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> Iterator[None]:
    """Context in which products of a scaled dz are written to dX and added to dW and db.

    On entry the sums are multiplied by `grad_scale`, on exit they and dX are divided by it.
    """
    sums = [t for t in (dw, db) if t is not None]
    if grad_scale is not None and not first:
        for t in sums:
            t.mul_(grad_scale)
    yield
    if grad_scale is not None:
        for t in sums if dx is None else [dx, *sums]:
            t.div_(grad_scale)


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right in fp32 (fp64 from fp64), whatever the operands.

    On a CPU (the interpreter) the library has no such product of 16-bit operands: they are widened
    first, which is exact.
    """
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = (first) or += left @ right, summed in fp32 and rounded to out's type once."""
    if first and out.dtype != left.dtype:
        product(left, right, out)
    elif left.is_cuda and out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=0 if first else 1, out=out)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(out.dtype, torch.float32)
        part = torch.mm(left.to(wide), right.to(wide))
        out.copy_(part if first else part.add_(out))
