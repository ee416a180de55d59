"""What a cache is, in figures: `fastdistill cache info` and `cache verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..cache import CacheError, TeacherCache
from ..runtime.printable import printable
from .opening import Failed


def figures(cache: TeacherCache) -> dict[str, Any]:
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
        "positions": settings.positions,
        "vocab_size": settings.vocab_size,
        "max_length": settings.max_length,
        "teacher": settings.teacher,
        "tokenizer_sha256": settings.tokenizer_sha256,
        "library": settings.library,
    }


def info(path: Path) -> dict[str, Any]:
    """Raises CacheError where the manifest, or a file's size, is not what it should be."""
    return figures(TeacherCache(path, check=False))


def verify(path: Path) -> dict[str, Any]:
    """Raises Failed, naming them, where files differ from what was built."""
    start = time.perf_counter()
    try:
        found = TeacherCache(path, check=False).verify()
    except CacheError as error:
        raise Failed(str(error)) from None
    return {**found._asdict(), "path": str(path), "seconds": time.perf_counter() - start}


def show(found: dict[str, Any]) -> None:
    teacher = found["teacher"]
    named = teacher.get("name") or teacher.get("path") or teacher["kind"]
    at = ", ".join(f"{T:g}" for T in found["temperatures"])
    kept = f"top {found['k']}" if found["targets"] == "topk" else f"{found['k']} draws"
    lines = [
        ("cache", found["path"]),
        ("teacher", str(named)),
        ("answers", f"{kept} at T = {at}; positions: {found['positions']}"),
        ("tokens", f"{found['tokens']:,} in {found['rows']:,} rows"),
        ("size", f"{found['bytes'] / 1e6:,.1f} MB in {found['shards']} files, "
                 f"{found['bytes_per_token']:.0f} bytes a token"),
    ]  # fmt: skip
    console = Console()
    for name, value in lines:
        line = printable(f"{name:<9}{value}", None)
        console.print(line, soft_wrap=True, markup=False, highlight=False)
