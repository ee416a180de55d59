"""Checks the files of a cache: their sizes, and their sha256 when needed.

Opening a cache skips shards that were checked before and have not changed (.verified.json holds
size, time and inode). `TeacherCache.verify` reads all of them, since a disk can lose bits without a
change of a file's time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ...runtime.atomic_files import sha256_of, write_json
from ...runtime.json_text import read_json
from ...runtime.progress import RowProgress
from .manifest import CacheError, Manifest, Shard

_KNOWN = ".verified.json"


def compare(folder: Path, manifest: Manifest, *, everything: bool, hashes: bool = True) -> None:
    """Raise CacheError that names every missing or damaged shard."""
    problems = [problem for s in manifest.shards if (problem := _size_is_wrong(folder, s))]
    if not problems and hashes:
        known = {} if everything else _known(folder)
        unread = [s for s in manifest.shards if known.get(s.file) != _stamp(folder, s)]
        problems = _hashes_are_wrong(folder, unread)
        if unread and not problems:
            remember(folder, manifest)
    if problems:
        pronoun = "it" if len(problems) == 1 else "them"
        raise CacheError(
            f"{folder}: {'; '.join(problems)}. Delete {pronoun} and build the cache again with the "
            "same settings: only missing shards are rebuilt"
        )


def remember(folder: Path, manifest: Manifest) -> None:
    """Record that the shards in their current state were checked."""
    with suppress(OSError):  # a read-only folder is checked every time
        write_json(folder / _KNOWN, {s.file: _stamp(folder, s) for s in manifest.shards})


def _size_is_wrong(folder: Path, shard: Shard) -> str | None:
    file = folder / shard.file
    if not file.is_file():
        return f"{shard.file} is missing"
    size = file.stat().st_size
    return None if size == shard.bytes else f"{shard.file} has {size:,} bytes, not {shard.bytes:,}"


def _hashes_are_wrong(folder: Path, shards: list[Shard]) -> list[str]:
    problems = []
    with (
        RowProgress("Reading the cache", total=len(shards)) as bar,
        ThreadPoolExecutor(2) as pool,  # hashing releases the GIL
    ):
        digests = pool.map(lambda s: sha256_of(folder / s.file), shards)
        for shard, sha256 in zip(shards, digests, strict=True):
            bar.advance(1, shard.bytes)
            if sha256 != shard.sha256:
                problems.append(f"{shard.file} is damaged (its sha256 is not the manifest's)")
    return problems


def _stamp(folder: Path, shard: Shard) -> list[int | str]:
    stat = (folder / shard.file).stat()
    return [shard.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _known(folder: Path) -> dict[str, list[int | str]]:
    try:
        return dict(read_json(folder / _KNOWN, dict))
    except (OSError, ValueError):
        return {}
