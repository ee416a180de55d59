"""Reads the header of a .gguf file (GGUF version 2 and 3, little-endian) within its bounds.

    "GGUF" | u32 version | u64 tensors | u64 fields
    field    string key | u32 type | value          string: u64 length | bytes
    tensor   string name | u32 n | u64 dims[n], the innermost first | u32 type | u64 offset
    padding to general.alignment, then the data, where each tensor begins at its offset

The reader of the gguf package trusts counts and lengths, so a flipped bit may make it allocate
without bound. This reader runs first and checks that every length fits into the file.
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...runtime.checks import fail
from ...runtime.optional import require
from .tensor_files import CheckpointError, check_not_pickle, reading

MAGIC = b"GGUF"
# Far above real models (vocabularies of 300,000 words, chat templates of 100 kB).
_MAX_FIELDS, _MAX_TENSORS, _MAX_ITEMS, _MAX_LENGTH = 1 << 12, 1 << 16, 1 << 22, 1 << 22
_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, as in PyTorch
    start: int  # first byte in the file
    bytes: int


class GGUFHeader(NamedTuple):
    fields: dict[str, Any]  # scalars and strings; None for arrays
    tensors: dict[str, GGUFTensor]


def gguf_package(file: Path) -> Any:
    try:
        return require("gguf", str(file), "'fastdistill[gguf]'")
    except ImportError as error:
        raise CheckpointError(str(error)) from None


def read_header(file: Path) -> GGUFHeader:
    check_not_pickle(file)
    sizes = gguf_package(file).GGML_QUANT_SIZES
    with (
        reading(file, advice="Not a whole .gguf file: download it again"),
        file.open("rb") as stream,
    ):
        walk = _Walk(stream, file.stat().st_size)
        if walk.take(4) != MAGIC:
            fail("file", "the first bytes 'GGUF'", "others")
        version = walk.number("I")
        if version not in (2, 3):
            fail("GGUF version", "2 or 3, little-endian", version)
        count = walk.count("number of tensors", _MAX_TENSORS)
        fields = {}
        for _ in range(walk.count("number of fields", _MAX_FIELDS)):
            key = walk.string()
            if key in fields:
                fail(key, "one field of this name", "another one")
            fields[key] = walk.value(walk.number("I"))
        entries = [_tensor(walk, sizes) for _ in range(count)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            fail("general.alignment", "a power of 2", repr(alignment))
        data = -(-walk.at // alignment) * alignment
        tensors = {}
        for name, tensor in entries:
            start = data + tensor.start
            if start + tensor.bytes > walk.size or name in tensors:
                expected = f"once, and bytes {start:,} to {start + tensor.bytes:,} in the file"
                fail(f"tensor {name!r}", expected, f"a file of {walk.size:,}")
            if tensor.start % alignment:
                expected = f"an offset that is a multiple of general.alignment, {alignment}"
                fail(f"tensor {name!r}", expected, f"{tensor.start:,}")
            tensors[name] = tensor._replace(start=start)
        ordered = sorted(tensors.items(), key=lambda item: item[1].start)
        for (name, tensor), (other, following) in pairwise(ordered):
            if following.start < tensor.start + tensor.bytes:
                fail(f"tensor {other!r}", "bytes of its own", f"some of {name!r}'s")
    return GGUFHeader(fields, tensors)


def _tensor(walk: _Walk, sizes: dict[Any, tuple[int, int]]) -> tuple[str, GGUFTensor]:
    name = walk.string()
    at, n = f"tensor {name!r}", walk.number("I")
    if not 1 <= n <= 4:
        fail(at, "1 to 4 dimensions", n)
    shape = tuple(reversed([walk.number("Q") for _ in range(n)]))
    kind, offset = walk.number("I"), walk.number("Q")
    known = {int(t): t for t in sizes}
    if kind not in known:
        fail(at, "a type that gguf knows", kind)
    per_block, block_bytes = sizes[known[kind]]
    if 0 in shape or shape[-1] % per_block:
        fail(at, f"rows of whole blocks of {per_block}", list(shape))
    size = math.prod(shape) // per_block * block_bytes
    return name, GGUFTensor(known[kind], shape, offset, size)


class _Walk:
    """Reads a file sequentially and checks all lengths against its size."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.at, self.items = stream, size, 0, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            fail("file", f"{count:,} more bytes at {self.at:,}", "its end")
        self.at += count
        return self.stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, name: str, limit: int) -> int:
        count: int = self.number("Q")
        if count > limit:
            fail(name, f"at most {limit:,}", f"{count:,}")
        return count

    def string(self) -> str:
        return self.take(self.count("length of a string", _MAX_LENGTH)).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            fail("type of a field", "0 to 12", kind)
        of, count = self.number("I"), self.count("length of an array", _MAX_ITEMS)
        self.items += count
        if self.items > _MAX_ITEMS or (of != _STRING and of not in _SCALARS):
            fail("array", "a short one of scalars or strings", f"type {of}")
        for _ in range(count if of == _STRING else 0):
            self.string()
        if of != _STRING:
            self.take(count * struct.calcsize("<" + _SCALARS[of]))
        return None
