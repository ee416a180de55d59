"""The package list and the optional compiled modules; everything else is in pyproject.toml.

The modules never make an installation fail: without a compiler (or with FASTDISTILL_NO_EXT=1) the
package installs without them, prints one line, and runs on PyTorch and Triton. The CUDA kernels
are a separate module, compiled if nvcc is available, with or without a GPU:

    FASTDISTILL_CUDA=auto | 0 | 1        build if nvcc is available (default) | never | or fail
    FASTDISTILL_CUDA_ARCHS="80;89;90"    compute capabilities, and PTX of the newest for later GPUs
    MAX_JOBS=N                           compile N files at a time (one per core)

FASTDISTILL_REPOSITORY is the address of the repository that builds a release. The links of the
package's metadata start with it; without it there are none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Listed by hand, because kernels/ has no __init__.py: with one it would shadow the PyPI package
# `kernels`, which transformers imports, when Python runs from the repository root.
PACKAGES = [
    "fastdistill",
    "fastdistill.alignment",
    "fastdistill.alignment.audits",
    "fastdistill.alignment.audits.inspect",
    "fastdistill.alignment.experiment",
    "fastdistill.alignment.experiment.demo",
    "fastdistill.alignment.experiment.demo.smollm2",
    "fastdistill.alignment.organisms",
    "fastdistill.alignment.organisms.language",
    "fastdistill.alignment.report",
    "fastdistill.alignment.statistics",
    "fastdistill.alignment.strategies",
    "fastdistill.cli",
    "fastdistill.compat",
    "fastdistill.hf",
    "fastdistill.kernels",
    "fastdistill.losses",
    "fastdistill.quant",
    "fastdistill.quant.backends",
    "fastdistill.quant.formats",
    "fastdistill.report",
    "fastdistill.report.run",
    "fastdistill.runtime",
    "fastdistill.teachers",
    "fastdistill.teachers.cache",
    "fastdistill.teachers.http",
    "fastdistill.training",
    "fastdistill.training.checks",
    "fastdistill.training.logs",
    "fastdistill.training.plan",
]

CPU_SOURCES = [
    f"csrc/{name}.cpp"
    for name in (
        "bind",
        "isa_scalar",
        "isa_avx2",
        "isa_avx512",
        "isa_vnni",
        "isa_bf16",
        "isa_amx",
        "topk_row",
    )
]
DEVICE_CODE = "csrc/cuda_quant.cu"
CUDA_ARCHS = "80;89;90;100"
MISSED = {  # a compiled module and its replacement
    "fastdistill.runtime._ext": ("the C++ extension", "pure PyTorch"),
    "fastdistill.runtime._cuda": ("the CUDA kernels", "Triton"),
}
KERNELS_LINK = Path(__file__).parent / "fastdistill" / "kernels"


def say(line: str) -> None:
    print(f"fastdistill: {line}", file=sys.stderr)


def drop(name: str, reason: str, required: bool = False) -> None:
    if required:
        raise SystemExit(f"fastdistill: FASTDISTILL_CUDA=1 asks for the CUDA kernels, but {reason}")
    what, instead = MISSED[name]
    say(f"installing WITHOUT {what} ({reason}); {instead} is used in its place")


class OptionalBuildExt(build_ext):
    """A build_ext that drops extensions that fail to build; nvcc compiles .cu sources."""

    def run(self) -> None:
        # Any exception: a broken toolchain fails in many ways (no compiler, no headers, a linker
        # that crashes, a platform that setuptools does not know).
        try:
            super().run()
        except Exception as error:
            for extension in self.extensions:
                self._drop(extension, error)
            self.extensions: list[Extension] = []

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            try:
                self.build_extension(extension)
            except Exception as error:
                self._drop(extension, error)
            else:
                built.append(extension)
        self.extensions = built

    def build_extension(self, extension: Any) -> None:
        if hasattr(extension, "nvcc"):
            device_code = Path(self.build_temp, "cuda_quant.o")
            device_code.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*extension.nvcc, "-o", str(device_code)], check=True)
            extension.extra_objects = [str(device_code)]
            extension.depends = [*extension.depends, str(device_code)]  # relink if it is newer
        super().build_extension(extension)

    def _drop(self, extension: Any, error: Exception) -> None:
        # The error of a failing compiler has its whole command line: keep the start.
        reason = shorten(str(error), width=80) or type(error).__name__
        drop(extension.name, reason, getattr(extension, "required", False))


def cuda_archs() -> list[int]:
    archs = os.environ.get("FASTDISTILL_CUDA_ARCHS", CUDA_ARCHS)
    if not re.fullmatch(r"\d+(;\d+)*", archs):
        raise SystemExit(
            f"fastdistill: FASTDISTILL_CUDA_ARCHS: expected compute capabilities like "
            f"{CUDA_ARCHS!r}, got {archs!r}"
        )
    return sorted({int(arch) for arch in archs.split(";")})


def supported_archs(nvcc: str, archs: list[int]) -> list[int]:
    """Return the `archs` that this nvcc supports; raises for one set in the environment."""
    result = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [int(arch) for arch in re.findall(r"compute_(\d+)\b", result.stdout)]
    unknown = ", ".join(str(arch) for arch in archs if arch not in known)
    if unknown and "FASTDISTILL_CUDA_ARCHS" in os.environ:
        raise SystemExit(
            f"fastdistill: FASTDISTILL_CUDA_ARCHS: {nvcc} does not compile for {unknown}; it knows "
            f"{';'.join(map(str, sorted(known)))}"
        )
    if unknown:
        say(f"no CUDA kernels for compute capability {unknown}, which this nvcc does not know")
    return [arch for arch in archs if arch in known]


def nvcc_command(nvcc: str, archs: list[int]) -> list[str]:
    flags = ["--threads=0", "-O3", "--fmad=false", "-std=c++17"]
    flags.append("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    if os.environ.get("CXX") and "NVCC_CCBIN" not in os.environ:
        flags.append(f"-ccbin={os.environ['CXX']}")
    return [nvcc, *flags, "-c", DEVICE_CODE]


def cuda_extension(Pybind11Extension: Any) -> list[Any]:
    """Return the CUDA module, or an empty list if it is disabled or cannot be built."""
    mode = os.environ.get("FASTDISTILL_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastdistill: FASTDISTILL_CUDA: expected auto, 0 or 1, got {mode!r}")
    name, required = "fastdistill.runtime._cuda", mode == "1"
    if mode == "0":
        drop(name, "FASTDISTILL_CUDA=0")
        return []
    archs = cuda_archs()
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=Path(home, "bin"))) or shutil.which("nvcc")
    if nvcc is None or sys.platform != "linux":
        where = "no nvcc on PATH or in CUDA_HOME/bin; install the CUDA toolkit or set CUDA_HOME"
        drop(name, where if nvcc is None else "they are built on Linux only", required)
        return []
    try:
        archs = supported_archs(nvcc, archs)
        # The library paths of nvcc: toolkits install the runtime in different places.
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        drop(name, shorten(str(error), width=80), required)
        return []
    if not archs:
        drop(name, f"{nvcc} knows none of the compute capabilities {CUDA_ARCHS}", required)
        return []
    extension = Pybind11Extension(
        name,
        ["csrc/bind_cuda.cpp"],
        depends=[DEVICE_CODE, "csrc/lut4.h"],
        cxx_std=17,
        library_dirs=list(dict.fromkeys(re.findall(r'"-L([^"]+)"', output))),
        libraries=["cudart_static", "dl", "rt", "pthread"],
        # torch ships a CUDA runtime too, perhaps another version: hide each from the other.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )
    extension.nvcc, extension.required = nvcc_command(nvcc, archs), required
    return [extension]


def cpu_flags() -> tuple[list[str], list[str]]:
    """Return the compiler and linker flags of the CPU kernels.

    No contraction: a * b + c rounds twice, so that results are the same on every instruction set.
    Apple's compiler has no OpenMP; there the kernels run on one thread.
    """
    if sys.platform == "win32":
        return ["/O2", "/fp:precise", "/openmp"], []
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", "-ffp-contract=off", *openmp], openmp


def extensions() -> list[Extension]:
    if os.environ.get("FASTDISTILL_NO_EXT") == "1":
        say("installing WITHOUT the C++ extension and CUDA kernels, as FASTDISTILL_NO_EXT=1 asks")
        return []
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError:
        for name in MISSED:
            required = name.endswith("_cuda") and os.environ.get("FASTDISTILL_CUDA") == "1"
            drop(name, "pybind11 is not installed", required)
        return []
    ParallelCompile("MAX_JOBS").install()  # the files of an extension; all cores by default
    compile_args, link_args = cpu_flags()
    return [
        Pybind11Extension(
            "fastdistill.runtime._ext",
            CPU_SOURCES,
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            optional=True,
        ),
        *cuda_extension(Pybind11Extension),
    ]


def restore_kernels_link() -> None:
    """Create the symlink to kernels/ in an unpacked sdist, which cannot contain one.

    Only an editable install needs it; a normal one uses package_dir below.
    """
    if not os.path.lexists(KERNELS_LINK):
        with suppress(OSError):  # a read-only tree, or Windows without the permission
            KERNELS_LINK.symlink_to(Path("..", "kernels"), target_is_directory=True)


def project_urls() -> dict[str, str]:
    """Return the links of the metadata."""
    repository = os.environ.get("FASTDISTILL_REPOSITORY", "").rstrip("/")
    if not repository:
        return {}
    return {
        "Source": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


restore_kernels_link()
setup(
    project_urls=project_urls(),
    packages=PACKAGES,
    package_dir={"fastdistill.kernels": "kernels"},
    package_data={
        "fastdistill": [
            "py.typed",
            "runtime/*.pyi",
            "alignment/experiment/demo/smollm2/*.txt",
            "alignment/audits/*.json",
            "alignment/organisms/language/*.json",
        ]
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
