"""Calls the compiled modules with addresses, sizes, dtype codes and the current stream.

The compiled functions do not check lengths: the operators in ops.py check every operand's dtype,
length, device and memory first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import torch_ops
from .formats import Nested
from .torch_ops import FP8

KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3, torch.int8: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _at(tensor: Tensor | None) -> int:
    """Return the address of a contiguous tensor, 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _cpu() -> tuple[Any, int, int]:
    return backend.extension(), backend.cpu_isa(), torch.get_num_threads()


def cpu_lut4_dequant(
    qdata: Tensor,
    scale: Tensor | Nested,
    offset: Tensor | None,
    lut: Tensor,
    out: Tensor,
    block: int,
    row_inverse: Tensor | None = None,
) -> None:
    if row_inverse is not None or out.dtype not in FLOATS:
        # 8-bit outputs are for GPU GEMMs; on a CPU only tests use them.
        torch_ops.lut4_dequant(qdata, scale, offset, lut, out, block, row_inverse)
        return
    ext, isa, threads = _cpu()
    plain = scale.expand() if isinstance(scale, Nested) else scale
    ext.lut4_dequant(
        isa,
        threads,
        _at(qdata),
        _at(plain),
        _at(offset),
        _at(lut),
        _at(out),
        KIND[out.dtype],
        out.numel(),
        block,
    )


def cpu_int8_dequant(qdata: Tensor, scale: Tensor, out: Tensor, block: int) -> None:
    if out.dtype not in FLOATS:
        torch_ops.int8_dequant(qdata, scale, out, block)
        return
    ext, isa, threads = _cpu()
    ext.int8_dequant(
        isa, threads, _at(qdata), _at(scale), _at(out), KIND[out.dtype], out.numel(), block
    )


def cpu_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype != torch.int8:
        return torch_ops.quantize_rows(x, dtype)
    ext, isa, threads = _cpu()
    q = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    ext.quantize_groups(
        isa, threads, _at(x), KIND[x.dtype], _at(q), _at(scale), 0, *x.shape, x.shape[1]
    )
    return q, scale


def cpu_lut4_products(
    x: Tensor,
    qdata: Tensor,
    lut: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    rows: int,
    weight_group: int,
    group: int,
) -> Tensor:
    ext, isa, threads = _cpu()
    codes = lut.new_empty(16, dtype=torch.int8)
    unit = ext.int8_table(_at(lut), _at(codes))
    out = x.new_empty(x.shape[0], rows)
    ext.lut4_gemm(
        isa,
        threads,
        _at(x),
        KIND[x.dtype],
        _at(qdata),
        _at(codes),
        unit,
        _at(scale),
        _at(offset),
        _at(bias),
        _at(out),
        x.shape[0],
        rows,
        x.shape[1],
        weight_group,
        group,
    )
    return out


def cpu_int8_products(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    weight_group: int,
    group: int,
) -> Tensor:
    ext, isa, threads = _cpu()
    out = x.new_empty(x.shape[0], qdata.shape[0])
    ext.int8_gemm(
        isa,
        threads,
        _at(x),
        KIND[x.dtype],
        _at(qdata),
        _at(scale),
        _at(bias),
        _at(out),
        x.shape[0],
        *qdata.shape,
        weight_group,
        group,
    )
    return out


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def cuda_lut4_dequant(
    qdata: Tensor,
    scale: Tensor | Nested,
    offset: Tensor | None,
    lut: Tensor,
    out: Tensor,
    block: int,
    row_inverse: Tensor | None = None,
) -> None:
    ext: Any = backend.cuda_extension()
    shape = (KIND[out.dtype], out.numel(), block, out.shape[-1], _at(row_inverse), _stream(out))
    with torch.cuda.device_of(out):
        if isinstance(scale, Nested):
            ext.lut4_dequant_nested(
                _at(qdata),
                _at(scale.codes),
                _at(scale.code),
                _at(scale.scale),
                _at(scale.offset),
                scale.block,
                _at(offset),
                _at(lut),
                _at(out),
                *shape,
            )
        else:
            ext.lut4_dequant(_at(qdata), _at(scale), _at(offset), _at(lut), _at(out), *shape)


def cuda_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ext: Any = backend.cuda_extension()
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    with torch.cuda.device_of(x):
        ext.quantize_rows(
            _at(x), KIND[x.dtype], _at(q), KIND[dtype], _at(scale), *x.shape, _stream(x)
        )
    return q, scale
