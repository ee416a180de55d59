"""Reads tensors by name from one .safetensors file or a folder of them.

safetensors files are a JSON header and raw bytes. A pickle (pytorch_model.bin, *.pt) can run code
and raises an error, whatever its file name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...runtime import checks, json_text
from ...runtime.printable import printable, printable_lines
from ..schemes import QuantWeight, short


@dataclass(frozen=True)
class Expanded:
    """A quantized weight that neither LUT4 nor INT8 represents exactly, as its values."""

    values: Tensor  # fp32, in the weight's own shape
    kind: str  # what it was, for the loader's message


Thunk = Callable[[], Tensor | QuantWeight | Expanded]  # reads one weight when called

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "index and shards are of different versions: download both again"
LARGEST = 1 << 40  # of sizes that are stored as numbers
# Errors that damaged bytes may raise: RuntimeError from torch, TypeError from unexpected JSON.
# A MemoryError passes through, since the checks here bound allocations.
_DAMAGE = (
    *(SafetensorError, OSError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, RecursionError, RuntimeError, AssertionError),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message is made printable.

    It names the file, the tensor, what was expected, what was found, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


def fail_checkpoint(place: object, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raise CheckpointError "place: expected …, got …; hint"."""
    hint = f"; {hint}" if hint else ""
    raise CheckpointError(f"{place}: expected {expected}, got {got}{hint}")


