"""python -m benchmarks.packages: versions here, and the packages that a GPU's benchmarks lack.

    python -m benchmarks.packages            versions, and what each missing package leaves out
    python -m benchmarks.packages --wheels   the command that collects the missing packages in a
                                             folder, for a machine that reaches no package index

It imports torch only to describe it, so that a broken installation is described, too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
FOLDER = "gpu-packages"
# What needs each package. The last five are what `datasets` imports and a GPU image may lack.
WANTED = {
    "transformers": "the training checks, train_step, large_teacher and large_student",
    "accelerate": "the training checks, train_step, large_teacher and large_student",
    "bitsandbytes": "adamw_8bit, QLoRA students, the materialized teacher, its 4- and 8-bit layers",
    "peft": "QLoRA students",
    "trl": "rows of TRL",
    "liger-kernel": "rows of Liger Kernel",
    "cut-cross-entropy": "its row",
    "matplotlib": "pictures of the rows",
    "datasets": "TRL's GKDTrainer",
    "pyarrow": "datasets",
    "pandas": "datasets",
    "xxhash": "datasets",
    "multiprocess": "datasets",
    "dill": "datasets",
}
BUILD = ("setuptools", "pybind11", "numpy", "pytest")  # printed only


def installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(package) if package else None
    except PackageNotFoundError:
        return None


def pins() -> dict[str, str]:
    """The exact version of each package in constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(
        re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", line)[0] for line in lines if "==" in line
    )


def missing() -> list[str]:
    """The packages of WANTED that are not installed."""
    return [package for package in WANTED if installed(package) is None]


def wheels() -> str:
    """The commands that collect the missing packages and use them; without dependencies."""
    if not missing():
        return "every package that the benchmarks want is installed"
    pinned = pins()
    names = [f"{name}=={pinned[name]}" if name in pinned else name for name in missing()]
    return (
        f"On a machine with the same Python that reaches a package index:\n"
        f"  python -m pip install --no-deps --target {FOLDER} {' '.join(names)}\n"
        f"Copy {FOLDER} here, then:\n"
        f"  PYTHONPATH={FOLDER} benchmarks/gpu.sh large"
    )


def describe() -> str:
    """Versions of what runs and builds here, and a line for each missing package."""
    import torch

    from fastdistill.runtime import backend

    lines = [f"CUDA of torch {torch.version.cuda}; {backend.describe()}"]
    lines.append(", ".join(f"{name} {installed(name) or 'missing'}" for name in BUILD))
    lines += [f"missing {name}, for {WANTED[name]}" for name in missing()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    print(wheels() if "--wheels" in arguments else describe())


if __name__ == "__main__":
    main(sys.argv[1:])
