"""Quantization to NVFP4: 4-bit floats with an fp8 scale for each block of 16 columns.

    g = 448 · 6 / max |W|                         fp32, one for the tensor
    s = e4m3(g · max |block| / 6)                 fp8; 448 is the largest e4m3, 6 the largest e2m1
    q = e2m1(w · g / s)                           ties to the even code
    w ≈ q · (s / g)

The scales and codes are those of compressed-tensors (NVFP4A16), which stores g as
weight_global_scale. Source: NVIDIA, "Introducing NVFP4"; formats/microscaling.py has the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.checks import fail
from .formats.microscaling import E2M1
from .schemes import Lut4Weight, pack_nibbles, short

BLOCK = 16
_LARGEST, _LARGEST_SCALE = 6.0, 448.0
_SMALLEST_SCALE = 0.125  # in place of a scale that e4m3 rounds to 0
# Halfway between neighbors; a tie goes up where the upper code is even.
_HALFWAY = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True))


def quantize_nvfp4(weight: Tensor) -> Lut4Weight:
    """Return a floating-point weight [N, K], where K is a multiple of 16, in NVFP4.

    Raises:
        ValueError: another shape or dtype, or a weight with NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] % BLOCK:
        got = f"{list(weight.shape)} of {short(weight.dtype)}"
        fail("weight", f"a floating-point [N, K] with K a multiple of {BLOCK}", got)
    blocks = weight.detach().float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(-1)
    top = largest.amax() if len(largest) else largest.new_zeros(())
    if not bool(top.isfinite()):
        fail("weight", "finite values", "NaN or infinity")
    whole = _LARGEST_SCALE * _LARGEST / top
    whole = torch.where(whole.isfinite(), whole, 1.0)
    stored = (whole * (largest / _LARGEST)).to(torch.float8_e4m3fn).float()
    stored = torch.where(stored == 0, _SMALLEST_SCALE, stored)
    scale = stored / whole
    return Lut4Weight(
        shape=(weight.shape[0], weight.shape[1]),
        block=BLOCK,
        qdata=pack_nibbles(_codes(blocks / scale[:, None])),
        scale=scale / 2,
        lut=torch.tensor(E2M1, device=weight.device),
    )


def _codes(values: Tensor) -> Tensor:
    size = values.abs()
    codes = (size > 5.0).to(torch.uint8)
    for halfway, up in _HALFWAY:
        codes += (size >= halfway) if up else (size > halfway)
    return torch.where((values < 0) & (codes > 0), codes + 8, codes)
