"""4-bit floats (E2M1) with a scale for each block of a row: MXFP4 and NVFP4.

    E2M1    0, 0.5, 1, 1.5, 2, 3, 4, 6 for the codes 0 to 7; bit 3 is the sign
    MXFP4   w = e2m1 · 2^(exponent − 127)             blocks of 32, an exponent (E8M0) for each
    NVFP4   w = e2m1 · (scale / global_scale)         blocks of 16, an fp8 scale (E4M3) for each

Sources: the OCP Microscaling Formats specification 1.0, and the NVFP4 layout of compressed-tensors.
A byte holds two columns, the first in its low nibble.

Both are LUT4 as they are. The table holds 2 · E2M1, which are integers, with half of each scale:
doubling and halving are exact, and layers that multiply integers need no rounded table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import Lut4Weight

_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
E2M1 = _DOUBLED + tuple(-value for value in _DOUBLED)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(exponent − 127) of stored E8M0 bytes, in fp32. Call it inside `reading`."""
    if exponents.numel() and int(exponents.max()) == 255:
        fail("exponents", "0 to 254", "255, which is NaN")
    return (exponents.double() - 127).exp2().float()


def microscaled(packed: Tensor, scale: Tensor, block: int) -> Lut4Weight:
    """Return the weight of packed codes. Call it inside `reading`.

    Args:
        packed: uint8 [N, K/2]. scale: fp32 [N, K/block].
    """
    half = scale / 2
    if not torch.equal(half * 2, scale):
        fail("scale", "a number that can be halved in float32", "NaN, or one near 1e-45")
    packed = packed.contiguous()
    return Lut4Weight(
        shape=(packed.shape[0], 2 * packed.shape[1]),
        block=block,
        qdata=(packed << 4 | packed >> 4).reshape(-1),
        scale=half.reshape(-1),
        lut=torch.tensor(E2M1),
    )
