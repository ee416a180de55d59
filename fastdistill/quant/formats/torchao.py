"""Reads torchao's tensors from safetensors: integers of 8 bits or fewer, and FP8.

    w[n, k] = (q[n, k] − zero[n / rows, k / columns]) · scale[n / rows, k / columns]

A weight X.weight is stored as

    X._weight_qdata       int8 or F8_E4M3 [N, K]
    X._weight_scale       [N / rows, K / columns]
    X._weight_zero_point  int8, as the scales; optional
    metadata of the file  "X.weight": a JSON with _type, and in _data the block_size [rows, columns]

Int8Tensor and IntxUnpackedToInt8Tensor become Int8Weight, or Lut4Weight if every q − zero is in
−8 … 7; differences that need nine bits are expanded, and so is Float8Tensor. Two types have packed
4-bit codes, and zeros that are added, in fp32: w = q · scale + zero. They become Lut4Weight.

    Int4Tensor                qdata int8 [N, K/2], the first of two columns in the low nibble
                              scale, zero_point [K/group, N]
    Int4TilePackedTo4dTensor  qdata int32 [N/8, K/(32 J), 32, J], where word [i, j, t, l] has q + 8
                              of row 8 i + t/4 and of the columns
                              32 (J j + l) + 2 (t mod 4) + (0, 8, 16, 24, 1, 9, 17, 25), in nibbles
                              from the lowest; padded rows and columns follow
                              scale_and_zero [K/group, N, 2]

The second is the layout of _convert_weight_to_int4pack on CUDA devices. Other types are refused.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.json_text import parse_json
from ..schemes import Int8Weight, Lut4Weight, QuantWeight, pack_nibbles, table
from .compressed_tensors import four_bits
from .fp8 import expanded, plain_floats, scale_of, tile_of
from .tensor_files import Expanded, TensorFiles, Thunk, reading, shape_of
from .without_data import in_full, int8, lut4

_PREFIX, _CODES = "._weight_", "._weight_qdata"
_PARTS = ("qdata", "scale", "zero_point", "scale_and_zero")
_OF_ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point")
_INTEGERS, _FLOATS = ("Int8Tensor", "IntxUnpackedToInt8Tensor"), ("Float8Tensor",)
_TILED = "Int4TilePackedTo4dTensor"
_TYPES = (*_INTEGERS, *_FLOATS, "Int4Tensor", _TILED)
_ASYMMETRIC = re.compile(r'"(weight_)?mapping_type": ({[^{}]*)?"ASYMMETRIC"')
_EXPAND = (
    "import sys, torch, transformers as t; at, out = sys.argv[1:]; "
    "m = t.AutoModelForCausalLM.from_pretrained(at); "
    "[setattr(x, n, torch.nn.Parameter(p.dequantize())) for x in m.modules() "
    "for n, p in list(x.named_parameters(recurse=False)) if type(p) is not torch.nn.Parameter]; "
    "m.hf_quantizer.remove_quantization_config(m); m._weight_conversions = None; "
    "m.save_pretrained(out); "
    "t.AutoTokenizer.from_pretrained(at).save_pretrained(out)"
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
        layer = name.removesuffix(_CODES)
        kind, tile, shape = _entry(files, metadata, layer)
        if (smoothed := f"{layer}{_PREFIX}act_pre_scale") in files:
            files.fail(smoothed, "weights alone", "a scale of the layer's input", _hint(files))
        if shape is not None:
            read: Thunk = functools.partial(_packed, files, layer, tile[1], shape, kind == _TILED)
        else:
            read = functools.partial(
                _integers if kind in _INTEGERS else _floats, files, layer, tile
            )
        thunks[f"{layer}.weight"] = read
    layers = [name.removesuffix(".weight") for name in thunks]
    parts = (*_PARTS, *_OF_ACTIVATIONS)
    return plain_floats(files, thunks, [f"{x}{_PREFIX}{part}" for x in layers for part in parts])


def _hint(files: TensorFiles) -> str:
    """Return the command that expands the checkpoint."""
    at = shlex.quote(str(files.config_file.parent))
    command = f"python -c {shlex.quote(_EXPAND)} {at} expanded"
    return f"expand it with transformers, where torchao is installed: {command}"


def _entry(
    files: TensorFiles, metadata: dict[Path, dict[str, str]], layer: str
) -> tuple[str, tuple[int, int], tuple[int, int] | None]:
    """Return the type of a weight, its block and, if its codes are packed, its shape."""
    file = files.file_of(layer + _CODES)
    with reading(file, f"metadata of {layer}.weight"):
        entry = parse_json(metadata[file][f"{layer}.weight"], layer, dict)
        kind: str = entry["_type"]
        if kind not in _TYPES:
            fail("_type", f"one of {_TYPES}", repr(kind), _hint(files))
        tile = tile_of(entry["_data"], "block_size")
        if tile is None:
            fail("block_size", "two positive integers [rows, columns]", "none")
        if kind in (*_INTEGERS, *_FLOATS):
            return kind, tile, None
        shape = shape_of(entry["_data"])
        if tile[0] != 1 or tile[1] % 2 or shape[1] % tile[1]:
            expected = f"[1, an even divisor of {shape[1]} columns]"
            fail("block_size", expected, list(tile))
    return kind, tile, shape


def _packed(
    files: TensorFiles, layer: str, group: int, shape: tuple[int, int], tiled: bool
) -> Lut4Weight:
    (N, K), name, prefix = shape, layer + _CODES, layer + _PREFIX
    scale_name = f"{prefix}scale_and_zero" if tiled else f"{prefix}scale"
    if tiled:
        codes = _untiled(files.matrix(name, torch.int32, -(-N // 8), None, 32, None))
        scale, zero = files.matrix(scale_name, torch.bfloat16, None, None, 2).float().unbind(-1)
    else:
        stored = files.matrix(name, torch.int8, N, K // 2).view(torch.uint8)
        codes = torch.stack([stored & 15, stored >> 4], -1).view(N, K) ^ 8
        scale, zero = scale_of(files, scale_name), scale_of(files, f"{prefix}zero_point")
    groups = K // group
    fits = scale.dim() == 2 and scale.shape == zero.shape
    if not fits or scale.shape[0] < groups or scale.shape[1] < N or codes.shape[1] < K:
        expected = f"scales and zeros [{groups}, {N}] of {K} columns, or padded ones"
        files.fail(scale_name, expected, f"{list(scale.shape)} of {codes.shape[1]} columns")
    with reading(files.file_of(name), name):
        return Lut4Weight(
            shape=shape,
            block=group,
            qdata=pack_nibbles(codes[:N, :K]),
            scale=scale[:groups, :N].t().reshape(-1),
            lut=table("q4_0"),
            offset=zero[:groups, :N].t().reshape(-1),
        )


def _untiled(words: Tensor) -> Tensor:  # int32 [N/8, K/(32 J), 32, J]
    """Return the codes, uint8 [N, K]."""
    tiles, columns, _, J = words.shape
    stored = words.contiguous().view(torch.uint8)
    nibbles = torch.stack([stored & 15, stored >> 4], -1)
    # [tile, tile of columns, row, pair, l, odd column, eight]
    split = nibbles.view(tiles, columns, 8, 4, J, 2, 4)
    return split.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * tiles, 32 * J * columns)


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
    kind, (_, block), size = _entry(files, files.metadata(), layer)
    if size is not None:
        return lut4(size, block, offset=True)
    N, K = files.shape(layer + _CODES)
    if kind in _FLOATS:
        return in_full(N, K)
    has_zeros = f"{layer}{_PREFIX}zero_point" in files and _ASYMMETRIC.search(settings) is not None
    if '"int4"' in settings and not has_zeros and block % 2 == 0:
        return lut4((N, K), block)
    return in_full(N, K) if has_zeros and '"int4"' not in settings else int8((N, K), block)
