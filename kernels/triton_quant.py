"""Dequantize 4-bit weights and quantize rows, if csrc/cuda_quant.cu was not built.

    w_i = lut[q_i] · scale[i / block] (+ offset[i / block])     (8-bit results: · row_inv[i / cols])
    nested:  scale[b] = code[absmax[b]] · nested_absmax[b / nested_block] + nested_offset
    rows:    scale_r = amax_r / top,   q_ri = round(x_ri · (top / amax_r)),   top = 127 | 448

q_i is a nibble: element 2i is the high half of byte i, 2i+1 the low one. NF4 in blocks of 64 to
bf16 moves 2.56 bytes per weight, most of them the result. A program takes the bytes whose weights
are one 16-byte store per thread (16-bit results), and the table is read from L1.

Every product and sum is rounded to fp32 by itself, then the result once, so that all backends give
the same bits. enable_fp_fusion=False stops LLVM and ptxas from contracting into FMAs. fp8 is stored
as uint8: below sm_89 there is no fp8 type.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .gpu_launch import launch
from .triton_common import INTERPRETED, round_to

EXPAND_TILE = {"BB": 512, "num_warps": 4}  # bytes per program
ROW_TILE = {"BK": 2048, "num_warps": 8}
EXACT = {"enable_fp_fusion": False}
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

INF_BITS = tl.constexpr(0x7F800000)
ROUNDING = tl.constexpr(
    1.5 * 2.0**23
)  # the low bits of x + ROUNDING are x, rounded to nearest even
FINE = tl.constexpr(2.0**14)  # likewise in units of 2⁻⁹, the smallest e4m3


@triton.jit
def to_int8(x):
    """Round to nearest even, clamp to ±127; NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return (x + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_e4m3(x):
    """The bits of float8_e4m3fn: rounded to nearest even, clamped to ±448; NaN stays NaN."""
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
def to_storage(x, to: tl.constexpr):
    """x in the type `to`; uint8 means fp8."""
    if to == tl.int8:
        return to_int8(x)
    elif to == tl.uint8:
        return to_e4m3(x)
    else:
        return round_to(x, to)


@triton.jit
def repeat(values, R: tl.constexpr, BB: tl.constexpr):
    """Repeat each of R values BB / R times."""
    return tl.reshape(tl.broadcast_to(values[:, None], [R, BB // R]), [BB])


@triton.jit
def rounded_sum(x, y):
    """x + y of fp32 blocks, where x is a product and rounded by itself.

    On sm_100 the ptxas of Triton 3.6 contracts pairs (mul.rn.f32x2, add.rn.f32x2) in spite of
    enable_fp_fusion=False; LLVM forms no pairs of assembly.
    """
    if INTERPRETED:
        return x + y
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def affine(
    b_w,
    o_blocks,
    m_blocks,
    p_scale,
    p_absmax,
    p_code,
    p_nested_offset,
    p_offset,
    NESTED_BLOCK: tl.constexpr,
    R: tl.constexpr,
    BB: tl.constexpr,
):
    """w · scale + offset, with those of the blocks o_blocks [R]."""
    if p_absmax is None:
        b_s = tl.load(p_scale + o_blocks, mask=m_blocks, other=0.0)
    else:
        b_absmax = tl.load(p_absmax + o_blocks, mask=m_blocks, other=0).to(tl.int32)
        b_s = tl.load(p_code + b_absmax) * tl.load(
            p_scale + o_blocks // NESTED_BLOCK, mask=m_blocks, other=0.0
        )
        b_s += tl.load(p_nested_offset)
    b_w *= repeat(b_s, R, BB)
    if p_offset is not None:
        b_offset = repeat(tl.load(p_offset + o_blocks, mask=m_blocks, other=0.0), R, BB)
        b_w = rounded_sum(b_w, b_offset)
    return b_w


@triton.jit
def expand(
    p_q,
    p_scale,
    p_absmax,
    p_code,
    p_nested_offset,
    p_offset,
    p_lut,
    p_row_inv,
    p_out,
    n_weights,
    n_bytes,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    BB: tl.constexpr,
):
    """w_i = lut[q_i] · scale[i / BLOCK] (+ offset[i / BLOCK]) (· row_inv[i / COLS]).

    Args:
        p_q: uint8 [n_bytes], two 4-bit codes each, the high half first.
        p_scale: fp32 [blocks]; with p_absmax, fp32 [blocks / NESTED_BLOCK].
        p_absmax: uint8 [blocks] or None; then scale = code[absmax] · p_scale + nested_offset.
        p_code: fp32 [256] or None. p_nested_offset: fp32, one element, or None.
        p_offset: fp32 [blocks] or None. p_lut: fp32 [16].
        p_row_inv: fp32 [n_weights / COLS] or None, for 8-bit results.
        p_out: [n_weights]: fp32, bf16, fp16, int8, or fp8 as uint8.

    Program i owns BB bytes: 2 · BB weights.
    """
    i_start = tl.program_id(0).to(tl.int64) * BB
    o_bytes = i_start + tl.arange(0, BB)
    b_q = tl.load(p_q + o_bytes, mask=o_bytes < n_bytes, other=0).to(tl.int32)
    WHOLE: tl.constexpr = BLOCK % 2 == 0 and 2 * BB % BLOCK == 0
    R: tl.constexpr = 2 * BB // BLOCK if WHOLE else BB
    if WHOLE:  # scale and offset of a block are read once
        o_blocks = 2 * i_start // BLOCK + tl.arange(0, R)
        m_blocks = o_blocks * BLOCK < n_weights
    else:
        o_blocks = 2 * o_bytes // BLOCK
        m_blocks = o_bytes < n_bytes
    b_high = affine(
        tl.load(p_lut + (b_q >> 4)),
        o_blocks,
        m_blocks,
        p_scale,
        p_absmax,
        p_code,
        p_nested_offset,
        p_offset,
        NESTED_BLOCK,
        R,
        BB,
    )
    if BLOCK % 2 == 1:  # the halves of a byte may lie in two blocks
        o_blocks = (2 * o_bytes + 1) // BLOCK
        m_blocks = 2 * o_bytes + 1 < n_weights
    b_low = affine(
        tl.load(p_lut + (b_q & 15)),
        o_blocks,
        m_blocks,
        p_scale,
        p_absmax,
        p_code,
        p_nested_offset,
        p_offset,
        NESTED_BLOCK,
        R,
        BB,
    )
    o_weights = 2 * i_start + tl.arange(0, 2 * BB)
    b_w = tl.interleave(b_high, b_low)
    if p_row_inv is not None:
        if COLS % (2 * BB) == 0:
            b_w *= tl.load(p_row_inv + 2 * i_start // COLS)
        else:
            b_w *= tl.load(p_row_inv + o_weights // COLS, mask=o_weights < n_weights, other=0.0)
    tl.store(p_out + o_weights, to_storage(b_w, p_out.dtype.element_ty), mask=o_weights < n_weights)


@triton.jit
def quantize_row(p_x, p_q, p_scale, n_cols, TOP: tl.constexpr, BK: tl.constexpr):
    """scale_r = amax_r / TOP,  q_ri = round(x_ri · (TOP / amax_r)),  amax_r = max |x_ri|.

    Args:
        p_x: [rows, n_cols] fp32, bf16 or fp16, contiguous.
        p_q: [rows, n_cols] int8, or fp8 as uint8. p_scale: fp32 [rows].

    Program r owns row r and walks it twice in blocks of BK columns.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_x += i_row * n_cols
    p_q += i_row * n_cols
    # As integers, magnitudes of floats keep their order, with infinity and then NaN on top.
    b_bits = tl.zeros([BK], tl.int32)
    for i_col in range(0, n_cols, BK):
        o_cols = i_col + tl.arange(0, BK)
        b_x = tl.load(p_x + o_cols, mask=o_cols < n_cols, other=0.0).to(tl.float32)
        b_bits = tl.maximum(b_bits, b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    b_max_bits = tl.max(b_bits, 0)
    b_amax = b_max_bits.to(tl.float32, bitcast=True)
    # Above this, TOP / amax is finite. A row below it (1.4e-36) counts as zeros.
    m_finite = b_max_bits < INF_BITS
    m_usable = m_finite & (b_amax > TOP * 2.0**-128)
    tl.store(
        p_scale + i_row,
        tl.where(m_usable, tl.div_rn(b_amax, TOP), tl.where(m_finite, 0.0, float("nan"))),
    )
    b_factor = tl.div_rn(TOP, tl.where(m_usable, b_amax, 1.0))
    for i_col in range(0, n_cols, BK):
        o_cols = i_col + tl.arange(0, BK)
        b_x = tl.load(p_x + o_cols, mask=o_cols < n_cols, other=0.0).to(tl.float32)
        b_y = tl.where(m_usable, b_x, 0.0) * b_factor
        tl.store(p_q + o_cols, to_storage(b_y, p_q.dtype.element_ty), mask=o_cols < n_cols)


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
        "triton_quant:expand",
        (triton.cdiv(out.numel(), 2 * EXPAND_TILE["BB"]),),
        out,
        p_q=qdata,
        p_scale=scale,
        p_absmax=absmax,
        p_code=code,
        p_nested_offset=nested_offset,
        p_offset=offset,
        p_lut=lut,
        p_row_inv=row_inv,
        p_out=_bytes(out),
        n_weights=out.numel(),
        n_bytes=triton.cdiv(out.numel(), 2),
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
        "triton_quant:quantize_row",
        (rows,),
        x,
        p_x=x,
        p_q=_bytes(q),
        p_scale=scale,
        n_cols=cols,
        TOP=TOP[q.dtype],
        **options,
    )
