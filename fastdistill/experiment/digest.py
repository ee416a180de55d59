"""A digest of a configuration: two runs with the same one are the same run."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(config: Any) -> str:
    """sha256 of the configuration as JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
