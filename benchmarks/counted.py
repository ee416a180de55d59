"""What a call would do on a GPU, counted on a machine without one.

The call runs in full: checks, host code of the kernels, autograd. Its tensors have no data and say
that they are on the GPU (`on_gpu`). Recorded in order: products, launches of Triton kernels and
PyTorch's operators, with the bytes that they read and write. A read of a value on the host has no
answer here and raises.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.kernels import gpu_launch, op_common, op_losses
from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.namespace import NAMESPACE
from fastdistill.runtime import backend

from .gpus import GPU

FREE = ("aten.empty", "aten.new_empty", "aten.lift_fresh")  # beside views and empty results
UNREAD = ("aten.copy_", "aten.fill_", "aten.zero_")  # the first argument, which they overwrite
# They touch a sector of 32 bytes for each index, not the whole tensor. The functional scatter_add
# is here for the backward of gather, which is in place with plain tensors.
INDEXED = ("aten.gather", "aten.scatter_", "aten.scatter_add")
SECTOR = 32
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = gpu_launch.__name__.rpartition(".")[0] + "."
_fake_device = FakeTensor.device


class Gemm(NamedTuple):
    """[m, k] @ [k, n]; reads and writes in bytes."""

    m: int
    n: int
    k: int
    operand: torch.dtype
    read: int
    written: int


class Sizes(NamedTuple):
    """What remains of a tensor, which may be freed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Sizes:
        return cls(tuple(tensor.shape), tensor.dtype, bytes_of(tensor))


class Launch(NamedTuple):
    """A Triton kernel "module:name"; the tensors among its arguments are Sizes."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Operator(NamedTuple):
    """An operator of PyTorch; a view or an allocation is free on the GPU."""

    name: str  # "aten.add.Tensor"
    read: int
    written: int
    is_free: bool

    @property
    def packet(self) -> str:
        """The name without the overload, "aten.add"."""
        return self.name.rpartition(".")[0]


Event = Gemm | Launch | Operator


class Calls(list[Event]):
    """What was recorded, in order."""

    def counts(self) -> dict[str, int]:
        """How many products, launches of Triton kernels, and other operators that run a kernel."""
        return {
            "gemms": sum(isinstance(e, Gemm) for e in self),
            "launches": sum(isinstance(e, Launch) for e in self),
            "operators": sum(isinstance(e, Operator) and not e.is_free for e in self),
        }

    def kernels(self) -> Counter[str]:
        """How often each Triton kernel is launched."""
        return Counter(e.kernel for e in self if isinstance(e, Launch))

    @property
    def flops(self) -> int:
        return sum(2 * e.m * e.n * e.k for e in self if isinstance(e, Gemm))


def bytes_of(tensor: Tensor) -> int:
    """The bytes behind a tensor; an expanded dimension counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


class _Recorder(TorchDispatchMode):
    """Record every operator; inside one, tensors are on the CPU, as FakeTensorMode requires."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls, self.inside = calls, False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.prim.device.default:
            return CPU
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        body = None
        if function.namespace == NAMESPACE:  # our operators run their Python code
            body = op_common.BODIES.get(function._schema.name.partition("::")[2])
        was, self.inside = self.inside, body is None
        try:
            if body is not None:
                with self:
                    return body(*args, **kwargs)
            out = function(*args, **kwargs)
            if not was:
                self.calls.append(self._event(function, args, kwargs, out))
            return out
        finally:
            self.inside = was

    def _event(self, function: Any, args: Any, kwargs: Any, out: Any) -> Event:
        full_name = str(function)
        name = full_name.rpartition(".")[0]
        read = {k: v for k, v in kwargs.items() if k != "out"}
        tensors = [t for t in tree_leaves((args, read)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in ("aten.mm", "aten.addmm"):
            left, right = tensors[-2:]
            moved = sum(map(bytes_of, tensors))
            return _gemm(left, right, moved, bytes_of(results[0]))
        changed = [
            value
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        leaves = tree_leaves((changed, kwargs.get("out")))
        overwritten = [t for t in leaves if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in (*tensors, *overwritten)}
        fresh = [t for t in results if t.untyped_storage()._cdata not in known]
        written = sum(map(bytes_of, (*overwritten, *fresh)))
        is_free = written == 0 or (not overwritten and name.startswith(FREE))
        if name in UNREAD or name.startswith("aten.new_") or name.endswith("_like"):
            tensors = tensors[1:]
        elif name in INDEXED:
            index = next(t for t in tensors if t.dtype == torch.int64)
            return Operator(full_name, bytes_of(index), SECTOR * index.numel(), is_free)
        return Operator(full_name, sum(map(bytes_of, tensors)), written, is_free)


def _gemm(left: Tensor, right: Tensor, read: int, written: int) -> Gemm:
    return Gemm(len(left), right.shape[1], right.shape[0], left.dtype, read, written)


@contextmanager
def on_gpu(gpu: GPU) -> Iterator[Calls]:
    """Context in which new tensors have no data and say "cuda:0"; what calls do is recorded.

    Nothing runs on a GPU, and none is needed.
    """
    calls = Calls()
    recorder = _Recorder(calls)

    def product(left: Tensor, right: Tensor, out: Tensor) -> None:
        calls.append(_gemm(left, right, bytes_of(left) + bytes_of(right), bytes_of(out)))

    def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
        read = bytes_of(left) + bytes_of(right) + (0 if first else bytes_of(out))
        calls.append(_gemm(left, right, read, bytes_of(out)))

    def launch(kernel: str, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
        if 0 in grid:
            return
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)  # the tensor of a descriptor
            if isinstance(tensor, Tensor):
                arguments[name] = Sizes.of(tensor)
        calls.append(Launch(kernel, grid, arguments))

    def device(tensor: Any) -> torch.device:
        return _fake_device.__get__(tensor) if recorder.inside else CUDA

    get_backend("triton")
    stand_ins = {
        gpu_launch.product: product,
        gpu_launch.add_product: add_product,
        gpu_launch.launch: launch,
        gpu_launch.jitted: lambda name: name,
    }
    properties = SimpleNamespace(
        total_memory=gpu.memory, multi_processor_count=gpu.sms, L2_cache_size=gpu.l2_bytes
    )
    with ExitStack() as stack:
        for module in [m for n, m in sys.modules.items() if n.startswith(PACKAGE)]:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__module__", "") == gpu_launch.__name__:
                    stand_in = stand_ins.get(value)
                    if stand_in is not None:
                        stack.enter_context(patch.object(module, name, stand_in))
        for target, name, value in (
            (torch.cuda, "get_device_capability", lambda *device: gpu.capability),
            (torch.cuda, "get_device_properties", lambda *device: properties),
            (backend, "triton_problem", lambda *device: None),
            (op_losses, "Tensor", FakeTensor),  # in place, as with a plain tensor
            (FakeTensor, "device", property(device)),
            (FakeTensor, "is_cuda", property(lambda tensor: not recorder.inside)),
            (FakeTensor, "data_ptr", lambda tensor: 16 * id(tensor)),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        yield calls
