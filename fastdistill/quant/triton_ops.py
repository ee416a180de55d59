"""The Triton kernels with the interface of engines.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.triton_quant import lut4_dequant as expand
from ..kernels.triton_quant import lut4_dequant_nested as expand_nested
from ..kernels.triton_quant import quantize_rows as round_rows
from .formats import Nested


def lut4_dequant(
    qdata: Tensor,
    scale: Tensor | Nested,
    offset: Tensor | None,
    lut: Tensor,
    out: Tensor,
    block: int,
    row_inverse: Tensor | None = None,
) -> None:
    cols = out.shape[-1]
    if isinstance(scale, Nested):
        expand_nested(
            qdata,
            scale.codes,
            scale.code,
            scale.scale,
            scale.offset,
            scale.block,
            offset,
            lut,
            out,
            block,
            row_inverse,
            cols,
        )
    else:
        expand(qdata, scale, offset, lut, out, block, row_inverse, cols)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    round_rows(x, q, scale)
    return q, scale
