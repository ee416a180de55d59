"""A dataset of JSON lines, read where it lies: a file may be larger than memory."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset


class JsonLines(Dataset):
    """Line i as a dict; only where lines begin is kept (8 bytes each), so workers cost nothing.

    Raises:
        ValueError: no such file, no line in it, or, when it is read, a line that is no JSON object;
        named with its number.
    """

    def __init__(self, path: str | Path, name: str = "data") -> None:
        self.path, self._name = Path(path), name
        if not self.path.is_file() or self.path.suffix not in (".jsonl", ".ndjson", ".json"):
            raise ValueError(
                f"{name}: expected a file of JSON lines (.jsonl), one object with messages, prompt "
                f"and completion, text, or input_ids a line, got {path}. datasets writes one with "
                "dataset.to_json('train.jsonl')"
            )
        self._starts, self._numbers = array("Q"), array("Q")
        at = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(at)
                    self._numbers.append(number)
                at += len(line)
        if not self._starts:
            raise ValueError(f"{name}: expected JSON lines, got none in {path}")
        self[0]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            example = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self._where(index)} JSON, got {_short(line)} ({error})") from None
        if not isinstance(example, dict):
            raise ValueError(f"{self._where(index)} a JSON object, got {_short(line)}")
        return example

    def _where(self, index: int) -> str:
        return f"{self._name}: expected line {self._numbers[index]} of {self.path} to be"


def _short(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return text if len(text) <= 60 else text[:57] + "..."
