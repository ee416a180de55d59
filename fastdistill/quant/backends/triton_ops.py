"""The Triton kernels with the interface of table.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.triton_quant import lut4_dequant as expand
from ...kernels.triton_quant import lut4_dequant_nested as expand_nested
from ...kernels.triton_quant import quantize_rows as round_rows
from ..schemes import Lut4Weight, Nested


def lut4_dequant(weight: Lut4Weight, out: Tensor, row_inverse: Tensor | None = None) -> None:
    scale, rest = weight.scale, (weight.offset, weight.lut, out, weight.block, row_inverse)
    if isinstance(scale, Nested):
        expand_nested(weight.qdata, *scale, *rest, out.shape[-1])
    else:
        expand(weight.qdata, scale, *rest, out.shape[-1])


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    round_rows(x, q, scale)
    return q, scale
