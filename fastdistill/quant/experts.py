"""Quantized experts of a mixture: one stacked weight [E, N, K].

transformers keeps the experts of a layer in 3-D parameters and, in its "eager" forward, uses them
one by one: F.linear(x, self.gate_up_proj[e]). Indexing an ExpertStack returns a handle that
F.linear accepts as a weight, so that no model code is patched. gpt-oss stores them transposed,
[E, K, N], and computes x @ self.gate_up_proj[e]: the handle of such a stack accepts that product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime import checks
from ..runtime.checks import fail
from .linear import Parts, QuantizedWeight, product, row_scale
from .ops import COMPUTE
from .schemes import Lut4Weight, QuantWeight

_PRODUCTS = (torch.matmul, torch.Tensor.matmul)


class ExpertStack(QuantizedWeight):
    """E weights [N, K] in one QuantWeight [E · N, K]; stack[e] is a handle to the e-th."""

    def __init__(
        self,
        weight: QuantWeight,
        experts: int,
        *,
        compute: str = "auto",
        transposed: bool = False,
    ) -> None:
        checks.choice("compute", compute, COMPUTE)
        rows, K = weight.shape
        if rows % experts or (rows // experts * K) % (2 * weight.block):
            expected = f"{experts} experts of whole blocks of {weight.block}"
            fail("weight", expected, list(weight.shape))
        if isinstance(weight, Lut4Weight):  # blocks of nested scales may span two experts
            weight = replace(weight, scale=weight.scales)
        super().__init__(weight)
        self.experts, self.compute, self.transposed = experts, compute, transposed
        self.register_buffer("row_scale", row_scale(weight, compute), persistent=False)

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: int | Tensor) -> Expert:
        return Expert(self, int(expert))

    def parts_of(self, expert: int) -> Parts:
        """One expert's weight, a view."""
        whole, (rows, K) = self.parts, self.shape
        N = rows // self.experts
        blocks = N * K // self.block
        at = slice(expert * blocks, (expert + 1) * blocks)
        offset = None if whole.offset is None else whole.offset.view(-1)[at]
        return whole._replace(
            shape=(N, K),
            qdata=whole.qdata.view(self.experts, -1)[expert],
            scale=whole.scale.view(-1)[at],
            offset=offset,
        )

    def extra_repr(self) -> str:
        rows, K = self.shape
        return f"experts={self.experts}, shape={(rows // self.experts, K)}, block={self.block}"


class Expert:
    """A handle to one expert: the weight of F.linear, or of a product if it is transposed."""

    def __init__(self, stack: ExpertStack, index: int) -> None:
        self.stack, self.index = stack, index

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        arguments = dict(zip(("input", "weight", "bias"), args, strict=False), **(kwargs or {}))
        expert = arguments.get("weight")
        if isinstance(expert, Expert):
            products = _PRODUCTS if expert.stack.transposed else (F.linear,)
            if function in products:
                return expert.product(arguments["input"], arguments.get("bias"))
        raise TypeError(
            f"quantized experts: expected torch.nn.functional.linear(x, experts[e]), or "
            f"x @ experts[e] if they are stored transposed, got "
            f"{getattr(function, '__name__', function)}. Set the model's experts "
            "implementation to 'eager'"
        )

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        stack, steps = self.stack, self.stack._buffers["row_scale"]
        if steps is not None:
            steps = steps.view(stack.experts, -1)[self.index]
        return product(stack.parts_of(self.index), x, bias, steps, stack.compute)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its experts as [E, K, N]."""
    return bool(getattr(module, "is_transposed", False))


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's stacked [E, N, K] weights; empty if there are none.

    Weights that are stored transposed are not quantized here, and not returned."""
    if not hasattr(module, "num_experts") or is_transposed(module):
        return []
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.is_floating_point() and p.shape[0] == module.num_experts
    ]


def put_experts(module: nn.Module, name: str, stack: ExpertStack) -> None:
    """Replace a 3-D parameter by a stack, and select the eager forward of experts."""
    del module._parameters[name]
    module.add_module(name, stack)
    config = getattr(module, "config", None)
    if config is not None:
        config._experts_implementation = "eager"
