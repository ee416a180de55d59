"""The C++ kernels of the losses on a CPU: row_topk and those of kernels/cpu_kernels.py."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu_kernels import CPUKernels, provide
from ..kernels.row_topk import by_sorting, library
from ..runtime import backend

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ALIGN = 64
_memory = threading.local()  # pages of new memory cost as much as a tenth of a product


def _call(name: str, *arguments: Any) -> Any:
    ext: Any = backend.extension()
    return getattr(ext, name)(backend.cpu_isa(), torch.get_num_threads(), *arguments)


def product(
    a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, remainder: bool = False
) -> None:
    """Compute out = (add: +=) a @ b by an operator, which profilers and counters see."""
    torch.ops.fastdistill.bf16_product(a, b, out, add, remainder)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool, remainder: bool) -> None:
    (m, k), n = a.shape, b.shape[1]
    if not k and not add:
        out.zero_()
    if not k or not out.numel():
        return
    _call(
        "bf16_gemm",
        a.data_ptr(),
        _DTYPES[a.dtype],
        *a.stride(),
        b.data_ptr(),
        *b.t().stride(),
        out.data_ptr(),
        _DTYPES[out.dtype],
        out.stride(0),
        m,
        n,
        k,
        remainder,
        add,
        _scratch(_call("bf16_scratch", n, k) + _ALIGN),
    )


def _scratch(size: int) -> int:
    """The aligned address of `size` bytes that the next call of this thread uses again."""
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < size:
        _memory.held = held = torch.empty(size, dtype=torch.uint8)
    return -(-held.data_ptr() // _ALIGN) * _ALIGN


def sum_columns(
    u: Tensor, top: Tensor, *, temperature: float, moments: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the new maximum and the sums of each column."""
    rows, n = u.shape
    top, sums = top.clone(), top.new_empty(moments + 1, n)
    addresses = (top.data_ptr(), sums.data_ptr())
    _call("sum_columns", u.data_ptr(), rows, n, u.stride(0), 1 / temperature, moments, *addresses)
    return top, list(sums)


def softmax_columns(u: Tensor, lse: Tensor, factor: Tensor, *, temperature: float) -> None:
    """Compute u = e^{u / T − lse} · factor in place."""
    rows, n = u.shape
    addresses = (lse.contiguous(), factor.contiguous())
    _call(
        "softmax_columns",
        u.data_ptr(),
        rows,
        n,
        u.stride(0),
        1 / temperature,
        *(t.data_ptr() for t in addresses),
    )


def row_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what fastdistill::row_topk of these logits is."""
    if backend.extension() is None or z.dtype != torch.float32 or z.stride(-1) != 1:
        return by_sorting(z, k)
    rows, cols = z.shape
    values = z.new_empty(rows, k)
    ids = torch.empty_like(values, dtype=torch.int64)
    rest = z.new_empty(rows)
    _call(
        "lse_topk",
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


def available() -> CPUKernels | None:
    """Return the kernels that this build and CPU have."""
    ext = backend.extension()
    if ext is None:
        return None
    has_product = ext.has_bf16_gemm(backend.cpu_isa())
    return CPUKernels(sum_columns, softmax_columns, product if has_product else None)


@functools.cache  # once in a process
def register() -> None:
    """Let the losses use the C++ kernels."""
    library.impl("row_topk", row_topk, "CPU")
    library.define(
        "bf16_product(Tensor a, Tensor b, Tensor(a!) out, bool add, bool remainder) -> ()"
    )
    library.impl("bf16_product", _product, "CPU")
    provide(available)
