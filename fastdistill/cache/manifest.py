"""What a cache says of itself: settings.json when it is begun, manifest.json when it is whole.

settings.json         what every process that builds here has to agree on
00007.safetensors     answers of a run of rows (shards.py)
00007.json            how many rows and tokens are in it, and its sha256
manifest.json         the settings, and what all shards say; written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_json
from .codec import BLOCK, bytes_per_token

VERSION = 1
SETTINGS, MANIFEST = "settings.json", "manifest.json"
TARGETS = ("topk", "sampled")
POSITIONS = ("all", "targets")


class CacheError(ValueError):
    """A teacher cache that cannot be built, read or used as asked. Names what is wrong and what to
    do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the bytes of a cache."""

    version: int = VERSION
    k: int
    temperatures: tuple[float, ...]
    targets: str
    positions: str
    seed: int | None  # of sampled targets
    vocab_size: int | None  # ids the teacher can name; None: not known
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
        """How many ids have room."""
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
        """How many samples a position has, of sampled targets."""
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
    first_row: str  # the key of a row is 16 bytes of a hash of its ids, here in hex
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


def write_settings(folder: Path, settings: Settings) -> None:
    write_json(folder / SETTINGS, settings.as_json())


def read_settings(folder: Path) -> Settings:
    return _settings(folder / SETTINGS, _read(folder / SETTINGS))


def write_shard_note(folder: Path, shard: Shard) -> None:
    write_json((folder / shard.file).with_suffix(".json"), asdict(shard))


def read_shard_note(folder: Path, index: int) -> Shard | None:
    """What was written behind a finished shard; None where there is nothing, or only part of it."""
    file = (folder / shard_name(index)).with_suffix(".json")
    try:
        note = _shard(file, _read(file))
    except (CacheError, FileNotFoundError):
        return None
    here = folder / note.file
    whole = note.file == shard_name(index) and here.is_file() and here.stat().st_size == note.bytes
    return note if whole else None


def write_manifest(folder: Path, settings: Settings) -> Manifest | None:
    """manifest.json, where every shard is finished; None, and nothing written, before that."""
    notes = [read_shard_note(folder, index) for index in range(settings.shards)]
    if None in notes:
        return None
    manifest = Manifest(settings=settings, shards=tuple(filter(None, notes)))
    write_json(folder / MANIFEST, manifest.as_json())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / SETTINGS).is_file():
            raise CacheError(
                f"{folder}: expected a finished cache, got one whose build has not ended. Build it "
                "again with the same settings: it goes on where it stopped"
            )
        raise FileNotFoundError(
            f"path: expected the folder of a teacher cache, got {str(folder)!r}, which has no "
            f"{MANIFEST}. TeacherCache.build makes one"
        )
    said = _read(file)
    listed = said.pop("shards", None)
    for derived in ("tokens", "bytes"):
        said.pop(derived, None)
    settings = _settings(file, said)
    if not isinstance(listed, list) or len(listed) != settings.shards:
        raise _damaged(file, f"it should list {settings.shards} shards")
    shards = tuple(_shard(file, entry) for entry in listed)
    if [shard.file for shard in shards] != [shard_name(i) for i in range(len(shards))]:
        raise _damaged(file, "its shards are not numbered from 0 on")
    if sum(shard.rows for shard in shards) != settings.rows:
        raise _damaged(file, f"its shards do not add up to {settings.rows} rows")
    return Manifest(settings=settings, shards=shards)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(file, f"expected a JSON object, got {type(value).__name__}")
    return value


def _settings(file: Path, said: dict[str, Any]) -> Settings:
    if said.get("version") != VERSION:
        raise CacheError(
            f"{file}: expected version {VERSION} of the format, got {said.get('version')!r}. Read "
            "it with the fastdistill that wrote it, or build it again"
        )
    if said.keys() != {field.name for field in fields(Settings)}:
        raise _damaged(file, "it has other entries than a cache's")
    try:
        settings = Settings(**{**said, "temperatures": tuple(map(float, said["temperatures"]))})
        counts = (settings.k, settings.rows, settings.rows_per_shard, settings.vocab_size or 1)
        sound = all(type(n) is int and n > 0 for n in counts) and settings.temperatures
    except (TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from None
    if not sound or settings.targets not in TARGETS or settings.positions not in POSITIONS:
        raise _damaged(file, "its numbers are not those of a cache")
    return settings


def _shard(file: Path, said: Any) -> Shard:
    try:
        shard = Shard(**said)
    except TypeError as error:
        raise _damaged(file, str(error)) from None
    kinds = {field.name: field.type for field in fields(Shard)}
    if any(type(getattr(shard, name)).__name__ != kind for name, kind in kinds.items()):
        raise _damaged(file, f"what it says of {shard.file} has other types than it should")
    return shard


def _damaged(file: Path, why: str) -> CacheError:
    return CacheError(
        f"{file}: damaged ({why}). Build the cache again with the same settings: what is finished "
        "is kept"
    )
