"""Identifiers say what a value is: words that had become private vocabulary stay rare."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastdistill", "kernels", "benchmarks")

# How often each word may occur among the identifiers. The limits only go down.
LIMITS = {
    "found": 0,
    "said": 0,
    "told": 0,
    "asked": 6,  # a key of probes.json
    "kept": 0,
    "opened": 0,
    "shown": 0,
    "beside": 2,  # a field of stored audit settings
    "given": 0,
    "whereof": 0,
}


def identifiers(tree: ast.AST) -> list[str]:
    """Return every identifier of a module, once per occurrence."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.append(node.arg)
    return names


@pytest.fixture(scope="module")
def counts() -> Counter[str]:
    """The words of all identifiers, split at underscores."""
    # The link fastdistill/kernels is kernels/ a second time; rglob does not follow it.
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    files = [file for file in files if "fastdistill/kernels" not in file.as_posix()]
    assert len(files) > 100
    names = (name for file in files for name in identifiers(ast.parse(file.read_text("utf-8"))))
    return Counter(word for name in names for word in name.lower().split("_"))


@pytest.mark.parametrize("word", LIMITS)
def test_a_private_word_is_rare_among_identifiers(counts, word):
    assert counts[word] <= LIMITS[word], f"name what the value holds instead of {word!r}"
