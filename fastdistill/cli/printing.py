"""What the verbs print: text that may come from elsewhere never acts on the terminal."""

from __future__ import annotations

import json
from typing import Any, TextIO

from ..runtime.printable import printable_lines


def say(text: Any, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print text, in which only ends of lines keep their meaning."""
    print(printable_lines(text), file=file, flush=flush)


def print_json(value: Any) -> None:
    """Print a value as JSON; characters that act on a terminal are written as JSON's escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    print("".join(map(_escaped, text)))


def _escaped(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return json.dumps(character)[1:-1]
