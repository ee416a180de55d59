"""CHANGELOG.md has the form of Keep a Changelog and knows the public names."""

from __future__ import annotations

import re

import pytest
import typer

import fastdistill
from fastdistill.cli.app import app
from helpers.project_files import read_text

TEXT = read_text("CHANGELOG.md")
RELEASES = re.findall(r"^## (.+)$", TEXT, re.M)
FIRST = TEXT.split("\n## ")[1]


def test_the_first_release_is_that_of_the_package() -> None:
    assert RELEASES[0].startswith(f"[{fastdistill.__version__}] - ")


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_has_a_version_and_a_date(release: str) -> None:
    assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|unreleased)", release)


@pytest.mark.parametrize("kind", re.findall(r"^### (.+)$", TEXT, re.M))
def test_a_kind_of_change_is_one_of_the_six(kind: str) -> None:
    assert kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def test_it_names_the_public_functions() -> None:
    names = [n for n in fastdistill.__all__ if callable(getattr(fastdistill, n)) and n[0].islower()]
    assert len(names) > 8
    assert [name for name in names if f"`{name}`" not in FIRST] == []


def test_it_names_the_commands() -> None:
    command = typer.main.get_command(app)
    names = sorted(getattr(command, "commands", {}))
    assert len(names) > 8
    assert [name for name in names if f"`{name}`" not in FIRST] == []
