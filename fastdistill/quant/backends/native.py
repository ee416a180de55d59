"""Calls the compiled modules with addresses, sizes, dtype codes and the current stream.

The compiled functions do not check lengths: the operators in ../ops.py check every operand's dtype,
length, device and memory first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import backend
from ..schemes import Int8Weight, Lut4Weight, Nested
from . import torch_ops
from .torch_ops import FP8

KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3, torch.int8: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _plain(value: Any) -> Any:
    """Return the address of a contiguous tensor, 0 for None, the code of a dtype."""
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return KIND[value]
    return 0 if value is None else value


def _cpu(function: str, *arguments: Any) -> Any:
    """Call a function of _ext.pyi with the instruction set and threads in use."""
    run = getattr(backend.extension(), function)
    return run(backend.cpu_isa(), torch.get_num_threads(), *map(_plain, arguments))


def _cuda(function: str, device: torch.device, *arguments: Any) -> None:
    """Call a function of _cuda.pyi on the current stream of a device."""
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        getattr(backend.cuda_extension(), function)(*map(_plain, arguments), stream)


def cpu_lut4_dequant(weight: Lut4Weight, out: Tensor, row_inverse: Tensor | None = None) -> None:
    if row_inverse is not None or out.dtype not in FLOATS:
        # 8-bit outputs are for GPU GEMMs; on a CPU only tests use them.
        torch_ops.lut4_dequant(weight, out, row_inverse)
        return
    result = (out, out.dtype, out.numel(), weight.block)
    _cpu("lut4_dequant", weight.qdata, weight.scales, weight.offset, weight.lut, *result)


def cpu_int8_dequant(weight: Int8Weight, out: Tensor) -> None:
    if out.dtype not in FLOATS:
        torch_ops.int8_dequant(weight, out)
        return
    result = (out, out.dtype, out.numel(), weight.block)
    _cpu("int8_dequant", weight.qdata, weight.scale, *result)


def cpu_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype != torch.int8:
        return torch_ops.quantize_rows(x, dtype)
    q = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    _cpu("quantize_groups", x, x.dtype, q, scale, None, *x.shape, x.shape[1])
    return q, scale


def cpu_lut4_products(x: Tensor, weight: Lut4Weight, bias: Tensor | None, group: int) -> Tensor:
    codes = weight.lut.new_empty(16, dtype=torch.int8)
    ext: Any = backend.extension()
    unit = ext.int8_table(_plain(weight.lut), _plain(codes))
    out = x.new_empty(x.shape[0], weight.shape[0])
    operands = (x, x.dtype, weight.qdata, codes, unit, weight.scales, weight.offset, bias, out)
    _cpu("lut4_gemm", *operands, x.shape[0], *weight.shape, weight.block, group)
    return out


def cpu_int8_products(x: Tensor, weight: Int8Weight, bias: Tensor | None, group: int) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    operands = (x, x.dtype, weight.qdata, weight.scale, bias, out)
    _cpu("int8_gemm", *operands, x.shape[0], *weight.shape, weight.block, group)
    return out


def cuda_lut4_dequant(weight: Lut4Weight, out: Tensor, row_inverse: Tensor | None = None) -> None:
    scale, tables = weight.scale, (weight.offset, weight.lut, out, out.dtype)
    sizes = (out.numel(), weight.block, out.shape[-1], row_inverse)
    if isinstance(scale, Nested):
        _cuda("lut4_dequant_nested", out.device, weight.qdata, *scale, *tables, *sizes)
    else:
        _cuda("lut4_dequant", out.device, weight.qdata, scale, *tables, *sizes)


def cuda_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    _cuda("quantize_rows", x.device, x, x.dtype, q, dtype, scale, *x.shape)
    return q, scale
