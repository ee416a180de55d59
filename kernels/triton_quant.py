"""Quantised weights expanded and rows quantised: csrc/cuda_quant.cu, where that is not built.

    w_i = lut[q_i] · scale[i / block] (+ offset[i / block])     (8-bit results: · row_inv[i / cols])
    nested:  scale[b] = code[absmax[b]] · nested_absmax[b / nested_block] + nested_offset
    rows:    scale_r = amax_r / top,   q_ri = round(x_ri · (top / amax_r)),   top = 127 | 448

q_i is a nibble: element 2i is the high half of byte i, 2i+1 the low one. NF4 in blocks of 64 to
bf16 moves 2.56 bytes per weight, most of them the result. A program takes the bytes whose weights
are one 16-byte store per thread (16-bit results), and the table is read from L1.

Every product and sum is rounded to fp32 by itself, then the result once, so that all backends give
the same bits. Contraction into FMAs is a decision of LLVM and ptxas: enable_fp_fusion=False forbids
it to both. fp8 is stored as uint8, which every GPU can: below sm_89 there is no fp8 type.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .triton_common import INTERPRETED, launch, narrowed

EXPAND_TILE = {"BB": 512, "num_warps": 4}  # bytes per program
ROW_TILE = {"BK": 2048, "num_warps": 8}
EXACT = {"enable_fp_fusion": False}
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

INF_BITS = tl.constexpr(0x7F800000)
ROUNDING = tl.constexpr(1.5 * 2.0**23)  # x + this has x, rounded to nearest even, in its low bits
FINE = tl.constexpr(2.0**14)  # likewise in units of 2⁻⁹, the smallest e4m3


@triton.jit
def to_int8(x):
    """To nearest even within ±127, NaN to 0."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return (x + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_e4m3(x):
    """The bits of float8_e4m3fn: to nearest even, what is too large to ±448, NaN stays NaN."""
    NATIVE: tl.constexpr = False if INTERPRETED else cuda_capability_geq(8, 9)
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(x) + FINE).to(tl.int32, bitcast=True) - 0x46800000  # − the bits of FINE
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))  # 2⁻⁶: no denormals
        code = tl.where(size > INF_BITS, 0x7F, code)
        return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def stored(x, to: tl.constexpr):
    """x as the type `to`, in which uint8 is fp8."""
    if to == tl.int8:
        return to_int8(x)
    elif to == tl.uint8:
        return to_e4m3(x)
    else:
        return narrowed(x, to)


