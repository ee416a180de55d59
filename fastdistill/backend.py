"""Which implementation runs, and what this machine has: the one place that probes and decides."""

from __future__ import annotations

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


def resolve_impl(impl: str) -> str:
    """The implementation behind `impl`; an explicit choice that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if impl == "triton":
        raise ValueError(
            "impl: 'triton' cannot run, because this version has no Triton kernels yet; "
            "use impl='torch' (chunked, on CPU and CUDA) or impl='auto'"
        )
    return "torch" if impl == "auto" else impl


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
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "packages": package_versions(),
        "extension": None if ext is None else ext.build_info(),
        "cpu_features": {} if ext is None else ext.cpu_features(),
        "impl": resolve_impl("auto"),
        "impl_why": "the chunked PyTorch backend is the only one in this version",
    }
