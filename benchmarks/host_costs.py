"""python -m benchmarks.host_costs: what a call costs the host, in µs, on this machine.

Python and C++ that no GPU waits for: tensors of one element on the CPU, minima of many repeats. The
constants of gpus.py are such figures. A launch is measured up to Triton's C launcher, which needs a
driver.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from unittest.mock import patch

import torch

from fastdistill.kernels import gpu_launch, gpu_rows
from fastdistill.kernels.head import LMHead

REPEATS, CALLS = 50, 200


def microseconds(call: Callable[[], object]) -> float:
    """The smallest mean time of a call over many rounds."""
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


def binder() -> Callable[[], object]:
    """Triton's part of a launch of reduce_rows in Python: it binds and specializes arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from fastdistill.kernels import triton_reduce

    compiled = JITFunction(triton_reduce.reduce_rows.fn)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(compiled.signature, compiled.params, backend)
    arguments: list[dict[str, object]] = []

    def launch(kernel: str, grid: tuple[int, ...], like: torch.Tensor, **options: object) -> None:
        arguments.append(options)

    head = LMHead(torch.empty(64, 16, dtype=torch.bfloat16))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with patch.object(gpu_rows, "launch", launch):
        reduce = gpu_rows.Running(head, ids, 0, False, False, None).block(slice(0, 1))
        reduce(slice(0, 64), torch.empty(1, 64))
    return lambda: bind(**arguments[0], debug=False)


def main() -> None:
    one = torch.ones(1, 1)
    out = torch.empty(1, 1)
    figures = {
        "product": lambda: torch.mm(one, one, out=out),
        "operator": lambda: one + one,
        "view": lambda: one[:1],
        "Triton's binder in a launch": binder(),
        "scalars of a head": lambda: gpu_launch.scalars(LMHead(one)),
    }
    for name, call in figures.items():
        print(f"{name:28} {microseconds(call):6.1f} µs")


if __name__ == "__main__":
    main()
