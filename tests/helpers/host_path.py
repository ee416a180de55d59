"""Run the checks of tests/test_gpu.py through Triton's compiler and launcher, without a GPU.

    python tests/helpers/host_path.py                       all checks of kernels, JSON on stdout
    python tests/helpers/host_path.py filtered quantized    only these checks or groups
    python tests/helpers/host_path.py --cached              kernels compiled before are not again
    python tests/helpers/host_path.py --time                µs of one launch of each loss kernel

helpers/stub_cuda.c is in the place of the CUDA driver: kernels are compiled for sm_90, launched by
Triton's own launcher, and do not run. It refuses what a driver refuses. Tensors are on the CPU,
products of matrices do nothing, and no result is compared. The JSON has, for each group of checks,
the compiled variants of each kernel, the launches, and the seconds of CPU time with compilers;
benchmarks/gpu_steps.py derives its time limits from these, without --cached. A time is the minimum
of many rounds: Triton's Python and C for one launch, without the driver's own work.
benchmarks/gpus.py has them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import fastdistill

HERE = Path(__file__).parent
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def missing() -> str | None:
    """Why the rehearsal cannot run on this machine, or None."""
    if torch.cuda.is_available():
        return "a GPU is here: tests/test_gpu.py runs on it"
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
        return "no C compiler is here"
    return None if (HEADERS / "cuda.h").exists() else "this Triton has no cuda.h"


def compile_stub(folder: Path, name: str = "libcuda.so.1") -> Path:
    """Compile the stub as a library of this name."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
    options = ["-shared", "-fPIC", f"-Wl,-soname,{name}", f"-I{HEADERS}"]
    command = [compiler, *options, str(HERE / "stub_cuda.c"), "-o", str(folder / name)]
    subprocess.run(command, check=True)
    return folder / name


def load_stub(folder: Path) -> ctypes.CDLL:
    """Load the stub as libcuda.so.1, so that Triton's modules are linked with it."""
    knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(compile_stub(folder)), mode=ctypes.RTLD_GLOBAL)


def use_stub_driver() -> None:
    """Triton's CUDA driver on device 0, an sm_90 that the stub describes."""
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            try:
                super().__init__()
            except ImportError as error:
                raise ImportError(
                    f"Triton {triton.__version__}: its driver needs calls that {HERE.name}/"
                    f"stub_cuda.c lacks; add them: {error}"
                ) from error
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())


def without_assertions(name: str) -> Any:
    """A module of checks that makes its calls and compares nothing."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    code = compile(Path(spec.origin).read_text(), spec.origin, "exec", optimize=1)
    sys.modules[name] = module
    exec(code, vars(module))
    return module


def as_on_a_gpu() -> None:
    """Chunks of a GPU, every call to Triton, no products; PyTorch's CUDA calls do nothing."""
    from fastdistill.kernels import gpu_launch, head
    from fastdistill.kernels.backends import get_backend
    from fastdistill.losses import checks
    from fastdistill.runtime import backend

    vars(checks)["values_readable"] = lambda tensor, check: check  # as on a GPU
    get_backend("triton")
    products = {gpu_launch.product, gpu_launch.add_product}
    launch = gpu_launch.launch

    def checked_launch(kernel: str, grid: Any, like: torch.Tensor, **arguments: Any) -> None:
        if 0 not in grid:
            refuse_null(kernel, arguments)
        launch(kernel, grid, like, **arguments)

    for module in [m for n, m in sys.modules.items() if n.startswith("fastdistill.kernels.")]:
        for name in ("product", "add_product"):
            if getattr(module, name, None) in products:
                setattr(module, name, lambda *args, **options: None)
        if getattr(module, "launch", None) is launch:
            vars(module)["launch"] = checked_launch
    tables: list[dict[str, Any]] = [vars(head)["CHUNK_BYTES"], vars(head)["CARRIED_CHUNKS"]]
    for table in tables:
        table["cpu"] = table["cuda"]
    functions: Any = vars(backend)
    functions |= {
        "triton_problem": lambda *device: None,
        "_resolve": lambda impl, *device: "triton",  # of the reference, too
    }
    cuda: Any = torch.cuda
    cuda.device_of = nullcontext
    for name in ("Stream", "stream", "synchronize", "set_sync_debug_mode", "CUDAGraph", "graph"):
        setattr(cuda, name, MagicMock())
    vars(torch)["compile"] = lambda function, **options: function
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _with_zeros(getattr(owner, name)))


