"""Digests: of a configuration, by which a run is told from others, and of what is kept of it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ..files import write_json
from ..runtime.json_text import read_json
from ..runtime.printable import printable

_DIGEST = "sha256"


def digest_of(config: Any) -> str:
    """sha256 of the configuration as JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_kept(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON with its digest. A number that is not finite is null."""
    whole = json.loads(json.dumps(_finite(record), allow_nan=False))
    write_json(path, {**whole, _DIGEST: digest_of(whole)})


def read_kept(path: Path, *keys: str) -> dict[str, Any]:
    """Return a record that `write_kept` wrote; one of earlier versions may be without a digest.

    Raises:
        ValueError: the file changed since it was written, or has not all of these keys.
    """
    record: dict[str, Any] = read_json(path, dict)
    digest = record.pop(_DIGEST, None)
    missing = [key for key in keys if key not in record]
    if missing or (digest is not None and digest_of(record) != digest):
        raise ValueError(
            f"{printable(path)}: expected a whole file, as it was written, got "
            f"{f'one without {missing[0]}' if missing else 'one that was changed or damaged'}. "
            "Delete it, and start the experiment again"
        )
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
