"""fastdistill's own checkpoint format: the tensors of ../schemes.py in safetensors.

A quantized weight W ("model.layers.0.mlp.up_proj.weight") is stored as

    W.qdata    LUT4: uint8 [N·K / 2], element 2j in the high nibble; INT8: int8 [N, K]
    W.scale    fp32 [N·K / block], or, if the scales are quantized:
               W.scale.codes uint8, W.scale.code fp32 [256], W.scale.scale fp32, W.scale.offset fp32
    W.lut      fp32 [16]            LUT4
    W.offset   fp32, as scale       LUT4, optional
    W.perm     int64 [K]            LUT4, optional

and each file's metadata has, under "fastdistill", a JSON that describes its weights:

    {"version": 1,
     "weights": {W: {"format": "lut4" | "int8", "shape": [N, K], "block": …, "nested_block": …,
                     "optional": ["offset", "perm"]}}}

nested_block is present with W.scale.codes; "optional" lists the optional tensors that are stored.

Layouts that depend on a CPU or a GPU are never stored, so checkpoints are portable.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ...runtime.json_text import parse_json
from ..schemes import Int8Weight, Lut4Weight, Nested, QuantWeight
from .tensor_files import TensorFiles, Thunk, block_of, integer, reading, shape_of, with_plain

VERSION = 1
KEY = "fastdistill"  # of the files' metadata, and the quant_method of config.json
_NESTED = ("scale.codes", "scale.code", "scale.scale", "scale.offset")
_PARTS = ("qdata", "scale", "lut", "offset", "perm", *_NESTED)


def tensors_of(name: str, weight: QuantWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors to store, metadata entry) of weight `name`; `weights` is the inverse."""
    entry: dict[str, Any] = {"shape": list(weight.shape), "block": weight.block}
    if isinstance(weight, Int8Weight):
        tensors = {"qdata": weight.qdata, "scale": weight.scale}
        entry["format"] = "int8"
    else:
        tensors = {"qdata": weight.qdata, "lut": weight.lut}
        entry["format"] = "lut4"
        if isinstance(weight.scale, Nested):
            *values, entry["nested_block"] = weight.scale
            tensors |= dict(zip(_NESTED, values, strict=True))
        else:
            tensors["scale"] = weight.scale
        optional = {"offset": weight.offset, "perm": weight.perm}
        present = {part: tensor for part, tensor in optional.items() if tensor is not None}
        tensors |= present
        entry["optional"] = list(present)
    for table in tensors.keys() & {"lut", "scale.code"}:
        # Layers share their tables, and safetensors refuses tensors that share memory.
        tensors[table] = tensors[table].clone()
    return {f"{name}.{part}": t.detach().contiguous() for part, t in tensors.items()}, entry


def metadata(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the safetensors metadata of a file: `entries` maps weight names to their entry."""
    return {"format": "pt", KEY: json.dumps({"version": VERSION, "weights": entries})}


def is_own_format(files: TensorFiles) -> bool:
    return any(KEY in values for values in files.metadata().values())


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    if (settings := config.get("quantization_config")) is not None:
        with reading(files.config_file, "quantization_config"):
            _check_not_newer(settings)
    thunks: dict[str, Thunk] = {}
    for file, values in files.metadata().items():
        if KEY not in values:
            continue
        with reading(file, f"metadata of {KEY}"):
            header = parse_json(values[KEY], KEY, dict)
            _check_not_newer(header)
            for name, entry in header["weights"].items():
                parts = _parts_of(entry)
                for part in parts:
                    files.file_of(f"{name}.{part}")
                thunks[name] = functools.partial(_read, files, name, entry, parts)
    return with_plain(files, thunks, [f"{name}.{part}" for name in thunks for part in _PARTS])


def _check_not_newer(values: dict[str, Any]) -> None:
    version = integer(values, "version")
    if not 1 <= version <= VERSION:
        hint = "a newer fastdistill wrote this: update with pip install -U fastdistill"
        fail("version", f"at most {VERSION}", version, hint)


def _parts_of(entry: dict[str, Any]) -> list[str]:
    """Return the names of the stored parts of a weight. Call it inside `reading`."""
    if entry["format"] == "int8":
        return ["qdata", "scale"]
    if entry["format"] != "lut4":
        fail("format", "'lut4' or 'int8'", repr(entry["format"]))
    optional = entry["optional"]
    if not isinstance(optional, list) or not set(optional) <= {"offset", "perm"}:
        fail("optional", "some of 'offset' and 'perm'", repr(optional))
    return ["qdata", "lut", *(_NESTED if "nested_block" in entry else ["scale"]), *optional]


def _read(files: TensorFiles, name: str, entry: dict[str, Any], parts: list[str]) -> QuantWeight:
    stored: dict[str, Any] = {part: files.read(f"{name}.{part}") for part in parts}
    with reading(files.file_of(f"{name}.qdata"), name):
        shape, block = shape_of(entry), block_of(entry, "block")
        if entry["format"] == "int8":
            if tuple(stored["qdata"].shape) != shape:
                fail("qdata", str(list(shape)), list(stored["qdata"].shape))
            return Int8Weight(shape=shape, block=block, **stored)
        if "nested_block" in entry:
            codes, code, scales, offset = (stored.pop(part) for part in _NESTED)
            nested_block = block_of(entry, "nested_block")
            stored["scale"] = Nested(codes, code, scales, offset, nested_block)
        weight = Lut4Weight(shape=shape, block=block, **stored)
        perm = weight.perm
        if perm is None or perm.is_meta:
            return weight
        if not torch.equal(perm.sort().values, torch.arange(shape[1])):
            raise ValueError(f"perm: expected each of 0 to {shape[1] - 1} once")
        return weight
