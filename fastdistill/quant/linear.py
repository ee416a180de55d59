"""Layers with quantized weights, which replace nn.Linear (and GPT-2's Conv1D).

They store the weight in its canonical format only: a state_dict is the same before and after a
forward pass, and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime import checks
from ..runtime.checks import fail
from . import ops
from .schemes import (
    BLOCK,
    NESTED,
    Int8Weight,
    Lut4Weight,
    Nested,
    QuantWeight,
    check_row_vector,
    quantize,
)


class QuantizedWeight(nn.Module):
    """A Lut4Weight or Int8Weight as buffers, which keep their types under .to(dtype)."""

    shape: tuple[int, int]
    block: int
    compute: str = "auto"

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        parts = parts_of(weight)
        self.shape, self.block, self.nested_block = parts.shape, parts.block, parts.nested_block
        for name, tensor in zip(NESTED, parts.nested, strict=False):
            self.register_buffer(name, tensor)
        self.register_buffer("qdata", parts.qdata)
        self.register_buffer("scale", parts.scale)
        if isinstance(weight, Lut4Weight):
            self.register_buffer("lut", parts.lut)
            self.register_buffer("offset", parts.offset)
            self.register_buffer("perm", parts.perm)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():  # model.bfloat16() must not round the scales
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._buffers.get("row_scale") is not None:  # derived from the previous weights
            self._buffers["row_scale"] = row_scale(self.quantized, self.compute)

    @property
    def parts(self) -> Parts:
        buffers: Any = self._buffers
        nested = [buffers[name] for name in NESTED] if self.nested_block else []
        scales = (buffers["scale"], nested, self.nested_block)
        tables = (buffers.get("offset"), buffers.get("lut"), buffers.get("perm"))
        return Parts(buffers["qdata"], *scales, *tables, self.shape, self.block)

    @property
    def quantized(self) -> QuantWeight:
        """The weight, sharing this module's memory."""
        w = self.parts
        if w.lut is None:
            return Int8Weight(shape=w.shape, block=w.block, qdata=w.qdata, scale=w.scale)
        scale = Nested.of(w.scale, w.nested, w.nested_block) if w.nested else w.scale
        return Lut4Weight(
            shape=w.shape,
            block=w.block,
            qdata=w.qdata,
            scale=scale,
            lut=w.lut,
            offset=w.offset,
            perm=w.perm,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [N, K]
        """Return the dense weight, with columns in the order of the layer's input."""
        return dequantize(self.quantized, dtype)


class Parts(NamedTuple):
    """A QuantWeight as the operators take it."""

    qdata: Tensor
    scale: Tensor  # fp32, or the uint8 codes of nested scales
    nested: list[Tensor]
    nested_block: int
    offset: Tensor | None
    lut: Tensor | None  # None: INT8
    perm: Tensor | None
    shape: tuple[int, int]
    block: int

    @property
    def lut4(self) -> tuple[Any, ...]:
        """The operands of a 4-bit weight, in the order of the operators."""
        return self[:6]


def parts_of(weight: QuantWeight) -> Parts:
    qdata, scale, nested, nested_block = weight.qdata.contiguous(), weight.scale, [], 0
    if isinstance(scale, Nested):
        nested, nested_block = [part.contiguous() for part in scale.parts], scale.block
        scale = scale.codes
    scales = (scale.contiguous(), nested, nested_block)
    if isinstance(weight, Int8Weight):
        return Parts(qdata, *scales, None, None, None, weight.shape, weight.block)
    offset = None if weight.offset is None else weight.offset.contiguous()
    tables = (offset, weight.lut.contiguous(), weight.perm)
    return Parts(qdata, *scales, *tables, weight.shape, weight.block)


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:  # [N, K]
    """Return the dense weight, with columns in the order of the layer's input."""
    w = parts_of(weight)
    dense: Tensor
    if w.lut is None:
        dense = torch.ops.fastdistill.int8_dequant(w.qdata.view(w.shape), w.scale, w.block, dtype)
    else:
        dense = torch.ops.fastdistill.lut4_dequant(*w.lut4, *w.shape, w.block, dtype)
    return dense if w.perm is None else dense[:, w.perm.argsort()]


def row_scale(weight: QuantWeight, compute: str) -> Tensor | None:  # fp32 [N]
    """Return the 8-bit step of each row for computes that need it, else None."""
    if compute not in ("int8", "fp8") or isinstance(weight, Int8Weight):
        return None
    top = dequantize(weight).abs().amax(-1)
    return top / (127 if compute == "int8" else 448)


def product(
    w: Parts,
    x: Tensor,  # [..., K]
    bias: Tensor | None,
    steps: Tensor | None,  # row_scale(weight, compute)
    compute: str,
) -> Tensor:  # [..., N]
    """Return x Wᵀ + bias.

    Raises:
        RuntimeError: x requires a gradient; quantized layers are forward only.
    """
    N, K = w.shape
    out: Tensor
    if x.shape[-1] != K:
        fail("x", f"[..., {K}]", list(x.shape))
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "x: a quantized layer is forward only and gives no gradient, but x requires one. Run "
            "the teacher under torch.no_grad()"
        )
    if w.perm is not None:
        x = x.index_select(-1, w.perm)
    rows = x.reshape(-1, K)
    if w.lut is None:
        out = torch.ops.fastdistill.int8_linear(
            rows, w.qdata.view(N, K), w.scale, steps, bias, w.block, compute
        )
    else:
        outputs = (steps, bias, N, w.block, compute)
        out = torch.ops.fastdistill.lut4_linear(rows, *w.lut4, *outputs)
    return out.view(*x.shape[:-1], N)


