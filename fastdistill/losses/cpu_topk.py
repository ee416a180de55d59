"""The C++ kernel of fastdistill::row_topk for CPUs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels.row_topk import by_sorting, library
from ..runtime import backend


def _on_cpu(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    ext = backend.extension()
    if ext is None or z.dtype != torch.float32 or z.stride(-1) != 1:
        return by_sorting(z, k)
    rows, cols = z.shape
    values = z.new_empty(rows, k)
    ids = torch.empty_like(values, dtype=torch.int64)
    rest = z.new_empty(rows)
    ext.lse_topk(
        backend.cpu_isa(),
        torch.get_num_threads(),
        z.data_ptr(),
        rows,
        cols,
        z.stride(0),
        1.0,
        k,
        ids.data_ptr(),
        values.data_ptr(),
        rest.data_ptr(),
    )
    return values, ids, rest


@functools.cache  # once in a process
def register() -> None:
    """Make the C++ kernel that of fastdistill::row_topk on CPUs."""
    library.impl("row_topk", _on_cpu, "CPU")
