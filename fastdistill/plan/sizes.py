"""Bytes as people write them: "24GB" and "24GiB" in, "22.4 GB" out."""

from __future__ import annotations

import re

UNITS = {"GB": 10**9, "GiB": 2**30}
GB = UNITS["GB"]


def read_bytes(name: str, value: int | str) -> int:
    """24GB is 24 · 10⁹ bytes, 24GiB is 24 · 2³⁰; an int is bytes.

    Raises:
        ValueError: anything else, or nothing above 0.
    """
    count = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", value)
        count = None if match is None else int(float(match[1]) * UNITS[match[2]])
    if count is None or count <= 0:
        raise ValueError(
            f"{name}: expected bytes, or a number with GB (10⁹) or GiB (2³⁰), got {value!r}. "
            "Write 24GB or 22.5GiB"
        )
    return count


def in_gb(count: float) -> str:
    return f"{count / GB:.2f} GB"
