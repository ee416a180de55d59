"""Makes the transformers config of a .gguf file from its fields and rotary factors.

The names of most entries are those of transformers' own table (GGUF_CONFIG_MAPPING). It leaves out
what follows from tensors, the constants of llama.cpp, and rotary factors, which are tensors here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import GGUF_CONFIG_MAPPING

from ...runtime import checks
from ...runtime.checks import fail
from .gguf_header import GGUFHeader
from .gguf_metadata import check_scale, read_metadata
from .gguf_names import NEXTN, family_of, has_experts
from .tensor_files import fail_checkpoint, reading

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE = (_FREQUENCIES, _LONG, _SHORT)
_TABLE = {  # the names in GGUF_CONFIG_MAPPING
    "gpt-oss": "gpt_oss",
    "granite": "llama",
    "minimax-m2": "minimax_m2",
    "olmo2": "llama",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3",
    "qwen35moe": "qwen3_moe",
    "smollm3": "llama",
}
_LINEAR_ATTENTION = {  # of Qwen3.5
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}
_NOT_OF_THE_CONFIG = ("rotary_dim", "scoring_func")  # of MiniMax-M2 in that table
_PARTLY_ROTARY = ("minimax-m2", "phi3", "qwen35", "qwen35moe", "stablelm")
_OWN_WIDTH = (
    "gemma2",
    "gemma3",
    "gpt-oss",
    "minimax-m2",
    "qwen3",
    "qwen3moe",
    "qwen35",
    "qwen35moe",
)  # models whose heads have a width of their own
# Layers of the 27B models, whose attention is scaled by hidden_size / heads (llama.cpp).
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN, _GEMMA3_LOCAL_BASE = 6, 10000.0  # constants of llama.cpp


def read_config(
    file: Path, header: GGUFHeader, family: str, factors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the config entries, with the model_type.

    Args:
        file: the first part. family: general.architecture. factors: the tensors named in ROPE.

    Raises CheckpointError for a field that is missing, wrong or not understood.
    """
    if "token_embd.weight" not in header.tensors:
        fail_checkpoint(file, "the tensor 'token_embd.weight'", "none of that name")
    with reading(file):
        return _config(header, family, factors)


def _config(header: GGUFHeader, family: str, factors: dict[str, Tensor]) -> dict[str, Any]:
    fields, tensors = header.fields, header.tensors
    metadata = read_metadata(fields, family)
    config: dict[str, Any] = {"vocab_size": tensors["token_embd.weight"].shape[0]}
    for prefix, table in ((family, _TABLE.get(family, family)), ("tokenizer", "tokenizer")):
        for key, entry in GGUF_CONFIG_MAPPING[table].items():
            if entry is not None and fields.get(f"{prefix}.{key}") is not None:
                config[entry] = fields[f"{prefix}.{key}"]
    for entry in _NOT_OF_THE_CONFIG:
        config.pop(entry, None)
    config |= {"model_type": family_of(fields, family).model_type, **metadata}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    later = fields.get(f"{family}.{NEXTN}", 0)
    checks.integer(f"{family}.{NEXTN}", later, 0)
    config["num_hidden_layers"] -= later
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if config["num_hidden_layers"] != len(blocks):
        expected = f"{len(blocks)}, as many as there are tensors of"
        fail(f"{family}.block_count", expected, repr(config["num_hidden_layers"]))
    width, rotated = _heads(fields, family, config)
    config |= _of_family(header, family, config, width)
    for name, factor in factors.items():
        if factor.numel() != rotated // 2:
            expected = f"{rotated // 2} numbers, one for 2 dimensions of a head"
            fail(name, expected, list(factor.shape))
    if _FREQUENCIES in factors:
        config |= _frequencies(factors[_FREQUENCIES], family, config)
    if family == "phi3":
        config |= _long_rope(fields, factors)
    elif _LONG in factors or _SHORT in factors:
        fail(_LONG, "rotary factors in a phi3 model only", f"one in a {family} model")
    return config


def _of_family(
    header: GGUFHeader, family: str, config: dict[str, Any], width: int
) -> dict[str, Any]:
    """Return the entries that one family has; Gemma 3 takes its rotary entries out of `config`."""
    fields = header.fields
    if family.startswith("gemma"):
        return _gemma(fields, family, config, width)
    if family == "stablelm":
        return _stablelm(header)
    if family == "granite":
        return _granite(fields, width)
    if family == "lfm2":
        return _lfm2(header, config, width)
    entries = _mixture(header, family) if has_experts(fields, family) else {}
    if family.startswith("qwen35"):
        entries |= _linear_attention(fields, family)
    return entries


