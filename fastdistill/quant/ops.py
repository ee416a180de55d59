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

import math
import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from .engines import QuantEngine, engine_for, fast_int8_on_cpu
from .formats import Nested, check_int8, check_lut4, check_row_vector
from .native import FLOATS
from .torch_ops import FP8, TOP

COMPUTE = ("auto", "exact", "int8", "fp8")
# Columns that share one activation scale on a CPU. With 4-bit weights at most the columns of one
# weight scale; with 8-bit weights twice as many cost 5 % more KL and take 7 % less time.
GROUP, INT8_GROUP = 64, 128
_MIN_GROUP = 8  # below this, scaling costs more than multiplying

_library = torch.library.Library("fastdistill", "FRAGMENT")
_library.define(
    "lut4_linear(Tensor x, Tensor qdata, Tensor scale, Tensor[] nested, int nested_block, "
    "Tensor? offset, Tensor lut, Tensor? row_scale, Tensor? bias, int rows, int block, "
    "str compute) -> Tensor"
)
_library.define(
    "int8_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? row_scale, Tensor? bias, int block, "
    "str compute) -> Tensor"
)
_library.define(
    "lut4_dequant(Tensor qdata, Tensor scale, Tensor[] nested, int nested_block, Tensor? offset, "
    "Tensor lut, int rows, int cols, int block, ScalarType dtype) -> Tensor"
)
_library.define("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)")
_library.define("int8_dequant(Tensor qdata, Tensor scale, int block, ScalarType dtype) -> Tensor")


class _Scratch(threading.local):
    """A growing buffer per thread, device and stream, into which W is expanded.

    Allocating memory per layer costs more than the expansion, because of page faults.
    """

    def __init__(self) -> None:
        self.of: dict[tuple, Tensor] = {}

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        key: tuple = (device,)
        if device.type == "cuda":
            key = (device, torch.cuda.current_stream(device).cuda_stream)
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
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"x: expected a floating-point tensor [M, {columns}], got {list(x.shape)} of {got}"
        )


def _check_memory(*strided: Tensor | None, **parts: Tensor | None) -> None:
    """Check that no memory has been freed, and that the `parts` of a weight are contiguous."""
    for name, part in parts.items():
        if part is not None and not part.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous memory, got strides {list(part.stride())} of "
                f"{list(part.shape)}. Call .contiguous()"
            )
    names = ("bias", "row_scale")
    for name, part in (*zip(names, strided, strict=False), *parts.items()):
        if part is None or not part.numel():
            continue
        last = sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True))
        needed = (part.storage_offset() + last + 1) * part.element_size()
        if part.untyped_storage().nbytes() < needed:
            raise ValueError(
                f"{name}: expected {needed} bytes for {list(part.shape)}, got memory that has been "
                "freed. Load the weight again"
            )


def _check_devices(device: torch.device, **operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name}: expected a tensor on {device}, as the other operands, got one on "
                f"{tensor.device}"
            )


def _check_lut4(
    rows: int,
    cols: int,
    block: int,
    qdata: Tensor,
    scale: Tensor,
    nested: list[Tensor],
    nested_block: int,
    offset: Tensor | None,
    lut: Tensor,
) -> Tensor | Nested:
    """Check a weight's parts and return its scales."""
    if len(nested) not in (0, 3):
        raise ValueError(
            f"nested: expected no tensor or 3 (code, scale, offset), got {len(nested)}"
        )
    scales = Nested.of(scale, nested, nested_block) if nested else scale
    check_lut4((rows, cols), block, qdata, scales, lut, offset)
    parts = dict(zip(("scale_code", "scale_scale", "scale_offset"), nested, strict=False))
    _check_devices(qdata.device, scale=scale, offset=offset, lut=lut, **parts)
    _check_memory(qdata=qdata, scale=scale, offset=offset, lut=lut, **parts)
    return scales


