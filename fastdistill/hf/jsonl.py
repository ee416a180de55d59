"""A dataset that reads JSON lines from disk, so that a file may be larger than memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..runtime.json_text import JSONError, parse_json
from ..runtime.printable import printable

SUFFIXES = (".jsonl", ".ndjson", ".json")
_PREVIEW_LENGTH = 60  # characters of an invalid line in an error


class Line(dict[str, Any]):
    """The object of a line; `source` names the line and the file."""

    source: str = ""


class JsonLines(Dataset[Line]):
    """Line i as a dict. Memory holds only the line offsets (8 bytes each), so workers are cheap.

    Every line is checked once, when the file is opened.

    Args:
        path: the file. name: the argument that errors name.
        check: called with the object of every line; raises ValueError or TypeError to reject it.

    Raises:
        ValueError: no such file, an empty file, or a line, named by its number, that is no JSON
        object, has half of a surrogate pair, or is rejected by `check`.
    """

    def __init__(
        self, path: str | Path, name: str = "data", check: Callable[[Any], Any] | None = None
    ) -> None:
        self.path, self._name = Path(path), name
        if not self.path.is_file() or self.path.suffix not in SUFFIXES:
            raise ValueError(
                f"{name}: expected a file of JSON lines (.jsonl), one object with messages, prompt "
                f"and completion, text, or input_ids a line, got {printable(path)}. datasets "
                "writes one with dataset.to_json('train.jsonl')"
            )
        self._starts, self._numbers = array("Q"), array("Q")
        at = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(at)
                    self._numbers.append(number)
                    self._check(self._parsed(line, number), line, check)
                at += len(line)
        if not self._starts:
            raise ValueError(f"{name}: expected JSON lines, got none in {printable(path)}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Line:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parsed(file.readline(), self._numbers[index])

    def _parsed(self, line: bytes, number: int) -> Line:
        source = f"line {number} of {printable(self.path)}"
        expected = f"{self._name}: expected {source} to be"
        try:
            value = parse_json(line, "line", unique=True)
        except JSONError as error:
            reason = str(error).removeprefix("line: ").removeprefix("expected JSON, ")
            raise ValueError(f"{expected} JSON, got {_short(line)} ({reason})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{expected} a JSON object, got {_short(line)}")
        example = Line(value)
        example.source = source
        return example

    def _check(self, example: Line, line: bytes, check: Callable[[Any], Any] | None) -> None:
        if b"\\ud" in line.lower() and not _is_unicode(example):
            raise ValueError(
                f"{self._name}: expected {example.source} to hold texts, got half of a surrogate "
                f"pair in {_short(line)}: a text was cut inside a character; remove that half"
            )
        if check is None:
            return
        try:
            check(example)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self._name}: {error} ({example.source})") from None


def _is_unicode(value: Any) -> bool:
    """Whether every text in a JSON value can be encoded as UTF-8."""
    if isinstance(value, dict):
        return all(_is_unicode(key) and _is_unicode(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_unicode, value))
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return True


def _short(line: bytes) -> str:
    text = printable(line.decode("utf-8", errors="replace").strip(), None)
    return text if len(text) <= _PREVIEW_LENGTH else text[: _PREVIEW_LENGTH - 3] + "..."
