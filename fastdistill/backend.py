"""Which implementation runs, and what this machine has: the one place that probes and decides."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

IMPLS = ("auto", "triton", "torch", "reference")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "peft",
    "bitsandbytes",
    "flash-attn",
)


TRITON_CAPABILITY = (8, 0)  # bf16 matrix instructions


@functools.cache
def no_triton(device_type: str, index: int | None) -> str | None:
    """Why the Triton kernels cannot run on this device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cpu":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return (
            "they need CUDA tensors; on a CPU they run, slowly, in Triton's interpreter only "
            "(TRITON_INTERPRET=1 before the first import)"
        )
    if device_type != "cuda":
        return f"they run on CUDA devices, not on {device_type!r}"
    capability = torch.cuda.get_device_capability(index)
    if capability < TRITON_CAPABILITY:
        return f"compute capability {capability} is below {TRITON_CAPABILITY}"
    return None


def automatic(device_type: str, index: int | None) -> str:
    """What impl="auto" means on a device: Triton on a GPU that can, else chunked PyTorch."""
    return "triton" if device_type == "cuda" and no_triton(device_type, index) is None else "torch"


@torch.compiler.assume_constant_result
def _resolve(impl: str, device_type: str, index: int | None) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if impl == "auto":
        return automatic(device_type, index)
    why = no_triton(device_type, index) if impl == "triton" else None
    if why is not None:
        raise ValueError(
            f"impl: 'triton' cannot run, because {why}; use impl='torch' (chunked, on CPU and "
            f"CUDA) or impl='auto'"
        )
    return impl


def resolve_impl(impl: str, device: torch.device | None = None) -> str:
    """The implementation behind `impl` for tensors on `device` (by default, on the first GPU or
    the CPU); an explicit choice that cannot run raises."""
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return _resolve(impl, device.type, device.index)


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages this library works with; None where missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def extension() -> Any | None:
    """The compiled module `fastdistill._ext`, or None where it was not built."""
    if importlib.util.find_spec("fastdistill._ext") is None:
        return None
    return importlib.import_module("fastdistill._ext")


def describe() -> dict[str, Any]:
    """What is here and what was chosen, for `doctor`, reports and benchmark rows."""
    cuda = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    ext = extension()
    chosen = resolve_impl("auto")
    kind = "cuda" if cuda else "cpu"
    why = no_triton(kind, 0 if cuda else None) or "this GPU runs the Triton kernels"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "packages": package_versions(),
        "extension": None if ext is None else ext.build_info(),
        "cpu_features": {} if ext is None else ext.cpu_features(),
        "impl": chosen,
        "impl_why": why,
    }
