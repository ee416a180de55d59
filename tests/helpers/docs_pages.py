"""The code blocks of a documentation page, and what they run with.

A block marked ```python no-run is not executed; its first line is a comment with the reason.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastdistill.alignment.experiment.demo.models import shipped_teacher
from helpers.trl_scene import TALKS, model

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.relative_to(ROOT).parts
)
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPERATORS = ("&", "&&", ";", "|", "||", ">", ">>", "<")


class Block(NamedTuple):
    language: str
    flags: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(m[1], m[2].strip(), m[3]) for m in _BLOCK.finditer(page.read_text("utf-8"))]


def python_blocks(page: Path, *, run: bool = True) -> list[str]:
    """The Python of a page that is executed, or that is not."""
    return [b.code for b in blocks(page) if b.language == "python" and (b.flags != "no-run") == run]


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `fastdistill` in each command of the page's shell blocks."""
    for block in blocks(page):
        if block.language not in ("sh", "bash", "console"):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            yield from _commands_of(line.removeprefix("$ "))


def _commands_of(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _OPERATORS:
            words.append(word)
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):  # of the environment
            words.pop(0)
        if words[:1] == ["fastdistill"]:
            yield words[1:]
        elif "fastdistill" in words and words[words.index("fastdistill") - 1] == "-m":
            yield words[words.index("fastdistill") + 1 :]
        words = []


def names_for(code: str) -> dict[str, Any]:
    """The names that a page may use without defining them: small models, a tokenizer and rows."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    if not used & {"student", "big", "tokenizer", "train"}:
        return {}
    tokenizer = shipped_teacher()[1]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return {
        "tokenizer": tokenizer,
        "student": model(tokenizer, 0),
        "big": model(tokenizer, 7, hidden=48),
        "train": TALKS,
    }
