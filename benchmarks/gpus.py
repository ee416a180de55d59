"""Constants of GPUs and of a host for `python -m benchmarks predict`, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class GPU:
    """Rates in FLOP/s and bytes/s, sizes in bytes, times in seconds."""

    name: str  # as PyTorch reports it
    capability: tuple[int, int]
    sms: int
    memory: int
    l2_bytes: int
    gemm: dict[torch.dtype, float]
    copy: float  # HBM, bytes read plus written
    l2: float
    instructions: float  # per second, of all threads
    gemm_start: float = 2e-6  # of a product, beyond its waves
    gap: float = 1e-6  # between two kernels of a stream
    shortest: float = 2e-6  # a kernel that moves next to nothing: with the gap, 3 µs each


# Read on such a machine: SMs, memory, L2, copy rate and 769 to 798 TFLOP/s of a large bf16 product.
# fp32 is NVIDIA's data sheet. The L2 rate, the three times and the share of cycles that issue an
# instruction (0.75) are estimates, not measured yet; the clock was read after a product.
H200 = GPU(
    name="NVIDIA H200",
    capability=(9, 0),
    sms=132,
    memory=143771 << 20,
    l2_bytes=60_000_000,
    gemm={torch.bfloat16: 770e12, torch.float16: 770e12, torch.float32: 67e12},
    copy=4.3e12,
    l2=5.5e12,
    instructions=0.75 * 132 * 128 * 1.98e9,
)
GPUS = {gpu.name: gpu for gpu in (H200,)}


LAUNCHES = {
    "triton_reduce:reduce_rows": 20.9e-6,
    "triton_topk:reduce_groups": 13.4e-6,
    "triton_token_loss:token_loss": 28.2e-6,
    "triton_token_loss:merge_slots": 12.4e-6,
    "triton_grad:grad_rows": 18.4e-6,
    "triton_grad:scale_in_place": 10.2e-6,
    "triton_dense:sum_divergence": 16.6e-6,
    "triton_dense:grad_divergence": 21.4e-6,
    "triton_gather:gather_rows": 13.5e-6,
    "triton_gather:scatter_hidden": 13.8e-6,
    "triton_gather:sum_parts": 11.8e-6,
    "triton_gather:sum_runs": 14.9e-6,
}


@dataclass(frozen=True)
class Host:
    """Seconds of Python and C++ on the host for one call of each kind.

    launches    what a kernel's launch takes in Triton's Python and C, on one core of an idle AMD
                EPYC: `python tests/helpers/host_path.py --time`, over a stub driver
    launch      the same for other kernels: that of reduce_rows, which has 28 arguments
    driver      more for any launch: the driver's own work (2 to 4 µs), which the stub leaves out,
                and torch.cuda.device_of (1 to 2 µs); an estimate
    gemm        of a product, and of an operator: usual figures of PyTorch on a GPU; `python -m
                benchmarks.host_costs` measures what needs no driver
    """

    launches: Mapping[str, float] = field(default_factory=lambda: LAUNCHES)
    launch: float = 21e-6
    driver: float = 5e-6
    gemm: float = 10e-6
    operator: float = 5e-6
    view: float = 1.5e-6


HOST = Host()
