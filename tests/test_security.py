"""The limits that SECURITY.md states are those of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LIMITS = re.findall(r"^\| .+ \| ([\d,]+) \| `([\w.]+)` \|$", TEXT, re.M)
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


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_named_folder_exists(folder: str) -> None:
    assert (ROOT / folder).is_dir()
