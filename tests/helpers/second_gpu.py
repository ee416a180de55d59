"""Public functions on tensors of "cuda:1" without data, on a machine without a GPU.

`second_gpu` is the context. In it operators run their own bodies on fake tensors, and Triton
kernels do nothing. An error is raised where a tensor is made on another device, where a value is
read on the host, and where a kernel is launched under another current device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 1)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
GPU = SimpleNamespace(multi_processor_count=132, total_memory=141 << 30)


class OnOneDevice(TorchDispatchMode):
    """Runs the bodies of this library's operators; if strict, results must be on DEVICE."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "fastdistill":
            name = function._schema.name.partition("::")[2]
            with self:
                return _body(name)(*args, **kwargs or {})
        out = function(*args, **kwargs or {})
        if not self.strict:
            return out
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device != DEVICE:
                # A scalar of PyTorch's own, which becomes an argument of a kernel.
                scalar = tensor.dim() == 0 and tensor.device.type == "cpu" and DEVICE not in devices
                assert scalar, f"{function} made a tensor on {tensor.device}"
            elif function in COPIES:
                assert devices == {DEVICE}, f"{function} copies from {devices}"
        return out


def _body(name: str) -> Callable[..., Any]:
    from fastdistill.kernels.op_common import BODIES
    from fastdistill.kernels.row_topk import by_sorting
    from fastdistill.quant import ops

    if name == "row_topk":
        return by_sorting
    return BODIES.get(name) or vars(ops)[f"_{name}"]


class Launches:
    """Stands in for jitted kernels and CUDA's current device, which is 0 outside of a launch."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.current = torch.device("cuda", 0)

    @contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        before, self.current = self.current, tensor.device
        yield
        self.current = before

    def jitted(self, name: str) -> Any:
        return _Kernel(partial(self.run, name))

    def run(self, name: str, **arguments: Any) -> None:
        self.kernels.add(name.partition(":")[2])
        for argument, value in arguments.items():
            tensor = getattr(value, "base", value)  # the tensor of a descriptor
            if isinstance(tensor, Tensor):
                devices = {tensor.device, self.current, DEVICE}
                assert len(devices) == 1, (name, argument, devices)


class _Kernel:
    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


@contextmanager
def second_gpu(strict: bool = True) -> Iterator[Launches]:
    """Context of fake tensors on "cuda:1" that counts launches; the GPU is an H200."""
    from fastdistill.kernels import gpu_dense, gpu_launch
    from fastdistill.kernels.backends import get_backend
    from fastdistill.quant import ops
    from fastdistill.runtime import backend

    get_backend("triton")
    launches = Launches()

    def of_device(value: Any) -> Callable[..., Any]:
        def run(device: Any = None) -> Any:
            assert device == DEVICE, f"a property of the current device, not of {DEVICE}"
            return value

        return run

    with ExitStack() as stack:
        for owner, name, value in (
            (gpu_launch, "jitted", launches.jitted),
            (gpu_dense, "jitted", launches.jitted),
            (backend, "triton_problem", lambda *device: None),
            (backend, "cuda_extension", lambda: None),  # it reads memory
            (torch.cuda, "device_of", launches.device_of),
            (torch.cuda, "get_device_capability", of_device((9, 0))),
            (torch.cuda, "get_device_properties", of_device(GPU)),
            (torch.cuda, "mem_get_info", of_device((1 << 34, GPU.total_memory))),
            (torch.cuda, "memory_reserved", of_device(0)),
            (torch.cuda, "memory_allocated", of_device(0)),
            (torch.cuda, "current_stream", of_device(SimpleNamespace(cuda_stream=0))),
            (ops, "scratch", type(ops.scratch)()),
            (torch.autograd, "grad", _grad),
            (FunctionCtx, "set_materialize_grads", _set_materialize_grads),
            (FakeTensor, "data_ptr", lambda tensor: 16 * id(tensor)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(_device_guard())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(OnOneDevice(strict))
        yield launches


def without_data(module: nn.Module) -> nn.Module:
    """The module, with its parameters and buffers on DEVICE; inside `second_gpu` only."""
    for part in module.modules():
        stores: list[Any] = [part._parameters, part._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    if isinstance(tensor, nn.Parameter):
                        tensors[name] = nn.Parameter(tensors[name], requires_grad=False)
    return module


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let autograd record tensors of "cuda" in a build of torch without CUDA.

    It looks up a guard of the device type, and ends the process if there is none. That of the CPU
    does nothing. A CUDA build has its own, which torch itself replaces where there is no GPU.
    """
    if torch.version.cuda:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 2).in_dll(library, name)  # by device type: CPU, CUDA, …
    guards[1] = guards[0]
    try:
        yield
    finally:
        guards[1] = None


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = ctx.materializes = value  # the first cannot be read


def backward(loss: Tensor) -> None:
    """loss.backward() in Python: torch's engine needs the device."""
    leaves, grads = _grads_of_leaves([loss])
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad


def _grad(outputs: Any, inputs: Sequence[Tensor], *args: Any, **options: Any) -> tuple[Any, ...]:
    """torch.autograd.grad of leaves."""
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    leaves, grads = _grads_of_leaves([outputs] if isinstance(outputs, Tensor) else outputs)
    by_leaf = {id(leaf): grad for leaf, grad in zip(leaves, grads, strict=True)}
    return tuple(by_leaf[id(t)] if id(t) in by_leaf else torch.zeros_like(t) for t in inputs)


@torch.no_grad()
def _grads_of_leaves(outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    upstream: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, index: int, grad: Tensor) -> None:
        meta = node._input_metadata[index]
        grad = grad.sum_to_size(meta.shape).to(meta.dtype)
        slots = upstream.setdefault(node, {})
        slots[index] = slots[index] + grad if index in slots else grad

    for output in outputs:
        add(output.grad_fn, output.output_nr, torch.ones_like(output))
    leaves, grads = [], []
    for node in _from_outputs_to_leaves(outputs):
        slots = upstream.get(node, {})
        if hasattr(node, "variable"):
            leaves.append(node.variable)
            grads.append(slots[0])
            continue
        for (following, index), grad in _results_by_edge(node, slots):
            if following is not None and grad is not None:
                add(following, index, grad)
    return leaves, grads


def _from_outputs_to_leaves(outputs: Sequence[Tensor]) -> list[Any]:
    order: dict[Any, None] = {}

    def visit(node: Any) -> None:
        if node not in order:
            for following, _ in node.next_functions:
                if following is not None:
                    visit(following)
            order[node] = None

    for output in outputs:
        visit(output.grad_fn)
    return list(reversed(order))


def _results_by_edge(node: Any, slots: dict[int, Tensor]) -> Iterable[tuple[Any, Any]]:
    in_python = hasattr(node, "apply")
    upstream: list[Any] = [slots.get(i) for i in range(len(node._input_metadata))]
    if getattr(node, "materializes", in_python):
        for i, meta in enumerate(node._input_metadata):
            if upstream[i] is None:
                upstream[i] = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
    results = getattr(node, "apply", node)(*upstream)
    results = results if isinstance(results, tuple) else (results,)
    edges = node.next_functions
    if in_python:  # it returns a result for inputs that are no tensors, too, and they have no edge
        edges = [edge for edge in edges if edge[0] is not None]
        results = [r for r, needed in zip(results, node.needs_input_grad, strict=True) if needed]
    return zip(edges, results, strict=True)
