"""Writes docs/licenses.md from the metadata of the installed packages: python docs/licenses.py."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from email.message import Message
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# What packages say that use no SPDX expression.
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
}
PAGE = """# Licenses of dependencies

The packages that `pyproject.toml` names, with the licenses in their metadata. torch is always
installed. The extras `test`, `peers`, `lint` and `docs` are for development.
`python docs/licenses.py` writes this page.

| package | license | needed by |
|---|---|---|
"""


def license_of(metadata: Message | Any) -> str:
    """Return the SPDX expression of a package, or the classifier that stands for it."""
    if metadata["License-Expression"]:
        return str(metadata["License-Expression"])
    kinds = [
        c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if "License ::" in c
    ]
    kinds = [kind for kind in kinds if kind in SPDX]
    name = kinds[0] if kinds else str(metadata["License"]).partition("\n")[0]
    return SPDX.get(name, name)


def needed_by(project: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of packages, each with the extras that name it."""
    lists = {"the base package": project["project"]["dependencies"]}
    lists |= project["project"]["optional-dependencies"]
    lists["the build"] = project["build-system"]["requires"]
    extras: dict[str, list[str]] = {}
    for extra, requirements in lists.items():
        for requirement in requirements:
            name = re.split(r"[^\w.-]", requirement)[0].lower()
            if name != "fastdistill":
                extras.setdefault(name, []).append(extra)
    return extras


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [
        f"| {name} | {license_of(importlib.metadata.metadata(name))} | {', '.join(extras)} |"
        for name, extras in sorted(needed_by(project).items())
    ]
    (ROOT / "docs" / "licenses.md").write_text(PAGE + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
