"""Printing for the commands: control characters in foreign text never reach the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any, TextIO

from ..runtime.printable import printable_lines


def say(text: Any, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print text; control characters other than newlines are escaped."""
    print(printable_lines(text), file=file, flush=flush)


def print_json(value: Any) -> None:
    """Print a value as JSON; control characters are written as JSON escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    print("".join(map(_escaped, text)))


def stdout_for_result() -> AbstractContextManager[Any]:
    """Return a context in which libraries print to stderr: stdout has the result alone."""
    return redirect_stdout(sys.stderr)


def command_line() -> str:
    """Return the command of this process, as a shell takes it."""
    return shlex.join(["fastdistill", *sys.argv[1:]])


def _escaped(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return json.dumps(character)[1:-1]
