"""The two weight formats that represent every checkpoint, and quantization to them.

    LUT4   w[i] = lut[q[i]] · scale[i / block] (+ offset[i / block])     4 bits and a table of 16
    INT8   w[i] = q[i] · scale[i / block]                                8 bits

are computed in fp32, with separate rounding of product and sum, and then rounded to the output
dtype. i indexes the flattened [N, K] tensor: if K is no multiple of the block, blocks cross rows,
as in bitsandbytes. Element 2j is the high nibble of byte j, 2j + 1 the low one.

NF4 and FP4 (Dettmers et al. 2023, QLoRA), GPTQ, AWQ, MXFP4, NVFP4 and most types of GGUF are LUT4
with other tables, scales and offsets; GGUF Q8_0 is INT8 with a block of 32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import checks
from ..runtime.checks import fail

# Quantiles of the normal distribution (QLoRA, appendix E), as bitsandbytes stores them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# 1 sign, 2 exponent and 1 mantissa bit, divided by 12, in the order of bitsandbytes' codes.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(m / 12 for m in _FP4_MAGNITUDES) + tuple(0 - m / 12 for m in _FP4_MAGNITUDES)
UNSIGNED = tuple(float(i) for i in range(16))  # GPTQ, AWQ and own int4: scale · q + offset
CENTERED = tuple(float(i - 8) for i in range(16))  # GGUF Q4_0 and Q3_K

NESTED = ("scale_code", "scale_scale", "scale_offset")  # names of Nested.parts
SCHEMES = ("nf4", "fp4", "int4", "int8")
BLOCK = 64
_CHUNK = 1 << 18  # weights quantized at a time: their fp32 copies stay in cache


class Nested(NamedTuple):
    """Scales that are quantized themselves:

    scale of block b = code[codes[b]] · scale[b / block] + offset
    """

    codes: Tensor  # uint8 [B]
    code: Tensor  # fp32 [256]
    scale: Tensor  # fp32 [B / block], rounded up
    offset: Tensor  # fp32 []
    block: int

    @classmethod
    def of(cls, codes: Tensor, parts: Sequence[Tensor], block: int) -> Nested:
        code, scale, offset = parts
        return cls(codes, code, scale, offset, block)

    @property
    def parts(self) -> list[Tensor]:
        return [self.code, self.scale, self.offset]

    def expand(self) -> Tensor:  # fp32 [B]
        blocks = torch.arange(self.codes.numel(), device=self.codes.device) // self.block
        return self.code[self.codes.long()] * self.scale[blocks] + self.offset


@dataclass(frozen=True, kw_only=True)
class Lut4Weight:
    """A 4-bit weight [N, K]; all tensors are on one device.

    `perm` [K]: column j is column perm[j] of the layer's input (GPTQ's act-order)."""

    shape: tuple[int, int]
    block: int
    qdata: Tensor  # uint8 [N·K / 2], rounded up
    scale: Tensor | Nested  # fp32 [N·K / block], rounded up
    lut: Tensor  # fp32 [16]
    offset: Tensor | None = None  # fp32, as scale
    perm: Tensor | None = None  # int64 [K]

    def __post_init__(self) -> None:
        """Check dtypes and lengths, which kernels rely on."""
        count = math.prod(self.shape)
        checks.integer("block", self.block, 1)
        blocks = -(-count // self.block)
        _expect("qdata", self.qdata, torch.uint8, -(-count // 2))
        _expect("lut", self.lut, torch.float32, 16)
        if isinstance(self.scale, Nested):
            checks.integer("scale block", self.scale.block, 1)
            _expect("scale codes", self.scale.codes, torch.uint8, blocks)
            _expect("scale code", self.scale.code, torch.float32, 256)
            _expect("scale scale", self.scale.scale, torch.float32, -(-blocks // self.scale.block))
            _expect("scale offset", self.scale.offset, torch.float32, 1)
        else:
            _expect("scale", self.scale, torch.float32, blocks)
        if self.offset is not None:
            _expect("offset", self.offset, torch.float32, blocks)
        if self.perm is not None:
            _expect("perm", self.perm, torch.int64, self.shape[1])

    @property
    def scales(self) -> Tensor:
        """The scales in fp32."""
        return self.scale.expand() if isinstance(self.scale, Nested) else self.scale


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """An 8-bit weight [N, K] with one scale per row (block = K) or per block of a row."""

    shape: tuple[int, int]
    block: int
    qdata: Tensor  # int8 [N, K]
    scale: Tensor  # fp32 [N·K / block]

    def __post_init__(self) -> None:
        """Check dtypes and lengths, which kernels rely on."""
        N, K = self.shape
        checks.integer("block", self.block, 1)
        if K % self.block:
            fail("block", f"a divisor of the row length {K}", self.block)
        _expect("qdata", self.qdata, torch.int8, N * K)
        _expect("scale", self.scale, torch.float32, N * K // self.block)


QuantWeight = Lut4Weight | Int8Weight


def take_rows(weight: QuantWeight, at: slice | Tensor) -> QuantWeight:
    """Return the rows of a slice or of ids [n]: the columns are whole blocks, in their order."""
    N, K = weight.shape
    assert isinstance(weight.scale, Tensor)
    scale = weight.scale.view(N, -1)[at]
    qdata = weight.qdata.view(N, -1)[at]
    shape = (len(qdata), K)
    if isinstance(weight, Int8Weight):
        return replace(weight, shape=shape, qdata=qdata, scale=scale.reshape(-1))
    offset = None if weight.offset is None else weight.offset.view(N, -1)[at].reshape(-1)
    return replace(
        weight, shape=shape, qdata=qdata.reshape(-1), scale=scale.reshape(-1), offset=offset
    )


def take_columns(weight: QuantWeight, at: Tensor) -> QuantWeight:
    """Return a matrix of `len(at)` groups of columns, each of whole blocks, in this order."""
    (N, K), groups = weight.shape, len(at)
    assert isinstance(weight.scale, Tensor)
    if K % groups or K // groups % weight.block or weight.block % 2:
        fail("block", f"a divisor of {K // groups} columns of a group", weight.block)

    def taken(part: Tensor) -> Tensor:
        return part.view(N, groups, -1)[:, at].reshape(-1)

    scale, qdata = taken(weight.scale), taken(weight.qdata)
    if isinstance(weight, Int8Weight):
        return replace(weight, qdata=qdata.view(N, K), scale=scale)
    offset = None if weight.offset is None else taken(weight.offset)
    return replace(weight, qdata=qdata, scale=scale, offset=offset)


def check_row_vector(name: str, value: Tensor | None, rows: int, *, fp32: bool = False) -> None:
    """Check a bias, or with `fp32` a row scale: one number for each of `rows` outputs."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{rows}] or None, got {type(value).__name__}")
    is_right_dtype = value.dtype == torch.float32 if fp32 else value.is_floating_point()
    if tuple(value.shape) != (rows,) or not is_right_dtype:
        kind = "float32" if fp32 else "floating-point"
        expected = f"a {kind} tensor [{rows}], one number for each output"
        fail(name, expected, f"{list(value.shape)} of {short(value.dtype)}")


