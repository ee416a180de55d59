"""One file of answers: safetensors, written whole or not at all, and read where it is mapped.

    rows R · tokens n · k slots

    keys     uint8 [R, 16]  which row it is: a hash of the ids that are attended to
    starts   int64 [R + 1]  where its answers begin
    places   int32 [n]      which of the row's tokens each answers for, where not all do
    ids, blocks, logprobs, log_tail, shift   the answers (codec.py)

A row's answers lie behind each other, in the order of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..files import sha256_of, sync
from .codec import Array, Packed, count_type
from .manifest import CacheError, Settings, Shard

KEY = 16  # bytes
_KINDS = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "F32": np.float32}
_KINDS |= {"I32": np.int32, "I64": np.int64}


def key_of(ids: NDArray[np.int64]) -> bytes:
    """Which row these are: the ids that are attended to, [T]."""
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=KEY).digest()


class Writer:
    """The answers of one shard while they come in, in any order of rows."""

    def __init__(self, settings: Settings, keys: list[bytes], places: list[Any]) -> None:
        """`places`: of each row, which of its tokens are answered, int [≤ T]."""
        counts = [len(p) for p in places]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self.keys = keys
        self.packed = Packed.zeros(
            int(self.starts[-1]), settings.k, settings.blocks, len(settings.temperatures)
        )
        self.places = None
        if settings.positions == "targets":
            self.places = np.concatenate([np.zeros(0), *places]).astype(np.int32)

    def put(self, row: int, packed: Packed) -> Packed:
        """Take a row's answers from the front of `packed`; returns what is behind them."""
        start, stop = self.starts[row], self.starts[row + 1]
        for own, given in zip(self.packed, packed, strict=True):
            own[start:stop] = given[: stop - start]
        return Packed(*(given[stop - start :] for given in packed))

    def write(self, file: Path) -> Shard:
        """A crash leaves the shard whole, or nothing of its name."""
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        tensors = {
            "keys": np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, KEY),
            "starts": self.starts,
            **self.packed._asdict(),
            **({} if self.places is None else {"places": self.places}),
        }
        try:
            save_file(tensors, temporary)
            sync(temporary)
            note = Shard(
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
        return note


class Mapped:
    """A shard on disk, mapped: reading a row touches its pages and no others."""

    def __init__(self, file: Path, settings: Settings, shard: Shard) -> None:
        kinds = {
            "keys": (np.uint8, (shard.rows, KEY)),
            "starts": (np.int64, (shard.rows + 1,)),
            "ids": (np.uint16, (shard.tokens, settings.k)),
            "blocks": (count_type(settings.k), (shard.tokens, settings.blocks)),
            "logprobs": (np.float16, (shard.tokens, settings.k)),
            "log_tail": (np.float32, (shard.tokens, len(settings.temperatures))),
            "shift": (np.float32, (shard.tokens, len(settings.temperatures))),
        }
        if settings.positions == "targets":
            kinds["places"] = (np.int32, (shard.tokens,))
        try:
            found = _map(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, str(error)) from None
        for name, (kind, shape) in kinds.items():
            tensor = found.get(name)
            if tensor is None or tensor.dtype != kind or tensor.shape != shape:
                raise _damaged(file, f"{name!r} is not {list(shape)} of {np.dtype(kind).name}")
        self.keys, self.starts = found["keys"], found["starts"]
        self.packed = Packed(*(found[name] for name in Packed._fields))
        self.places = found.get("places")

    def row(self, row: int) -> tuple[Array | None, Packed]:
        """(which tokens, answers) of a row, still on disk; None: all of them."""
        at = slice(self.starts[row], self.starts[row + 1])
        places = None if self.places is None else self.places[at]
        return places, Packed(*(tensor[at] for tensor in self.packed))


def _map(file: Path) -> dict[str, Array]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(size, 1 << 20)))
        # Private and writable, since torch takes no memory that is read-only.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    found = {}
    for name, said in header.items():
        if name == "__metadata__":
            continue
        start, stop = said["data_offsets"]
        data = memoryview(mapped)[8 + size + start : 8 + size + stop]
        found[name] = np.frombuffer(data, _KINDS[said["dtype"]]).reshape(said["shape"])
    return found


def _damaged(file: Path, why: str) -> CacheError:
    return CacheError(
        f"{file}: damaged ({why}). Delete it and build the cache again with the same settings: "
        "only this shard is made anew"
    )
