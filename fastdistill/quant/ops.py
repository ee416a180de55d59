"""torch.library operators of quantized inference: schema, shapes for tracing, dispatch.

fastdistill::lut4_linear    x Wᵀ + b with W in 4 bits
fastdistill::int8_linear    x Wᵀ + b with W in 8 bits
fastdistill::lut4_dequant, int8_dequant    W itself, in a floating-point type
fastdistill::quantize_rows  activations in 8 bits, a scale per token

`compute` selects the arithmetic of the product:

    exact   W is expanded into a reused buffer per device, then multiplied by the library's GEMM:
            the arithmetic of bitsandbytes, GPTQ and AWQ
    int8    8-bit integers on both sides; activations are quantized per token and group of at most
            64 columns (128 with 8-bit weights) on a CPU, per token on a GPU
    fp8     8-bit floats (e4m3) on both sides, per token and per row of W; GPUs from sm_89 on
    auto    int8 on a CPU with VNNI instructions if the shape allows it, else exact

The operators are forward only: a teacher needs no gradient, and the reused W is overwritten.

Every operator checks dtype, length, device and memory of each operand, since the compiled kernels
read from addresses.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime import checks
from ..runtime.checks import fail
from .backends.native import FLOATS
from .backends.table import QuantEngine, engine_for, fast_int8_on_cpu
from .backends.torch_ops import FP8, TOP
from .schemes import NESTED, Int8Weight, Lut4Weight, Nested, check_row_vector, short

COMPUTE = ("auto", "exact", "int8", "fp8")
# Columns that share one activation scale on a CPU. With 4-bit weights at most the columns of one
# weight scale; with 8-bit weights twice as many cost 5 % more KL and take 7 % less time.
GROUP, INT8_GROUP = 64, 128
_STRIDED = ("bias", "row_scale")  # copied before a kernel reads them
_MIN_GROUP = 8  # below this, scaling costs more than multiplying

_library = torch.library.Library("fastdistill", "FRAGMENT")


class _Scratch(threading.local):
    """A growing buffer per thread, device and stream, into which W is expanded.

    Allocating memory per layer costs more than the expansion, because of page faults.
    """

    def __init__(self) -> None:
        self.of: dict[tuple[object, ...], Tensor] = {}

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        key = (device, stream)
        size = math.prod(shape) * dtype.itemsize
        buffer = self.of.get(key)
        if buffer is None or buffer.numel() < size:
            self.of.pop(key, None)
            buffer = None  # free the old buffer before allocating the new one
            buffer = self.of[key] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype).view(shape)


scratch = _Scratch()


def groups(K: int, block: int, max_group: int = GROUP) -> tuple[int, int] | None:
    """Return (columns per weight scale, columns per activation scale) for 8-bit CPU products.

    None if blocks that cross rows would make groups too small."""
    weight_group = math.gcd(K, block)
    group = math.gcd(weight_group, max_group)
    return (weight_group, group) if group >= _MIN_GROUP else None


def unsupported_reason(
    compute: str, device: torch.device, rows: int, K: int, block: int
) -> str | None:
    """Return why `compute` cannot run with a [rows, K] weight on this device; None if it can."""
    if compute in ("auto", "exact"):
        return None
    if device.type == "cpu":
        if compute == "fp8":
            return "it needs a GPU (sm_89 or later); a CPU has compute='int8' and 'exact'"
        if groups(K, block) is None:
            return f"blocks of {block} cross its rows of {K}; use compute='exact' or 'auto'"
        return None
    if rows % 16 or K % 16:
        return f"a GPU's 8-bit products need multiples of 16, not {rows} x {K}; use compute='exact'"
    if compute == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 products need a GPU of sm_89 or later; use compute='int8' or 'exact'"
    return None


def _resolved(compute: str, device: torch.device, rows: int, K: int, block: int) -> str:
    if compute == "auto":
        fast = device.type == "cpu" and fast_int8_on_cpu() and groups(K, block) is not None
        return "int8" if fast else "exact"
    reason = unsupported_reason(compute, device, rows, K, block)
    if reason is not None:
        raise ValueError(f"compute: {compute!r} cannot run on this layer: {reason}")
    return compute


def _check_input(x: Tensor, cols: int | None = None) -> None:
    """Check that x is floating-point [M, K], with K = `cols` if that is known."""
    if x.dim() != 2 or not x.is_floating_point() or cols not in (None, x.shape[1]):
        columns = "K" if cols is None else cols
        got = f"{list(x.shape)} of {short(x.dtype)}"
        fail("x", f"a floating-point tensor [M, {columns}]", got)


def _check_memory(**tensors: Tensor | None) -> None:
    """Check that no memory has been freed, and that the parts of a weight are contiguous."""
    for name, part in tensors.items():
        if part is not None and name not in _STRIDED and not part.is_contiguous():
            got = f"strides {list(part.stride())} of {list(part.shape)}"
            fail(name, "contiguous memory", got, "call .contiguous()")
    for name, part in tensors.items():
        if part is None or not part.numel():
            continue
        last = sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True))
        needed = (part.storage_offset() + last + 1) * part.element_size()
        if part.untyped_storage().nbytes() < needed:
            expected = f"{needed} bytes for {list(part.shape)}"
            fail(name, expected, "memory that has been freed", "load the weight again")


def _check_devices(device: torch.device, **operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.device != device:
            expected = f"a tensor on {device}, as the other operands"
            fail(name, expected, f"one on {tensor.device}")


def _check_outputs(x: Tensor, rows: int, row_scale: Tensor | None, bias: Tensor | None) -> None:
    """Check the operands that have one number for each output."""
    check_row_vector("bias", bias, rows)
    check_row_vector("row_scale", row_scale, rows, fp32=True)
    _check_devices(x.device, bias=bias, row_scale=row_scale)
    _check_memory(bias=bias, row_scale=row_scale)


def _lut4(
    device: torch.device,
    shape: tuple[int, int],
    block: int,
    qdata: Tensor,
    scale: Tensor,
    nested: list[Tensor],
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
) -> Lut4Weight:
    """Return a 4-bit weight after checking its parts."""
    if len(nested) not in (0, 3):
        fail("nested", "no tensor or 3 (code, scale, offset)", len(nested))
    scales = Nested.of(scale, nested, nested_block) if nested else scale
    weight = Lut4Weight(shape=shape, block=block, qdata=qdata, scale=scales, lut=lut, offset=offset)
    parts = dict(zip(NESTED, nested, strict=False))
    _check_devices(device, qdata=qdata, scale=scale, offset=offset, lut=lut, **parts)
    _check_memory(qdata=qdata, scale=scale, offset=offset, lut=lut, **parts)
    return weight


def _int8(device: torch.device, qdata: Tensor, scale: Tensor, block: int) -> Int8Weight:
    """Return an 8-bit weight after checking its parts."""
    if qdata.dim() != 2:
        fail("qdata", "a tensor [N, K]", list(qdata.shape))
    weight = Int8Weight(
        shape=(qdata.shape[0], qdata.shape[1]), block=block, qdata=qdata, scale=scale
    )
    _check_devices(device, qdata=qdata, scale=scale)
    _check_memory(qdata=qdata, scale=scale)
    return weight


def regrouped(weight: Lut4Weight, group: int) -> Lut4Weight:
    """Return a weight with blocks of `group` columns, which do not cross rows."""
    if group == weight.block:
        return weight
    count = math.prod(weight.shape)
    at = torch.arange(0, count, group, device=weight.qdata.device) // weight.block
    offset = None if weight.offset is None else weight.offset.view(-1)[at]
    return replace(weight, block=group, scale=weight.scales.view(-1)[at], offset=offset)


def _lut4_linear(
    x: Tensor,  # [M, K]
    qdata: Tensor,
    scale: Tensor,
    nested: list[Tensor],
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    block: int,
    compute: str,
) -> Tensor:  # [M, N]
    _check_input(x)
    shape, engine = (rows, x.shape[1]), engine_for(x.device)
    weight = _lut4(x.device, shape, block, qdata, scale, nested, nested_block, offset, lut)
    _check_outputs(x, rows, row_scale, bias)
    compute = _resolved(compute, x.device, *shape, block)
    x = x.contiguous()
    if compute == "exact":
        W = scratch.take(shape, _storage(x.dtype), x.device)
        engine.lut4_dequant(weight, W)
        return _exact(x, W, bias)
    if x.device.type == "cpu":
        weight_group, group = groups(shape[1], block) or (block, GROUP)
        weight = regrouped(weight, weight_group)
        return engine.lut4_products(_floats(x), weight, _fp32(bias), group).to(x.dtype)
    assert row_scale is not None
    W = scratch.take(shape, FP8 if compute == "fp8" else torch.int8, x.device)
    engine.lut4_dequant(weight, W, torch.where(row_scale > 0, 1 / row_scale, 0.0))
    return row_products(engine, x, W, row_scale, bias)


def _int8_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    block: int,
    compute: str,
) -> Tensor:
    weight = _int8(x.device, qdata, scale, block)
    (rows, K), engine = weight.shape, engine_for(x.device)
    _check_input(x, K)
    _check_outputs(x, rows, row_scale, bias)
    compute = _resolved(compute, x.device, rows, K, block)
    x = x.contiguous()
    if compute == "int8" and x.device.type == "cpu":
        _, group = groups(K, block, INT8_GROUP) or (block, INT8_GROUP)
        return engine.int8_products(_floats(x), weight, _fp32(bias), group).to(x.dtype)
    if compute == "int8" and block == K:
        return row_products(engine, x, qdata, scale.view(-1), bias)
    W = scratch.take(weight.shape, _storage(x.dtype), x.device)
    engine.int8_dequant(weight, W)
    if compute == "exact":
        return _exact(x, W, bias)
    w, row_scale = engine.quantize_rows(W, FP8 if compute == "fp8" else torch.int8)
    return row_products(engine, x, w, row_scale, bias)


def row_products(
    engine: QuantEngine,
    x: Tensor,  # [M, K]
    w: Tensor,  # int8 or fp8 [N, K]
    row_scale: Tensor,  # fp32 [N]
    bias: Tensor | None,
) -> Tensor:  # [M, N] in x's type
    """Return 8-bit products on a GPU: quantize activations per token, GEMM, apply both scales."""
    q, sx = engine.quantize_rows(_floats(x), w.dtype)
    if w.dtype == FP8:
        out = torch._scaled_mm(
            q, w.t(), scale_a=sx[:, None], scale_b=row_scale[None], out_dtype=torch.bfloat16
        ).to(x.dtype)
    else:
        # torch._int_mm needs more than 16 rows.
        padded = q if len(q) > 16 else torch.cat([q, q.new_zeros(32 - len(q), q.shape[1])])
        exact = torch._int_mm(padded, w.t())[: len(q)]
        out = (exact * sx[:, None] * row_scale).to(x.dtype)
    return out if bias is None else out + bias.to(out.dtype)


def _storage(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in FLOATS else torch.float32


def _floats(x: Tensor) -> Tensor:
    return x if x.dtype in FLOATS else x.float()


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _exact(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _lut4_dequant(
    qdata: Tensor,
    scale: Tensor,
    nested: list[Tensor],
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
    rows: int,
    cols: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    shape, device = (rows, cols), qdata.device
    weight = _lut4(device, shape, block, qdata, scale, nested, nested_block, offset, lut)
    out = qdata.new_empty(shape, dtype=dtype)
    engine_for(device).lut4_dequant(weight, out)
    return out


def _int8_dequant(qdata: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    weight = _int8(qdata.device, qdata, scale, block)
    out = torch.empty_like(qdata, dtype=dtype, memory_format=torch.contiguous_format)
    engine_for(qdata.device).int8_dequant(weight, out)
    return out


def _quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (q [M, K] int8 or fp8-e4m3fn, scale fp32 [M]) with x ≈ q · scale."""
    _check_input(x)
    checks.choice("dtype", dtype, TOP)
    x = _floats(x)
    return engine_for(x.device).quantize_rows(x.contiguous(), dtype)


