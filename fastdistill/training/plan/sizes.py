"""Parses and formats sizes: "24GB" and "24GiB" to bytes, bytes to "22.4 GB"."""

from __future__ import annotations

import re

UNITS = {"GB": 10**9, "GiB": 2**30}
GB = UNITS["GB"]


def read_bytes(name: str, value: int | str) -> int:
    """Return a size in bytes: "24GB" is 24 · 10⁹, "24GiB" is 24 · 2³⁰, an int is bytes.

    Raises:
        ValueError: the value has another form, or is not positive.
    """
    count = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", value)
        count = None if match is None else int(float(match[1]) * UNITS[match[2]])
    if count is None or count <= 0:
        raise ValueError(
            f"{name}: expected bytes, or a number with GB (10⁹) or GiB (2³⁰), got {value!r}. "
            "Write 24GB or 22.5GiB, for example"
        )
    return count


def in_gb(count: float) -> str:
    return f"{count / GB:.2f} GB"
