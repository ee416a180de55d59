"""Reads bitsandbytes checkpoints of transformers: 4 bits (NF4, FP4) and LLM.int8.

    4 bits   w[i] = quant_map[q[i]] · absmax[i / blocksize]      i over the flattened [N, K]
    nested   absmax[b] = nested_quant_map[absmax[b]] · nested_absmax[b / nested_blocksize]
                         + nested_offset
    8 bits   w[n, k] = q[n, k] · SCB[n] / 127

A layer X with 4 bits is stored (bitsandbytes 0.50, QuantState.as_dict) as

    X.weight                   u8 [N·K/2, 1], element 2j in the high nibble of byte j; or the same
                               bytes under another type (bnb_4bit_quant_storage)
    X.weight.absmax            fp32 [blocks]; nested: u8 codes
    X.weight.quant_map         fp32 [16]
    X.weight.nested_absmax     fp32 [blocks / nested_blocksize]
    X.weight.nested_quant_map  fp32 [256]
    X.weight.quant_state.bitsandbytes__nf4 | __fp4
                               u8, a JSON: quant_type, blocksize, dtype, shape, nested_blocksize,
                               nested_dtype, nested_offset

This is a Lut4Weight already, so nothing is recomputed. The table is the checkpoint's. With 8 bits
X.weight is int8 [N, K], X.SCB holds the fp32 absolute maxima of its rows, and X.weight_format, if
present, is 0: row-major.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.json_text import parse_json
from ..schemes import Int8Weight, Lut4Weight, Nested
from .tensor_files import TensorFiles, Thunk, block_of, reading, shape_of, with_plain
from .without_data import int8, lut4

STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def is_stored(files: TensorFiles) -> bool:
    return any(STATE in name or name.endswith(".SCB") for name in files.names())


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    thunks: dict[str, Thunk] = {}
    parts: set[str] = set()
    for name in files.names():
        if STATE in name:
            weight, _, kind = name.partition(STATE)
            if kind not in TYPES:
                files.fail(name, f"one of the 4-bit types {TYPES}", repr(kind))
            thunks[weight] = functools.partial(_four_bits, files, weight, name, kind)
            parts |= {name, *(weight + part for part in _PARTS)}
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            thunks[weight] = functools.partial(_eight_bits, files, weight, name)
            parts |= {name, weight + "_format"}
    return with_plain(files, thunks, parts)


def _four_bits(files: TensorFiles, weight: str, state_name: str, kind: str) -> Lut4Weight:
    file, packed = files.file_of(weight), files.read(weight)
    state_bytes = files.read(state_name)
    with reading(files.file_of(state_name), state_name):
        state = parse_json(_bytes_of(state_bytes).numpy().tobytes(), "quant_state", dict)
        shape, block = shape_of(state), block_of(state, "blocksize")
        if state["quant_type"] != kind:
            fail("quant_type", repr(kind), repr(state["quant_type"]))
    absmax, lut = files.read(weight + ".absmax"), files.read(weight + ".quant_map")
    with reading(file, weight):
        scale: Tensor | Nested
        if "nested_blocksize" in state:
            scale = _nested(files, weight, absmax, state)
        else:
            scale = _floats(absmax, "absmax")
        table = _floats(lut, "quant_map")
        return Lut4Weight(shape=shape, block=block, qdata=_bytes_of(packed), scale=scale, lut=table)


def _nested(
    files: TensorFiles, weight: str, codes: Tensor, state: dict[str, Any]
) -> Nested:  # inside `reading`
    offset = state["nested_offset"]
    if not isinstance(offset, float | int):
        raise TypeError(f"nested_offset: expected a number, got {offset!r}")
    return Nested(
        codes=codes.reshape(-1),
        code=_floats(files.read(weight + ".nested_quant_map"), "nested_quant_map"),
        scale=_floats(files.read(weight + ".nested_absmax"), "nested_absmax"),
        offset=torch.tensor(offset, dtype=torch.float32),
        block=block_of(state, "nested_blocksize"),
    )


def _eight_bits(files: TensorFiles, weight: str, scale_name: str) -> Int8Weight:
    q = files.matrix(weight, torch.int8, None, None)
    N, K = q.shape
    if (layout := weight + "_format") in files:
        order = files.read(layout)
        if order.numel() != 1 or order.item() != 0:
            got = f"{order.flatten()[:4].tolist()}: the order of an old bitsandbytes for one GPU"
            hint = "load and save the model with a newer one"
            files.fail(layout, "0, rows one after the other", got, hint)
    top = files.read(scale_name)
    with reading(files.file_of(weight), weight):
        shape = shape_of({"shape": [N, K]})
        scale = _floats(top, "SCB") / 127
        return Int8Weight(shape=shape, block=K, qdata=q, scale=scale)


def _bytes_of(stored: Tensor) -> Tensor:
    """Return the bytes of a tensor, whose dtype has no meaning."""
    return stored.contiguous().reshape(-1).view(torch.uint8)


def _floats(stored: Tensor, what: str) -> Tensor:
    if not stored.is_floating_point():
        raise TypeError(f"{what}: expected floating point, got {stored.dtype}")
    return stored.reshape(-1).float()


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Lut4Weight | Int8Weight:
    """Return a weight on the meta device (without_data.py); its shape is that of the model."""
    if len(shape) != 2:
        files.fail(name, "a matrix of the model", list(shape))
    size = (shape[0], shape[1])
    if f"{name}.absmax" not in files:
        return int8(size, shape[1])
    blocks = math.prod(files.shape(f"{name}.absmax"))
    block = _block(files, f"{name}.absmax", math.prod(shape), usual=64)
    if (nested := f"{name}.nested_absmax") not in files:
        return lut4(size, block)
    return lut4(size, block, nested_block=_block(files, nested, blocks, usual=256))


def _block(files: TensorFiles, name: str, count: int, *, usual: int) -> int:
    """Return the block size, a power of two, with which `name` has one number for each block.

    Several sizes may fit a small weight; then it is the usual one.
    """
    blocks = math.prod(files.shape(name))
    for block in (usual, *(1 << i for i in range(4, 17))):
        if -(-count // block) == blocks:
            return block
    files.fail(name, f"one number for each block of {count:,} values", f"{blocks:,} numbers")