def short(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.numel() != count or tensor.dtype != dtype:
        got = f"{list(tensor.shape)} of {short(tensor.dtype)}"
        fail(name, f"{count} values of {short(dtype)}", got)


def table(name: str, device: torch.device | str | None = None) -> Tensor:  # fp32 [16]
    values = {"nf4": NF4, "fp4": FP4, "int4": UNSIGNED, "q4_0": CENTERED}[name]
    return torch.tensor(values, dtype=torch.float32, device=device)


def int8_table(lut: Tensor) -> tuple[Tensor, float]:
    """Return (codes int8 [16], unit) with lut ≈ unit · codes.

    Exact for integers, else with an error of at most 1/254 of the largest entry."""
    if bool((lut == lut.round()).all()) and lut.abs().max() <= 127:
        return lut.to(torch.int8), 1.0
    top = lut.abs().max().item()
    return (lut * (127 / top)).round().to(torch.int8), top / 127


def quantize(weight: Tensor, scheme: str, *, block: int = BLOCK) -> QuantWeight:
    """Quantize a floating-point weight [N, K] with `scheme`.

    nf4, fp4: bit-identical to bitsandbytes (absmax of each block of the flattened tensor, nearest
    table entry). int4: 16 equal steps from the block's minimum to its maximum. int8: 255 symmetric
    steps, one scale per row.

    Raises:
        ValueError: an unknown scheme, a weight that is not floating point and 2-D, an odd block.
    """
    checks.choice("scheme", scheme, SCHEMES)
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{list(weight.shape)} of {short(weight.dtype)}"
        fail("weight", "a floating-point [N, K]", got)
    if block < 2 or block % 2:
        fail("block", "an even number of at least 2", block)
    if scheme == "int8":
        return _int8(weight)
    N, K = weight.shape
    flat = weight.detach().reshape(-1)
    lut = table(scheme, weight.device)
    qdata = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    scales, offsets = [], []
    step = max(block, _CHUNK // block * block)
    for start in range(0, flat.numel(), step):
        values = flat[start : start + step].float()
        q, scale, offset = _chunk(values, scheme, lut, block)
        scales.append(scale)
        offsets.append(offset)
        packed = pack_nibbles(q)
        qdata[start // 2 : start // 2 + packed.numel()] = packed
    scale = torch.cat(scales)
    _finite(scale)
    return Lut4Weight(
        shape=(N, K),
        block=block,
        qdata=qdata,
        scale=scale,
        lut=lut,
        offset=torch.cat(offsets) if scheme == "int4" else None,
    )


def _chunk(values: Tensor, scheme: str, lut: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q uint8, scale, offset) of whole blocks; the last one may be short."""
    count = values.numel()
    short = -count % block
    if short:  # pad with the last value, which does not change the extremes
        values = torch.cat([values, values[-1:].expand(short)])
    by_block = values.view(-1, block)
    if scheme == "int4":
        low, high = by_block.amin(-1), by_block.amax(-1)
        scale = (high - low) / 15
        least = torch.finfo(torch.float32).tiny  # the scale of equal values is 0
        steps = (by_block - low[:, None]) / scale.clamp(min=least)[:, None]
        return steps.round().clamp_(0, 15).to(torch.uint8).view(-1)[:count], scale, low
    scale = by_block.abs().amax(-1)
    # Multiply by the reciprocal, as bitsandbytes does: a division would round differently.
    unit = by_block.mul(scale.clamp(min=1e-38).reciprocal()[:, None]).clamp_(-1, 1).view(-1)[:count]
    return _nearest(unit, lut), scale, scale


def _nearest(unit: Tensor, lut: Tensor) -> Tensor:
    """Return the codes of the nearest entries; ties go to the lower one.

    FP4 has two zeros: as in bitsandbytes, small positive values get the second one's code.
    """
    values, codes = lut.sort(stable=True)
    rank = torch.zeros(unit.shape, dtype=torch.uint8, device=unit.device)
    for halfway in ((values[:-1] + values[1:]) / 2).unbind():
        rank += unit > halfway  # fifteen comparisons in cache are faster than a search
    return rank if torch.equal(values, lut) else codes.to(torch.uint8)[rank.int()]


def _int8(weight: Tensor) -> Int8Weight:
    N, K = weight.shape
    qdata = torch.empty(N, K, dtype=torch.int8, device=weight.device)
    scale = torch.empty(N, dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // max(K, 1))
    for start in range(0, N, rows):
        values = weight[start : start + rows].detach().float()
        top = values.abs().amax(-1)
        inverse = torch.full_like(top, 127) / top  # scalar / tensor would round twice
        usable = inverse.isfinite() | ~top.isfinite()
        scale[start : start + rows] = torch.where(usable, top / 127, 0.0)
        inverse = torch.where(usable, inverse, 0.0)
        qdata[start : start + rows] = (values * inverse[:, None]).round_().to(torch.int8)
    _finite(scale)
    return Int8Weight(shape=(N, K), block=K, qdata=qdata, scale=scale)


def _finite(scale: Tensor) -> None:
    """Raise ValueError for NaN or infinity, which propagate to the scale of their block."""
    if not bool(scale.isfinite().all()):
        fail("weight", "finite values", "NaN or infinity")


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack uint8 codes below 16, flattened, two per byte, the first in the high nibble."""
    q = q.reshape(-1)
    if q.numel() % 2:
        q = torch.cat([q, q.new_zeros(1)])
    return q[::2] << 4 | q[1::2]


def unpack_nibbles(qdata: Tensor, count: int) -> Tensor:  # uint8 [count]
    return torch.stack([qdata >> 4, qdata & 15], -1).reshape(-1)[:count]