def regrouped(values: Tensor, rows: int, K: int, block: int, group: int) -> Tensor:
    """Return scales or offsets of the flattened blocks as [N, K / group]; group divides K."""
    if group == block:
        return values.view(rows, -1)
    at = torch.arange(0, rows * K, group, device=values.device) // block
    return values.view(-1)[at].view(rows, -1)


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
    K, engine = x.shape[1], engine_for(x.device)
    scales = _check_lut4(rows, K, block, qdata, scale, nested, nested_block, offset, lut)
    check_row_vector("bias", bias, rows)
    check_row_vector("row_scale", row_scale, rows, fp32=True)
    _check_devices(x.device, qdata=qdata, bias=bias, row_scale=row_scale)
    _check_memory(bias, row_scale)
    compute = _resolved(compute, x.device, rows, K, block)
    x = x.contiguous()
    if compute == "exact":
        W = scratch.take((rows, K), _storage(x.dtype), x.device)
        engine.lut4_dequant(qdata, scales, offset, lut, W, block)
        return _exact(x, W, bias)
    if x.device.type == "cpu":
        weight_group, group = groups(K, block) or (block, GROUP)
        plain = scales.expand() if isinstance(scales, Nested) else scales
        plain = regrouped(plain, rows, K, block, weight_group)
        if offset is not None:
            offset = regrouped(offset, rows, K, block, weight_group)
        return engine.lut4_products(
            _floats(x), qdata, lut, plain, offset, _fp32(bias), rows, weight_group, group
        ).to(x.dtype)
    kind = FP8 if compute == "fp8" else torch.int8
    W = scratch.take((rows, K), kind, x.device)
    engine.lut4_dequant(qdata, scales, offset, lut, W, block, _inverse(row_scale))
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
    if qdata.dim() != 2:
        raise ValueError(f"qdata: expected a tensor [N, K], got {list(qdata.shape)}")
    (rows, K), engine = qdata.shape, engine_for(x.device)
    _check_input(x, K)
    check_int8((rows, K), block, qdata, scale)
    check_row_vector("bias", bias, rows)
    check_row_vector("row_scale", row_scale, rows, fp32=True)
    _check_devices(x.device, qdata=qdata, scale=scale, bias=bias, row_scale=row_scale)
    _check_memory(bias, row_scale, qdata=qdata, scale=scale)
    compute = _resolved(compute, x.device, rows, K, block)
    x = x.contiguous()
    if compute == "int8" and x.device.type == "cpu":
        _, group = groups(K, block, INT8_GROUP) or (block, INT8_GROUP)
        return engine.int8_products(
            _floats(x), qdata, scale.view(rows, -1), None, _fp32(bias), block, group
        ).to(x.dtype)
    if compute == "int8" and block == K:
        return row_products(engine, x, qdata, scale.view(-1), bias)
    W = scratch.take((rows, K), _storage(x.dtype), x.device)
    engine.int8_dequant(qdata, scale, W, block)
    if compute == "exact":
        return _exact(x, W, bias)
    kind = FP8 if compute == "fp8" else torch.int8
    w, row_scale = engine.quantize_rows(W, kind)
    return row_products(engine, x, w, row_scale, bias)


def row_products(
    engine: QuantEngine,
    x: Tensor,  # [M, K]
    w: Tensor,  # int8 or fp8 [N, K]
    row_scale: Tensor | None,  # fp32 [N]
    bias: Tensor | None,
) -> Tensor:  # [M, N] in x's type
    """Return 8-bit products on a GPU: quantize activations per token, GEMM, apply both scales."""
    assert row_scale is not None
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


def _inverse(row_scale: Tensor | None) -> Tensor:
    assert row_scale is not None
    return torch.where(row_scale > 0, 1 / row_scale, 0.0)


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
    scales = _check_lut4(rows, cols, block, qdata, scale, nested, nested_block, offset, lut)
    out = qdata.new_empty(rows, cols, dtype=dtype)
    engine_for(qdata.device).lut4_dequant(qdata, scales, offset, lut, out, block)
    return out


def _int8_dequant(qdata: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    if qdata.dim() != 2:
        raise ValueError(f"qdata: expected a tensor [N, K], got {list(qdata.shape)}")
    check_int8((qdata.shape[0], qdata.shape[1]), block, qdata, scale)
    _check_devices(qdata.device, scale=scale)
    _check_memory(qdata=qdata, scale=scale)
    out = torch.empty_like(qdata, dtype=dtype, memory_format=torch.contiguous_format)
    engine_for(qdata.device).int8_dequant(qdata, scale, out, block)
    return out


def _quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (q [M, K] int8 or fp8-e4m3fn, scale fp32 [M]) with x ≈ q · scale."""
    _check_input(x)
    if dtype not in TOP:
        raise ValueError(f"dtype: expected one of {list(TOP)}, got {dtype}")
    x = _floats(x)
    return engine_for(x.device).quantize_rows(x.contiguous(), dtype)


for _name, _kernel in (
    ("lut4_linear", _lut4_linear),
    ("int8_linear", _int8_linear),
    ("lut4_dequant", _lut4_dequant),
    ("int8_dequant", _int8_dequant),
    ("quantize_rows", _quantize_rows),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)


# Meta tensors run these functions too; mixed with real tensors they raise an error.


@torch.library.register_fake("fastdistill::lut4_linear", lib=_library)
def _(x, qdata, scale, nested, nested_block, offset, lut, row_scale, bias, rows, block, compute):
    parts = dict(zip(("scale_code", "scale_scale", "scale_offset"), nested, strict=False))
    _check_devices(
        x.device,
        qdata=qdata,
        scale=scale,
        offset=offset,
        lut=lut,
        row_scale=row_scale,
        bias=bias,
        **parts,
    )
    return x.new_empty(x.shape[0], rows)


@torch.library.register_fake("fastdistill::int8_linear", lib=_library)
def _(x, qdata, scale, row_scale, bias, block, compute):
    _check_devices(x.device, qdata=qdata, scale=scale, row_scale=row_scale, bias=bias)
    return x.new_empty(x.shape[0], qdata.shape[0])


@torch.library.register_fake("fastdistill::lut4_dequant", lib=_library)
def _(qdata, scale, nested, nested_block, offset, lut, rows, cols, block, dtype):
    _check_devices(qdata.device, scale=scale, offset=offset, lut=lut)
    return qdata.new_empty(rows, cols, dtype=dtype)


@torch.library.register_fake("fastdistill::quantize_rows", lib=_library)
def _(x, dtype):
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastdistill::int8_dequant", lib=_library)
def _(qdata, scale, block, dtype):
    _check_devices(qdata.device, scale=scale)
    return torch.empty_like(qdata, dtype=dtype)
