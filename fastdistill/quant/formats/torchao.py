"""Reads torchao's tensors from safetensors: integers of 8 bits or fewer, and FP8.

    w[n, k] = (q[n, k] − zero[n / rows, k / columns]) · scale[n / rows, k / columns]

A weight X.weight is stored as

    X._weight_qdata       int8 or F8_E4M3 [N, K]
    X._weight_scale       [N / rows, K / columns]
    X._weight_zero_point  int8, as the scales; optional
    metadata of the file  "X.weight": a JSON with _type, and in _data the block_size [rows, columns]

Int8Tensor and IntxUnpackedToInt8Tensor become Int8Weight, or Lut4Weight if every q − zero is in
−8 … 7; differences that need nine bits are expanded, and so is Float8Tensor. Other types are packed
for one kind of GPU, and are refused.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import torch

from ...runtime.checks import fail
from ...runtime.json_text import parse_json
from ..schemes import Int8Weight, QuantWeight
from .compressed_tensors import four_bits
from .fp8 import expanded, plain_floats, scale_of, tile_of
from .tensor_files import Expanded, TensorFiles, Thunk, reading
from .without_data import check_divides, in_full, int8, lut4

_PREFIX, _CODES = "._weight_", "._weight_qdata"
_PARTS = ("qdata", "scale", "zero_point")
_OF_ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point")
_INTEGERS, _FLOATS = ("Int8Tensor", "IntxUnpackedToInt8Tensor"), ("Float8Tensor",)
_ASYMMETRIC = re.compile(r'"(weight_)?mapping_type": ({[^{}]*)?"ASYMMETRIC"')
_HINT = (
    "load it with transformers where torchao is installed, replace each quantized weight by "
    "weight.dequantize(), and call save_pretrained"
)


def is_stored(files: TensorFiles) -> bool:
    return any(name.endswith(_CODES) for name in files.names())


def notes(config: dict[str, Any]) -> list[str]:
    quantizes = "Activation" in json.dumps(config["quantization_config"].get("quant_type"))
    return ["activations are not quantized here: only the weights are"] if quantizes else []


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    metadata = files.metadata()
    thunks: dict[str, Thunk] = {}
    for name in files.names():
        if not name.endswith(_CODES):
            continue
        layer, file = name.removesuffix(_CODES), files.file_of(name)
        with reading(file, f"metadata of {layer}.weight"):
            entry = parse_json(metadata[file][f"{layer}.weight"], layer, dict)
            if entry["_type"] not in (*_INTEGERS, *_FLOATS):
                expected = f"one of {(*_INTEGERS, *_FLOATS)}"
                fail("_type", expected, repr(entry["_type"]), _HINT)
            tile = tile_of(entry["_data"], "block_size")
            if tile is None:
                fail("block_size", "two positive integers [rows, columns]", "none")
        if (smoothed := f"{layer}{_PREFIX}act_pre_scale") in files:
            files.fail(smoothed, "weights alone", "a scale of the layer's input", _HINT)
        read = _integers if entry["_type"] in _INTEGERS else _floats
        thunks[f"{layer}.weight"] = functools.partial(read, files, layer, tile)
    layers = [name.removesuffix(".weight") for name in thunks]
    parts = (*_PARTS, *_OF_ACTIVATIONS)
    return plain_floats(files, thunks, [f"{x}{_PREFIX}{part}" for x in layers for part in parts])


def _floats(files: TensorFiles, layer: str, tile: tuple[int, int]) -> Expanded:
    name = layer + _CODES
    codes = files.matrix(name, torch.float8_e4m3fn, None, None)
    scale = scale_of(files, f"{layer}{_PREFIX}scale")
    return Expanded(expanded(files, name, codes, scale, tile).values, "torchao's Float8Tensor")


def _integers(files: TensorFiles, layer: str, tile: tuple[int, int]) -> QuantWeight | Expanded:
    name = layer + _CODES
    q = files.matrix(name, torch.int8, None, None)
    (N, K), (rows, columns) = q.shape, tile
    if not q.numel() or N % rows or K % columns:
        files.fail(name, f"whole blocks of {rows} × {columns}", [N, K])
    scale = scale_of(files, f"{layer}{_PREFIX}scale")
    shape = (N // rows, K // columns)
    if tuple(scale.shape) != shape:
        files.fail(f"{layer}{_PREFIX}scale", str(list(shape)), list(scale.shape))
    scale = scale.repeat_interleave(rows, 0)
    steps = q.short()
    if (zero := f"{layer}{_PREFIX}zero_point") in files:
        points = files.matrix(zero, torch.int8, *shape).short()
        steps = steps - points.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    least, most = int(steps.min()), int(steps.max())
    if least >= -8 and most <= 7 and columns % 2 == 0:
        return four_bits(files, name, steps, scale, None, columns, None)
    if least < -128 or most > 127:
        values = steps.float().mul_(scale.repeat_interleave(columns, 1))
        return Expanded(values, "torchao's integers with zero points")
    with reading(files.file_of(name), name):
        qdata = steps.to(torch.int8)
        return Int8Weight(shape=(N, K), block=columns, qdata=qdata, scale=scale.reshape(-1))


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> QuantWeight | Expanded:
    """Return a weight on the meta device (without_data.py)."""
    layer, settings = name.removesuffix(".weight"), json.dumps(config["quantization_config"])
    N, K = files.shape(layer + _CODES)
    if files.dtype(layer + _CODES) != "I8":
        return in_full(N, K)
    scale = f"{layer}{_PREFIX}scale"
    block = check_divides(files, scale, files.shape(scale)[-1], K)
    has_zeros = f"{layer}{_PREFIX}zero_point" in files and _ASYMMETRIC.search(settings) is not None
    if '"int4"' in settings and not has_zeros and block % 2 == 0:
        return lut4((N, K), block)
    return in_full(N, K) if has_zeros and '"int4"' not in settings else int8((N, K), block)
