"""Layers over quantised weights, in the place of nn.Linear (and of GPT-2's Conv1D).

They hold the weight in its canonical format and nothing else: a state_dict is the same before and
after a forward pass, and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .formats import BLOCK, Int8Weight, Lut4Weight, Nested, QuantWeight, quantize

_NESTED = ("scale_code", "scale_scale", "scale_offset")


class QuantizedWeight(nn.Module):
    """A Lut4Weight or Int8Weight as buffers, which keep their types under .to(dtype)."""

    shape: tuple[int, int]
    block: int

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        self.shape, self.block = weight.shape, weight.block
        self.nested_block = 0
        scale = weight.scale
        if isinstance(scale, Nested):
            self.nested_block = scale.block
            for name, tensor in zip(_NESTED, scale.parts, strict=True):
                self.register_buffer(name, tensor)
            scale = scale.codes
        self.register_buffer("qdata", weight.qdata.contiguous())
        self.register_buffer("scale", scale.contiguous())
        if isinstance(weight, Lut4Weight):
            self.register_buffer("lut", weight.lut)
            self.register_buffer("offset", weight.offset)
            self.register_buffer("perm", weight.perm)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # model.bfloat16() must not round the scales
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    @property
    def quantized(self) -> QuantWeight:
        """The weight, sharing this module's memory."""
        held: Any = self._buffers
        if "lut" not in held:
            return Int8Weight(
                shape=self.shape, block=self.block, qdata=held["qdata"], scale=held["scale"]
            )
        scale = held["scale"]
        if self.nested_block:
            scale = Nested.of(scale, [held[name] for name in _NESTED], self.nested_block)
        return Lut4Weight(
            shape=self.shape,
            block=self.block,
            qdata=held["qdata"],
            scale=scale,
            lut=held["lut"],
            offset=held["offset"],
            perm=held["perm"],
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [N, K]
        """The dense weight, columns in the order of the layer's input."""
        return dequantize(self.quantized, dtype)


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:  # [N, K]
    """The dense weight, columns in the order of the layer's input."""
    if isinstance(weight, Int8Weight):
        qdata = weight.qdata.view(weight.shape)
        return torch.ops.fastdistill.int8_dequant(qdata, weight.scale, weight.block, dtype)
    scale, nested, nested_block = _flat(weight.scale)
    dense = torch.ops.fastdistill.lut4_dequant(
        weight.qdata, scale, nested, nested_block, weight.offset, weight.lut, *weight.shape,
        weight.block, dtype,
    )  # fmt: skip
    return dense if weight.perm is None else dense[:, weight.perm.argsort()]


def _flat(scale: Tensor | Nested) -> tuple[Tensor, list[Tensor], int]:
    if isinstance(scale, Nested):
        return scale.codes, scale.parts, scale.block
    return scale, [], 0


def row_scale(weight: QuantWeight, compute: str) -> Tensor | None:  # fp32 [N]
    """The step of each row in 8 bits, for computes that round whole rows; None for the others."""
    if compute not in ("int8", "fp8") or isinstance(weight, Int8Weight):
        return None
    top = dequantize(weight).abs().amax(-1)
    return top / (127 if compute == "int8" else 448)


def product(
    weight: QuantWeight,
    x: Tensor,  # [..., K]
    bias: Tensor | None,
    steps: Tensor | None,  # row_scale(weight, compute)
    compute: str,
) -> Tensor:  # [..., N]
    """x Wᵀ + bias.

    Raises:
        RuntimeError: where a gradient would be needed; quantised weights are forward only.
    """
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}], got {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "x: a quantised layer is forward only and gives no gradient, but x requires one. Run "
            "the teacher under torch.no_grad()"
        )
    if isinstance(weight, Int8Weight):
        out = torch.ops.fastdistill.int8_linear(
            x.reshape(-1, K), weight.qdata.view(N, K), weight.scale, steps, bias, weight.block,
            compute,
        )  # fmt: skip
    else:
        if weight.perm is not None:
            x = x.index_select(-1, weight.perm)
        scale, nested, nested_block = _flat(weight.scale)
        out = torch.ops.fastdistill.lut4_linear(
            x.reshape(-1, K), weight.qdata, scale, nested, nested_block, weight.offset, weight.lut,
            steps, bias, N, weight.block, compute,
        )  # fmt: skip
    return out.view(*x.shape[:-1], N)


class _QuantLinear(QuantizedWeight):
    def __init__(
        self, weight: QuantWeight, bias: Tensor | None = None, *, compute: str = "auto"
    ) -> None:
        check_compute(compute)
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
        bias, steps = self._buffers["bias"], self._buffers["row_scale"]
        return product(self.quantized, x, bias, steps, self.compute)

    def extra_repr(self) -> str:
        bias = self._buffers["bias"] is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"block={self.block}, compute={self.compute!r}"
        )


class LUT4Linear(_QuantLinear):
    """y = x Wᵀ + b with W in 4 bits and a table of 16 values (formats.py).

    Args:
        weight: a Lut4Weight [N, K]. bias: [N] or None.
        compute: "exact", "int8", "fp8" or "auto" (ops.py says what each computes).

    Takes [..., K] and returns [..., N] in the input's type; frozen, forward only.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str = "nf4", *, block: int = BLOCK, compute: str = "auto"
    ) -> LUT4Linear:
        """Quantise a layer: scheme "nf4", "fp4" or "int4"."""
        if scheme == "int8":
            raise ValueError("scheme: expected 'nf4', 'fp4' or 'int4'; 8 bits are an Int8Linear")
        return cls(quantize(linear.weight, scheme, block=block), linear.bias, compute=compute)


class Int8Linear(_QuantLinear):
    """y = x Wᵀ + b with W in 8 bits, a scale per row or per block (formats.py).

    Args and shapes as LUT4Linear's, with an Int8Weight.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, compute: str = "auto") -> Int8Linear:
        return cls(quantize(linear.weight, "int8"), linear.bias, compute=compute)


def linear_of(weight: QuantWeight, bias: Tensor | None, compute: str) -> LUT4Linear | Int8Linear:
    kind = Int8Linear if isinstance(weight, Int8Weight) else LUT4Linear
    return kind(weight, bias, compute=compute)


def check_compute(compute: str) -> None:
    if compute not in ops.COMPUTE:
        raise ValueError(f"compute: expected one of {ops.COMPUTE}, got {compute!r}")
