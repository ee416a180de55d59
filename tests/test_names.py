"""Identifiers say what a value is: words that had become private vocabulary stay rare."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("fastdistill", "kernels", "benchmarks")

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
# The same for tests/, where the name of a test is a sentence and does not count.
LIMITS_OF_TESTS = dict.fromkeys(LIMITS, 0) | {
    "asked": 4,  # an argument and a field of StyleRestoreProbe
    "beside": 1,  # an argument of WeightDiffAudit
    "given": 2,  # hypothesis.given
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
        elif isinstance(node, ast.alias) and node.asname:
            names.append(node.asname)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.append(node.name)
    return names


def words_of(*folders: str) -> Counter[str]:
    """Count the words of all identifiers, split at underscores."""
    # The link fastdistill/kernels is kernels/ a second time; rglob does not follow it.
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files = [file for file in files if "fastdistill/kernels" not in file.as_posix()]
    assert len(files) > 100
    names = (name for file in files for name in identifiers(ast.parse(file.read_text("utf-8"))))
    return Counter(
        word for name in names if not name.startswith("test_") for word in name.lower().split("_")
    )


@pytest.fixture(scope="module")
def package() -> Counter[str]:
    return words_of(*PACKAGE)


@pytest.fixture(scope="module")
def tests() -> Counter[str]:
    return words_of("tests")


@pytest.mark.parametrize("word", LIMITS)
def test_a_private_word_is_rare_among_identifiers(package, word):
    assert package[word] <= LIMITS[word], f"name what the value holds instead of {word!r}"


@pytest.mark.parametrize("word", LIMITS_OF_TESTS)
def test_a_private_word_is_rare_among_identifiers_of_tests(tests, word):
    assert tests[word] <= LIMITS_OF_TESTS[word], f"name what the value holds instead of {word!r}"
