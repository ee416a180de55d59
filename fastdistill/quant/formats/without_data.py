"""Weights on the meta device for a memory plan: headers of files, and weights of given shapes.

The function `without_data` of a format returns the weight that its reader returns, on the meta
device. Some readers choose the form of a weight by its values. There the usual values are assumed:
the zeros of symmetric GPTQ with 8 bits are 128, zero points of 8 bits do not fit INT8, and the
columns of act-order are out of order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from ..schemes import Int8Weight, Lut4Weight, Nested
from .tensor_files import Expanded, TensorFiles

_TABLE = torch.zeros(16)  # with data, since merging compares tables


class Headers(TensorFiles):
    """TensorFiles whose `read` returns a tensor of the same shape and type on the meta device."""

    def read(self, name: str) -> Tensor:
        kind = self.dtype(name)
        if kind not in str_to_torch_dtype:
            self.fail(name, f"one of the types {', '.join(str_to_torch_dtype)}", kind)
        return meta(*self.shape(name), dtype=str_to_torch_dtype[kind])


class RemoteHeaders(Headers):
    """Headers of files that are not on this machine.

    Args:
        folder: where config.json is.
        tensors: name -> (file name, type as in safetensors, shape).
        metadata: file name -> the metadata of its header. size: bytes of all files.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, dict[str, str]],
        size: int,
    ) -> None:
        self.path, self._open, self._size = folder, {}, size
        self._file_of = {name: folder / file for name, (file, _, _) in tensors.items()}
        self._tensors = tensors
        self._metadata = {folder / file: values for file, values in metadata.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        self.file_of(name)
        return tuple(self._tensors[name][2])

    def dtype(self, name: str) -> str:
        self.file_of(name)
        return self._tensors[name][1]

    @property
    def bytes(self) -> int:
        return self._size

    def metadata(self) -> dict[Path, dict[str, str]]:
        return self._metadata


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lut4(
    shape: tuple[int, int],
    block: int,
    *,
    offset: bool = False,
    perm: bool = False,
    nested_block: int = 0,
) -> Lut4Weight:
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    scale: Tensor | Nested = meta(blocks)
    if nested_block:
        codes, inner = meta(blocks, dtype=torch.uint8), meta(-(-blocks // nested_block))
        scale = Nested(codes, meta(256), inner, meta(1), nested_block)
    return Lut4Weight(
        shape=shape,
        block=block,
        qdata=meta(-(-count // 2), dtype=torch.uint8),
        scale=scale,
        lut=_TABLE,
        offset=meta(blocks) if offset else None,
        perm=meta(shape[1], dtype=torch.int64) if perm else None,
    )


def int8(shape: tuple[int, int], block: int) -> Int8Weight:
    N, K = shape
    qdata, scale = meta(N, K, dtype=torch.int8), meta(N * K // block)
    return Int8Weight(shape=shape, block=block, qdata=qdata, scale=scale)


def in_full(*shape: int) -> Expanded:
    return Expanded(meta(*shape), "their type")
