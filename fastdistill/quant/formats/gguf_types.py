"""The types of GGUF tensors (ggml), as codes, scales and offsets of schemes.py.

    Q4_0, Q5_0, Q8_0        w = d · q            blocks of 32
    IQ4_NL                  w = d · table[q]     blocks of 32
    MXFP4                   w = d · table[q]     blocks of 32, d = 2^(e − 128) of a byte e
    Q4_1, Q5_1              w = d · q + m        blocks of 32
    Q3_K, Q6_K              w = (d · s) · q      blocks of 256, an integer s for each 16 values
    IQ4_XS                  w = (d · s) · table[q]    256, s for each 32 values
    Q2_K                    w = (d · s) · q − d₂ · s₂    256, s and s₂ for each 16 values
    Q4_K, Q5_K              w = (d · s) · q − d₂ · s₂    256, s and s₂ for each 32 values

in fp32, with every operation rounded, as in ggml; other d, d₂ and m are fp16. So 4-bit codes are
LUT4 and signed codes without an offset are INT8, with the same bits. Q5_1 and Q5_K have 32 codes
and an offset: they are neither, and are expanded to fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..schemes import CENTERED, UNSIGNED, Int8Weight, Lut4Weight, QuantWeight, pack_nibbles

# The table of IQ4_NL and IQ4_XS.
_IQ4 = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_MXFP4 = (*_E2M1, 0.0, *(-value for value in _E2M1[1:]))


class Codes(NamedTuple):
    """The contents of B blocks of n values, with one scale for `group` of them."""

    q: Tensor  # uint8 or int8 [B, n]
    scale: Tensor  # fp32 [B, n / group]
    offset: Tensor | None = None  # fp32, as scale


@dataclass(frozen=True)
class GGUFType:
    """A type of tensors: `values` of them are stored in `bytes`."""

    name: str
    values: int
    bytes: int
    dtype: torch.dtype = torch.float32  # of plain numbers
    unpack: Callable[[Tensor], Codes] | None = None  # uint8 [B, bytes] -> codes; None: plain
    group: int = 0  # values that share a scale
    table: tuple[float, ...] = ()  # empty: codes are the numbers themselves
    has_offset: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether a matrix is a Lut4Weight or an Int8Weight, bit for bit."""
        return self.unpack is not None and (bool(self.table) or not self.has_offset)

    @property
    def bits(self) -> float:
        """Bits of a value in memory, quantized if that is exact."""
        if not self.is_exact:
            return 8 * self.dtype.itemsize
        return (4 if self.table else 8) + 32 * (1 + self.has_offset) / self.group


def quantized(kind: GGUFType, shape: tuple[int, int], chunks: Iterator[Tensor]) -> QuantWeight:
    """Return a matrix from its blocks, uint8 [B, bytes] in chunks; kind.is_exact must be true."""
    count, groups = math.prod(shape), math.prod(shape) // kind.group
    scale = torch.empty(groups)
    offset = torch.empty(groups) if kind.has_offset else None
    q = torch.empty(count // 2 if kind.table else count, dtype=torch.uint8)
    at = 0
    for codes in map(_unpacked(kind), chunks):
        part = pack_nibbles(codes.q) if kind.table else codes.q.view(torch.uint8).view(-1)
        start = at * q.numel() // groups
        q[start : start + part.numel()] = part
        _fill(scale, at, codes.scale)
        if offset is not None and codes.offset is not None:
            _fill(offset, at, codes.offset)
        at += codes.scale.numel()
    if not kind.table:
        return Int8Weight(
            shape=shape, block=kind.group, qdata=q.view(torch.int8).view(shape), scale=scale
        )
    lut = torch.tensor(kind.table)
    return Lut4Weight(shape=shape, block=kind.group, qdata=q, scale=scale, lut=lut, offset=offset)


def expanded(kind: GGUFType, shape: tuple[int, ...], chunks: Iterator[Tensor]) -> Tensor:
    """Return a tensor in fp32 from its blocks, uint8 [B, bytes] in chunks."""
    out = torch.empty(math.prod(shape))
    table = torch.tensor(kind.table)
    at = 0
    for codes in map(_unpacked(kind), chunks):
        values = table[codes.q.int()] if kind.table else codes.q.float()
        w = values.view(-1, kind.group).mul_(codes.scale.reshape(-1, 1))
        if codes.offset is not None:
            w += codes.offset.reshape(-1, 1)
        _fill(out, at, w)
        at += w.numel()
    return out.view(shape)


def _unpacked(kind: GGUFType) -> Callable[[Tensor], Codes]:
    assert kind.unpack is not None
    return kind.unpack


def _fill(out: Tensor, at: int, values: Tensor) -> None:
    out[at : at + values.numel()] = values.reshape(-1)


def _half(blocks: Tensor, at: int) -> Tensor:  # fp32 [B, 1]
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor, width: int) -> Tensor:  # uint8 [B, 2 · n]
    """Return the low nibbles of every `width` bytes, followed by the high ones."""
    runs = data.reshape(len(data), -1, 1, width)
    return torch.cat([runs & 15, runs >> 4], 2).view(len(data), -1)


