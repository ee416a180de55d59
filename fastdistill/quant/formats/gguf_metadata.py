"""Reads the metadata of a .gguf file and checks that all of it is used.

A key of the architecture's namespace ("llama.rope.scaling.factor") is read by transformers or here,
or must have a neutral value. Any other key may change the mathematics and raises an error.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ...runtime import checks
from ...runtime.checks import fail
from ...runtime.printable import printable
from .gguf_names import has_experts

_REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# What gguf_config.py and transformers read of every family.
_READ = {
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.scale",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
}
_EXPERTS = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_QWEN35 = {
    *(f"ssm.{key}" for key in ("conv_kernel", "group_count", "inner_size", "state_size")),
    "ssm.time_step_rank",
    "full_attention_interval",
    "nextn_predict_layers",
    "rope.dimension_sections",  # of images: the positions of a text are equal in all sections
}
_READ_OF = {  # by family, besides
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "granite": {"embedding_scale", "logit_scale", "residual_scale"},
    "gemma3": {"rope.freq_base_swa", "attention.sliding_window_pattern"},
    "lfm2": {"shortconv.l_cache"},
    "phi3": {"rope.scaling.attn_factor", "rope.scaling.original_context_length"},
    "qwen2moe": {"expert_shared_feed_forward_length"},
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35 | {"expert_shared_feed_forward_length", "feed_forward_length"},
    "stablelm": {"use_parallel_residual"},
}
# Families whose whole heads rotate.
_YARN = ("gpt-oss", "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
_BETAS = ("beta_fast", "beta_slow")
# Details of scalings, which are read with YaRN and have no effect without it; the model's origin.
_SILENT = {
    "rope.scaling.original_context_length",
    *(f"rope.scaling.yarn_{beta}" for beta in _BETAS),
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
# Where a file names the checkpoint that it was made of; the last may be that of a fine-tune.
_SOURCES = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.base_model.0.repo_url",
)
_UNLESS = ", the base if the file is a fine-tune"
_HUB = re.compile(r"(?:https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?", re.ASCII)
# Neutral values, with which llama.cpp computes the plain model.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_NEUTRAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {  # by family, besides
    "gpt-oss": {"attention.sliding_window_pattern": (2,)},
    "minimax-m2": {"expert_gating_func": (2,)},  # the sigmoid
}


def read_metadata(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """Return the config entries that transformers does not read.

    Raises ValueError for a missing key, and for one that no config can express.
    """
    entries = {
        key.removeprefix(f"{family}."): value
        for key, value in fields.items()
        if key.startswith(f"{family}.")
    }
    needed, known = required(fields, family), _READ | _READ_OF.get(family, set())
    neutral = _NEUTRAL | _NEUTRAL_OF.get(family, {})
    if has_experts(fields, family):
        known = known | _EXPERTS
    for key in needed:
        if entries.get(key) is None:
            fail(f"{family}.{key}", "a number for all layers", "none")
        checks.positive(f"{family}.{key}", entries[key])
    for key, value in entries.items():
        if key in known or key in needed:
            continue
        if key in neutral:
            if value not in neutral[key]:
                expected = " or ".join(map(str, neutral[key]))
                fail(f"{family}.{key}", expected, _short(value), instead(fields))
        elif key not in _SILENT:
            fail(f"{family}.{key}", "no such field", _short(value), instead(fields))
    base = entries.get("rope.freq_base", 10000.0)  # llama.cpp's default
    checks.positive(f"{family}.rope.freq_base", base)
    rope = {"rope_theta": float(base)}
    return _scaling(entries, family) | _window(entries, family) | rope


def instead(fields: dict[str, Any]) -> str:
    """Return the advice to use the safetensors checkpoint, with the command that downloads it.

    A file may name the repository that it was made of. No other name is guessed."""
    for key in _SOURCES:
        if match := _HUB.fullmatch(str(fields.get(key))):
            name = match[1]
            where = f"that the file names ({key}{_UNLESS if 'base_model' in key else ''})"
            return f"use the safetensors checkpoint {where}: hf download {name}, and pass {name!r}"
    where = "the model's safetensors checkpoint, which the file does not name"
    return f"use {where}: hf download OWNER/NAME, and pass 'OWNER/NAME'"


def required(fields: dict[str, Any], family: str) -> tuple[str, ...]:
    """Return the keys that a file must have, with a number for all layers."""
    moe = ("expert_count", "expert_used_count") if has_experts(fields, family) else ()
    if family == "stablelm":
        return *_REQUIRED[:-1], "attention.layer_norm_epsilon"
    if family == "qwen35moe":  # all its feed-forward layers are experts
        return *(key for key in _REQUIRED if key != "feed_forward_length"), *moe
    return *_REQUIRED, *moe


def check_scale(fields: dict[str, Any], family: str, width: int) -> None:
    """Raise ValueError for heads whose scale or value size does not follow from their width."""
    scale, values = (fields.get(f"{family}.attention.{key}") for key in ("scale", "value_length"))
    is_free = family.startswith(("gemma", "granite"))  # their config has the scale
    if scale and not is_free and not math.isclose(scale, width**-0.5, rel_tol=1e-5):
        expected = f"{width**-0.5:g}, 1/√{width}"
        fail(f"{family}.attention.scale", expected, _short(scale))
    if values not in (None, width):
        fail(f"{family}.attention.value_length", f"{width}, as key_length", _short(values))


def _scaling(entries: dict[str, Any], family: str) -> dict[str, Any]:
    """Return rope_scaling. As in llama.cpp, a factor without a type is linear."""
    kind = entries.get("rope.scaling.type") or "linear"
    if kind == "longrope" and family == "phi3":
        return {}  # its factors are tensors
    factor = entries.get("rope.scaling.factor") or entries.get("rope.scale_linear") or 1.0
    kinds = ("none", "linear", *(("yarn",) if family in _YARN else ()))
    if kind not in kinds:
        fail(f"{family}.rope.scaling.type", f"one of {kinds}", _short(kind))
    checks.positive(f"{family}.rope.scaling.factor", factor)
    if kind == "none" or factor == 1:
        # Without an entry, transformers would scale those of gpt-oss.
        return {"rope_scaling": {"rope_type": "default"}} if family == "gpt-oss" else {}
    if kind == "yarn":  # as in transformers, cos and sin are multiplied by 0.1 ln(factor) + 1
        original = entries.get("rope.scaling.original_context_length", entries["context_length"])
        checks.integer(f"{family}.rope.scaling.original_context_length", original, 1)
        yarn = {"factor": float(factor), "original_max_position_embeddings": original}
        for beta in _BETAS:
            if (value := entries.get(f"rope.scaling.yarn_{beta}")) is not None:
                checks.positive(f"{family}.rope.scaling.yarn_{beta}", value)
                yarn[beta] = float(value)
        if family == "gpt-oss":
            yarn["truncate"] = False  # as its own configuration; no field says so
        return {"rope_scaling": {"rope_type": "yarn", **yarn}}
    return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}}


def _window(entries: dict[str, Any], family: str) -> dict[str, Any]:
    """Return sliding_window of families that have one; raise for a real one in others."""
    window = entries.get("attention.sliding_window") or None
    if family == "phi3":
        return {"sliding_window": window}
    if family == "gpt-oss" or family.startswith("gemma"):
        checks.integer(f"{family}.attention.sliding_window", window, 1)
        return {"sliding_window": window}
    if window is not None and window < entries["context_length"]:
        expected = f"none, or one of the whole context of {entries['context_length']}"
        fail(f"{family}.attention.sliding_window", expected, _short(window))
    return {}


def _short(value: Any) -> str:
    return "an array" if value is None else printable(repr(value))