class _QuantLinear(QuantizedWeight):
    def __init__(
        self, weight: QuantWeight, bias: Tensor | None = None, *, compute: str = "auto"
    ) -> None:
        checks.choice("compute", compute, ops.COMPUTE)
        check_row_vector("bias", bias, weight.shape[0])
        super().__init__(weight)
        self.compute = compute
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("row_scale", row_scale(weight, compute), persistent=False)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N], in x's type
        buffers = self._buffers
        return product(self.parts, x, buffers["bias"], buffers["row_scale"], self.compute)

    def extra_repr(self) -> str:
        bias = self._buffers["bias"] is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"block={self.block}, compute={self.compute!r}"
        )


class LUT4Linear(_QuantLinear):
    """y = x Wᵀ + b with W in 4 bits and a table of 16 values (schemes.py).

    Args:
        weight: a Lut4Weight [N, K]. bias: [N] or None.
        compute: "exact", "int8", "fp8" or "auto" (ops.py says what each computes).

    Takes [..., K] and returns [..., N] in the input's type; frozen, forward only.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str = "nf4", *, block: int = BLOCK, compute: str = "auto"
    ) -> LUT4Linear:
        """Quantize a layer: scheme "nf4", "fp4" or "int4"."""
        if scheme == "int8":
            raise ValueError("scheme: expected 'nf4', 'fp4' or 'int4'; 8 bits are an Int8Linear")
        return cls(quantize(linear.weight, scheme, block=block), linear.bias, compute=compute)


class Int8Linear(_QuantLinear):
    """y = x Wᵀ + b with W in 8 bits, a scale per row or per block (schemes.py).

    Args and shapes as LUT4Linear's, with an Int8Weight.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, compute: str = "auto") -> Int8Linear:
        """Quantize a layer to 8 bits, with a scale per row."""
        return cls(quantize(linear.weight, "int8"), linear.bias, compute=compute)


def linear_of(weight: QuantWeight, bias: Tensor | None, compute: str) -> LUT4Linear | Int8Linear:
    kind = Int8Linear if isinstance(weight, Int8Weight) else LUT4Linear
    return kind(weight, bias, compute=compute)
