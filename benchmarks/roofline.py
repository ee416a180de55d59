"""Peak rates of this machine, measured in the same process, and the resulting floor.

    floor = max(FLOPs / GEMM rate, bytes / copy bandwidth)

No method is much faster than the floor. The roofline share of a row is its floor over its time.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastdistill.runtime import backend

from .data import device

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large square GEMM by dtype; bytes/s of a copy, read plus written; 8-bit peak."""

    gemm: dict[torch.dtype, float]
    copy: float
    int8: float | None = None  # 8-bit integer operations, 2 per multiply-add; None if unknown

    def of(self, rate: str, dtype: torch.dtype) -> float | None:
        """The peak rate for a contender."""
        return {"": self.gemm.get(dtype), "int8": self.int8}.get(rate)

    def __str__(self) -> str:
        gemm = ", ".join(f"{str(d)[6:]} {r / 1e12:.3g} TFLOP/s" for d, r in self.gemm.items())
        int8 = "" if self.int8 is None else f", int8 {self.int8 / 1e12:.3g} TOP/s"
        return f"GEMM {gemm}{int8}; copy {self.copy / 1e9:.3g} GB/s"


def measure_rates(
    dtypes: Iterable[torch.dtype], time_ms: Callable[[Callable[[], object]], float]
) -> Rates:
    """Median rates on random data: zeros multiply faster."""
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
        gemm[dtype] = 2 * n**3 / median_s(functools.partial(torch.mm, a, b, out=out))
    size = COPY_BYTES[at.type]
    source = torch.randn(size // 4, device=at)
    target = torch.empty_like(source)
    copy = 2 * size / median_s(lambda: target.copy_(source))
    return Rates(gemm, copy, _int8_peak() if at.type == "cpu" else None)


def _int8_peak() -> float | None:
    """The CPU's products of 8-bit integers from registers, on all its threads."""
    ext = backend.extension()
    if ext is None:
        return None
    rates = (ext.int8_peak(backend.cpu_isa(), torch.get_num_threads()) for _ in range(2))
    return max(rates) * 1e9 or None
