"""Compiled kernels that the torch backend uses on a CPU, if there are any.

The C++ extension provides them (`fastdistill/losses/cpu_kernels.py`). This package knows only their
signatures, so that it works without the extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Product(Protocol):
    """Computes out = a @ b, or out += a @ b with `add`, summed in fp32.

    a: [M, K] in bfloat16, or in fp32 and rounded to bfloat16; b: [K, N] bfloat16; out: [M, N] in
    fp32, or in bfloat16 and rounded once. With `remainder`, a is replaced by its rounding error:
    the sum of both products has an error of 2^-17 of each term instead of 2^-9.

    PyTorch's own product of bfloat16 on a CPU rounds its result to bfloat16.
    """

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, remainder: bool = False
    ) -> None: ...


class SumColumns(Protocol):
    """Returns (top [n], sums): the largest of `top` and z = u / T in each column, and power sums.

    sums[i] = Σ e^{z − top} (z − top)^i over the rows of u [v, n], for i = 0 .. moments ≤ 2.
    """

    def __call__(
        self, u: Tensor, top: Tensor, *, temperature: float, moments: int
    ) -> tuple[Tensor, list[Tensor]]: ...


class SoftmaxColumns(Protocol):
    """Computes u = e^{u / T − lse} · factor · (1 − (u / softcap)²) in place; u [v, n], others [n].

    The last factor is left out without a softcap.
    """

    def __call__(
        self, u: Tensor, lse: Tensor, factor: Tensor, *, temperature: float, softcap: float | None
    ) -> None: ...


class SumRemainders(Protocol):
    """Adds Σ_v u − bfloat16(u) to `sums`; u: [v, n], sums: [n]."""

    def __call__(self, u: Tensor, sums: Tensor) -> None: ...


class CPUKernels(NamedTuple):
    """The compiled kernels of a CPU. All but the product take fp32.

    new_product is None on a CPU without instructions for bfloat16. The calls of one product share
    scratch memory, which it keeps.
    """

    sum_columns: SumColumns
    softmax_columns: SoftmaxColumns
    sum_remainders: SumRemainders
    new_product: Callable[[], Product] | None


def _none() -> CPUKernels | None:
    return None


_available: Callable[[], CPUKernels | None] = _none


def provide(available: Callable[[], CPUKernels | None]) -> None:
    """Set the function that returns the kernels of this process, or None."""
    global _available
    _available = available


def cpu_kernels() -> CPUKernels | None:
    """Return the kernels of this process; None while torch.compile traces: a graph has none."""
    return None if torch.compiler.is_compiling() else _available()
