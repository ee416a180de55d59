"""CITATION.cff follows version 1.2.0 of its schema and agrees with the package."""

from __future__ import annotations

from typing import Any

import pytest

import fastdistill
from helpers.project_files import pyproject, read_yaml

# Of https://github.com/citation-file-format/citation-file-format, schema.json of 1.2.0.
REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = REQUIRED | set(
    "abstract commit contact date-released doi identifiers keywords license license-url "
    "preferred-citation references repository repository-artifact repository-code type url "
    "version".split()
)


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    content = read_yaml("CITATION.cff")
    assert isinstance(content, dict)
    return content


def test_it_has_the_keys_of_the_schema(citation: dict[str, Any]) -> None:
    assert citation.keys() >= REQUIRED
    assert citation.keys() <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")


def test_its_values_have_the_types_of_the_schema(citation: dict[str, Any]) -> None:
    for key in ("title", "message", "abstract", "version", "license"):
        assert isinstance(citation[key], str), key
        assert citation[key], key
    authors, keywords = citation["authors"], citation["keywords"]
    assert authors
    for author in authors:  # an entity has a name; a person has a family name
        assert author.get("name") or author.get("family-names")
    assert len(keywords) == len(set(keywords)) > 0
    assert all(isinstance(keyword, str) for keyword in keywords)


def test_it_agrees_with_the_package(citation: dict[str, Any]) -> None:
    project = pyproject()["project"]
    assert citation["version"] == fastdistill.__version__
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]
    names = [author["name"] for author in citation["authors"]]
    assert names == [author["name"] for author in project["authors"]]