def _register(
    schema: str, kernel: Callable[..., object], empty: Callable[..., Tensor | tuple[Tensor, Tensor]]
) -> None:
    """Register an operator; `empty` returns its result without values, for tracing.

    Tracing includes meta tensors; mixed with real tensors they raise an error.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    parameters = list(inspect.signature(kernel).parameters)

    def trace(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        operands = dict(zip(parameters, arguments, strict=True))
        parts = operands | dict(zip(NESTED, operands.get("nested", ()), strict=False))
        tensors = {part: value for part, value in parts.items() if isinstance(value, Tensor)}
        _check_devices(arguments[0].device, **tensors)
        return empty(**operands)

    torch.library.register_fake(f"fastdistill::{name}", trace, lib=_library)


_register(
    "lut4_linear(Tensor x, Tensor qdata, Tensor scale, Tensor[] nested, int nested_block, "
    "Tensor? offset, Tensor lut, Tensor? row_scale, Tensor? bias, int rows, int block, "
    "str compute) -> Tensor",
    _lut4_linear,
    lambda x, rows, **_: x.new_empty(x.shape[0], rows),
)
_register(
    "int8_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? row_scale, Tensor? bias, int block, "
    "str compute) -> Tensor",
    _int8_linear,
    lambda x, qdata, **_: x.new_empty(x.shape[0], qdata.shape[0]),
)
_register(
    "lut4_dequant(Tensor qdata, Tensor scale, Tensor[] nested, int nested_block, Tensor? offset, "
    "Tensor lut, int rows, int cols, int block, ScalarType dtype) -> Tensor",
    _lut4_dequant,
    lambda qdata, rows, cols, dtype, **_: qdata.new_empty(rows, cols, dtype=dtype),
)
_register(
    "int8_dequant(Tensor qdata, Tensor scale, int block, ScalarType dtype) -> Tensor",
    _int8_dequant,
    lambda qdata, dtype, **_: torch.empty_like(qdata, dtype=dtype),
)
_register(
    "quantize_rows(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)",
    _quantize_rows,
    lambda x, dtype: (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
