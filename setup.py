"""The package list and the optional C++ extension; everything else is in pyproject.toml.

The extension must never stop an installation: without a compiler (or with FASTDISTILL_NO_EXT=1)
the package installs without it, says so in one line, and runs on pure PyTorch.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By hand, because kernels/ has no __init__.py: with one it would shadow the PyPI package `kernels`
# (which transformers imports) for everybody who runs Python from the repository root.
PACKAGES = [
    "fastdistill",
    "fastdistill.kernels",
]


KERNELS_LINK = Path(__file__).parent / "fastdistill" / "kernels"


def say(line: str) -> None:
    print(f"fastdistill: {line}", file=sys.stderr)


class OptionalBuildExt(build_ext):
    """build_ext that drops what it cannot build instead of failing."""

    def run(self) -> None:
        # Any exception: a broken toolchain fails in many ways (no compiler, no headers, a linker
        # that crashes, a platform that setuptools does not know), and all mean the same to a user.
        try:
            super().run()
        except Exception as error:
            self._drop(error)
            self.extensions: list[Extension] = []

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            try:
                self.build_extension(extension)
            except Exception as error:
                self._drop(error)
            else:
                built.append(extension)
        self.extensions = built

    def _drop(self, error: Exception) -> None:
        # A compiler that fails is reported with its whole command line: keep the telling start.
        reason = shorten(str(error), width=80) or type(error).__name__
        say(f"installing WITHOUT the C++ extension ({reason}); pure PyTorch is used in its place")


def extensions() -> list[Extension]:
    if os.environ.get("FASTDISTILL_NO_EXT") == "1":
        say("installing WITHOUT the C++ extension, as FASTDISTILL_NO_EXT=1 asks")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say("installing WITHOUT the C++ extension (pybind11 is not installed)")
        return []
    return [
        Pybind11Extension(
            "fastdistill._ext",
            ["csrc/bind.cpp"],
            depends=["csrc/cpu_features.h"],
            cxx_std=17,
            optional=True,
        )
    ]


def restore_kernels_link() -> None:
    """Give an unpacked sdist, which cannot hold a symlink, the one that a checkout has.

    Only an editable install needs it; a normal one goes by package_dir below.
    """
    if not os.path.lexists(KERNELS_LINK):
        with suppress(OSError):  # a read-only tree, or Windows without the right to make links
            KERNELS_LINK.symlink_to(Path("..", "kernels"), target_is_directory=True)


restore_kernels_link()
setup(
    packages=PACKAGES,
    package_dir={"fastdistill.kernels": "kernels"},
    package_data={"fastdistill": ["py.typed", "*.pyi", "demo_teacher/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
