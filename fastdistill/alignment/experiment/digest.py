"""Digests of run configurations, and JSON records with a checksum."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ...runtime.atomic_files import write_json
from ...runtime.json_text import read_json
from ...runtime.printable import printable

_DIGEST = "sha256"


def digest_of(config: Any) -> str:
    """Return the sha256 of the configuration as JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON with its digest; numbers that are not finite become null."""
    finite = json.loads(json.dumps(_finite(record), allow_nan=False))
    write_json(path, {**finite, _DIGEST: digest_of(finite)})


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Return a record that `write_record` wrote; records of earlier versions have no digest.

    Raises:
        ValueError: the file changed since it was written, or lacks one of these keys.
    """
    record: dict[str, Any] = read_json(path, dict)
    digest = record.pop(_DIGEST, None)
    missing = [key for key in keys if key not in record]
    if missing or (digest is not None and digest_of(record) != digest):
        raise ValueError(
            f"{printable(path)}: expected an unmodified record, got "
            f"{f'one without {missing[0]}' if missing else 'one that was changed or damaged'}. "
            "Delete it and restart the experiment"
        )
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
