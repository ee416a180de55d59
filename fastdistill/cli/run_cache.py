"""`fastdistill cache info` and `fastdistill cache verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..runtime.printable import printable
from ..teachers.cache import CacheError, TeacherCache
from .loaders import Failed
from .printing import say


def figures(cache: TeacherCache) -> dict[str, Any]:
    """Return the sizes and settings of a cache."""
    settings = cache.manifest.settings
    return {
        "path": str(cache.path),
        "rows": settings.rows,
        "tokens": cache.manifest.tokens,
        "bytes": cache.manifest.bytes,
        "bytes_per_token": cache.manifest.bytes / max(cache.manifest.tokens, 1),
        "shards": len(cache.manifest.shards),
        "k": settings.k,
        "temperatures": list(settings.temperatures),
        "targets": settings.targets,
        **({"layers": list(cache.layers)} if cache.answers == "hidden" else {}),
        "positions": settings.positions,
        "vocab_size": settings.vocab_size,
        "max_length": settings.max_length,
        "teacher": settings.teacher,
        "tokenizer_sha256": settings.tokenizer_sha256,
        "library": settings.library,
    }


def info(path: Path) -> dict[str, Any]:
    """Return `figures` of the cache at `path`.

    Raises CacheError for an invalid manifest or a file of the wrong size.
    """
    return figures(TeacherCache(path, check=False))


def verify(path: Path) -> dict[str, Any]:
    """Compare the sha256 of every file with the manifest.

    Raises Failed, naming the files that differ.
    """
    start = time.perf_counter()
    try:
        totals = TeacherCache(path, check=False).verify()
    except CacheError as error:
        raise Failed(str(error)) from None
    return {**totals._asdict(), "path": str(path), "seconds": time.perf_counter() - start}


def show(summary: dict[str, Any]) -> None:
    """Print what `info` returns."""
    teacher = summary["teacher"]
    name = teacher.get("name") or teacher.get("path") or teacher["kind"]
    if summary["targets"] == "hidden":
        layers = ", ".join(map(str, summary["layers"]))
        what = "hidden states" + (f", and those after layers {layers}" if layers else "")
    else:
        temperatures = ", ".join(f"{T:g}" for T in summary["temperatures"])
        targets = f"top {summary['k']}" if summary["targets"] == "topk" else f"{summary['k']} draws"
        what = f"{targets} at T = {temperatures}"
    lines = [
        ("cache", summary["path"]),
        ("teacher", str(name)),
        ("answers", f"{what}; positions: {summary['positions']}"),
        ("tokens", f"{summary['tokens']:,} in {summary['rows']:,} rows"),
        (
            "size",
            f"{summary['bytes'] / 1e6:,.1f} MB in {summary['shards']} files, "
            f"{summary['bytes_per_token']:.0f} bytes per token",
        ),
    ]
    for label, value in lines:
        say(printable(f"{label:<9}{value}", None))
