"""Memory of an optimizer in bytes: its state, and its temporaries during a step.

adamw_torch            two moments in the parameters' type; √v of all parameters at once on a
                       GPU, two temporaries of the largest one on a CPU
adamw_torch_fused      two moments in the parameters' type
adamw_8bit             two moments of 1 byte, and 4 bytes per block of 256 for each; fp32 for
(adamw_bnb_8bit)       tensors of less than 4096 values
sgd                    none, without momentum
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "sgd")
_BLOCK, _LEAST = 256, 4096


class OptimizerMemory(NamedTuple):
    state: int
    scratch: int


def optimizer_memory(name: str, trained: Sequence[Tensor], device: str) -> OptimizerMemory:
    """Return the memory of one of OPTIMIZERS."""
    sizes = [p.nbytes for p in trained]
    if name == "sgd":
        return OptimizerMemory(0, 0)
    if name.endswith("8bit"):
        counts = [p.numel() for p in trained]
        blocks = [4 * n if n < _LEAST else n + 4 * -(-n // _BLOCK) for n in counts]
        return OptimizerMemory(2 * sum(blocks), 0)
    state = 2 * sum(sizes)
    if name == "adamw_torch_fused":
        return OptimizerMemory(state, 0)
    return OptimizerMemory(state, sum(sizes) if device == "cuda" else 2 * max(sizes, default=0))
