"""Reads teacher answers that DistillKit wrote to Parquet.

There are two kinds of rows, both with `input_ids` and lists with one entry per position:

    token_ids, top_values                      the plain top k
    bytepacked_indices, compressed_logprobs    bytes, described by compression_config.yaml

A compressed position holds, in this order: the first exact_k values; the coefficients of a curve
through the others, t = 0, 1, …; and bins of residuals to that curve, each a scale and integers of
element_bits bits. With delta_encoding each value is the difference to the logprob before it. Ids
have ⌈log₂ d⌉ bits. Bits are packed most significant first.

The entry of position t is the answer after input_ids[t]; the last token may have none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...losses.types import TopK
from ...runtime import checks
from ...runtime.optional import require
from ...runtime.printable import printable
from ...runtime.yaml_text import parse_yaml
from .build import PendingRow
from .manifest import MAX_K, MAX_VOCAB, CacheError, Settings, check_links

CONFIG = "compression_config.yaml"
_RAW, _COMPRESSED = ("token_ids", "top_values"), ("bytepacked_indices", "compressed_logprobs")
_FLOATS: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")
}
_CURVES = {"sqrt": np.sqrt, "exp": np.exp}
_MAX_CONFIG_BYTES = 1 << 16  # bytes of the settings
_MAX_TERMS, _MAX_BITS = 64, 32
_LIMIT = 1.5  # largest probability mass that lossy compression may yield
Bytes = NDArray[np.uint8]


class ResidualBin(NamedTuple):
    """Residuals of `num_elements` values: a scale, and an integer for each."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @classmethod
    def read(cls, name: str, entry: Any, k: int) -> ResidualBin:
        _check(name, entry, "an object", isinstance(entry, dict))
        a_bin = cls(*(entry.get(field) for field in cls._fields))
        _check_float(f"{name}.scale_dtype", a_bin.scale_dtype)
        _check_count(f"{name}.element_bits", a_bin.element_bits, 1, _MAX_BITS)
        _check_count(f"{name}.num_elements", a_bin.num_elements, 1, k)
        return a_bin


