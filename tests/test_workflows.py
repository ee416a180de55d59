"""The workflows parse, and run only make targets and scripts of this repository."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.project_files import ROOT, WORKFLOWS, pyproject, read_text, read_yaml

TARGETS = set(re.findall(r"^([a-z-]+):", read_text("Makefile"), re.M))
SCRIPTS = sorted(p for p in (ROOT / ".ci").iterdir() if p.suffix != ".log")


def name_of(path: Path) -> str:
    return path.name


def steps_of(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def is_script(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def unknown_commands(run: str) -> list[str]:
    """Return the commands of a `run:` step that are neither make targets nor scripts."""
    unknown = []
    for line in run.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            unknown += [line] if not targets or not TARGETS.issuperset(targets) else []
        elif words and not is_script(ROOT / words[0]):
            unknown.append(line)
    return unknown


def test_there_are_three_workflows() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"ci", "nightly", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_has_what_github_needs(path: Path) -> None:
    workflow = read_yaml(path)
    assert isinstance(workflow["name"], str)
    assert workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["runs-on"], name
        assert 0 < int(job["timeout-minutes"]) <= 60, name
        for needed in [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []):
            assert needed in workflow["jobs"], name
    for step in steps_of(workflow):
        assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_runs_make_targets_and_scripts_only(path: Path) -> None:
    runs = [step["run"] for step in steps_of(read_yaml(path)) if "run" in step]
    assert runs
    assert [command for run in runs for command in unknown_commands(run)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_an_action_has_a_version(path: Path) -> None:
    actions = [step["uses"] for step in steps_of(read_yaml(path)) if "uses" in step]
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+\.\d+)?|release/v\d+)", action)


@pytest.mark.parametrize(
    "run", ["make no-such-target", "make", ".ci/no-such-script", "pytest tests", ".ci", "Makefile"]
)
def test_other_commands_would_be_reported(run: str) -> None:
    assert unknown_commands(f"make lint\n{run}  # why\n") == [f"{run}  # why"]


def test_make_targets_are_declared_phony() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", read_text("Makefile"), re.M)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_can_be_executed(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n# ")


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "Makefile"], ids=name_of)
def test_an_installed_extra_exists(path: Path) -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    for group in re.findall(r"\.\[([\w,-]+)\]", path.read_text(encoding="utf-8")):
        assert set(group.split(",")) <= set(extras)


def test_the_matrix_of_ci_is_within_the_supported_versions() -> None:
    classifiers = pyproject()["project"]["classifiers"]
    supported = {c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)}
    jobs = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    matrices = [job["strategy"]["matrix"]["python"] for job in jobs if "strategy" in job]
    assert matrices
    for versions in matrices:
        assert set(versions) <= supported
        assert versions == matrices[0]


def test_wheels_are_built_for_every_supported_version() -> None:
    classifiers = pyproject()["project"]["classifiers"]
    supported = [c.rpartition(".")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    built = re.findall(r"cp3(\d+)-", pyproject()["tool"]["cibuildwheel"]["build"])
    assert built == supported
