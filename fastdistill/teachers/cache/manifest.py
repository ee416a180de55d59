"""The metadata files of a cache.

settings.json         settings that all builders share; written first
00007.safetensors     answers of consecutive rows (shards.py)
00007.json            record of that shard: its rows, tokens and sha256
manifest.json         the settings and the records of all shards; written last
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ...hf.source import MANIFEST, SETTINGS
from ...quant.formats.tensor_files import CheckpointError, check_inside
from ...runtime import checks
from ...runtime.atomic_files import write_json
from ...runtime.json_text import JSONError, read_json
from ...runtime.printable import printable, printable_lines
from .codec import BLOCK, layout
from .hidden_states import HiddenLayout

VERSION = 1
TARGETS = ("topk", "sampled")
HIDDEN = "hidden"  # the targets of a cache with answers="hidden"
POSITIONS = ("all", "targets")
MAX_K = (1 << 16) - 1  # what a count of ids in a block holds
MAX_VOCAB = (1 << 31) - 1  # ids are handed out as int32
KEY = 16  # bytes of a row's key


class CacheError(ValueError):
    """Raised if a teacher cache cannot be built, read or used.

    The printable message says what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that determine the bytes of a cache."""

    version: int = VERSION
    k: int
    temperatures: tuple[float, ...]
    targets: str
    positions: str
    seed: int | None  # of sampled targets
    vocab_size: int | None  # number of ids of the teacher; None: unknown
    max_length: int | None
    completion_only: bool
    rows: int
    rows_per_shard: int
    tokens_per_batch: int | None  # of the teacher's forward pass
    teacher: dict[str, Any]
    tokenizer_sha256: str | None
    chat_template_sha256: str | None
    library: dict[str, str]
    hidden: HiddenLayout | None = None  # of targets "hidden", which has no k and no temperatures

    @property
    def ids(self) -> int:
        """The number of ids that the format holds."""
        return 4 * BLOCK if self.vocab_size is None else self.vocab_size

    @property
    def blocks(self) -> int:
        return -(-self.ids // BLOCK)

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], int]]:
        """The type and the values per token of each array of answers."""
        if self.hidden is not None:
            return self.hidden.columns
        return layout(self.k, self.blocks, len(self.temperatures))

    @property
    def bytes_per_token(self) -> int:
        positions = 4 if self.positions == "targets" else 0
        return positions + sum(kind.itemsize * width for kind, width in self.columns.values())

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    @property
    def draws(self) -> int | None:
        """Samples per position of sampled targets; None for top-k."""
        return self.k if self.targets == "sampled" else None

    def rows_of(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def as_json(self) -> dict[str, Any]:
        entries = {**asdict(self), "temperatures": list(self.temperatures)}
        if self.hidden is None:
            del entries["hidden"]
        return entries


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of answers."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    first_row: str  # the row's key, a 16-byte hash of its ids, in hex
    last_row: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    settings: Settings
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.settings.as_json(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }


def check_links(folder: Path) -> None:
    """Raise CacheError for a file that links out of its folder (see `check_inside`)."""
    try:
        for path in folder.glob("*"):
            if path.is_symlink():
                check_inside(folder, path)
    except CheckpointError as error:
        raise CacheError(str(error)) from None


def shard_name(index: int) -> str:
    return f"{index:05}.safetensors"


def read_settings(folder: Path) -> Settings:
    return _settings(folder / SETTINGS, _read(folder / SETTINGS))


def read_shard_record(folder: Path, index: int) -> Shard | None:
    """Return the record of a finished shard; None if the record or the shard is incomplete."""
    file = (folder / shard_name(index)).with_suffix(".json")
    try:
        record = _shard(file, _read(file))
    except (CacheError, FileNotFoundError):
        return None
    path = folder / record.file
    if record.file != shard_name(index) or not path.is_file():
        return None
    return record if path.stat().st_size == record.bytes else None


def write_manifest(folder: Path, settings: Settings) -> Manifest | None:
    """Write and return the manifest if every shard is finished; else return None."""
    records = [read_shard_record(folder, index) for index in range(settings.shards)]
    if None in records:
        return None
    manifest = Manifest(settings=settings, shards=tuple(filter(None, records)))
    write_json(folder / MANIFEST, manifest.as_json())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / SETTINGS).is_file():
            raise CacheError(
                f"{folder}: expected a finished cache, got one whose build has not ended. Build it "
                "again with the same settings to resume"
            )
        raise FileNotFoundError(
            f"path: expected the folder of a teacher cache, got {str(folder)!r}, which has no "
            f"{MANIFEST}. TeacherCache.build makes one"
        )
    check_links(folder)
    entries = _read(file)
    listed = entries.pop("shards", None)
    settings = _settings(file, {n: x for n, x in entries.items() if n not in ("tokens", "bytes")})
    if not isinstance(listed, list) or len(listed) != settings.shards:
        raise _damaged(file, f"it should list {settings.shards} shards")
    shards = tuple(_shard(file, entry) for entry in listed)
    if [shard.file for shard in shards] != [shard_name(i) for i in range(len(shards))]:
        raise _damaged(file, "its shards are not numbered from 0 on")
    for index, shard in enumerate(shards):
        _check_shard(file, shard, settings, len(settings.rows_of(index)))
    return Manifest(settings=settings, shards=shards)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file, dict))
    except JSONError as error:
        raise _damaged(file, str(error)) from None


def _settings(file: Path, entries: dict[str, Any]) -> Settings:
    if entries.get("version") != VERSION:
        raise CacheError(
            f"{file}: expected version {VERSION} of the format, got "
            f"{_describe(entries.get('version'))}. Read it with the fastdistill that wrote it, or "
            "build it again"
        )
    optional = {"hidden"}
    if entries.keys() - optional != {field.name for field in fields(Settings)} - optional:
        raise _damaged(file, "it has other entries than a cache's")
    _check_settings(file, entries)
    hidden = entries.get("hidden")
    changed = {
        "temperatures": tuple(map(float, entries["temperatures"])),
        "hidden": None if hidden is None else HiddenLayout.from_json(hidden),
    }
    return Settings(**{**entries, **changed})


def _check_settings(file: Path, entries: dict[str, Any]) -> None:
    """Check the entries before use: k and the vocabulary determine how much is allocated."""
    try:
        checks.integer("vocab_size", entries["vocab_size"], 1, MAX_VOCAB, optional=True)
        checks.integer("seed", entries["seed"], optional=True)
        for name in ("rows", "rows_per_shard"):
            checks.integer(name, entries[name], 1)
        for name in ("max_length", "tokens_per_batch"):
            checks.integer(name, entries[name], 1, optional=True)
        checks.choice("targets", entries["targets"], (*TARGETS, HIDDEN))
        checks.choice("positions", entries["positions"], POSITIONS)
        checks.boolean("completion_only", entries["completion_only"])
        _check_what_is_stored(entries)
        for name in ("tokenizer_sha256", "chat_template_sha256"):
            if not isinstance(entries[name], (str, type(None))):
                checks.fail(name, "a text or null", repr(entries[name]))
        teacher, library = entries["teacher"], entries["library"]
        if not isinstance(teacher, dict) or not isinstance(teacher.get("kind"), str):
            checks.fail("teacher", "an object with the teacher's kind", repr(teacher))
        if not isinstance(library, dict):
            checks.fail("library", "an object with versions", repr(library))
    except ValueError as error:
        reason = f"its numbers are not those of a cache: {printable(error)}"
        raise _damaged(file, reason) from None


def _check_what_is_stored(entries: dict[str, Any]) -> None:
    """Check k and temperatures of distributions, or the layout of hidden states."""
    temperatures, hidden = entries["temperatures"], entries.get("hidden")
    if entries["targets"] == HIDDEN:
        checks.integer("k", entries["k"], 0, 0)
        if temperatures != []:
            checks.fail("temperatures", "none with hidden states", repr(temperatures))
        HiddenLayout.from_json(hidden)
        return
    if hidden is not None:
        checks.fail("hidden", f"null with targets {entries['targets']!r}", repr(hidden))
    checks.integer("k", entries["k"], 1, min(MAX_K, entries["vocab_size"] or MAX_K))
    is_list = isinstance(temperatures, list)
    if not is_list or not all(type(T) in (int, float) and 0 < T < 1e30 for T in temperatures):
        checks.fail("temperatures", "finite numbers above 0", repr(temperatures))
    most = 1 if entries["targets"] == "sampled" else len(temperatures)
    if not 0 < len(set(temperatures)) == len(temperatures) <= most:
        expected = "different numbers (one of sampled targets)"
        checks.fail("temperatures", expected, repr(temperatures))


def _describe(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (list, dict)) else printable(repr(value), 80)


def _shard(file: Path, entry: Any) -> Shard:
    names = {field.name for field in fields(Shard)}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise _damaged(file, f"it should say {', '.join(sorted(names))} of every shard")
    for field in fields(Shard):
        if type(entry[field.name]).__name__ != field.type:
            raise _damaged(
                file,
                f"{field.name} of a shard: expected {field.type}, got "
                f"{_describe(entry[field.name])}",
            )
    return Shard(**entry)


def _check_shard(file: Path, shard: Shard, settings: Settings, rows: int) -> None:
    """Check the record of a shard against the settings, before the shard is opened."""
    if shard.rows != rows:
        raise _damaged(file, f"rows of {shard.file}: expected {rows}, got {shard.rows}")
    if shard.tokens < 0:
        raise _damaged(file, f"tokens of {shard.file}: expected 0 or more, got {shard.tokens}")
    least = shard.tokens * settings.bytes_per_token + rows * (KEY + 8)
    if shard.bytes < least:
        raise _damaged(
            file,
            f"bytes of {shard.file}: expected at least {least:,} for {shard.tokens:,} tokens of "
            f"{settings.bytes_per_token:,} bytes, got {shard.bytes:,}",
        )


def _damaged(file: Path, reason: str) -> CacheError:
    return CacheError(
        f"{file}: damaged ({reason}). Build the cache again with the same settings: finished "
        "shards are kept"
    )
