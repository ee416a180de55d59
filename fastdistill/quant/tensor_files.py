"""Reads tensors by name from one .safetensors file or a folder of them.

safetensors files are a JSON header and raw bytes. A pickle (pytorch_model.bin, *.pt) can run code
and raises an error, whatever its file name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime import json_text
from ..runtime.printable import printable, printable_lines
from .formats import QuantWeight

Thunk = Callable[[], Tensor | QuantWeight]  # reads one weight when called

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
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
    """Return the object in a JSON file; raise CheckpointError if that fails."""
    try:
        value = json_text.read_json(file)
    except (json_text.JSONError, OSError) as error:
        raise CheckpointError(
            f"{error}. Expected a JSON object in {file}: download the file again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, got {type(value).__name__}: download the file again"
        )
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
        raise CheckpointError(
            f"{file}: expected a file of this folder, got a link to {printable(target)}. Files "
            "outside the folder are not read: put the file itself into the folder"
        )


def integer(values: dict[str, Any], key: str) -> int:
    """Return values[key], an integer. Call it inside `reading`."""
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key}: expected an integer, got {value!r}")
    return value


def shape_of(values: dict[str, Any]) -> tuple[int, int]:
    """Return values["shape"] of a non-empty matrix. Call it inside `reading`."""
    shape = values["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    ):
        raise ValueError(f"shape: expected two positive integers [N, K], got {shape!r}")
    return shape[0], shape[1]


def block_of(values: dict[str, Any], key: str) -> int:
    """Return values[key], a positive integer. Call it inside `reading`."""
    block = integer(values, key)
    if not 0 < block < 1 << 40:
        raise ValueError(f"{key}: expected a positive block size, got {block}")
    return block


def check_not_pickle(file: Path) -> None:
    """Raise CheckpointError if an existing file is a pickle by its name or first bytes."""
    with reading(file), file.open("rb") as stream:
        head = stream.read(9)
    is_zip, is_bare = head[:4] == b"PK\x03\x04", head[:1] == b"\x80" and head[1:2] <= b"\x05"
    # The same bytes may be the length of a safetensors header, which is followed by "{".
    pickled = (is_zip or is_bare) and head[8:9] != b"{"
    if pickled or file.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{file}: expected a .safetensors or .gguf file, got a pickle, which runs code when it "
            "is loaded and is never opened here. Convert it where you trust it: load the model "
            "with transformers and call save_pretrained(folder), which writes safetensors"
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
            raise CheckpointError(
                f"{self.path}: expected a .safetensors file or a folder with {_SINGLE} or "
                f"{_INDEX}, got nothing at this path"
            )
        elif (self.path / _SINGLE).is_file():  # preferred to an index, as in transformers
            check_inside(self.path, self.path / _SINGLE)
            self._add(self.path / _SINGLE)
        elif (self.path / _INDEX).is_file():
            check_inside(self.path, self.path / _INDEX)
            self._read_index(self.path / _INDEX)
        else:
            for file in sorted(self.path.glob("*")):
                if file.suffix.lower() in PICKLE_SUFFIXES:
                    check_not_pickle(file)
            raise CheckpointError(
                f"{self.path}: expected {_SINGLE} or {_INDEX} in this folder, got neither"
            )

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
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: expected in this checkpoint, got none of that "
                "name. It is incomplete: download or save it again"
            )
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU. It may be memory-mapped: do not write to it."""
        file = self.file_of(name)
        with reading(file, name):
            return self._open[file].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header of its file."""
        file = self.file_of(name)
        with reading(file, name):
            return tuple(self._open[file].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype, from the header of its file: F32, BF16, I32, BOOL, …"""
        file = self.file_of(name)
        with reading(file, name):
            return str(self._open[file].get_slice(name).get_dtype())

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
            raise CheckpointError(
                f"{index}: expected a 'weight_map' of tensor names to files, got "
                f"{type(shards).__name__}"
            )
        names_of: dict[str, set[str]] = {}
        for name, shard in shards.items():
            # A path could refer to any file on this machine.
            if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
                raise CheckpointError(
                    f"{index}: tensor {name!r}: expected the name of a file in the same folder, "
                    f"got {shard!r}"
                )
            file = index.parent / shard
            if shard not in names_of:
                with reading(index, name):  # a name may be too long for the system
                    exists = file.is_file()
                if not exists:
                    raise CheckpointError(
                        f"{file}: expected this shard, because {index.name} names it for tensor "
                        f"{name!r}, got no such file. Download it"
                    )
                check_inside(index.parent, file)
                names_of[shard] = self._header(file)
            if name not in names_of[shard]:
                raise CheckpointError(
                    f"{file}: tensor {name!r}: expected in this file, because {index.name} says "
                    "so, got a file without it. Index and shards are of different versions: "
                    "download both again"
                )
            self._file_of[name] = file
        self._check_whole_index(index, names_of)

    def _check_whole_index(self, index: Path, names_of: dict[str, set[str]]) -> None:
        """Raise CheckpointError for a tensor that the index omits or maps to another shard."""
        for shard, names in names_of.items():
            for name in sorted(names):
                if name not in self._file_of:
                    reason = f"an index without {printable(name)!r}"
                elif self._file_of[name].name != shard:
                    reason = f"{printable(name)!r} in {self._file_of[name].name} too"
                else:
                    continue
                raise CheckpointError(
                    f"{index}: expected each tensor of {printable(shard)} in the index and in no "
                    f"other shard, got {reason}. Index and shards are of different versions: "
                    "download both again"
                )

    def _add(self, file: Path) -> None:
        self._file_of |= dict.fromkeys(sorted(self._header(file)), file)

    def _header(self, file: Path) -> set[str]:
        check_not_pickle(file)
        with reading(file, advice="Not a whole .safetensors file: download it again"):
            handle = self._open[file] = safe_open(file, framework="pt", device="cpu")
            return set(handle.keys())


def with_plain(
    files: TensorFiles, quantized: dict[str, Thunk], parts: Iterable[str]
) -> dict[str, Thunk]:
    """Return `quantized` plus thunks of all other tensors of `files`, except their `parts`."""
    skipped = {*quantized, *parts}
    plain = [name for name in files.names() if name not in skipped]
    return {**{name: functools.partial(files.read, name) for name in plain}, **quantized}


def matrix(file: Path, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """Return `tensor` after checking its dtype and shape; None allows any length."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        expected = ["any" if n is None else n for n in shape]
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected {expected} of {_short(dtype)}, got "
            f"{list(tensor.shape)} of {_short(tensor.dtype)}"
        )
    return tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
