"""Untrusted JSON: every error is a ValueError that names the source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from .printable import printable

_CHUNK = 1 << 20
MAX_BYTES = 1 << 28  # per file; the index of a large checkpoint has a few MB
MAX_DEPTH = 100  # so that functions that call themselves for each level do not run out of stack


class JSONError(ValueError):
    """Text that is not JSON, or not the kind of JSON that was expected."""


class RepeatedName(JSONError):
    """An object with a repeated name: no rule says which value counts."""


def parse_json(
    text: str | bytes, source: str, expected: type | None = None, *, unique: bool = False
) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the document; bytes are read as UTF-8.
        source: what the error names: a file, a line of it, or a server.
        expected: `dict` or `list`, if the value has to be one.
        unique: raise for an object with a repeated name; otherwise the last value counts.

    Raises:
        JSONError: the text is not UTF-8, not JSON, nested too deeply, or of another type.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RepeatedName as error:
        raise RepeatedName(f"{source}: {error}") from None
    except RecursionError:
        raise JSONError(f"{source}: expected JSON, got one nested too deeply") from None
    except (UnicodeDecodeError, ValueError) as error:
        reason = printable(error)
        raise JSONError(f"{source}: expected JSON, got a text that is not: {reason}") from None
    if _is_deep(text, value):
        raise JSONError(f"{source}: expected JSON, got one nested too deeply")
    if expected is not None and not isinstance(value, expected):
        kind = "a JSON object" if expected is dict else "a JSON list"
        raise JSONError(f"{source}: expected {kind}, got {type(value).__name__}")
    return value


def _is_deep(text: str | bytes, value: Any) -> bool:
    """Return whether a value has more than MAX_DEPTH levels of lists and objects."""
    if isinstance(text, str):
        brackets = text.count("[") + text.count("{")
    else:
        brackets = text.count(b"[") + text.count(b"{")
    if brackets <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for box in level
            if isinstance(box, (dict, list))
            for part in (box.values() if isinstance(box, dict) else box)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    name = next(name for name in value if names.count(name) > 1)
    raise RepeatedName(f"expected each name once in an object, got {printable(name, 60)!r} twice")


def read_json(
    path: str | os.PathLike[str], expected: type | None = None, max_bytes: int = MAX_BYTES
) -> Any:
    """Return the value of a JSON file; see `parse_json`.

    Raises:
        JSONError: as `parse_json`, or the file is larger than `max_bytes`.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as stream:
        text = read_bounded(stream, printable(path), max_bytes)
    return parse_json(text, printable(path), expected)


def read_bounded(stream: IO[bytes], source: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the rest of a stream, such as a compressed file; raise JSONError if it is larger."""
    text = bytearray()
    while chunk := stream.read(_CHUNK):  # read(max_bytes) allocates that much for a small file too
        text += chunk
        if len(text) > max_bytes:
            raise JSONError(f"{source}: expected at most {max_bytes:,} bytes, got more")
    return bytes(text)
