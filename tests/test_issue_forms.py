"""The issue forms have the fields that the repository host requires."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.project_files import ROOT, read_text, read_yaml

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_there_are_three_forms() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature", "performance"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_follows_the_syntax(path: Path) -> None:
    form = read_yaml(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids)) > 0
    assert all(re.fullmatch(r"[\w-]+", name) for name in ids)
    for field in form["body"]:
        assert field["type"] in KINDS
        attributes = field["attributes"]
        assert attributes["value" if field["type"] == "markdown" else "label"]
        if field["type"] == "dropdown":
            options = attributes["options"]
            assert len(options) == len(set(options)) > 1
        if "validations" in field:
            assert type(field["validations"]["required"]) is bool


def test_the_pull_request_template_names_existing_files() -> None:
    text = read_text(".github/PULL_REQUEST_TEMPLATE.md")
    files = re.findall(r"`([\w/]+\.md)`", text)
    assert files
    assert [name for name in files if not (ROOT / name).is_file()] == []
