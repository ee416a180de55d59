"""The metadata files of a cache.

settings.json         settings that all builders share; written first
00007.safetensors     answers of consecutive rows (shards.py)
00007.json            record of that shard: its rows, tokens and sha256
manifest.json         the settings and the records of all shards; written last
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...hf.resolve import MANIFEST, SETTINGS
from ...runtime.atomic_files import write_json
from ...runtime.json_text import JSONError, read_json
from ...runtime.printable import printable, printable_lines
from .codec import BLOCK, bytes_per_token

VERSION = 1
TARGETS = ("topk", "sampled")
POSITIONS = ("all", "targets")
MAX_K = (1 << 16) - 1  # what a count of ids in a block holds
MAX_VOCAB = (1 << 31) - 1  # ids are handed out as int32
KEY = 16  # bytes of a row's key


class CacheError(ValueError):
    """A teacher cache cannot be built, read or used; the message is made printable.

    It names what is wrong and what to do."""

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

    @property
    def ids(self) -> int:
        """The number of ids that the format holds."""
        return 4 * BLOCK if self.vocab_size is None else self.vocab_size

    @property
    def blocks(self) -> int:
        return -(-self.ids // BLOCK)

    @property
    def bytes_per_token(self) -> int:
        positions = 4 if self.positions == "targets" else 0
        return bytes_per_token(self.k, self.blocks, len(self.temperatures)) + positions

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
        return {**asdict(self), "temperatures": list(self.temperatures)}


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
    if entries.keys() != {field.name for field in fields(Settings)}:
        raise _damaged(file, "it has other entries than a cache's")
    _check_settings(file, entries)
    return Settings(**{**entries, "temperatures": tuple(map(float, entries["temperatures"]))})


def _check_settings(file: Path, entries: dict[str, Any]) -> None:
    """Check the entries before use: k and the vocabulary determine how much is allocated."""
    vocab = entries["vocab_size"]
    limit = min(MAX_K, vocab) if _is_count(vocab) else MAX_K
    temperatures = entries["temperatures"]
    sampled = entries["targets"] == "sampled"
    texts = ("tokenizer_sha256", "chat_template_sha256")
    counts = ("max_length", "tokens_per_batch")
    rules = {
        "vocab_size": (vocab is None or _is_count(vocab, MAX_VOCAB), f"1..{MAX_VOCAB} or null"),
        "k": (_is_count(entries["k"], limit), f"an integer in 1..{limit}"),
        "temperatures": (
            isinstance(temperatures, list)
            and all(type(T) in (int, float) and 0 < T < 1e30 for T in temperatures)  # NaN is not
            and 0 < len(set(temperatures)) == len(temperatures)
            and not (sampled and len(temperatures) > 1),
            "different finite numbers above 0 (one of sampled targets)",
        ),
        "targets": (entries["targets"] in TARGETS, f"one of {', '.join(TARGETS)}"),
        "positions": (entries["positions"] in POSITIONS, f"one of {', '.join(POSITIONS)}"),
        "seed": (entries["seed"] is None or type(entries["seed"]) is int, "an integer or null"),
        "completion_only": (type(entries["completion_only"]) is bool, "true or false"),
        **{n: (_is_count(entries[n]), "an integer above 0") for n in ("rows", "rows_per_shard")},
        "teacher": (
            isinstance(entries["teacher"], dict)
            and isinstance(entries["teacher"].get("kind"), str),
            "an object with the teacher's kind",
        ),
        "library": (isinstance(entries["library"], dict), "an object with versions"),
        **{n: (entries[n] is None or isinstance(entries[n], str), "a text or null") for n in texts},
        **{n: (entries[n] is None or _is_count(entries[n]), "a count or null") for n in counts},
    }
    for name, (is_valid, expected) in rules.items():
        if not is_valid:
            raise _damaged(
                file,
                f"its numbers are not those of a cache: {name}: expected {expected}, got "
                f"{_describe(entries[name])}",
            )


def _is_count(value: Any, limit: float = math.inf) -> bool:
    return type(value) is int and 0 < value <= limit


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
            f"bytes of {shard.file}: expected at least {least:,} for {shard.tokens:,} tokens with "
            f"k={settings.k}, got {shard.bytes:,}",
        )


def _damaged(file: Path, reason: str) -> CacheError:
    return CacheError(
        f"{file}: damaged ({reason}). Build the cache again with the same settings: finished "
        "shards are kept"
    )
