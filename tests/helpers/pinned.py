"""Which packages are installed at the version that constraints.txt pins."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.registry import installed

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def pins() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(
        re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", line)[0] for line in lines if "==" in line
    )


def is_as_pinned(package: str) -> bool:
    """Whether a package is here at its pinned version, in whatever build (2.13.0+cpu)."""
    version = installed(package)
    return version is not None and version.partition("+")[0] == pins().get(package)
