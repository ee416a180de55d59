"""A test that needs a package of the extra `peers` has a mark, or no target of make would run it.

`make test` does not install these packages, and `make test-slow` runs marked tests only.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.project_files import ROOT

PEERS = {
    "axolotl",
    "bitsandbytes",
    "compressed_tensors",
    "deepspeed",
    "inspect_ai",
    "lm_eval",
    "openai",
    "scipy",
    "speculators",
    "torchao",
    "trl",
    "verl",
}
FILES = [
    file
    for file in sorted((ROOT / "tests").rglob("test_*.py"))
    if "importorskip" in file.read_text(encoding="utf-8")
]


def needs_peer(node: ast.AST, functions: set[str]) -> bool:
    """Whether the code skips without a peer, or names one of the functions that do."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func).endswith("importorskip"):
            name = part.args[0]
            if isinstance(name, ast.Constant) and str(name.value).partition(".")[0] in PEERS:
                return True
        if isinstance(part, ast.Name | ast.arg):
            identifier = part.id if isinstance(part, ast.Name) else part.arg
            if identifier in functions:
                return True
    return False


def is_marked(*nodes: ast.AST) -> bool:
    text = " ".join(ast.unparse(node) for node in nodes)
    return "mark.peers" in text or "mark.slow" in text


def unmarked(tree: ast.Module) -> list[str]:
    """Return the tests without a mark that need a peer, in themselves or through a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers: set[str] = set()
    for _ in functions:  # a helper may call another
        helpers |= {
            f.name for f in functions if not f.name.startswith("test_") and needs_peer(f, helpers)
        }
    marks = [node for node in tree.body if isinstance(node, ast.Assign)]
    marks = [node for node in marks if ast.unparse(node.targets[0]) == "pytestmark"]
    if is_marked(*marks):
        return []
    at_top = [node for node in tree.body if isinstance(node, ast.Expr | ast.Assign)]
    if any(needs_peer(node, set()) for node in at_top):
        return ["the whole module"]
    tests: list[tuple[ast.FunctionDef, list[ast.expr]]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            tests.append((node, []))
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            tests += [(method, node.decorator_list) for method in methods]
    return [
        test.name
        for test, of_class in tests
        if test.name.startswith("test_")
        and needs_peer(test, helpers)
        and not is_marked(*test.decorator_list, *of_class)
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_test_that_needs_a_peer_is_marked(file: Path) -> None:
    assert unmarked(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "def test_a():\n    pytest.importorskip('trl.experimental')",
        "def peer():\n    pytest.importorskip('trl')\ndef test_a():\n    peer()",
        "@pytest.fixture\ndef peer():\n    pytest.importorskip('trl')\ndef test_a(peer): ...",
        "class TestA:\n    def test_a(self):\n        pytest.importorskip('scipy')",
        "pytest.importorskip('inspect_ai')\ndef test_a(): ...",
    ],
)
def test_a_missing_mark_is_seen(source: str) -> None:
    assert unmarked(ast.parse(source))
    assert not unmarked(ast.parse("pytestmark = pytest.mark.peers\n" + source))
    assert not unmarked(ast.parse(source.replace("importorskip('", "importorskip('not_")))
