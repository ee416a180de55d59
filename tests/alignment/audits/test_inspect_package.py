"""Inspect AI is optional."""

import importlib
import sys

import pytest

from helpers.source_imports import PACKAGE, imports_of


def test_without_inspect_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.delitem(sys.modules, "fastdistill.alignment.audits.inspect.package", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[inspect\]'"):
        importlib.import_module("fastdistill.alignment.audits.inspect.package")


def test_only_the_modules_named_for_it_import_inspect():
    for path in (PACKAGE / "audits").glob("*.py"):
        if not path.stem.startswith("inspect_"):
            assert not [i for i in imports_of(path) if "inspect_" in i.target], path.name
