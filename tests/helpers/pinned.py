"""Which packages are installed at the version that constraints.txt pins."""

from __future__ import annotations

from benchmarks.packages import installed, pins


def is_as_pinned(package: str) -> bool:
    """Whether a package is here at its pinned version, in whatever build (2.13.0+cpu)."""
    version = installed(package)
    return version is not None and version.partition("+")[0] == pins().get(package)
