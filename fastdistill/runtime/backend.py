"""Probe the machine and choose the implementation."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .version import __version__

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
    "uvicorn",
    "pyarrow",
)


TRITON_CAPABILITY = (8, 0)  # bf16 matrix instructions


@functools.cache
def triton_problem(device_type: str, index: int | None) -> str | None:
    """Return why the Triton kernels cannot run on this device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cpu":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return (
            "the Triton kernels need a CUDA GPU; TRITON_INTERPRET=1, set before the first import, "
            "runs them slowly on a CPU"
        )
    if device_type != "cuda":
        return f"the Triton kernels need a CUDA GPU, not {device_type!r}"
    capability = torch.cuda.get_device_capability(index)
    if capability < TRITON_CAPABILITY:
        return f"compute capability {capability} is below {TRITON_CAPABILITY}"
    return None


def automatic(device_type: str, index: int | None) -> str:
    """Resolve impl="auto" on a device: Triton on a GPU that runs it, else chunked PyTorch."""
    return (
        "triton"
        if device_type == "cuda" and triton_problem(device_type, index) is None
        else "torch"
    )


def _resolve(impl: str, device_type: str, index: int | None) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if impl == "auto":
        return automatic(device_type, index)
    reason = triton_problem(device_type, index) if impl == "triton" else None
    if reason is not None:
        raise ValueError(
            f"impl: 'triton' cannot run: {reason}. Use impl='torch' (chunked, on CPU and "
            f"CUDA) or impl='auto'"
        )
    return impl


# The mark that torch.compiler.assume_constant_result sets. Calling that function imports
# torch._dynamo, which takes seconds.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_impl(impl: str, device: torch.device | None = None) -> str:
    """Return the implementation for `impl` and tensors on `device`; raise if it cannot run.

    The default device is the first GPU, or the CPU.
    """
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    resolved: str = _resolve(impl, device.type, device.index)
    return resolved


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages this library works with; None if missing."""
    versions_by_name: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions_by_name[name] = version(name)
        except PackageNotFoundError:
            versions_by_name[name] = None
    return versions_by_name


def versions() -> dict[str, str]:
    """Versions of this library, Python and the installed packages, for records of results."""
    installed = {
        name: version_text
        for name, version_text in package_versions().items()
        if version_text is not None
    }
    return {"fastdistill": __version__, "python": platform.python_version()} | installed


@functools.cache
def extension() -> Any | None:
    """The compiled module `fastdistill.runtime._ext`; None if not built or FASTDISTILL_NO_EXT=1."""
    return _compiled("_ext")


@functools.cache
def cuda_extension() -> Any | None:
    """The CUDA module `fastdistill.runtime._cuda`, under the same conditions."""
    return _compiled("_cuda")


def _compiled(module: str) -> Any | None:
    name = f"{__package__}.{module}"
    off = os.environ.get("FASTDISTILL_NO_EXT") == "1"
    if off or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


@functools.cache
def cpu_isa() -> int:
    """The instruction set of the extension's kernels, as an index into `isa_names()`.

    It is the best of this CPU, or the one that FASTDISTILL_CPU_ISA names.
    """
    ext = extension()
    if ext is None:
        return 0
    names, best = ext.isa_names(), ext.best_isa()
    isa = os.environ.get("FASTDISTILL_CPU_ISA", names[best])
    if isa not in names[: best + 1]:
        raise ValueError(
            f"FASTDISTILL_CPU_ISA: expected one of {', '.join(names[: best + 1])} on this CPU, got "
            f"{isa!r}"
        )
    return int(names.index(isa))


def describe() -> dict[str, Any]:
    """The machine and the chosen implementation, for `doctor`, reports and benchmark rows."""
    cuda = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    ext, cuda_ext = extension(), cuda_extension()
    chosen = resolve_impl("auto")
    kind = "cuda" if cuda else "cpu"
    reason = triton_problem(kind, 0 if cuda else None) or "this GPU runs the Triton kernels"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "packages": package_versions(),
        "extension": None if ext is None else ext.build_info(),
        "cpu_features": {} if ext is None else ext.cpu_features(),
        "cpu_isa": None if ext is None else ext.isa_names()[cpu_isa()],
        "cuda_extension": None if cuda_ext is None else cuda_ext.build_info(),
        "impl": chosen,
        "impl_why": reason,
    }


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of processes, from torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def served_token() -> str | None:
    """The bearer token of a served teacher, FASTDISTILL_TOKEN, for client and server."""
    return os.environ.get("FASTDISTILL_TOKEN") or None


@contextmanager
def one_thread() -> Iterator[None]:
    """Context with one torch thread, for small models.

    More threads gain little there, and on a busy machine they multiply the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
