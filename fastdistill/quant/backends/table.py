"""Selects the implementation of quantized inference on a device.

    CPU     the compiled module (csrc/, any of four instruction sets)  →  plain PyTorch
    CUDA    the compiled module (csrc/cuda_quant.cu)  →  Triton  →  plain PyTorch

All of them give the same bits. The first available one of the row is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import backend
from . import native, torch_ops


class QuantEngine(NamedTuple):
    """The functions of one implementation.

        lut4_dequant    writes a Lut4Weight into a tensor [N, K] of floats, fp8 or int8
        int8_dequant    writes an Int8Weight into a tensor [N, K] of floats
        quantize_rows   activations [M, K] -> (int8 or fp8, fp32 scale [M])
        lut4_products   x Wᵀ of 8-bit activations per group and 4-bit weights, accumulated in fp32
        int8_products   the same with 8-bit weights

    None of them applies the order of columns, `perm`.
    """

    name: str
    lut4_dequant: Callable[..., None]
    int8_dequant: Callable[..., None]
    quantize_rows: Callable[..., tuple[Tensor, Tensor]]
    lut4_products: Callable[..., Tensor]
    int8_products: Callable[..., Tensor]


TORCH = QuantEngine(
    "torch",
    torch_ops.lut4_dequant,
    torch_ops.int8_dequant,
    torch_ops.quantize_rows,
    torch_ops.lut4_products,
    torch_ops.int8_products,
)
CPU = QuantEngine(
    "extension",
    native.cpu_lut4_dequant,
    native.cpu_int8_dequant,
    native.cpu_quantize_rows,
    native.cpu_lut4_products,
    native.cpu_int8_products,
)
CUDA = TORCH._replace(
    name="cuda extension",
    lut4_dequant=native.cuda_lut4_dequant,
    quantize_rows=native.cuda_quantize_rows,
)


@functools.cache
def triton() -> QuantEngine:
    from . import triton_ops

    return TORCH._replace(
        name="triton",
        lut4_dequant=triton_ops.lut4_dequant,
        quantize_rows=triton_ops.quantize_rows,
    )


def engine_for(device: torch.device) -> QuantEngine:
    if device.type == "cpu" and backend.extension() is not None:
        return CPU
    if device.type == "cuda":
        if backend.cuda_extension() is not None:
            return CUDA
        if backend.triton_problem(device.type, device.index) is None:
            return triton()
    return TORCH


def fast_int8_on_cpu() -> bool:
    """Whether this CPU multiplies 8-bit integers faster than bf16: with VNNI instructions."""
    ext = backend.extension()
    return ext is not None and backend.cpu_isa() >= ext.isa_names().index("avx512_vnni")
