"""What this machine can do, measured in the same process, and the floor that follows from it.

    floor = max(FLOPs / GEMM rate, bytes / copy bandwidth)

No method is much faster than that; a row's roofline share is its floor over its time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .data import device

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large square GEMM by dtype, and bytes/s of a copy, read plus written."""

    gemm: dict[torch.dtype, float]
    copy: float

    def floor_ms(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        return max(flops / self.gemm[dtype], moved / self.copy) * 1e3

    def __str__(self) -> str:
        gemm = ", ".join(f"{str(d)[6:]} {r / 1e12:.3g} TFLOP/s" for d, r in self.gemm.items())
        return f"GEMM {gemm}; copy {self.copy / 1e9:.3g} GB/s"


def measure_rates(
    dtypes: Iterable[torch.dtype], time_ms: Callable[[Callable[[], object]], float]
) -> Rates:
    """Medians over random data: zeros multiply faster than what a model holds."""
    at = device()

    def median_s(work: Callable[[], object]) -> float:
        for _ in range(3):
            work()
        return statistics.median(time_ms(work) for _ in range(10)) / 1e3

    n = GEMM_SIZE[at.type]
    gemm = {}
    for dtype in dict.fromkeys(dtypes):
        a, b = (torch.randn(n, n, device=at).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        gemm[dtype] = 2 * n**3 / median_s(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    size = COPY_BYTES[at.type]
    source = torch.randn(size // 4, device=at)
    target = torch.empty_like(source)
    return Rates(gemm, 2 * size / median_s(lambda: target.copy_(source)))
