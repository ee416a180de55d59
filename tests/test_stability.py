"""docs/stability.md agrees with pyproject.toml, constraints.txt, the workflows and the code."""

from __future__ import annotations

import importlib
import re

import pytest

import fastdistill
from helpers.project_files import ROOT, pyproject, read_text, read_yaml

TEXT = read_text("docs/stability.md")
FORMATS = re.findall(r"^\| .+ \| (\d+) \| .+ \| `([\w.]+)` \|$", TEXT, re.M)
# Extras that only developers install, and unions of others.
NOT_OF_USERS = {"all", "dev", "docs", "lint", "peers", "test"}
NEWER, OLDER = 'python_version >= "3.11"', 'python_version < "3.11"'


def requirements() -> dict[str, tuple[str, list[str]]]:
    """Return {package: (versions, where it is required)} of everything that a user may install."""
    project = pyproject()["project"]
    groups = {"core": project["dependencies"]}
    groups |= {
        f"`{name}`": group
        for name, group in project["optional-dependencies"].items()
        if name not in NOT_OF_USERS
    }
    packages: dict[str, tuple[str, list[str]]] = {}
    for group, lines in groups.items():
        for line in lines:
            match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?([^;]*)", line)
            assert match is not None
            name, versions = match[1].lower(), match[2].strip()
            if name.startswith("fastdistill"):  # an extra of another extra, and our demo
                continue
            known, used = packages.setdefault(name, (versions, []))
            assert known == versions, f"{name}: {known} and {versions}"
            used.append(group)
    return dict(sorted(packages.items()))


def pinned() -> dict[str, tuple[str, str]]:
    """Return {package: (version for Python 3.11 and newer, version for 3.10)}; "–" for none."""
    pins: dict[str, tuple[str, str]] = {}
    for line in read_text("constraints.txt").splitlines():
        match = re.match(r"([\w.-]+)==([\w.+]+)(?:; (.+))?$", line)
        if match is None:
            assert not line.strip() or line.startswith("#"), line
            continue
        name, version, marker = match[1].lower(), match[2], match[3]
        assert marker in (None, NEWER, OLDER), line
        newer, older = pins.get(name, ("–", "–"))
        pins[name] = (
            newer if marker == OLDER else version,
            older if marker == NEWER else version,
        )
    return pins


def expected_table() -> str:
    pins = pinned()
    lines = ["| Package | Can be installed | Tested | Tested on Python 3.10 | Needed by |"]
    lines.append("|---|---|---|---|---|")
    for name, (versions, used) in requirements().items():
        newer, older = pins[name]
        lines.append(f"| {name} | `{versions}` | {newer} | {older} | {', '.join(used)} |")
    return "\n".join(lines)


def test_the_table_of_packages_is_current() -> None:
    table = expected_table()
    assert len(table.splitlines()) > 10
    assert f"\n{table}\n" in TEXT, f"replace the table in docs/stability.md by:\n\n{table}\n"


def test_the_versions_of_python_are_those_of_ci() -> None:
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    versions = next(job["strategy"]["matrix"]["python"] for job in jobs if "strategy" in job)
    assert f"CI tests Python {', '.join(versions[:-1])} and {versions[-1]} on Linux" in TEXT


def test_the_table_of_formats_is_read() -> None:
    assert len(FORMATS) == 3


@pytest.mark.parametrize(("version", "constant"), FORMATS, ids=[name for _, name in FORMATS])
def test_the_version_of_a_format_is_that_of_the_code(version: str, constant: str) -> None:
    module, _, name = constant.rpartition(".")
    assert getattr(importlib.import_module(module), name) == int(version)


def test_every_stored_version_is_in_the_table() -> None:
    """A module constant VERSION or PROTOCOL is the version of a format."""
    root = ROOT / "fastdistill"
    constants = set()
    for path in root.rglob("*.py"):
        for name in re.findall(r"^(VERSION|PROTOCOL) = \d+$", path.read_text("utf-8"), re.M):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            constants.add(f"fastdistill.{module}.{name}")
    assert constants == {constant for _, constant in FORMATS}


def test_the_environment_variables_are_those_of_the_code() -> None:
    named = set(re.findall(r"FASTDISTILL_[A-Z_]+", TEXT))
    sources = read_text("fastdistill/runtime/backend.py") + read_text("setup.py")
    assert named == set(re.findall(r"FASTDISTILL_[A-Z_]+", sources))


def test_the_page_has_one_title() -> None:
    assert len(re.findall(r"^# ", TEXT, re.M)) == 1
    assert fastdistill.__version__ in TEXT