@dataclass(frozen=True, kw_only=True)
class Compression:
    """compression_config.yaml."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False  # used by the writer only
    normalize_t: bool = False

    @classmethod
    def read(cls, file: Path) -> Compression:
        """Read and check the file: it determines the memory per position."""
        try:
            entries = _yaml(file)
            for name in ("polynomial_terms", "residual_bins"):
                value = entries.get(name) or []
                _check(name, value, "a list", isinstance(value, list))
                entries[name] = tuple(value)
            return cls(**entries).checked()
        except (TypeError, ValueError) as error:
            reason = printable(error)
            raise CacheError(f"{file}: expected DistillKit's settings, got {reason}") from None

    def checked(self) -> Compression:
        """Return these settings with the entries of `residual_bins` as records."""
        _check_count("d", self.d, 2, MAX_VOCAB)
        _check_count("k", self.k, 1, min(self.d, MAX_K))
        _check_count("exact_k", self.exact_k, 0, self.k)
        for name in ("exact_dtype", "term_dtype"):
            _check_float(name, getattr(self, name))
        for name in ("delta_encoding", "error_diffusion", "normalize_t"):
            value = getattr(self, name)
            _check(name, value, "true or false", isinstance(value, bool))
        for term in self.polynomial_terms:
            if not (isinstance(term, str) and term in _CURVES):
                _check_count("polynomial_terms", term, 0, _MAX_TERMS)
        if len(self.polynomial_terms) > _MAX_TERMS:
            raise ValueError(f"polynomial_terms: expected at most {_MAX_TERMS}, got more")
        bins = enumerate(self.residual_bins)
        return replace(
            self,
            residual_bins=tuple(
                ResidualBin.read(f"residual_bins[{i}]", b, self.k) for i, b in bins
            ),
        )

    def ids(self, packed: Bytes) -> NDArray[np.int64]:  # [n, bytes] -> [n, k]
        bits = math.ceil(np.log2(np.float32(self.d)))
        return _integers(packed, bits, self.k)

    def logprobs(self, packed: Bytes) -> NDArray[np.float64]:  # [n, bytes] -> [n, k]
        rest = _ByteReader(packed)
        exact = rest.floats(self.exact_dtype, self.exact_k)
        size = self.k - self.exact_k
        others = np.zeros((len(packed), size))
        if self.polynomial_terms:
            others += rest.floats(self.term_dtype, len(self.polynomial_terms)) @ self._curves(size)
        start = 0
        for scale_dtype, bits, count in self.residual_bins:
            scale = rest.floats(scale_dtype, 1)
            steps = rest.integers(bits, count).astype(np.float64)
            if start + count > size:
                raise CacheError(
                    f"residual_bins in {CONFIG}: expected {size} elements at most (k - exact_k), "
                    f"got {start + count} and more"
                )
            # One bit is a sign; several are a two's complement shifted to start at 0.
            steps = 2 * steps - 1 if bits == 1 else steps - 2 ** (bits - 1)
            others[:, start : start + count] += steps * scale
            start += count
        values = np.concatenate([exact, others], -1)
        return values.cumsum(-1) if self.delta_encoding else values

    def _curves(self, size: int) -> NDArray[np.float64]:  # [terms, size]
        t = np.linspace(0, 1, size) if self.normalize_t else np.arange(size, dtype=np.float64)
        terms = self.polynomial_terms
        return np.stack([_CURVES[p](t) if isinstance(p, str) else t**p for p in terms])


def _yaml(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        text = stream.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise ValueError(f"more than {_MAX_CONFIG_BYTES:,} bytes")
    entries = parse_yaml(text.decode("utf-8"), file.name)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{type(entries).__name__} in place of names and values")
    return dict(entries)


def _check(name: str, value: Any, expected: str, is_valid: bool) -> None:
    if not is_valid:
        # Do not print the value: a YAML alias bomb is small until it is printed.
        got = repr(value) if isinstance(value, (int, float)) else type(value).__name__
        checks.fail(name, expected, got)


def _check_count(name: str, value: Any, low: int, high: int) -> None:
    _check(name, value, f"{low} to {high}", type(value) is int and low <= value <= high)


def _check_float(name: str, value: Any) -> None:
    _check(name, value, f"one of {', '.join(_FLOATS)}", isinstance(value, str) and value in _FLOATS)


class _ByteReader:
    """Reads numbers from the packed bytes of n positions, front to back."""

    def __init__(self, packed: Bytes) -> None:
        self._rest = packed

    def _take(self, count: int) -> Bytes:
        if self._rest.shape[1] < count:
            raise CacheError(
                f"compressed_logprobs: expected more bytes per position by {CONFIG} than there are"
            )
        taken, self._rest = self._rest[:, :count], self._rest[:, count:]
        return taken.copy()

    def floats(self, kind: str, count: int) -> NDArray[np.float64]:
        dtype = _FLOATS[kind]
        taken = torch.from_numpy(self._take(count * dtype.itemsize))
        return taken.view(dtype).double().numpy().reshape(len(taken), count)

    def integers(self, bits: int, count: int) -> NDArray[np.int64]:
        return _integers(self._take(-(-bits * count // 8)), bits, count)


def _integers(packed: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    if packed.shape[1] != -(-bits * count // 8):
        raise CacheError(
            f"bytepacked_indices: expected {-(-bits * count // 8)} bytes per position by {CONFIG} "
            f"({count} values of {bits} bits), got {packed.shape[1]}"
        )
    each = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return each.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of pyarrow, and of columns of another type, into a CacheError."""
    try:
        yield
    except (CacheError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have none
            raise
        expected = "a whole Parquet file with lists of numbers"
        raise CacheError(f"{file}: expected {expected}, got {printable(error)}") from None


class ParquetRows:
    """The rows of Parquet files, as a dataset with input_ids and as the source of answers."""

    answers_all = False  # a row's last token may have none

    def __init__(self, files: list[Path]) -> None:
        self._pq = require("pyarrow.parquet", "from_parquet", "'fastdistill[parquet]'")
        self.compression = None
        if (config := files[0].parent / CONFIG).is_file():
            self.compression = Compression.read(config)
        self._groups: list[tuple[Path, int]] = []
        self._starts = [0]
        for file in files:
            with _reading(file):
                metadata = self._pq.ParquetFile(file).metadata
                names = set(metadata.schema.to_arrow_schema().names)
            self.columns = self._columns_of(file, names)
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._open: tuple[int, Any] | None = None
        if not len(self):
            checks.fail("parquet", "at least one row", f"none in {files[0].parent}")
        self.k = self.answer(0).ids.shape[1]
        self.vocab_size = None if self.compression is None else self.compression.d
        self.identity = {"kind": "DistillKit", "name": str(files[0].parent)}

    def _columns_of(self, file: Path, names: set[str]) -> tuple[str, str]:
        for columns in (_RAW, _COMPRESSED):
            if {"input_ids", *columns} <= names:
                if columns == _COMPRESSED and self.compression is None:
                    raise CacheError(f"{file}: expected {CONFIG} in its folder, got none")
                return columns
        raise CacheError(
            f"{file}: expected the columns input_ids and either {' and '.join(_RAW)} or "
            f"{' and '.join(_COMPRESSED)}, got {', '.join(sorted(names))}"
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._row(index)["input_ids"].astype(np.int64)}

    def _row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._open is None or self._open[0] != group:
            file, number = self._groups[group]
            columns = ["input_ids", *self.columns]
            with _reading(file):
                table = self._pq.ParquetFile(file).read_row_group(number, columns=columns)
            self._open = (group, table)
        row = self._open[1].slice(index - self._starts[group], 1)
        kinds = {"top_values": "iuf"}
        with _reading(self._groups[group][0]):
            return {
                name: _array(row.column(name), f"row {index}: {name}", kinds.get(name, "iu"))
                for name in ("input_ids", *self.columns)
            }

    def answer(self, index: int) -> TopK:
        """[P, k] of a row's first P tokens."""
        row = self._row(index)
        first, second = (row[name] for name in self.columns)
        if self.compression is not None and self.columns == _COMPRESSED:
            ids = self.compression.ids(first)
            logprobs = self.compression.logprobs(second)
        else:
            ids, logprobs = first.astype(np.int64), second.astype(np.float64)
        if ids.ndim != 2 or ids.shape != logprobs.shape:
            raise CacheError(
                f"row {index}: expected ids and logprobs of one shape [tokens, k], got "
                f"{list(ids.shape)} and {list(logprobs.shape)}"
            )
        ids = np.where(np.isneginf(logprobs), -1, ids)
        # Lossy differences and curves may sum to slightly more than 1.
        mass = np.exp(logprobs).sum(-1, keepdims=True)
        if len(mass) and not mass.max() < _LIMIT:
            raise CacheError(
                f"row {index}: expected log-probabilities, got a mass of {mass.max():.4g} at one "
                f"position. Do {CONFIG} and the files belong together?"
            )
        logprobs = logprobs - np.log(np.maximum(mass, 1.0))
        return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs))

    def answers(
        self, rows: list[PendingRow], settings: Settings, shard: int
    ) -> Iterator[tuple[list[int], list[TopK]]]:
        for at, row in enumerate(rows):
            answer = self.answer(row.index)
            count, tokens = len(answer.ids), len(row.tokens)
            if count not in (tokens, tokens - 1):
                raise CacheError(
                    f"row {row.index}: expected {tokens - 1} or {tokens} answers to its {tokens} "
                    f"tokens, got {count}"
                )
            shape, temperature = (tokens, answer.ids.shape[1]), settings.temperatures[0]
            padded = TopK.empty(shape, temperature, dtype=torch.float64)
            padded.put(torch.arange(count), answer._replace(log_tail=answer.tail().float()))
            yield [at], [padded]


