"""Finds weights that two models share in memory, inside any objects."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ...losses.vocab_parallel import is_dtensor
from ...teachers.local import Teacher

_MAX_DEPTH = 5  # levels of objects and containers around a teacher's model
_MAX_OBJECTS = 10_000  # objects that are inspected


def shared_parameters(model: nn.Module, others: Sequence[nn.Module | Tensor]) -> list[str]:
    """Return the names of parameters of `model` that share memory with a tensor of `others`.

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


def models_in(teacher: Any) -> tuple[list[nn.Module | Tensor], list[nn.Parameter]]:
    """Return the models and tensors inside a teacher, and the parameters that a Teacher froze.

    The search follows attributes, containers, partials and bound methods. It does not enter a
    function: its closure may read the student on purpose, as an interpolated target does.
    """
    weights: dict[int, nn.Module | Tensor] = {}
    frozen: list[nn.Parameter] = []
    visited: dict[int, Any] = {}  # holds the objects, so that no id is reused

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, (nn.Module, Tensor)):
            weights[id(value)] = value
        elif depth and id(value) not in visited and len(visited) < _MAX_OBJECTS:
            visited[id(value)] = value
            if isinstance(value, Teacher):
                frozen.extend(value.frozen)
            for inner in _held_by(value):
                visit(inner, depth - 1)

    visit(teacher, _MAX_DEPTH)
    return list(weights.values()), frozen


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, (type, ModuleType, FunctionType, str, bytes)):
        return
    if isinstance(value, Mapping):
        yield from islice(value.values(), _MAX_OBJECTS)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from islice(value, _MAX_OBJECTS)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield getattr(value, name, None)


def _tensors(model: nn.Module | Tensor) -> Iterator[Tensor]:
    if isinstance(model, Tensor):
        yield model
        return
    yield from model.parameters()
    yield from model.buffers()


def _span(tensor: Any) -> list[tuple[str, int, int]]:
    """Return [(device, first byte, end byte)], empty without data."""
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
    """Return the union of the spans as spans that do not overlap."""
    merged: list[tuple[str, int, int]] = []
    for device, begin, end in spans:
        if merged and merged[-1][0] == device and begin <= merged[-1][2]:
            merged[-1] = (device, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((device, begin, end))
    return merged


def _is_within(span: tuple[str, int, int], merged: list[tuple[str, int, int]]) -> bool:
    device, begin, end = span
    before = bisect_right(merged, (device, end - 1, 2**63)) - 1
    return before >= 0 and merged[before][0] == device and merged[before][2] > begin
