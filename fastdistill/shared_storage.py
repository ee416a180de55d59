"""Which weights of two models lie in the same memory, in whatever objects they are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .parallel import is_dtensor
from .teacher import Teacher

_DEEP = 3  # objects around a teacher's model


def shared_parameters(model: nn.Module, others: list[nn.Module]) -> list[str]:
    """Names of the parameters of `model` that have memory in common with a tensor of `others`.

    A view, a slice, a tensor of another module and another Parameter of the same data all count.
    Parameters without data here (on the meta device, or partitioned) are compared as objects.
    """
    tensors = [tensor for other in others for tensor in _tensors(other)]
    objects = {id(tensor) for tensor in tensors}
    spans = _merged(sorted(span for tensor in tensors for span in _span(tensor)))
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in objects or any(_is_within(span, spans) for span in _span(parameter))
    ]


def models_in(teacher: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The models that answer for a teacher, itself or what the objects around one hold; and the
    parameters that a Teacher among them froze."""
    models: dict[int, nn.Module] = {}
    frozen: list[nn.Parameter] = []

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            models[id(value)] = value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, type):
            if isinstance(value, Teacher):
                frozen.extend(value.frozen)
            for inner in vars(value).values():
                look(inner, depth - 1)

    look(teacher, _DEEP)
    return list(models.values()), frozen


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _span(tensor: Any) -> list[tuple[str, int, int]]:
    """[(device, first byte, byte behind the last)], nothing without data."""
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    if local.is_meta or not local.numel():
        return []
    try:
        begin = local.data_ptr()
    except RuntimeError:  # a tensor subclass without one memory
        return []
    steps = zip(local.shape, local.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return [(str(local.device), begin, begin + (last + 1) * local.element_size())]


def _merged(spans: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The same bytes as spans that do not overlap."""
    merged: list[tuple[str, int, int]] = []
    for device, begin, end in spans:
        if merged and merged[-1][0] == device and begin <= merged[-1][2]:
            merged[-1] = (device, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((device, begin, end))
    return merged


def _is_within(span: tuple[str, int, int], merged: list[tuple[str, int, int]]) -> bool:
    """Whether a span has a byte in common with one of the merged spans."""
    device, begin, end = span
    before = bisect_right(merged, (device, end - 1, 2**63)) - 1
    return before >= 0 and merged[before][0] == device and merged[before][2] > begin
