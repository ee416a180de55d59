"""Shared by test_layout and others."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


PACKAGE, KERNELS = ROOT / "fastdistill", ROOT / "kernels"


class Import(NamedTuple):
    target: str  # absolute dotted name; of `from a import b`, a.b
    line: int
    in_function: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("fastdistill", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, name: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, also those inside functions and under TYPE_CHECKING."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(a.name, node.lineno, in_function) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                package = name.split(".")[: -up or None]
                base = ".".join([*package, *filter(None, [node.module])])
            yield from (Import(f"{base}.{a.name}", node.lineno, in_function) for a in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or function)

    yield from visit(ast.parse(source), False)


@functools.cache
def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(), module_name(path), path.name == "__init__.py"))