def _array(column: Any, name: str, kinds: str) -> NDArray[Any]:
    """Return one row of a column: a list, or a list of lists of equal length."""
    values = column.combine_chunks().flatten()
    lists = hasattr(values, "flatten") and values.type.num_fields > 0
    inner = values.flatten() if lists else values
    if column.null_count or values.null_count or inner.null_count:
        raise CacheError(f"{name}: expected numbers, got a null")
    array = np.asarray(inner.to_numpy(zero_copy_only=False))
    if array.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "whole numbers"
        raise CacheError(f"{name}: expected {expected}, got {printable(inner.type)}")
    if not lists:
        return array
    lengths = np.diff(values.offsets.to_numpy() if hasattr(values, "offsets") else np.zeros(0))
    if len(lengths) and (lengths != lengths[0]).any():
        raise CacheError(
            f"{name}: expected lists of one length, got {lengths.min()} and {lengths.max()}"
        )
    return array.reshape(len(values), -1)


def files_of(path: str | Path) -> list[Path]:
    """Return one Parquet file, or those of a folder in numeric order."""
    path = Path(path)
    if path.is_file():
        return [path]
    check_links(path)
    numbered = sorted(path.glob("*.parquet"), key=lambda p: (len(p.name), p.name))
    if not numbered:
        checks.fail("parquet", "a Parquet file, or a folder with some", repr(str(path)))
    return numbered
