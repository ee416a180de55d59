"""Quantized inference in plain PyTorch: the fallback, and the bitwise reference in tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemes import Int8Weight, Lut4Weight, int8_table, unpack_nibbles

_CHUNK = 1 << 22
FP8 = torch.float8_e4m3fn
TOP = {torch.int8: 127.0, FP8: 448.0}  # the largest value that rows are scaled to


def expand_blocks(values: Tensor, start: int, stop: int, block: int) -> Tensor:
    """Return values[i / block] for start ≤ i < stop; start is a multiple of block."""
    per_block = values[start // block : -(-stop // block)]
    return per_block.repeat_interleave(block)[: stop - start]


def lut4_dequant(weight: Lut4Weight, out: Tensor, row_inverse: Tensor | None = None) -> None:
    """out = lut[q] · scale + offset, times row_inverse (fp32 [N]) for 8-bit results."""
    block, scale = weight.block, weight.scales.view(-1)
    flat, count, cols = out.view(-1), out.numel(), out.shape[-1]
    step = max(1, _CHUNK // (2 * block)) * 2 * block  # whole blocks and whole bytes
    for start in range(0, count, step):
        stop = min(start + step, count)
        q = unpack_nibbles(weight.qdata[start // 2 : -(-stop // 2)], stop - start)
        w = weight.lut[q.long()] * expand_blocks(scale, start, stop, block)
        if weight.offset is not None:
            w = w + expand_blocks(weight.offset.view(-1), start, stop, block)
        if row_inverse is not None:
            w *= row_inverse[torch.arange(start, stop, device=w.device) // cols]
        flat[start:stop] = rounded(w, out.dtype)


def int8_dequant(weight: Int8Weight, out: Tensor) -> None:
    """out = q · scale."""
    (rows, cols), block = weight.shape, weight.block
    scale = weight.scale.view(-1)
    step, per_row = max(1, _CHUNK // cols), cols // block
    for start in range(0, rows, step):
        q = weight.qdata[start : start + step]
        w = q.view(-1, block) * scale[start * per_row :][: q.numel() // block, None]
        out[start : start + step] = w.view(q.shape)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`; int8 to nearest even within ±127, fp8 within ±448."""
    if dtype == torch.int8:
        return values.round().clamp(-127, 127).to(dtype)
    if dtype == FP8:
        return values.clamp(-448, 448).to(dtype)
    return values.to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (q [M, K] of `dtype`, scale fp32 [M]) with x ≈ q · scale.

    A row with NaN or infinity gets the scale NaN, so that its outputs are NaN.
    """
    q, scale, _ = quantize_groups(x, x.shape[1], dtype)
    return q, scale.view(-1)


def quantize_groups(
    x: Tensor, group: int, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q [M, K], scale fp32 [M, K/group], Σq [M, K/group] int32 of int8) per group."""
    groups = x.float().view(x.shape[0], -1, group)
    top = groups.abs().amax(-1)
    fine = top.isfinite()
    limit = torch.full_like(top, TOP[dtype])  # scalar / tensor would be rounded twice
    inverse = limit / top
    usable = fine & inverse.isfinite()  # else 0, or too small to invert
    scale = torch.where(fine, torch.where(usable, top / limit, 0.0), torch.nan)
    inverse = torch.where(usable, inverse, 0.0).unsqueeze(-1)
    # 0 · inf is NaN, which integers cannot represent: zero such groups first.
    q = rounded(torch.where(fine.unsqueeze(-1), groups, 0.0) * inverse, dtype)
    total = q.sum(-1, dtype=torch.int32) if dtype == torch.int8 else scale.new_empty(0)
    return q.view(x.shape), scale, total


def lut4_products(x: Tensor, weight: Lut4Weight, bias: Tensor | None, group: int) -> Tensor:
    """Return int8_products with the table in 8 bits: lut ≈ unit · codes."""
    table, unit = int8_table(weight.lut)
    q = unpack_nibbles(weight.qdata.view(-1), weight.shape[0] * weight.shape[1])
    codes = table[q.long()].view(weight.shape)
    return _products(x, codes, weight.scales * unit, weight.offset, bias, group)


def int8_products(x: Tensor, weight: Int8Weight, bias: Tensor | None, group: int) -> Tensor:
    """Return x Wᵀ + bias, with 8-bit activations per group of columns."""
    return _products(x, weight.qdata, weight.scale, None, bias, group)


def _products(
    x: Tensor,  # [M, K]
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # fp32 [N · weight groups]
    offset: Tensor | None,  # as scale
    bias: Tensor | None,
    group: int,
) -> Tensor:  # [M, N] in x's type
    """Σ_g (Σ_{k ∈ g} qx · codes) · sx · scale (+ sx · Σ qx · offset) + bias.

    Groups are summed in order, in fp32; within a group the sum is exact, since it stays below 2^24.
    """
    q, sx, total = quantize_groups(x, group)
    out = x.new_zeros(x.shape[0], codes.shape[0], dtype=torch.float32)
    scale = scale.view(codes.shape[0], -1)
    offset = None if offset is None else offset.view(scale.shape)
    for g in range(sx.shape[1]):
        at, w = slice(g * group, (g + 1) * group), g * scale.shape[1] // sx.shape[1]
        exact = q[:, at].float() @ codes[:, at].float().t()
        out += exact * (sx[:, g, None] * scale[None, :, w])
        if offset is not None:
            out += (sx[:, g] * total[:, g])[:, None] * offset[None, :, w]
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
