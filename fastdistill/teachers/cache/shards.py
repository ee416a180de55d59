"""One file of answers: safetensors, written atomically and read memory-mapped.

    rows R · tokens n · k slots

    keys     uint8 [R, 16]  a hash of the row's attended ids
    starts   int64 [R + 1]  index of the row's first answer
    places   int32 [n]      the row's position of each answer; absent if all are answered
    ids, blocks, logprobs, log_tail, shift   the answers (codec.py), or
    hidden           the hidden states (hidden_states.py)

A row's answers are consecutive, in the order of its tokens.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ...hf.source import MANIFEST
from ...runtime.atomic_files import sha256_of, sync
from ...runtime.json_text import parse_json
from ...runtime.printable import printable
from .codec import Array
from .manifest import KEY, CacheError, Settings, Shard

_HEADER = 1 << 20  # bytes at most
_KINDS = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "F32": np.float32}
_KINDS |= {"I32": np.int32, "I64": np.int64}


def key_of(ids: NDArray[np.int64]) -> bytes:
    """Return the key of a row with these attended ids [T]."""
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=KEY).digest()


class Writer:
    """Collects the answers of one shard, in any order of rows."""

    def __init__(self, settings: Settings, keys: list[bytes], places: list[Any]) -> None:
        """`places`: the answered positions of each row, int [≤ T]."""
        counts = [len(p) for p in places]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self.keys = keys
        tokens = int(self.starts[-1])
        self.columns: dict[str, Array] = {
            name: np.zeros((tokens, width), kind)
            for name, (kind, width) in settings.columns.items()
        }
        self.places = None
        if settings.positions == "targets":
            self.places = np.concatenate([np.zeros(0), *places]).astype(np.int32)

    def put(self, row: int, answers: dict[str, Array]) -> dict[str, Array]:
        """Take a row's answers from the front of `answers` and return the rest."""
        start, stop = self.starts[row], self.starts[row + 1]
        for name, target in self.columns.items():
            target[start:stop] = answers[name][: stop - start]
        return {name: source[stop - start :] for name, source in answers.items()}

    def write(self, file: Path) -> Shard:
        """Write the shard atomically and return its record."""
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        tensors: dict[str, Array] = {
            "keys": np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, KEY),
            "starts": self.starts,
            **self.columns,
            **({} if self.places is None else {"places": self.places}),
        }
        try:
            save_file(tensors, temporary)
            sync(temporary)
            record = Shard(
                file=file.name,
                rows=len(self.keys),
                tokens=int(self.starts[-1]),
                bytes=temporary.stat().st_size,
                sha256=sha256_of(temporary),
                first_row=self.keys[0].hex(),
                last_row=self.keys[-1].hex(),
            )
            os.replace(temporary, file)
            sync(file.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return record


class Mapped:
    """A memory-mapped shard: reading a row touches its pages only."""

    def __init__(self, file: Path, settings: Settings, shard: Shard) -> None:
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "keys": (np.uint8, (shard.rows, KEY)),
            "starts": (np.int64, (shard.rows + 1,)),
            **{
                name: (kind, (shard.tokens, width))
                for name, (kind, width) in settings.columns.items()
            },
        }
        if settings.positions == "targets":
            kinds["places"] = (np.int32, (shard.tokens,))
        self.file = file
        try:
            tensors = _map(file)
        except (OSError, ValueError) as error:
            raise self.damaged(printable(error)) from None
        for name, (kind, shape) in kinds.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != kind or tensor.shape != shape:
                raise self.damaged(f"{name!r} is not {list(shape)} of {np.dtype(kind).name}")
        if unknown := sorted(tensors.keys() - kinds.keys()):
            raise self.damaged(f"{printable(repr(unknown[0]))} is no tensor of a cache's")
        self.keys, self.starts = tensors["keys"], tensors["starts"]
        for field, at in (("first_row", 0), ("last_row", -1)):
            expected, key = getattr(shard, field), self.keys[at].tobytes().hex()
            if key != expected:
                raise self.damaged(
                    f"keys: expected {printable(expected)}, the {field} of {MANIFEST}, got {key}"
                )
        self.columns = {name: tensors[name] for name in settings.columns}
        self.places = tensors["places"] if "places" in kinds else None
        steps = np.diff(self.starts)
        if self.starts[0] != 0 or self.starts[-1] != shard.tokens or (steps < 0).any():
            raise self.damaged(f"starts: expected increasing numbers from 0 to {shard.tokens:,}")

    def row(self, row: int) -> tuple[Array | None, dict[str, Array]]:
        """Return (positions or None for all, answers) of a row, still mapped."""
        at = slice(self.starts[row], self.starts[row + 1])
        places = None if self.places is None else self.places[at]
        return places, {name: column[at] for name, column in self.columns.items()}

    def places_of(self, row: int, tokens: int) -> Array:
        """Return the answered positions of a row of `tokens` tokens, checked."""
        places, _ = self.row(row)
        count = int(self.starts[row + 1] - self.starts[row])
        if places is None:
            if count != tokens:
                raise self.damaged(f"row {row}: expected {tokens} answers, got {count}")
            return np.arange(tokens)
        positions = places.astype(np.int64)
        if count and (
            positions[0] < 0 or positions[-1] >= tokens or (np.diff(positions) <= 0).any()
        ):
            raise self.damaged(
                f"places of row {row}: expected increasing numbers in 0..{tokens - 1}"
            )
        return positions

    def damaged(self, reason: str) -> CacheError:
        return CacheError(
            f"{self.file}: damaged ({reason}). Delete it and build the cache again with the same "
            "settings: only this shard is rebuilt"
        )


def _map(file: Path) -> dict[str, Array]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _HEADER:
            raise ValueError(f"expected a header of at most {_HEADER:,} bytes, got {size:,}")
        header = parse_json(stream.read(size), "its header", dict)
        # Copy-on-write, since torch accepts no read-only memory.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    data = memoryview(mapped)[8 + size :]
    return {n: _tensor(data, n, entry) for n, entry in header.items() if n != "__metadata__"}


def _tensor(data: memoryview, name: str, entry: Any) -> Array:
    try:
        kind = np.dtype(_KINDS[entry["dtype"]])
        shape, (start, stop) = [*entry["shape"]], entry["data_offsets"]
        sound = (
            all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            and start <= stop <= len(data)
            and math.prod(shape) * kind.itemsize == stop - start
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{name!r}: expected a type, a shape and where it lies in the file")
    return np.frombuffer(data[start:stop], kind).reshape(shape)
