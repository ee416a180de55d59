"""Checkpoints written for the tests of their readers, and what their weights should be."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastdistill.quant.backends.torch_ops import int8_dequant, lut4_dequant
from fastdistill.quant.formats import own_format
from fastdistill.quant.formats.detect import checkpoint_of, open_checkpoint, without_data
from fastdistill.quant.formats.tensor_files import Expanded
from fastdistill.quant.formats.without_data import Headers
from fastdistill.quant.schemes import Int8Weight, Lut4Weight, Nested, quantize

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
W = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def store(folder, tensors, settings=None, metadata=None):
    """A folder of safetensors with `settings` as its quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
    return folder


def values(weight, dtype=torch.float32):
    """What `weight` stands for, in the layer's own order of columns."""
    out = torch.empty(weight.shape, dtype=dtype)
    if isinstance(weight, Int8Weight):
        int8_dequant(weight, out)
        return out
    assert isinstance(weight, Lut4Weight)
    lut4_dequant(weight, out)
    return out if weight.perm is None else out[:, weight.perm.argsort()]


def store_own(folder, weights, version=1, **changes):
    """A folder in our own format; `changes` go into what the metadata says of W."""
    tensors: dict[str, Any] = {}
    says: dict[str, Any] = {}
    for name, weight in weights.items():
        parts, says[name] = own_format.tensors_of(name, weight)
        tensors |= parts
    says[W] |= changes
    metadata = own_format.metadata(says)
    if version != 1:
        metadata = {"fastdistill": json.dumps({"version": version, "weights": says})}
    return store(folder, tensors, {"quant_method": "fastdistill", "version": 1}, metadata)


def int4(**changes):
    torch.manual_seed(0)
    weight = quantize(torch.randn(8, 32), "int4", block=16)
    return Lut4Weight(**{**vars(weight), **changes})


def nested_weight(folder):
    """bitsandbytes' doubly quantised NF4, from its golden bytes."""
    tensors = golden("bitsandbytes")["nf4_nested"]["tensors"]
    (weight,) = read_all(store(folder, tensors)).values()
    return weight


def read_all(path):
    return {name: read() for name, read in open_checkpoint(path).weights.items()}


def assert_planned(path, name, weight):
    """What a plan counts from the headers of a checkpoint is the weight that is read."""
    shape = weight.values.shape if isinstance(weight, Expanded) else weight.shape
    planned: Any = without_data(checkpoint_of(Headers(path)), {name: tuple(shape)})[name]()
    assert type(planned) is type(weight)
    assert _sizes(planned) == _sizes(weight)


def _sizes(weight):
    if isinstance(weight, Expanded):
        return tuple(weight.values.shape)
    parts = vars(weight)
    if isinstance(scale := parts["scale"], Nested):  # the block of its scales takes no memory
        parts = parts | {"scale": sum(part.nbytes for part in (scale.codes, *scale.parts))}
    return {name: getattr(part, "nbytes", part) for name, part in parts.items()}


def to_json(tensor):
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return [kind, list(tensor.shape), base64.b64encode(data).decode()]


def from_json(stored):
    kind, shape, data = stored
    flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
    return flat.view(getattr(torch, kind)).view(shape)


def golden(name):
    """{case: {"tensors": {...}, "values": {dtype: tensor}}} of a file in golden/."""
    cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return {
        case: {part: {k: from_json(v) for k, v in held.items()} for part, held in parts.items()}
        for case, parts in cases.items()
    }


def write_golden(name, made_with, cases):
    GOLDEN.mkdir(exist_ok=True)
    stored = {
        case: {part: {k: to_json(v) for k, v in held.items()} for part, held in parts.items()}
        for case, parts in cases.items()
    }
    text = json.dumps({"made_with": made_with, "cases": stored}, indent=1)
    (GOLDEN / f"{name}.json").write_text(text + "\n")
