"""python hub/assemble.py OUT: write a project that kernel-builder builds for the `kernels` hub.

    OUT/{build.toml, flake.nix, LICENSE}
    OUT/torch-ext/fastdistill_kernels/{__init__.py, kernels/, losses/, runtime/}

Imports in the package are relative, and its operators are in a namespace of its name
(kernels/namespace.py), so it works under any name and beside an installed fastdistill.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "fastdistill/losses", "fastdistill/runtime")
# Of runtime/, what the other two import; all of them need torch only.
RUNTIME = {"__init__", "backend", "checks", "printable", "tensor_checks", "version"}


def package(target: Path) -> None:
    """Write the Python package into the folder `target`."""
    for name in FOLDERS:
        folder = target / Path(name).name
        folder.mkdir(parents=True)
        for source in sorted((ROOT / name).glob("*.py")):
            if folder.name != "runtime" or source.stem in RUNTIME:
                shutil.copy(source, folder)
    shutil.copy(ROOT / "hub" / "__init__.py", target)


def project(out: Path) -> None:
    """Write the project into the folder `out`."""
    package(out / "torch-ext" / "fastdistill_kernels")
    for source in ("hub/build.toml", "hub/flake.nix", "LICENSE"):
        shutil.copy(ROOT / source, out)


if __name__ == "__main__":
    project(Path(sys.argv[1]))
