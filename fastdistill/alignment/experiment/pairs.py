"""Pairs of organisms as the units of a study: a file with one JSON object per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...hf.jsonl import JsonLines
from ...runtime.checks import fail
from .checkpoint_source import OPTIONAL, CheckpointSource

# Key of a line -> field of CheckpointSource; those of _PATHS may be relative to the file.
_PATHS = {
    "base": "base",
    "untrusted": "teacher",
    "benign": "benign",
    **{name: name for name in OPTIONAL},
    "probes": "probes",
    "pool": "pool",
    "capability": "capability",
    "text": "text",
}
_TEXTS = ("eliciting", "near_misses")
_REQUIRED = ("base", "untrusted", "benign", "probes", "pool", "capability")


def read_pairs(path: Path, **common: Any) -> list[CheckpointSource]:
    """Return a source per line; its base seed is its index.

    A line has base, untrusted, benign and probes, and optionally placebo, other_base, earlier,
    pool, capability, text, eliciting and near_misses. Relative paths are relative to the file.

    Args:
        common: fields of CheckpointSource for lines without them.

    Raises:
        ValueError: a line, named by its number, is no object of these keys, refers to something
        that is missing or has no trait, or repeats another.
    """
    sources: list[CheckpointSource] = []
    rows = JsonLines(path, "pairs")
    for i in range(len(rows)):
        row = rows[i]
        try:
            source = _to_source(row, path.parent, common, len(sources))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"pairs: {error} ({row.source})") from None
        if any(source.as_json() == other.as_json() for other in sources):
            fail("pairs", "different models or files in each line", f"a copy in {row.source}")
        sources.append(source)
    return sources


def _to_source(
    row: dict[str, Any], folder: Path, common: dict[str, Any], index: int
) -> CheckpointSource:
    unknown = sorted(set(row) - {*_PATHS, *_TEXTS})
    paths = {
        name: _resolve(folder, key, row[key])
        for key, name in _PATHS.items()
        if row.get(key) is not None
    }
    texts = {key: row[key] for key in _TEXTS if key in row}
    fields = {**common, **paths, **texts, "index": index}
    missing = [key for key in _REQUIRED if fields.get(_PATHS[key]) is None]
    if unknown or missing:
        fail(
            (unknown or missing)[0],
            f"a line with {', '.join(_REQUIRED)}, and optionally {', '.join((*OPTIONAL, *_TEXTS))}",
            "an unknown key" if unknown else "none",
            ""
            if unknown or missing[0] not in ("pool", "capability")
            else "or pass it as an option",
        )
    return CheckpointSource(**fields | {"probes": Path(fields["probes"])})


def _resolve(folder: Path, key: str, value: Any) -> str:
    """Return a path below the folder of the file if one exists, or else the value (a hub name)."""
    if not isinstance(value, str):
        fail(key, "a path or the name of one on the hub", repr(value))
    exists = (folder / Path(value.partition(":")[0]).expanduser()).exists()
    return str(folder / value) if exists else value