def refuse_null(kernel: str, arguments: dict[str, Any]) -> None:
    """Raise if a tensor without memory is passed; a kernel without slots may get [n, 0]."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.data_ptr() and value.shape[-1:] != (0,):
            raise ValueError(f"{kernel}: {name}: expected a tensor in memory, got a null pointer")


def _with_zeros(empty: Any) -> Any:
    """Integers that no kernel writes are indices of other operations."""

    def run(*args: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **options)
        return tensor if tensor.is_floating_point() else tensor.zero_()

    return run


class Launches:
    """fastdistill for a module of checks: calls of the reference launch nothing."""

    def __init__(self) -> None:
        from fastdistill.kernels import gpu_launch

        self.names: Any = vars(gpu_launch)

    def __getattr__(self, name: str) -> Any:
        function = getattr(fastdistill, name)

        def run(*args: Any, **options: Any) -> Any:
            if options.get("impl") != "reference":
                return function(*args, **options)
            launches, self.names["jitted"] = self.names["jitted"], MagicMock()
            try:
                return function(*args, **options)
            finally:
                self.names["jitted"] = launches

        return run


def groups() -> dict[str, list[Any]]:
    """The checks of each group as functions that only launch."""
    tolerances = without_assertions("helpers.tolerances")
    tolerances.relative = tolerances.assert_close = lambda *args: 0.0
    losses = without_assertions("helpers.gpu_checks")
    losses.IMPLS = ("triton",)
    losses.fd = Launches()
    gradients, zeros = losses.gradients, (torch.zeros(()),) * 4
    losses.gradients = lambda c, teacher, dtype, impl, **options: (
        zeros if impl == "reference" else gradients(c, teacher, dtype, impl, **options)
    )
    quantized = without_assertions("helpers.gpu_quant_checks")
    on_cpu = quantized.every_compute_against_fp64  # its layers multiply as on a CPU

    def every_compute_against_fp64() -> None:
        (engine,) = quantized.engines()
        weight = quantized.quantize(torch.randn(512, 1024), "nf4")
        for to in (*quantized.FLOATS, torch.int8, quantized.FP8):
            inverse = None if to.is_floating_point and to.itemsize > 1 else torch.ones(512)
            engine.lut4_dequant(weight, torch.empty(512, 1024, dtype=to), inverse)
        for dtype, kind in itertools.product(quantized.FLOATS, (torch.int8, quantized.FP8)):
            for tokens in (1, 17, 300):
                engine.quantize_rows(torch.randn(tokens, 1024).to(dtype), kind)

    replaced = [every_compute_against_fp64 if c is on_cpu else c for c in quantized.CHECKS]
    return {"losses": list(losses.CHECKS), "quantized": replaced}


@contextmanager
def over_the_stub(cached: bool = False) -> Iterator[ctypes.CDLL]:
    """Context in which kernels are compiled and launched over the stub, which it yields.

    With `cached`, variants that are in Triton's cache of compiled kernels are read from there.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not cached:
            knobs.cache.dir = folder
        stub = load_stub(Path(folder))
        use_stub_driver()
        as_on_a_gpu()
        yield stub


def launch_microseconds(rounds: int = 40, calls: int = 200) -> dict[str, float]:
    """The smallest mean time of a launch of each kernel of the losses, in µs."""
    with over_the_stub():
        from fastdistill.kernels import gpu_launch

        launch, first = gpu_launch.launch, dict[str, tuple[Any, dict[str, Any]]]()

        def record(kernel: str, grid: Any, like: torch.Tensor, **arguments: Any) -> None:
            first.setdefault(kernel, (grid, arguments))
            launch(kernel, grid, like, **arguments)

        for module in [m for n, m in sys.modules.items() if n.startswith("fastdistill.kernels.")]:
            if getattr(module, "launch", None) is launch:
                vars(module)["launch"] = record
        x, w = (torch.randn(n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (2048, 4096))
        log_p = torch.log_softmax(torch.randn(2048, 65), -1)
        ids = torch.rand(2048, 4096).topk(64).indices
        teacher = fastdistill.TopK(ids, log_p[:, :64].contiguous(), log_p[:, 64].contiguous())
        paths: list[dict[str, Any]] = [{}, {"backward": "recompute"}, {"tail": "renorm_both"}]
        for options in paths:
            loss = fastdistill.topk_distill_loss(x, w, teacher, check=False, **options)
            getattr(loss, "loss", loss).backward()
        fastdistill.linear_topk(x.detach(), w.detach(), 64)
        loss = fastdistill.linear_distill_loss(x, w, x.detach(), w.detach())
        getattr(loss, "loss", loss).backward()
        best = {}
        for kernel, (grid, arguments) in sorted(first.items()):
            call = partial(gpu_launch.jitted(kernel)[grid], **arguments)
            best[kernel] = min(timeit.repeat(call, number=calls, repeat=rounds)) / calls * 1e6
        return best


def main(names: set[str], cached: bool = False) -> dict[str, Any]:
    """Run checks and groups by name, all of them by default, and return their counts."""
    with over_the_stub(cached) as stub:
        counts = {}
        for group, checks in groups().items():
            chosen = [c for c in checks if not names or {group, c.__name__} & names]
            if chosen:
                counts[group] = count(chosen, stub)
    return counts


def count(checks: list[Any], stub: ctypes.CDLL) -> dict[str, Any]:
    variants: dict[str, str] = {}  # hash -> kernel

    def compiled(*, src: Any, metadata: dict[str, Any], **others: Any) -> None:
        variants[metadata["hash"]] = src.fn.__name__

    knobs.compilation.listener = compiled
    launched, times = stub.stub_launched(), os.times()
    for check in checks:
        check()
    seconds = sum(os.times()[:4]) - sum(times[:4])
    return {
        "variants": len(variants),
        "cpu_seconds": round(seconds, 1),
        "launches": stub.stub_launched() - launched,
        "by_kernel": dict(sorted(Counter(variants.values()).items())),
    }


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(f"host_path: {reason}")
    words = {*sys.argv[1:]}
    if "--time" in words:
        for kernel, microseconds in launch_microseconds().items():
            print(f"{kernel:34} {microseconds:6.1f} µs")
        sys.exit()
    print(json.dumps(main(words - {"--cached"}, "--cached" in words), indent=1))