def _bits(data: Tensor, width: int, bits: int) -> Tensor:  # uint8 [B, n · 8 / bits]
    """Return the lowest bits of every `width` bytes, followed by the next ones."""
    runs = data.reshape(len(data), -1, 1, width)
    parts = [runs >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, 2).view(len(data), -1)


def _signed(q: Tensor, zero: int) -> Tensor:  # int8
    return q.to(torch.int8) - zero


def _q4_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 2:], 16), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _fifth_bits(data: Tensor) -> Tensor:  # uint8 [B, 32] of 4 bytes
    return (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).view(len(data), -1) << 4


def _q5_0(blocks: Tensor) -> Codes:
    q = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return Codes(_signed(q, 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Codes:
    q = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return Codes(q, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Codes:
    scales = blocks[:, :16]
    scale, least = _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4)
    return Codes(_bits(blocks[:, 16:80], 32, 2), scale, -least)


def _q3_k(blocks: Tensor) -> Codes:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scale = _half(blocks, 108) * _signed(_nibbles(low, 8) | _bits(high, 4, 2) << 4, 32)
    third = _bits(blocks[:, :32], 32, 1) << 2
    # q − 4 + 4 · third bit in −4..3, and 8 more for the table of −8..7
    return Codes(_bits(blocks[:, 32:96], 32, 2) + third + 4, scale)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:  # fp32 [B, 8] each
    """Return the scales and offsets of Q4_K and Q5_K: 8 + 8 integers of 6 bits in 12 bytes."""
    a, b, c = blocks[:, 4:16].split(4, 1)
    scales = torch.cat([a & 63, c & 15 | (a >> 2) & 48], 1)
    least = torch.cat([b & 63, c >> 4 | (b >> 2) & 48], 1)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * least)


def _q4_k(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 16:], 32), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Codes:
    q = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << 4
    return Codes(q, *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> Codes:
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    q = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << 4
    return Codes(_signed(q, 32), scale)


def _iq4_xs(blocks: Tensor) -> Codes:
    low = (blocks[:, 4:8].unsqueeze(-1) >> torch.tensor([0, 4], dtype=torch.uint8)) & 15
    twos = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (blocks[:, 2:4].unsqueeze(-1) >> twos) & 3
    scales = low.view(len(blocks), 8) | high.view(len(blocks), 8) << 4
    return Codes(_nibbles(blocks[:, 8:], 16), _half(blocks, 0) * _signed(scales, 32))


def _mxfp4(blocks: Tensor) -> Codes:
    scale = (blocks[:, :1].double() - 128).exp2().float()
    return Codes(_nibbles(blocks[:, 1:], 16), scale)


TYPES = {
    0: GGUFType("F32", 1, 4),
    1: GGUFType("F16", 1, 2, torch.float16),
    30: GGUFType("BF16", 1, 2, torch.bfloat16),
    2: GGUFType("Q4_0", 32, 18, unpack=_q4_0, group=32, table=CENTERED),
    3: GGUFType("Q4_1", 32, 20, unpack=_q4_1, group=32, table=UNSIGNED, has_offset=True),
    6: GGUFType("Q5_0", 32, 22, unpack=_q5_0, group=32),
    7: GGUFType("Q5_1", 32, 24, unpack=_q5_1, group=32, has_offset=True),
    8: GGUFType("Q8_0", 32, 34, unpack=_q8_0, group=32),
    10: GGUFType("Q2_K", 256, 84, unpack=_q2_k, group=16, table=UNSIGNED, has_offset=True),
    11: GGUFType("Q3_K", 256, 110, unpack=_q3_k, group=16, table=CENTERED),
    12: GGUFType("Q4_K", 256, 144, unpack=_q4_k, group=32, table=UNSIGNED, has_offset=True),
    13: GGUFType("Q5_K", 256, 176, unpack=_q5_k, group=32, has_offset=True),
    14: GGUFType("Q6_K", 256, 210, unpack=_q6_k, group=16),
    20: GGUFType("IQ4_NL", 32, 18, unpack=_q4_0, group=32, table=_IQ4),
    23: GGUFType("IQ4_XS", 256, 136, unpack=_iq4_xs, group=32, table=_IQ4),
    39: GGUFType("MXFP4", 32, 17, unpack=_mxfp4, group=32, table=_MXFP4),
}
# Types of ggml that are not read.
OTHERS = dict(
    zip(
        (9, 15, 16, 17, 18, 19, 21, 22, 24, 25, 26, 27, 28, 29, 34, 35, 40, 41),
        "Q8_1 Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S I8 I16 I32 I64 F64 IQ1_M TQ1_0 TQ2_0 "
        "NVFP4 Q1_0".split(),
        strict=True,
    )
)