def fail_entry(file: Path, name: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raise CheckpointError that names an entry of a configuration."""
    fail_checkpoint(f"{file}: {printable(name)}", expected, printable(repr(got)), hint)


@contextlib.contextmanager
def reading(file: Path, tensor: str | None = None, advice: str = "") -> Iterator[None]:
    """Turn errors within this context into a CheckpointError that names the file and tensor."""
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        at = f"{file}: tensor {tensor!r}: " if tensor else f"{file}: "
        reason = printable(error, 1000) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"expected an entry {error}, got none"
        raise CheckpointError(f"{at}{reason}{'. ' + advice if advice else ''}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise CheckpointError if that fails."""
    if file.is_symlink():
        check_inside(file.parent, file)
    try:
        value = json_text.read_json(file)
    except (json_text.JSONError, OSError) as error:
        raise CheckpointError(
            f"{error}. Expected a JSON object in {file}: download the file again"
        ) from None
    if not isinstance(value, dict):
        fail_checkpoint(file, "a JSON object", type(value).__name__, "download the file again")
    return value


def check_inside(folder: Path, file: Path) -> None:
    """Raise CheckpointError for a file of a checkpoint that is a link out of its folder.

    Only the cache of the Hugging Face hub has links: the files of `snapshots/<revision>` link to
    `blobs`, next to `snapshots`.
    """
    with reading(file):
        target, home = file.resolve(strict=True), folder.resolve(strict=True)
        is_plain = target.is_file()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not is_plain or not any(target.is_relative_to(home) for home in homes):
        got = f"a link to {printable(target)}"
        hint = "files outside the folder are not read: put the file itself into the folder"
        fail_checkpoint(file, "a file of this folder", got, hint)


def integer(
    values: dict[str, Any], key: str, least: int | None = None, most: int | None = None
) -> int:
    """Return values[key], an integer in [least, most]. Call it inside `reading`."""
    value: int = values[key]
    checks.integer(key, value, least, most)
    return value


def shape_of(values: dict[str, Any]) -> tuple[int, int]:
    """Return values["shape"] of a non-empty matrix. Call it inside `reading`."""
    shape = values["shape"]
    is_pair = isinstance(shape, list) and len(shape) == 2
    if not is_pair or not all(type(n) is int and 0 < n < LARGEST for n in shape):
        checks.fail("shape", "two positive integers [N, K]", repr(shape))
    return shape[0], shape[1]


def block_of(values: dict[str, Any], key: str) -> int:
    """Return values[key], the size of a block. Call it inside `reading`."""
    return integer(values, key, 1, LARGEST)


def check_not_pickle(file: Path) -> None:
    """Raise CheckpointError if an existing file is a pickle by its name or first bytes."""
    with reading(file), file.open("rb") as stream:
        head = stream.read(9)
    is_zip, is_bare = head[:4] == b"PK\x03\x04", head[:1] == b"\x80" and head[1:2] <= b"\x05"
    # The same bytes may be the length of a safetensors header, which is followed by "{".
    pickled = (is_zip or is_bare) and head[8:9] != b"{"
    if pickled or file.suffix.lower() in PICKLE_SUFFIXES:
        fail_checkpoint(
            file,
            "a .safetensors or .gguf file",
            "a pickle, which runs code when it is loaded and is never opened here",
            "convert it where you trust it: load the model with transformers and call "
            "save_pretrained(folder), which writes safetensors",
        )


class TensorFiles:
    """The tensors of one .safetensors file, or of a folder with model.safetensors or an index.

    Headers are read at once, which finds damage early; a tensor's bytes only by `read`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        if self.path.is_file():
            self._add(self.path)
        elif not self.path.is_dir():
            expected = f"a .safetensors file or a folder with {SINGLE} or {INDEX}"
            fail_checkpoint(self.path, expected, "nothing at this path")
        elif (file := self.path / SINGLE).is_file():  # preferred to an index, as in transformers
            check_inside(self.path, file)
            self._add(file)
        elif (file := self.path / INDEX).is_file():
            check_inside(self.path, file)
            self._read_index(file)
        else:
            for file in sorted(self.path.glob("*")):
                if file.suffix.lower() in PICKLE_SUFFIXES:
                    check_not_pickle(file)
            fail_checkpoint(self.path, f"{SINGLE} or {INDEX} in this folder", "neither")

    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def config_file(self) -> Path:
        """The path of config.json, which may not exist."""
        return (self.path if self.path.is_dir() else self.path.parent) / "config.json"

    def file_of(self, name: str) -> Path:
        if name not in self._file_of:
            expected, hint = f"the tensor {name!r}", "it is incomplete: download or save it again"
            fail_checkpoint(self.path, expected, "none of that name", hint)
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU. It may be memory-mapped: do not write to it."""
        file = self.file_of(name)
        with reading(file, name):
            tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def matrix(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """Return a tensor after checking its dtype and shape; None allows any length."""
        tensor = self.read(name)
        fits = tensor.dim() == len(shape) and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            expected = f"{['any' if n is None else n for n in shape]} of {short(dtype)}"
            self.fail(name, expected, f"{list(tensor.shape)} of {short(tensor.dtype)}")
        return tensor

    def fail(self, name: str, expected: str, got: object, hint: str = "") -> NoReturn:
        """Raise CheckpointError that names a tensor and its file."""
        fail_checkpoint(f"{self.file_of(name)}: tensor {name!r}", expected, got, hint)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header of its file."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype, from the header of its file: F32, BF16, I32, BOOL, …"""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        file = self.file_of(name)
        with reading(file, name):
            return self._open[file].get_slice(name)

    @property
    def bytes(self) -> int:
        """The total size of the files with tensors."""
        return sum(file.stat().st_size for file in self._open)

    def metadata(self) -> dict[Path, dict[str, str]]:
        """Return the metadata of each file's header."""
        headers = {}
        for file, handle in self._open.items():
            with reading(file):
                headers[file] = dict(handle.metadata() or {})
        return headers

    def _read_index(self, index: Path) -> None:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            got = type(shards).__name__
            fail_checkpoint(index, "a 'weight_map' of tensor names to files", got)
        names_of: dict[str, set[str]] = {}
        for name, shard in shards.items():
            # A path could refer to any file on this machine.
            if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
                expected = "the name of a file in the same folder"
                fail_checkpoint(f"{index}: tensor {name!r}", expected, repr(shard))
            file = index.parent / shard
            if shard not in names_of:
                with reading(index, name):  # a name may be too long for the system
                    exists = file.is_file()
                if not exists:
                    expected = f"this shard, because {index.name} names it for tensor {name!r}"
                    fail_checkpoint(file, expected, "no such file", "download it")
                check_inside(index.parent, file)
                names_of[shard] = self._header(file)
            if name not in names_of[shard]:
                expected = f"the tensor {name!r}, because {index.name} says so"
                fail_checkpoint(file, expected, "a file without it", _AGAIN)
            self._file_of[name] = file
        self._check_whole_index(index, names_of)

    def _check_whole_index(self, index: Path, names_of: dict[str, set[str]]) -> None:
        """Raise CheckpointError for a tensor that the index omits or maps to another shard."""
        for shard, names in names_of.items():
            for name in sorted(names):
                if name not in self._file_of:
                    reason = f"an index without {name!r}"
                elif self._file_of[name].name != shard:
                    reason = f"{name!r} in {self._file_of[name].name} too"
                else:
                    continue
                expected = f"each tensor of {shard} in the index and in no other shard"
                fail_checkpoint(index, expected, reason, _AGAIN)

    def _add(self, file: Path) -> None:
        self._file_of |= dict.fromkeys(sorted(self._header(file)), file)

    def _header(self, file: Path) -> set[str]:
        check_not_pickle(file)
        with reading(file, advice="Not a whole .safetensors file: download it again"):
            handle = self._open[file] = safe_open(file, framework="pt", device="cpu")
            return set(handle.keys())  # type: ignore[no-untyped-call]


def with_plain(
    files: TensorFiles, quantized: dict[str, Thunk], parts: Iterable[str]
) -> dict[str, Thunk]:
    """Return `quantized` plus thunks of all other tensors of `files`, except their `parts`."""
    skipped = {*quantized, *parts}
    plain = [name for name in files.names() if name not in skipped]
    return {**{name: functools.partial(files.read, name) for name in plain}, **quantized}
