"""Reads gpt-oss: experts in MXFP4 (microscaling.py), everything else in bf16.

    X_blocks   uint8 [E, N, K/32, 16]   two columns per byte, the first in its low nibble
    X_scales   uint8 [E, N, K/32]       exponents of two

become X, a Lut4Weight [E · N, K], for the parameter that transformers stores transposed, [E, K, N].
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..schemes import Lut4Weight
from .microscaling import microscaled, powers_of_two
from .tensor_files import TensorFiles, Thunk, reading, with_plain
from .without_data import lut4

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32


def is_stored(files: TensorFiles) -> bool:
    return any(name + _SCALES in files for name in _weights(files))


def _weights(files: TensorFiles) -> list[str]:
    return [name.removesuffix(_BLOCKS) for name in files.names() if name.endswith(_BLOCKS)]


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    names = _weights(files)
    for name in names:
        files.file_of(name + _SCALES)
    thunks: dict[str, Thunk] = {name: functools.partial(_read, files, name) for name in names}
    return with_plain(files, thunks, [n + part for n in names for part in (_BLOCKS, _SCALES)])


def _read(files: TensorFiles, name: str) -> Lut4Weight:
    scales = files.matrix(name + _SCALES, torch.uint8, None, None, None)
    blocks = files.matrix(name + _BLOCKS, torch.uint8, *scales.shape, _BLOCK // 2)
    if not scales.numel():
        files.fail(name + _SCALES, "[E, N, K/32] without a 0", list(scales.shape))
    rows = scales.shape[0] * scales.shape[1]
    with reading(files.file_of(name + _SCALES), name + _SCALES):
        scale = powers_of_two(scales).view(rows, -1)
        return microscaled(blocks.reshape(rows, -1), scale, _BLOCK)


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Lut4Weight:
    """Return a weight on the meta device (without_data.py)."""
    E, N, groups = files.shape(name + _SCALES)
    return lut4((E * N, groups * _BLOCK), _BLOCK)
