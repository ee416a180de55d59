"""Reads models in one .gguf file (llama.cpp): weights of type Q4_0, Q8_0, F32, F16 and BF16.

    Q4_0   w = (q − 8) · d    blocks of 32 in 18 bytes: fp16 d, then 16 bytes, byte j with element j
                              in its low nibble and element j + 16 in its high one
    Q8_0   w = q · d          blocks of 32 in 34 bytes: fp16 d, then 32 int8

become Lut4Weight and Int8Weight; both multiply in fp32 as llama.cpp does. Embedding, head and norms
may be of any type that the gguf package can expand, and are read as fp32 (Q4_0 files often have a
Q6_K output.weight).

Tensor names differ from transformers, and some families have reordered rows. The names of each
family are below. The query and key projections of Llama, and of Mistral, which is "llama" here,
interleave the two halves of each head's rotary dimensions (LlamaModel.permute of llama.cpp's
convert_hf_to_gguf.py): row (h, i, half) there is row (h, half, i) of the model. Unknown tensors
raise an error.

The config is that of transformers (load_gguf_checkpoint), plus the entries that it leaves out.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime import checks
from ...runtime.checks import fail
from ..schemes import Int8Weight, Lut4Weight, QuantWeight, pack_nibbles, table
from .gguf_header import GGUFHeader, GGUFTensor, gguf_package, read_header
from .gguf_metadata import check_scale, read_metadata
from .tensor_files import Thunk, fail_checkpoint, reading

_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_COMMON = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LLAMA = _COMMON | {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
}
_LAYER = {  # the tensors of a layer, by general.architecture
    "llama": _LLAMA,
    "qwen2": _LLAMA | {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    "qwen3": _LLAMA | {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
    "phi3": _COMMON
    | {"attn_qkv.weight": "self_attn.qkv_proj.weight", "ffn_up.weight": "mlp.gate_up_proj.weight"},
}
FAMILIES = tuple(_LAYER)
_ROPE = "rope_freqs.weight"
_INSTEAD = "use the model's safetensors checkpoint"
BLOCK = 32


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Thunk]]:
    """Return (the transformers config, a thunk for each of the model's parameters)."""
    header = read_header(file)
    family = header.fields.get("general.architecture")
    if family not in FAMILIES:
        expected = f"one of {FAMILIES}, whose layout is known"
        fail_checkpoint(f"{file}: general.architecture", expected, repr(family), _INSTEAD)
    if (parts := header.fields.get("split.count", 1)) != 1:
        hint = "join them with llama-gguf-split --merge"
        fail_checkpoint(file, "a model in one file", f"one of {parts}", hint)
    config = _config(file, header, family)
    weights: dict[str, Thunk] = {}
    for name, tensor in header.tensors.items():
        if name != _ROPE:
            heads = None
            if family == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
                heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
            read = functools.partial(_read, file, name, tensor, heads)
            weights[_parameter(file, name, family)] = read
    return config, weights


def _parameter(file: Path, name: str, family: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    names, part = (_LAYER[family], match[2]) if match else (_MODEL, name)
    if part not in names:
        fail_checkpoint(
            f"{file}: tensor {name!r}",
            f"a tensor of a {family} model as transformers has it",
            "an unknown one (of a mixture of experts, of rescaled rotary frequencies, a bias)",
            _INSTEAD,
        )
    return f"model.layers.{match[1]}.{names[part]}" if match else names[part]


def _read(file: Path, name: str, tensor: GGUFTensor, heads: int | None) -> Tensor | QuantWeight:
    with reading(file, name):
        data = np.fromfile(file, np.uint8, tensor.bytes, offset=tensor.start)
        if data.size != tensor.bytes:
            fail("data", f"{tensor.bytes:,} bytes", f"{data.size:,}")
        weight = _expand(file, name, data, tensor)
        return weight if heads is None else _halves_together(weight, tensor.shape[0], heads)


def _expand(file: Path, name: str, data: Any, tensor: GGUFTensor) -> Tensor | QuantWeight:
    kind, bits = tensor.type.name, torch.from_numpy(data)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in plain:
        return bits.view(plain[kind]).view(tensor.shape)
    if name.startswith("blk.") and not name.endswith(("_norm.weight", ".bias")):
        if kind in ("Q4_0", "Q8_0") and len(tensor.shape) == 2:
            return (q4_0 if kind == "Q4_0" else q8_0)(bits, (tensor.shape[0], tensor.shape[1]))
        expected = "a matrix of type Q4_0, Q8_0, F32, F16 or BF16"
        hint = "make one with llama-quantize --pure, or use the safetensors checkpoint"
        fail("data", expected, f"{list(tensor.shape)} of {kind}", hint)
    rows = data.reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):  # NaN and infinity are kept
        return torch.from_numpy(np.array(gguf_package(file).dequantize(rows, tensor.type)))


def q4_0(data: Tensor, shape: tuple[int, int]) -> Lut4Weight:  # data uint8 [N·K / 32 · 18]
    blocks = data.view(-1, 18)
    low_then_high = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
    return Lut4Weight(
        shape=shape,
        block=BLOCK,
        qdata=pack_nibbles(low_then_high),
        scale=blocks[:, :2].contiguous().view(torch.float16).view(-1).float(),
        lut=table("q4_0"),
    )


def q8_0(data: Tensor, shape: tuple[int, int]) -> Int8Weight:  # data uint8 [N·K / 32 · 34]
    blocks = data.view(-1, 34)
    return Int8Weight(
        shape=shape,
        block=BLOCK,
        qdata=blocks[:, 2:].contiguous().view(torch.int8).view(shape),
        scale=blocks[:, :2].contiguous().view(torch.float16).view(-1).float(),
    )


def _halves_together(
    weight: Tensor | QuantWeight, rows: int, heads: int
) -> Tensor | QuantWeight:  # inside `reading`
    """Reorder rows (h, i, half) to (h, half, i)."""
    if heads < 1 or rows % (2 * heads):
        fail("data", f"{heads} heads of an even number of rows each", f"{rows} rows")
    order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    if isinstance(weight, Tensor):
        return weight[order]
    assert isinstance(weight.scale, Tensor)  # as q4_0 and q8_0 make it
    scale = weight.scale.view(rows, -1)[order].view(-1)
    qdata = weight.qdata.view(rows, -1)[order]
    flat = isinstance(weight, Lut4Weight)
    return replace(weight, qdata=qdata.view(-1) if flat else qdata, scale=scale)


def _config(file: Path, header: GGUFHeader, family: str) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields = header.fields
    with reading(file, advice=_INSTEAD):
        metadata = read_metadata(fields, family)
        config: dict[str, Any] = dict(load_gguf_checkpoint(str(file))["config"])
        config |= {"model_type": family, **metadata}  # transformers may derive it from the name
        blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
        if config["num_hidden_layers"] != len(blocks):
            expected = f"{len(blocks)}, as many as there are tensors of"
            fail(f"{family}.block_count", expected, repr(config["num_hidden_layers"]))
        heads = config["num_attention_heads"]
        config.setdefault("num_key_value_heads", heads)
        for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
            checks.integer(key, config[key], 1)
        width = fields.get(f"{family}.attention.key_length") or config["hidden_size"] // heads
        rotated = fields.get(f"{family}.rope.dimension_count", width)
        if type(width) is not int or rotated != width:
            expected = f"the {width} dimensions of a head"
            fail(f"{family}.rope.dimension_count", expected, rotated)
        if width * heads != config["hidden_size"] or family == "qwen3":
            config["head_dim"] = width
        check_scale(fields, family, width)
        if _ROPE in header.tensors:
            if "rope_scaling" in metadata:
                factor = metadata["rope_scaling"]["factor"]
                fail(f"{family}.rope.scaling.factor", f"none with {_ROPE}", factor)
            stored = _read(file, _ROPE, header.tensors[_ROPE], None)
            if not isinstance(stored, Tensor) or stored.numel() != width // 2:
                expected = f"{width // 2} numbers, one for 2 dimensions of a head"
                fail(_ROPE, expected, list(stored.shape))
            config["rope_scaling"] = _llama3_scaling(stored, float(config["rope_theta"]))
    return config


def _llama3_scaling(stored: Any, theta: float) -> dict[str, Any]:  # inside `reading`
    """Return the llama3 rope_scaling that gives these divisors of the rotary frequencies.

    Wavelengths below context / 4 are kept, those above context / 1 grow by `factor`, and between
    them 1 / divisor is linear in context / wavelength, with context = 8192.
    """
    divisors = stored.double().view(-1)
    inverse = theta ** -(torch.arange(len(divisors)).double() / len(divisors))
    factor, context = divisors.max().item(), 8192
    smooth = ((context * inverse / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(divisors, expected, rtol=1e-5, atol=0):
        fail(_ROPE, "the rotary frequencies of Llama 3.1", "others")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
