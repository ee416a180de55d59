"""quantize_model: quantizes the linear layers of a model to 4 or 8 bits, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..runtime import checks
from .experts import ExpertStack, expert_parameters, is_transposed, put_experts
from .fake import WEIGHT_SCHEMES, check_conversion, quantize_as
from .linear import linear_of
from .ops import COMPUTE, unsupported_reason
from .schemes import QuantWeight

# Routers are small, and rounding there would change the experts of a token.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def targets(
    model: nn.Module, skip: Sequence[str] = ("lm_head",)
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers to quantize: all but the output head, routers and those in `skip`.

    An entry of `skip` is a full name, its last part, or a parent's name."""
    methods = ("get_output_embeddings", "get_input_embeddings")
    ends = [getattr(model, method, lambda: None)() for method in methods]
    tied = {id(getattr(end, "weight", None)) for end in ends if end is not None}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        if id(module.weight) in tied or skipped(name, skip):
            continue
        yield name, module


def skipped(name: str, skip: Sequence[str]) -> bool:
    parts = name.split(".")
    return parts[-1] in _ROUTERS or any(
        entry in (name, parts[-1]) or name.startswith(f"{entry}.") for entry in skip
    )


def stacks(model: nn.Module, skip: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, parameter) of the stacked experts to quantize."""
    for name, module in model.named_modules():
        for parameter in expert_parameters(module):
            if not skipped(f"{name}.{parameter}", skip):
                yield name, module, parameter


def quantizable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Return the names of the parameters to quantize: of `targets` and `stacks`."""
    layers = [f"{name}.weight" for name, _ in targets(model, skip)]
    return layers + [f"{name}.{parameter}" for name, _, parameter in stacks(model, skip)]


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:  # [N, K]
    """Return a parameter as the rows that are quantized."""
    if weight.dim() == 3:  # [E, N, K]
        if is_transposed(module):
            weight = weight.transpose(1, 2)
        return weight.reshape(-1, weight.shape[-1]).contiguous()
    return weight.t().contiguous() if is_conv1d(module) else weight


def put(model: nn.Module, name: str, weight: QuantWeight, compute: str) -> None:
    """Replace a parameter by a quantized layer, or if it is 3-D by a stack of experts."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter: Tensor = getattr(module, leaf)
    if parameter.dim() == 3:
        try:
            transposed = is_transposed(module)
            stack = ExpertStack(weight, len(parameter), compute=compute, transposed=transposed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or name it in skip=") from None
        put_experts(module, leaf, stack)
        return
    reason = unsupported_reason(compute, weight.qdata.device, *weight.shape, weight.block)
    if reason is not None:
        raise ValueError(
            f"compute: {compute!r} cannot run on {owner}: {reason}, or name it in skip="
        )
    parent, _, child = owner.rpartition(".")
    layer = linear_of(weight, module._parameters.get("bias"), compute)
    setattr(model.get_submodule(parent), child, layer)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    scheme: str,
    *,
    compute: str = "auto",
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replace the linear layers of a loaded model by quantized ones, in place.

    The output head, embeddings, norms and routers keep their dtype. The model is switched to eval
    mode and frozen: quantized layers are forward only.

    Args:
        model: a Hugging Face causal LM, or any nn.Module with nn.Linear layers, on any device.
        scheme: "nf4", "fp4", "int4" (blocks of 64) or "int8" (one scale per row); schemes.py. Or
            "nvfp4" (nvfp4.py). For a model of `fake_quantize`, the scheme that it was trained with.
        compute: "exact", "int8", "fp8" or "auto"; ops.py.
        skip: layers to exclude, by full name, last part of the name, or a parent's name.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown scheme or compute, weights that are not finite, a layer shape that
            `compute` does not support, a model with nothing to quantize, or one that was trained
            for another scheme or other layers.
    """
    checks.choice("scheme", scheme, WEIGHT_SCHEMES)
    checks.choice("compute", compute, COMPUTE)
    if isinstance(skip, str):
        skip = (skip,)
    names = quantizable(model, skip)
    check_conversion(model, scheme, names)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        try:
            weight = quantize_as(rows_of(module, getattr(module, leaf)), scheme)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None
        put(model, name, weight, compute)
    if not names:
        got = f"none in {type(model).__name__} outside skip={tuple(skip)}"
        checks.fail("model", "linear layers to quantize", got)
    warn_about_full_precision(model)
    return model.eval().requires_grad_(False)


def warn_about_full_precision(model: nn.Module) -> None:
    """Warn about stacked experts in full precision, which are most of a mixture's memory."""
    full_precision = [
        name
        for name, module in model.named_modules()
        if is_transposed(module) and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]
    if full_precision:
        warnings.warn(
            f"model: {len(full_precision)} groups of experts are stored transposed and stay in "
            f"full precision ({full_precision[0]}, …)",
            stacklevel=3,
        )
