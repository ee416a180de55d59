"""Make untrusted text (of a server, a checkpoint, a cache, a data file) safe to print.

Escape sequences can clear the screen of a terminal, change its title or write to the clipboard.
Untrusted text passes through `printable` before it reaches a terminal, a log or an error message.
"""

from __future__ import annotations

import unicodedata
from typing import Any

# Control and format characters (such as those that reverse the text direction), surrogates, private
# and unassigned characters, line and paragraph separators.
_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
LIMIT = 300


def printable(value: Any, limit: int | None = LIMIT) -> str:
    r"""Return `value` as one line in which no character acts on a terminal.

    Args:
        value: a string, or anything that `str` takes.
        limit: the maximum number of characters; None for all.

    Characters that act on a terminal are written as escapes; the result encodes as UTF-8.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    text = value if isinstance(value, str) else str(value)
    cut = limit is not None and len(text) > limit
    line = text[:limit] if cut else text
    if not line.isprintable():
        line = "".join(map(_escaped, line))
    return line + "…" if cut else line


def printable_lines(value: Any) -> str:
    """Return `value` with `printable` applied to each line, without a limit."""
    return "\n".join(printable(line, None) for line in str(value).split("\n"))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
