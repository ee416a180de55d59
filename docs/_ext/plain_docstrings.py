"""Turns the package's docstrings into reStructuredText, before napoleon reads their sections.

The docstrings are plain text: code in single backticks, equations as indented lines, and `|` and
`*` as themselves.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_SECTION = re.compile(r"(Args|Example|Returns|Raises|Yields):$")
_EXCEPTION = re.compile(r"    (\w+(?:, \w+)*): ")
_CODE = re.compile(r"(`[^`]+`)")


def to_rst(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText."""
    result: list[str] = []
    section, in_block, in_list = None, False, False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            section, in_block, in_list = _SECTION.match(line), False, False
        if indented and not section and not in_block:
            result += ["::", ""] if not result or not result[-1] else ["", "::", ""]
            in_block = True
        verbatim = in_block or line.lstrip().startswith(">>> ")
        line = line if verbatim else _escape(line)
        if section and section[1] == "Raises" and indented:
            in_list = in_list or bool(_EXCEPTION.match(line))
            line = _item(line) if in_list else line
        result.append(line)
    return result


def _item(line: str) -> str:
    """Return a line of a list of exceptions: a new item, or the next line of one."""
    return (
        _EXCEPTION.sub(r"    - \1: ", line) if _EXCEPTION.match(line) else "      " + line.strip()
    )


def _escape(line: str) -> str:
    """Escape what reStructuredText would read as markup."""
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", text) for text in parts[::2]]
    return "".join(parts)


def _process(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}
