"""The limits that SECURITY.md states are those of the code, and its promises have tests."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LIMITS = re.findall(r"^\| .+ \| ([\d,]+) \| `([\w.]+)` \|$", TEXT, re.M)
PROMISES = re.findall(r"^\| .+ \| `([\w/]+\.py)::(test_\w+)` \|$", TEXT, re.M)
FOLDERS = re.findall(r"`(fastdistill/[\w/]+)`", TEXT)


def test_the_tables_are_read() -> None:
    assert len(LIMITS) == TEXT.partition("## Limits")[2].count("\n|") - 2
    assert FOLDERS


@pytest.mark.parametrize(("value", "constant"), LIMITS, ids=[name for _, name in LIMITS])
def test_a_limit_is_that_of_the_code(value: str, constant: str) -> None:
    module, _, name = constant.rpartition(".")
    if module.endswith("http_protocol"):
        pytest.importorskip("uvicorn")
    if module.endswith("http.app"):
        pytest.importorskip("starlette")
    assert getattr(importlib.import_module(module), name) == int(value.replace(",", ""))


@pytest.mark.parametrize(("file", "name"), PROMISES)
def test_a_promise_has_a_test(file: str, name: str) -> None:
    """One that runs in CI, on a machine without a GPU."""
    functions = [
        node
        for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(functions) == 1
    marks = [ast.unparse(mark) for mark in functions[0].decorator_list]
    assert not [mark for mark in marks if re.search(r"mark\.(skip\(|gpu|xfail)", mark)]


def test_every_promise_is_read() -> None:
    table = TEXT.partition("## Tests of the promises")[2].partition("## Limits")[0]
    assert len(PROMISES) == len(set(PROMISES)) == table.count("\n|") - 2 > 30


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_named_folder_exists(folder: str) -> None:
    assert (ROOT / folder).is_dir()
