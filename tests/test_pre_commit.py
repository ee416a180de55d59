"""The hooks of pre-commit run the checks of `make lint` and download nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers.project_files import read_text, read_yaml

HOOKS: list[dict[str, Any]] = [
    hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
]


def test_every_repository_is_local() -> None:
    assert {repo["repo"] for repo in read_yaml(".pre-commit-config.yaml")["repos"]} == {"local"}
    assert {hook["language"] for hook in HOOKS} == {"system"}


def test_the_hooks_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint: .*\n((?:\t.+\n)+)", read_text("Makefile"), re.M)
    assert recipe is not None
    commands = [re.sub(r" (--check|\.)", "", line) for line in recipe[1].split("\n\t")]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in HOOKS]
    assert [c.strip().replace("$(BIN)", ".venv/bin") for c in commands] == entries


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_has_what_pre_commit_needs(hook: dict[str, Any]) -> None:
    assert {"id", "name", "entry", "language"} <= hook.keys()
    # ruff reads the files of a commit even if pyproject.toml excludes them, unless told not to.
    assert ("ruff" in hook["entry"]) == ("--force-exclude" in hook["entry"])
    assert (hook["id"] == "mypy") == (hook.get("pass_filenames") is False)
