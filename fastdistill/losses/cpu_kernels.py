"""The C++ kernels of the losses on a CPU: row_topk and those of kernels/cpu_kernels.py.

They read from addresses, so shape, type and strides of each operand are checked first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu_kernels import CPUKernels, provide
from ..kernels.row_topk import by_sorting, library
from ..runtime import backend
from ..runtime.checks import fail

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ALIGN = 64


def _call(name: str, *arguments: Any) -> Any:
    ext: Any = backend.extension()
    return getattr(ext, name)(backend.cpu_isa(), torch.get_num_threads(), *arguments)


def _check(
    name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError for a tensor of another shape or type, or whose last dimension has gaps."""
    fits = value.shape == shape and value.dtype in dtypes
    if not fits or (value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1):
        expected = f"{list(shape)} of {' or '.join(str(d)[6:] for d in dtypes)}, without gaps"
        fail(name, expected, f"{list(value.shape)} of {str(value.dtype)[6:]}, {value.stride()}")


def _check_columns(u: Tensor, **others: Tensor) -> None:
    """Check logits [v, n] and tensors [n] of its columns, in fp32."""
    if u.dim() != 2:
        fail("u", "a tensor [v, n]", list(u.shape))
    for name, value in {"u": u, **others}.items():
        shape = tuple(u.shape) if name == "u" else (u.shape[1],)
        _check(name, value, shape, (torch.float32,))


class ProductOnCPU:
    """Computes out = a @ b, or out += a @ b with `add`; its calls share scratch memory."""

    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, remainder: bool = False
    ) -> None:
        size = _call("bf16_scratch", b.shape[1], a.shape[1]) + _ALIGN
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None
            self._scratch = a.new_empty(size, dtype=torch.uint8)
        torch.ops.fastdistill.bf16_product(a, b, out, self._scratch, add, remainder)


def _product(
    a: Tensor, b: Tensor, out: Tensor, scratch: Tensor, add: bool, remainder: bool
) -> None:
    if a.dim() != 2 or a.dtype not in _DTYPES or (a.numel() and 1 not in a.stride()):
        fail(
            "a", "a bfloat16 or float32 matrix with a stride of 1", f"{list(a.shape)} of {a.dtype}"
        )
    if b.dim() != 2 or b.dtype != torch.bfloat16 or (b.numel() and 1 not in b.stride()):
        fail("b", "a bfloat16 matrix with a stride of 1", f"{list(b.shape)} of {b.dtype}")
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k:
        fail("b", f"[{k}, N], as many rows as a has columns", list(b.shape))
    _check("out", out, (m, n), tuple(_DTYPES))
    needed = _call("bf16_scratch", n, k) + _ALIGN
    if scratch.dtype != torch.uint8 or scratch.dim() != 1 or scratch.numel() < needed:
        fail("scratch", f"{needed} bytes", f"{list(scratch.shape)} of {scratch.dtype}")
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
        -(-scratch.data_ptr() // _ALIGN) * _ALIGN,
    )


def sum_columns(
    u: Tensor, top: Tensor, *, temperature: float, moments: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the new maximum and the power sums of each column (`SumColumns`)."""
    _check_columns(u, top=top)
    rows, n = u.shape
    top, sums = top.clone(), top.new_empty(moments + 1, n)
    if u.is_meta:
        return top, list(sums)
    addresses = (top.data_ptr(), sums.data_ptr())
    _call("sum_columns", u.data_ptr(), rows, n, u.stride(0), 1 / temperature, moments, *addresses)
    return top, list(sums)


def softmax_columns(
    u: Tensor, lse: Tensor, factor: Tensor, *, temperature: float, softcap: float | None
) -> None:
    """Compute u = e^{u / T − lse} · factor · (1 − (u / softcap)²) in place."""
    addresses = (lse.contiguous(), factor.contiguous())
    _check_columns(u, lse=addresses[0], factor=addresses[1])
    rows, n = u.shape
    if u.is_meta:
        return
    _call(
        "softmax_columns",
        u.data_ptr(),
        rows,
        n,
        u.stride(0),
        1 / temperature,
        0.0 if softcap is None else 1 / softcap,
        *(t.data_ptr() for t in addresses),
    )


def sum_remainders(u: Tensor, sums: Tensor) -> None:
    """Add the columns of u − bfloat16(u) to `sums`."""
    _check_columns(u, sums=sums)
    if not u.is_meta:
        rows, n = u.shape
        _call("sum_remainders", u.data_ptr(), rows, n, u.stride(0), sums.data_ptr())


def row_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest logits of each row, their ids, and the log-sum-exp of the others."""
    if z.dim() != 2:
        fail("z", "a matrix of logits", list(z.shape))
    if not 1 <= k <= z.shape[1]:
        fail("k", f"a number from 1 to {z.shape[1]}", k)
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
    """Return the kernels that this build has for this CPU, or None."""
    ext = backend.extension()
    if ext is None:
        return None
    isa = backend.cpu_isa()
    # Without instructions the product is emulated, for tests: far slower than PyTorch in fp32.
    has_product = ext.isa_names()[isa] != "scalar" and ext.has_bf16_gemm(isa)
    return CPUKernels(
        sum_columns, softmax_columns, sum_remainders, ProductOnCPU if has_product else None
    )


@functools.cache  # once in a process
def register() -> None:
    """Let the losses use the C++ kernels."""
    library.impl("row_topk", row_topk, "CPU")
    library.define(
        "bf16_product(Tensor a, Tensor b, Tensor(a!) out, Tensor(b!) scratch, bool add, "
        "bool remainder) -> ()"
    )
    library.impl("bf16_product", _product, "CPU")
    library.impl("bf16_product", lambda *operands: None, "Meta")
    provide(available)
