"""QuantizedMatrix: a quantized embedding or output head, which reads as a dense matrix.

    W[v] = the row of codes, scales and offsets of v (schemes.py), rounded to `dtype`

Losses, top k and the models themselves read these two weights as a matrix [V, H]. A QuantizedMatrix
is a tensor for them, but stores 4 or 8 bits per value. Slices, gathered rows, embeddings and
F.linear compute only the rows that they read, and products take a slab of rows at a time. So no
[V, H] in full precision exists, and every value is that of the expanded matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernels.op_common import BODIES
from .linear import dequantize
from .schemes import Int8Weight, Lut4Weight, QuantWeight, take_rows

SLAB_BYTES = 8 << 20  # rows in full precision that F.linear multiplies at a time

_aten = torch.ops.aten


class QuantizedMatrix(Tensor):
    """A QuantWeight [V, H] as a frozen tensor of `dtype`.

    `make` returns one. Operations other than those above expand the whole matrix; writing to it
    raises a TypeError. `nbytes` is what it stores.
    """

    qdata: Tensor
    scale: Tensor
    lut: Tensor | None
    offset: Tensor | None
    block: int

    @staticmethod
    def __new__(cls, weight: QuantWeight, dtype: torch.dtype) -> QuantizedMatrix:
        size, device = weight.shape, weight.qdata.device
        base: Any = Tensor
        made: QuantizedMatrix = base._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        return made

    def __init__(self, weight: QuantWeight, dtype: torch.dtype) -> None:
        assert isinstance(weight.scale, Tensor)  # as `make` has it
        self.qdata, self.scale, self.block = weight.qdata, weight.scale, weight.block
        self.lut = self.offset = None
        if isinstance(weight, Lut4Weight):
            self.lut, self.offset = weight.lut, weight.offset

    @classmethod
    def make(cls, weight: QuantWeight, dtype: torch.dtype) -> QuantizedMatrix | None:
        """Return the weight as a matrix; None if its rows cannot be read one by one."""
        K = weight.shape[1]
        if K % weight.block or K % 2:
            return None
        if isinstance(weight, Lut4Weight):
            if weight.perm is not None:
                return None
            weight = replace(weight, scale=weight.scales)
        return cls(weight, dtype)

    @property
    def quantized(self) -> QuantWeight:
        """The weight, sharing this tensor's memory."""
        shape = (self.shape[0], self.shape[1])
        common: dict[str, Any] = {"shape": shape, "block": self.block, "scale": self.scale}
        if self.lut is None:
            return Int8Weight(qdata=self.qdata, **common)
        return Lut4Weight(qdata=self.qdata, lut=self.lut, offset=self.offset, **common)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes of codes, scales and offsets."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    def rows(self, at: slice | Tensor) -> Tensor:
        """Return the rows of a slice or of ids [n], dense."""
        return dequantize(take_rows(self.quantized, at), self.dtype)

    def dequantize(self) -> Tensor:
        """Return the whole matrix, dense."""
        return dequantize(self.quantized, self.dtype)

    def with_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QuantizedMatrix:
        """Return this matrix in another dtype, with `change` applied to its parts."""
        w = self.quantized
        assert isinstance(w.scale, Tensor)
        parts: dict[str, Any] = {"qdata": change(w.qdata), "scale": change(w.scale)}
        if isinstance(w, Lut4Weight):
            parts["lut"] = change(w.lut)
            parts["offset"] = None if w.offset is None else change(w.offset)
        return QuantizedMatrix(replace(w, **parts), dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        bits = 8 if self.lut is None else 4
        return f"QuantizedMatrix({list(self.shape)}, bits={bits}, dtype={self.dtype})"

    # The protocol of wrapper subclasses: Module.to moves them, and torch.compile traces them.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [n for n in ("qdata", "scale", "lut", "offset") if getattr(self, n) is not None]
        return names, (self.block, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedMatrix:
        (block, dtype), shape = context, (int(size[0]), int(size[1]))
        if "lut" not in parts:
            return QuantizedMatrix(Int8Weight(shape=shape, block=block, **parts), dtype)
        return QuantizedMatrix(Lut4Weight(shape=shape, block=block, **parts), dtype)

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on, besides the types of the parts."""
        return repr((self.__tensor_flatten__(), tuple(self.shape)))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(weight := _second(args, kwargs), QuantizedMatrix):
            operands = dict(zip(("input", "weight", "bias"), args, strict=False), **kwargs)
            return _linear(operands["input"], weight, operands.get("bias"))
        if func is Tensor.__setitem__ and isinstance(args[0], cls):
            _fail_to_write(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastdistill":  # reads slabs of rows itself
            return BODIES[func._schema.name.partition("::")[2]](*args, **kwargs)
        if func in _OPERATIONS:
            result = _OPERATIONS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if args and isinstance(args[0], cls) and func._schema.is_mutable:
            _fail_to_write(args[0])
        args, kwargs = tree_map(_dense, (args, kwargs))
        return func(*args, **kwargs)


def slabs(matrix: QuantizedMatrix) -> Iterator[slice]:
    """Yield slices of rows that take SLAB_BYTES in full precision."""
    V, H = matrix.shape
    step = max(64, SLAB_BYTES // (max(H, 1) * matrix.dtype.itemsize))
    for start in range(0, V, step):
        yield slice(start, min(start + step, V))


def _fail_to_write(matrix: QuantizedMatrix) -> NoReturn:
    raise TypeError(
        f"weight: expected a tensor that may be written to, got {matrix!r}; dequantize() it"
    )


def _second(args: Any, kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("weight")


def _linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a slab of rows at a time."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for at in slabs(weight) if x.numel() else ():  # losses pass the head no positions
        out[..., at] = F.linear(x, weight.rows(at), None if bias is None else bias[at])
    return out


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedMatrix) else value


def _same(matrix: QuantizedMatrix, *_: Any, **__: Any) -> QuantizedMatrix:
    return QuantizedMatrix(matrix.quantized, matrix.dtype)


def _slice(
    matrix: QuantizedMatrix, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if dim != 0 or step != 1:
        return NotImplemented
    at = slice(*slice(start, end).indices(matrix.shape[0])[:2])
    return _same(matrix) if at == slice(0, matrix.shape[0]) else matrix.rows(at)


def _index_select(matrix: QuantizedMatrix, dim: int, index: Tensor) -> Any:
    return matrix.rows(index) if dim == 0 else NotImplemented


def _index(matrix: QuantizedMatrix, indices: list[Any]) -> Any:
    if len(indices) != 1 or indices[0].dtype == torch.bool:
        return NotImplemented
    return _embedding(matrix, indices[0])


def _embedding(matrix: Any, ids: Tensor, *_: Any, **__: Any) -> Any:
    if not isinstance(matrix, QuantizedMatrix):
        return NotImplemented
    return matrix.rows(ids.flatten()).view(*ids.shape, matrix.shape[1])


def _to_copy(
    matrix: QuantizedMatrix, *, dtype: Any = None, device: Any = None, **options: Any
) -> Any:
    dtype = matrix.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return NotImplemented
    non_blocking = bool(options.get("non_blocking"))
    return matrix.with_parts(lambda part: part.to(device, non_blocking=non_blocking), dtype)


def _clone(matrix: QuantizedMatrix, **_: Any) -> QuantizedMatrix:
    return matrix.with_parts(torch.clone, matrix.dtype)


def _new(func: Any) -> Callable[..., Any]:
    def make(matrix: QuantizedMatrix, *args: Any, **kwargs: Any) -> Tensor:
        like = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
        return func(like, *args, **kwargs)  # type: ignore[no-any-return]

    return make


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.slice.Tensor: _slice,
    _aten.index_select.default: _index_select,
    _aten.index.Tensor: _index,
    _aten.embedding.default: _embedding,
    _aten._to_copy.default: _to_copy,
    _aten.clone.default: _clone,
    **{
        op: _new(op)
        for op in (_aten.new_empty.default, _aten.new_zeros.default, _aten.new_full.default)
    },
}
