"""Shared by test_positions and others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


LEARNED = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 64}


STATE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


FAMILIES: dict[str, Any] = {
    "llama": COMMON,
    "gpt_neox": COMMON,
    "gpt2": LEARNED,
    "gptj": LEARNED | {"rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40, "vocab_size": 64},
    "mamba": STATE | {"state_size": 8},
    "rwkv": STATE | {"attention_hidden_size": 32, "context_length": 40},
}


WITHOUT_LIMIT = {"bloom", "mamba"}


def build(family, dtype=torch.float64, **changes):
    """A random model whose weights are large enough that a wrong position shows."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