@triton.jit
def spread(values, R: tl.constexpr, BB: tl.constexpr):
    """R values, each for BB / R neighbours."""
    return tl.reshape(tl.broadcast_to(values[:, None], [R, BB // R]), [BB])


@triton.jit
def affine(
    w, b, inside, scale, absmax, code, nested_offset, offset,
    NESTED_BLOCK: tl.constexpr, R: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """w · scale + offset of the blocks b [R]."""
    if absmax is None:
        s = tl.load(scale + b, mask=inside, other=0.0)
    else:
        at = tl.load(absmax + b, mask=inside, other=0).to(tl.int32)
        s = tl.load(code + at) * tl.load(scale + b // NESTED_BLOCK, mask=inside, other=0.0)
        s += tl.load(nested_offset)
    w *= spread(s, R, BB)
    if offset is not None:
        w += spread(tl.load(offset + b, mask=inside, other=0.0), R, BB)
    return w


@triton.jit
def expand(
    qdata, scale, absmax, code, nested_offset, offset, lut, row_inv, out, count, size,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, COLS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BB
    byte = start + tl.arange(0, BB)
    q = tl.load(qdata + byte, mask=byte < size, other=0).to(tl.int32)
    WHOLE: tl.constexpr = BLOCK % 2 == 0 and 2 * BB % BLOCK == 0
    R: tl.constexpr = 2 * BB // BLOCK if WHOLE else BB
    if WHOLE:  # what belongs to a block is read once
        b = 2 * start // BLOCK + tl.arange(0, R)
        inside = b * BLOCK < count
    else:
        b = 2 * byte // BLOCK
        inside = byte < size
    high = affine(
        tl.load(lut + (q >> 4)), b, inside, scale, absmax, code, nested_offset, offset,
        NESTED_BLOCK, R, BB,
    )  # fmt: skip
    if BLOCK % 2 == 1:  # the halves of a byte may lie in two blocks
        b = (2 * byte + 1) // BLOCK
        inside = 2 * byte + 1 < count
    low = affine(
        tl.load(lut + (q & 15)), b, inside, scale, absmax, code, nested_offset, offset,
        NESTED_BLOCK, R, BB,
    )  # fmt: skip
    i = 2 * start + tl.arange(0, 2 * BB)
    w = tl.interleave(high, low)
    if row_inv is not None:
        if COLS % (2 * BB) == 0:
            w *= tl.load(row_inv + 2 * start // COLS)
        else:
            w *= tl.load(row_inv + i // COLS, mask=i < count, other=0.0)
    tl.store(out + i, stored(w, out.dtype.element_ty), mask=i < count)


@triton.jit
def quantize_row(x, q, scale, cols, TOP: tl.constexpr, BK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    x += r * cols
    q += r * cols
    # As integers the magnitudes of floats have their order, with infinity and then NaN on top.
    bits = tl.zeros([BK], tl.int32)
    for k in range(0, cols, BK):
        i = k + tl.arange(0, BK)
        v = tl.load(x + i, mask=i < cols, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(bits, 0)
    amax = most.to(tl.float32, bitcast=True)
    # Above this bar top / amax is finite. Below it, within 1.4e-36, a row counts as zeros.
    finite = most < INF_BITS
    usable = finite & (amax > TOP * 2.0**-128)
    tl.store(
        scale + r,
        tl.where(usable, tl.div_rn(amax, TOP), tl.where(finite, 0.0, float("nan"))),
    )
    factor = tl.div_rn(TOP, tl.where(usable, amax, 1.0))
    for k in range(0, cols, BK):
        i = k + tl.arange(0, BK)
        v = tl.load(x + i, mask=i < cols, other=0.0).to(tl.float32)
        y = tl.where(usable, v, 0.0) * factor
        tl.store(q + i, stored(y, q.dtype.element_ty), mask=i < cols)


def _bytes(out: Tensor) -> Tensor:
    return out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out


def lut4_dequant(
    qdata: Tensor,  # uint8 [⌈count / 2⌉]
    scale: Tensor,  # fp32 [⌈count / block⌉]
    offset: Tensor | None,  # fp32, as scale
    lut: Tensor,  # fp32 [16]
    out: Tensor,  # count elements, contiguous: fp32 | bf16 | fp16 | fp8-e4m3fn | int8
    block: int,
    row_inv: Tensor | None = None,  # fp32 [⌈count / cols⌉], for 8-bit results
    cols: int | None = None,
) -> None:
    """out = lut[q] · scale + offset, times row_inv."""
    _expand(qdata, scale, None, None, None, 1, offset, lut, out, block, row_inv, cols)


def lut4_dequant_nested(
    qdata: Tensor,
    absmax: Tensor,  # uint8 [⌈count / block⌉]
    code: Tensor,  # fp32 [256]
    nested_absmax: Tensor,  # fp32 [⌈blocks / nested_block⌉]
    nested_offset: Tensor,  # fp32, one element: read on the device
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
    out: Tensor,
    block: int,
    row_inv: Tensor | None = None,
    cols: int | None = None,
) -> None:
    """lut4_dequant with scale = code[absmax] · nested_absmax + nested_offset."""
    nested = (nested_absmax, absmax, code, nested_offset, nested_block)
    _expand(qdata, *nested, offset, lut, out, block, row_inv, cols)


def _expand(
    qdata: Tensor,
    scale: Tensor,
    absmax: Tensor | None,
    code: Tensor | None,
    nested_offset: Tensor | None,
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
    out: Tensor,
    block: int,
    row_inv: Tensor | None,
    cols: int | None,
) -> None:
    if row_inv is not None and out.dtype not in TOP:
        raise ValueError(f"row_inv: expected with int8 or fp8 results only, got {out.dtype}")
    options: dict[str, Any] = EXPAND_TILE | EXACT
    launch(
        expand,
        (triton.cdiv(out.numel(), 2 * EXPAND_TILE["BB"]),),
        out,
        qdata,
        scale,
        absmax,
        code,
        nested_offset,
        offset,
        lut,
        row_inv,
        _bytes(out),
        out.numel(),
        triton.cdiv(out.numel(), 2),
        BLOCK=block,
        NESTED_BLOCK=nested_block,
        COLS=0 if row_inv is None else cols,
        **options,
    )


def quantize_rows(
    x: Tensor,  # fp32 | bf16 | fp16 [rows, cols], contiguous, as q
    q: Tensor,  # int8 | fp8-e4m3fn [rows, cols]
    scale: Tensor,  # fp32 [rows]
) -> None:
    """x ≈ q · scale; a row with NaN or infinity has the scale NaN and zeros in q."""
    rows, cols = x.shape
    BK = min(ROW_TILE["BK"], max(16, triton.next_power_of_2(cols)))
    options: dict[str, Any] = ROW_TILE | EXACT | {"BK": BK}
    launch(
        quantize_row,
        (rows,),
        x,
        x,
        _bytes(q),
        scale,
        cols,
        TOP=TOP[q.dtype],
        **options,
    )
