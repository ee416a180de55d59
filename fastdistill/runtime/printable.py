"""Text that somebody else wrote (a server, a checkpoint, a cache, a data file), made safe to print.

A terminal obeys escape sequences: it can be told to clear the screen, to change its title or to
write to the clipboard. Every foreign text passes through `printable` before it reaches a terminal,
a log or an error message.
"""

from __future__ import annotations

import unicodedata
from typing import Any

# Controls, format characters (among them the marks that reverse the direction of text), surrogates,
# private and unassigned characters, separators of lines and of paragraphs.
_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
LIMIT = 300


def printable(value: Any, limit: int | None = LIMIT) -> str:
    r"""Return `value` as one line in which no character acts on a terminal.

    Args:
        value: a string, or anything that `str` takes.
        limit: the most characters of it that are shown; None shows all.

    Characters that act on a terminal are written as escapes; the result encodes as UTF-8.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    text = value if isinstance(value, str) else str(value)
    cut = limit is not None and len(text) > limit
    text_part = text[:limit] if cut else text
    if not text_part.isprintable():
        text_part = "".join(map(_escaped, text_part))
    return text_part + "…" if cut else text_part


def printable_lines(value: Any) -> str:
    """Return `value` as text whose lines are each as `printable` makes them, without a limit."""
    return "\n".join(printable(line, None) for line in str(value).split("\n"))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
