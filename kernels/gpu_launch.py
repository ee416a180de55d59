"""Launches of Triton kernels, and library products with fp32 results. Imports no Triton.

The files gpu_*.py are the host code of the Triton backend: they allocate, loop over chunks and
slabs, and name the kernels of triton_*.py, which are imported when the first one is launched. On
the meta device a launch and a product do nothing, so the same code shows the memory of a loss where
there is no GPU and no Triton.
"""

from __future__ import annotations

import functools
import math
import pkgutil
from typing import Any

import torch
from torch import Tensor

from .head import LMHead
from .token_loss import NEG, LossOptions

SLOT_TILE = 64  # slots per block


@functools.cache
def jitted(name: str) -> Any:
    """A function of Triton's language by "module:name", for example "triton_grad:grad_rows"."""
    return pkgutil.resolve_name(f"{__package__}.{name}")


def launch(kernel: str, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Run the kernel "module:name" on the device of `like`; do nothing for an empty grid."""
    if 0 in grid or like.is_meta:
        return
    with torch.cuda.device_of(like):
        jitted(kernel)[grid](**arguments)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


def scalars(head: LMHead) -> dict[str, float | bool]:
    """The scalars of a head as a kernel takes them."""
    return {
        "scale": float(head.logit_scale),
        "cap": 0.0 if head.softcap is None else float(head.softcap),
        "CAP": head.softcap is not None,
        "inv_T": 1.0 / head.temperature,
    }


def mixture(options: LossOptions) -> dict[str, float]:
    """β or the skew of a named divergence as a kernel takes it; logarithms from fp64."""
    w = float(options.beta if options.divergence == "jsd" else options.skew)
    return {
        "w": w,
        "rest": 1.0 - w,
        "log_w": math.log(w) if w > 0.0 else NEG,
        "log_rest": math.log1p(-w) if w < 1.0 else NEG,
    }


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right in fp32 (fp64 from fp64), whatever the operands.

    On a CPU (the interpreter) the library has no such product of 16-bit operands: they are widened
    first, which is exact.
    """
    if out.is_meta:
        return
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = (first) or += left @ right, summed in fp32 and rounded to out's type once."""
    if out.is_meta:
        return
    if first and out.dtype != left.dtype:
        product(left, right, out)
    elif left.is_cuda and out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=0 if first else 1, out=out)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(out.dtype, torch.float32)
        part = torch.mm(left.to(wide), right.to(wide))
        out.copy_(part if first else part.add_(out))