def _heads(fields: dict[str, Any], family: str, config: dict[str, Any]) -> tuple[int, int]:
    """Return (the width of a head, its rotated dimensions), and add their entries to `config`."""
    config.pop("head_dim", None)
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
        checks.integer(key, config[key], 1)
    width = fields.get(f"{family}.attention.key_length") or config["hidden_size"] // heads
    checks.integer(f"{family}.attention.key_length", width, 1)
    rotated = fields.get(f"{family}.rope.dimension_count", width)
    checks.integer(f"{family}.rope.dimension_count", rotated, 1)
    if family in _PARTLY_ROTARY and rotated <= width:
        config["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        expected = f"the {width} dimensions of a head"
        fail(f"{family}.rope.dimension_count", expected, rotated)
    if width * heads != config["hidden_size"] or family in _OWN_WIDTH:
        config["head_dim"] = width
    check_scale(fields, family, width)
    return width, rotated


def _frequencies(divisors: Tensor, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the rope_scaling of divisors of the rotary frequencies; {} if all are 1."""
    if "rope_scaling" in config:
        factor = config["rope_scaling"]["factor"]
        fail(f"{family}.rope.scaling.factor", f"none with {_FREQUENCIES}", factor)
    if bool((divisors == 1).all()):
        return {}
    return {"rope_scaling": _llama3_scaling(divisors, float(config["rope_theta"]))}


def _gemma(
    fields: dict[str, Any], family: str, config: dict[str, Any], width: int
) -> dict[str, Any]:
    """Return the scale of attention, the caps of logits and Gemma 3's rotary frequencies."""
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA[family]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else width
    if scale := fields.get(f"{family}.attention.scale"):
        checks.positive(f"{family}.attention.scale", scale)
        scalar = round(scale**-2)
    entries: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    if family == "gemma2":
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if f"gemma2.{cap}" in fields:
                checks.between(f"gemma2.{cap}", fields[f"gemma2.{cap}"], 0)
                entries[cap] = float(fields[f"gemma2.{cap}"]) or None
        return entries
    pattern = fields.get("gemma3.attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if pattern != _GEMMA3_PATTERN:
        fail("gemma3.attention.sliding_window_pattern", str(_GEMMA3_PATTERN), pattern)
    local = fields.get("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_BASE)
    checks.positive("gemma3.rope.freq_base_swa", local)
    scaled = config.pop("rope_scaling", {"rope_type": "default"})  # of the global layers only
    entries["rope_parameters"] = {
        "full_attention": {"rope_theta": config.pop("rope_theta"), **scaled},
        "sliding_attention": {"rope_theta": float(local), "rope_type": "default"},
    }
    return entries


def _granite(fields: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the four scales of Granite; one that is absent or 0 has no effect."""
    entries = {}
    for key, (entry, neutral) in {
        "embedding_scale": ("embedding_multiplier", 1.0),
        "residual_scale": ("residual_multiplier", 1.0),
        "logit_scale": ("logits_scaling", 1.0),
        "attention.scale": ("attention_multiplier", width**-0.5),
    }.items():
        scale = fields.get(f"granite.{key}") or neutral
        checks.positive(f"granite.{key}", scale)
        entries[entry] = float(scale)
    return entries


def _lfm2(header: GGUFHeader, config: dict[str, Any], width: int) -> dict[str, Any]:
    """Return which layers of LFM2 have attention, as the tensors say, and their sizes."""
    tensors = header.tensors
    names = [f"blk.{i}.attn_k.weight" for i in range(config["num_hidden_layers"])]
    rows = {tensors[name].shape[0] for name in names if name in tensors}
    if len(rows) != 1 or min(rows) % width:
        expected = f"a multiple of {width} rows, the same in all layers with attention"
        fail("attn_k.weight", expected, sorted(rows) or "none")
    checks.integer("lfm2.shortconv.l_cache", config.get("conv_L_cache"), 1)
    return {
        "norm_eps": config["rms_norm_eps"],
        "num_key_value_heads": min(rows) // width,
        "layer_types": ["full_attention" if name in tensors else "conv" for name in names],
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in tensors),
        "block_auto_adjust_ff_dim": False,  # feed_forward_length is the adjusted one
    }


def _stablelm(header: GGUFHeader) -> dict[str, Any]:
    parallel = not any(name.endswith(".ffn_norm.weight") for name in header.tensors)
    stated = header.fields.get("stablelm.use_parallel_residual", parallel)
    if stated != parallel:
        expected = f"{parallel}, as the tensors say"
        fail("stablelm.use_parallel_residual", expected, stated)
    biased = any(name.endswith(".attn_q.bias") for name in header.tensors)
    normed = any(name.endswith(".attn_q_norm.weight") for name in header.tensors)
    return {
        "use_parallel_residual": parallel,
        "use_qkv_bias": biased,
        "qk_layernorm": normed,
    }


def _mixture(header: GGUFHeader, family: str) -> dict[str, Any]:
    """Return the widths of the experts, and how a router's probabilities are used."""
    fields = header.fields
    experts = fields[f"{family}.expert_count"]
    checks.integer(f"{family}.expert_count", experts, 1)
    used = fields[f"{family}.expert_used_count"]
    checks.integer(f"{family}.expert_used_count", used, 1, experts)
    if not family.endswith("moe"):  # their experts have the width feed_forward_length
        return {"num_local_experts": experts, "num_experts_per_tok": used}
    entries: dict[str, Any] = {}
    if family != "qwen35moe":
        entries["norm_topk_prob"] = family == "qwen3moe"  # as llama.cpp
    widths = {"moe_intermediate_size": ("blk.0.ffn_gate_exps.weight", 1)}
    if family != "qwen3moe":
        widths["shared_expert_intermediate_size"] = ("blk.0.ffn_gate_shexp.weight", 0)
    for entry, (name, axis) in widths.items():
        shape = header.tensors[name].shape if name in header.tensors else ()
        if len(shape) <= axis:
            fail(name, f"a tensor of {axis + 2} dimensions", list(shape) or "none")
        entries[entry] = shape[axis]
    return entries


def _linear_attention(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """Return the sizes of Qwen3.5's linear attention."""
    entries: dict[str, Any] = {}
    for key, entry in _LINEAR_ATTENTION.items():
        entries[entry] = fields.get(f"{family}.{key}")
        checks.integer(f"{family}.{key}", entries[entry], 1)
    keys, values = entries["linear_num_key_heads"], entries["linear_num_value_heads"]
    inner = fields.get(f"{family}.ssm.inner_size")
    if values % keys:
        fail(f"{family}.ssm.time_step_rank", f"a multiple of {keys} (ssm.group_count)", values)
    checks.integer(f"{family}.ssm.inner_size", inner, 1)
    if inner % values:
        fail(f"{family}.ssm.inner_size", f"a multiple of {values} (ssm.time_step_rank)", inner)
    return {**entries, "linear_value_head_dim": inner // values}


def _long_rope(fields: dict[str, Any], factors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the rope_scaling of Phi-3's long contexts; {} without factors."""
    kind = fields.get("phi3.rope.scaling.type")
    if _LONG not in factors and _SHORT not in factors:
        if kind == "longrope":
            fail("phi3.rope.scaling.type", f"longrope with {_LONG} and {_SHORT}", "neither")
        if (attention := fields.get("phi3.rope.scaling.attn_factor", 1)) != 1:
            fail("phi3.rope.scaling.attn_factor", f"1 without {_LONG}", attention)
        return {}
    for name in (_LONG, _SHORT):
        if name not in factors or not bool((factors[name].isfinite() & (factors[name] > 0)).all()):
            got = "none" if name not in factors else "zero, negative, infinite or NaN factors"
            fail(name, f"finite factors above 0 in both {_LONG} and {_SHORT}", got)
    original = fields.get("phi3.rope.scaling.original_context_length")
    checks.integer("phi3.rope.scaling.original_context_length", original, 1)
    scaling = {
        "rope_type": "longrope",
        "long_factor": factors[_LONG].tolist(),
        "short_factor": factors[_SHORT].tolist(),
        "original_max_position_embeddings": original,
    }
    if attention := fields.get("phi3.rope.scaling.attn_factor"):
        checks.positive("phi3.rope.scaling.attn_factor", attention)
        scaling["attention_factor"] = float(attention)
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _llama3_scaling(stored: Tensor, theta: float) -> dict[str, Any]:  # inside `reading`
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
        fail(_FREQUENCIES, "the rotary frequencies of Llama 3.1", "others")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
