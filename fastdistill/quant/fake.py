"""Fake quantization of a model for quantization-aware training and distillation.

    forward     y = x Q(W)ᵀ + b,   Q(W) = dequantize(quantize(W))
    backward    ∂L/∂W = ∂L/∂Q(W)   (straight-through estimator; Bengio et al. 2013)

W stays in full precision: the optimizer updates it and checkpoints store it. Every forward pass
computes the scales from W. `quantize_model` with the same scheme then gives exactly Q(W). In the
terms of torchao, `fake_quantize` is "prepare" and `quantize_model` is "convert".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime import checks
from .linear import dequantize
from .nvfp4 import quantize_nvfp4
from .schemes import SCHEMES, QuantWeight, quantize

WEIGHT_SCHEMES = ("nvfp4", *SCHEMES)


def quantize_as(weight: Tensor, scheme: str) -> QuantWeight:
    """Return a weight [N, K] quantized with a scheme of WEIGHT_SCHEMES."""
    return quantize_nvfp4(weight) if scheme == "nvfp4" else quantize(weight, scheme)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: str) -> Tensor:
        return dequantize(quantize_as(weight, scheme), weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FakeQuantizedLinear(nn.Linear):
    """y = x Q(W)ᵀ + b with a weight in full precision; Q rounds it to `scheme`.

    It shares weight and bias with the layer that it replaces, so a state_dict keeps its names.
    """

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.scheme = linear.weight, scheme
        self.bias = linear.bias
        self.train(linear.training)

    def quantized_weight(self) -> Tensor:  # [N, K]
        """Return Q(W); its gradient is passed on to W."""
        quantized: Tensor = _StraightThrough.apply(self.weight, self.scheme)  # type: ignore[no-untyped-call]
        return quantized

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return F.linear(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme!r}"


def fake_quantized(model: nn.Module) -> dict[str, str]:
    """Return {name: scheme} of the fake-quantized layers of a model."""
    layers = model.named_modules()
    return {name: m.scheme for name, m in layers if isinstance(m, FakeQuantizedLinear)}


def fake_quantize(
    model: nn.Module, scheme: str, *, skip: Sequence[str] = ("lm_head",)
) -> nn.Module:
    """Replace the linear layers of a model by fake-quantized ones, in place.

        y = x Q(W)ᵀ + b,  Q(W) = dequantize(quantize(W)),  ∂L/∂W = ∂L/∂Q(W)

    The layers are those of `quantize_model`: the output head, embeddings, norms and routers keep
    their precision. Only weights are quantized, not activations.

    Args:
        model: a Hugging Face causal LM, or any nn.Module with nn.Linear layers.
        scheme: "nvfp4" (blocks of 16 with fp8 scales), "nf4", "fp4", "int4" (blocks of 64) or
            "int8" (one scale per row).
        skip: layers to exclude, by full name, last part of the name, or a parent's name.

    Returns:
        The same model. Its parameters keep their names, so its checkpoints load into the plain one.

    Raises:
        ValueError: an unknown scheme; a model with fake-quantized layers, without linear layers, or
            with stacked experts or GPT-2's Conv1D outside `skip`; a row length that the scheme does
            not support.

    Example:
        student = fake_quantize(AutoModelForCausalLM.from_pretrained(path), "nvfp4")
        DistillTrainer(student, teacher=path, args=args, train_dataset=rows).train()
        save_quantized(quantize_model(student, "nvfp4"), "student-nvfp4")
    """
    from .model import stacks, targets

    checks.choice("scheme", scheme, WEIGHT_SCHEMES)
    if isinstance(skip, str):
        skip = (skip,)
    if fake_quantized(model):
        got = "layers that are fake-quantized already"
        checks.fail("model", "layers in full precision", got, "call fake_quantize once")
    layers = dict(targets(model, skip))
    others = [f"{name}.{parameter}" for name, _, parameter in stacks(model, skip)]
    others += [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if others:
        hint = "name it in skip= here and in quantize_model"
        checks.fail("model", "nn.Linear layers alone", f"{others[0]} of another kind", hint)
    if not layers:
        got = f"none in {type(model).__name__} outside skip={tuple(skip)}"
        checks.fail("model", "linear layers to quantize", got, "shorten skip=")
    for name, layer in layers.items():
        try:
            quantize_as(layer.get_parameter("weight")[:1], scheme)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or name it in skip=") from None
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, FakeQuantizedLinear(layer, scheme))
    return model


def check_conversion(model: nn.Module, scheme: str, names: Sequence[str]) -> None:
    """Raise ValueError if scheme or layers differ from those of the fake-quantized layers."""
    fake = fake_quantized(model)
    if not fake:
        return
    trained = sorted(set(fake.values()))
    if trained != [scheme]:
        expected = f"{trained[0]!r}, for which the layers were trained"
        checks.fail("scheme", expected, repr(scheme), "pass the same scheme")
    differing = {f"{name}.weight" for name in fake} ^ set(names)
    if differing:
        name = min(differing)
        got = f"one that {'includes' if name in names else 'leaves out'} {name}"
        hint = "pass the skip= of fake_quantize"
        checks.fail("skip", "the layers that fake_quantize left out", got, hint)
