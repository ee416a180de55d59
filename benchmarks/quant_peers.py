"""Alternatives for quantized layers: other libraries, built from a weight [V, H].

Each takes the full-precision weight and returns a function that multiplies activations by it (the
last two dequantize it). A library is imported when its contender runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.quant.backends.table import TORCH

from .peers import named
from .registry import Missing


def full(weight: Tensor) -> Callable[[Tensor], Tensor]:
    copy = weight.clone()
    return lambda x: F.linear(x, copy)


def bnb4(weight: Tensor, training: bool) -> nn.Module:
    nn4 = named("bitsandbytes", "bitsandbytes.nn", "Linear4bit")
    params = named("bitsandbytes", "bitsandbytes.nn", "Params4bit")
    layer = nn4(
        *reversed(weight.shape),
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = params(
        weight.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=layer,
    )
    return layer.to(weight.device).train(training)


bnb4_eval = functools.partial(bnb4, training=False)
bnb4_train = functools.partial(bnb4, training=True)


def bnb8(weight: Tensor) -> nn.Module:
    nn8 = named("bitsandbytes", "bitsandbytes.nn", "Linear8bitLt")
    params = named("bitsandbytes", "bitsandbytes.nn", "Int8Params")
    layer = nn8(*reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = params(weight.float().clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device).eval()


def _only_cpu(weight: Tensor, what: str) -> None:
    if weight.is_cuda:
        raise Missing(f"{what} is a CPU operator")


def int4pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's 4-bit product, groups of 64: w = (q − 8) · scale + zero."""
    _only_cpu(weight, "int4pack")
    N, K = weight.shape
    groups = weight.float().view(N, K // 64, 64)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().view(N, K)
    both = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(weight.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, both)


def int8pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
    _only_cpu(weight, "int8pack")
    q, scale = TORCH.quantize_rows(weight, torch.int8)
    scale_16 = scale.to(weight.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale_16)


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's 8-bit product of unsigned activations, one scale per token."""
    _only_cpu(weight, "oneDNN qlinear")
    q, scale = TORCH.quantize_rows(weight, torch.int8)
    zeros = torch.zeros(len(q), dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(q, None)

    def run(x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True).float() / 127
        unsigned = (x / step).round_().add_(128).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(step).to(x.dtype)

    return run


def bnb_dequant(weight: Tensor) -> Callable[[Tensor], Tensor]:
    functional = named("bitsandbytes", "bitsandbytes", "functional")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return lambda x: functional.dequantize_4bit(packed, state)


def bnb_dequant_reused(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The bitsandbytes kernel with a reused output; on a CPU it has no public name."""
    functional = named("bitsandbytes", "bitsandbytes", "functional")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    out = torch.empty_like(weight)
    if weight.is_cuda:
        return lambda x: functional.dequantize_4bit(packed, state, out=out)
    library = named("bitsandbytes", "bitsandbytes.cextension", "lib")
    kernel = library.cdequantize_blockwise_cpu_nf4_bf16
    tensors = (packed, state.absmax, out)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    sizes = [ctypes.c_longlong(n) for n in (64, *weight.shape)]

    def run(x: Tensor) -> Tensor:
        kernel(*addresses, *sizes)
        return tensors[-1]

    return run
