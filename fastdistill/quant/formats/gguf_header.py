"""Reads the headers of .gguf files (GGUF version 2 and 3, little-endian) within their bounds.

    "GGUF" | u32 version | u64 tensors | u64 fields
    field    string key | u32 type | value          string: u64 length | bytes
    tensor   string name | u32 n | u64 dims[n], the innermost first | u32 type | u64 offset
    padding to general.alignment, then the data, where each tensor begins at its offset

A reader that trusts counts and lengths may allocate without bound after a flipped bit. This one
checks that every length fits into the file, and runs before any other.

llama-gguf-split stores a model in parts, NAME-00001-of-00003.gguf and so on. The first has the
fields of the model; each has split.no, split.count and split.tensors.count, and its own tensors.
"""

from __future__ import annotations

import math
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...runtime.checks import fail
from .gguf_types import OTHERS, TYPES, GGUFType
from .tensor_files import check_inside, check_not_pickle, fail_checkpoint, reading

MAGIC = b"GGUF"
# Far above real models (vocabularies of 300,000 words, chat templates of 100 kB).
_MAX_FIELDS, _MAX_TENSORS, _MAX_ITEMS, _MAX_LENGTH = 1 << 12, 1 << 16, 1 << 22, 1 << 22
_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_PARTS = 99_999  # five digits in a name
_PART = re.compile(r"(.+-)(\d{5})(-of-(\d{5})\.gguf)")


class GGUFTensor(NamedTuple):
    file: Path
    type: GGUFType
    shape: tuple[int, ...]  # outermost first, as in PyTorch
    start: int  # first byte in the file
    bytes: int


class GGUFHeader(NamedTuple):
    fields: dict[str, Any]  # scalars and strings; None for arrays
    tensors: dict[str, GGUFTensor]
    files: list[Path]  # all parts, in order

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def read_headers(file: Path) -> GGUFHeader:
    """Return the header of a model; `file` may be any of its parts.

    Raises CheckpointError for a part that is missing, damaged or of another model."""
    header = read_header(file)
    count = header.fields.get("split.count", 1)
    if count in (0, 1):
        return header
    if type(count) is not int or count > _MAX_PARTS:
        fail_checkpoint(f"{file}: split.count", f"at most {_MAX_PARTS} parts", repr(count))
    match = _PART.fullmatch(file.name)
    if match is None or int(match[4]) != count:
        expected = (
            f"a name that ends with -00001-of-{count:05}.gguf, since it is one of {count} parts"
        )
        hint = "give the parts their names, or join them with llama-gguf-split --merge"
        fail_checkpoint(file, expected, file.name, hint)
    parts = []
    for number in range(1, count + 1):
        part = file.with_name(f"{match[1]}{number:05}{match[3]}")
        if not part.is_file():
            expected = f"this part, because {file.name} is one of {count}"
            fail_checkpoint(part, expected, "no such file", "download it")
        if part != file:
            check_inside(file.parent, part)
        parts.append(header if part == file else read_header(part))
        place = tuple(parts[-1].fields.get(f"split.{key}") for key in ("no", "count"))
        if place != (number - 1, count):
            expected = f"split.no {number - 1} and split.count {count}, as its name says"
            fail_checkpoint(part, expected, f"{place[0]!r} and {place[1]!r}")
    tensors: dict[str, GGUFTensor] = {}
    for part_header in parts:
        for name, tensor in part_header.tensors.items():
            if name in tensors:
                expected, got = "a tensor of one part", f"one of {tensors[name].file.name} too"
                fail_checkpoint(f"{tensor.file}: tensor {name!r}", expected, got)
            tensors[name] = tensor
    total = parts[0].fields.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        expected = f"{total!r} tensors in all parts (split.tensors.count)"
        fail_checkpoint(parts[0].files[0], expected, len(tensors), "download all parts again")
    return GGUFHeader(parts[0].fields, tensors, [each.files[0] for each in parts])


def read_header(file: Path) -> GGUFHeader:
    """Return the header of one file."""
    check_not_pickle(file)
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
        entries = [_tensor(walk, file) for _ in range(count)]
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
    return GGUFHeader(fields, tensors, [file])


def _tensor(walk: _Walk, file: Path) -> tuple[str, GGUFTensor]:
    name = walk.string()
    at, n = f"tensor {name!r}", walk.number("I")
    if not 1 <= n <= 4:
        fail(at, "1 to 4 dimensions", n)
    shape = tuple(reversed([walk.number("Q") for _ in range(n)]))
    number, offset = walk.number("I"), walk.number("Q")
    if number not in TYPES:
        if number not in OTHERS:
            fail(at, "a type of ggml", number)
        fail_checkpoint(
            f"{file}: {at}",
            f"one of the types {', '.join(kind.name for kind in TYPES.values())}",
            OTHERS[number],
            f"convert the file: llama-quantize --allow-requantize {file.name} out.gguf Q8_0",
        )
    kind = TYPES[number]
    if 0 in shape or shape[-1] % kind.values:
        fail(at, f"rows of whole blocks of {kind.values}", list(shape))
    size = math.prod(shape) // kind.values * kind.bytes
    return name, GGUFTensor(file, kind, shape, offset, size)


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
