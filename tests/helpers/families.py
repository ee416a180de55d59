"""Shared by test_families and others."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 83


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so that attention moves the answers, and a wrong mask shows
}


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB} | {
    name: SIZES[name] for name in ("bos_token_id", "eos_token_id", "initializer_range")
}


EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


# Windows shorter than the rows, so that they must hold across the seams of a packed row.
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 4},
    "gemma2": SIZES | {"sliding_window": 4, "final_logit_softcapping": 5.0},
    "gemma3_text": SIZES | {"sliding_window": 4, "final_logit_softcapping": 5.0},
    "phi": SIZES | {"partial_rotary_factor": 0.5},
    "phi3": SIZES,
    "gpt2": GPT2,
    "gptj": GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False},
    "gpt_neox": SIZES,
    "mixtral": SIZES | EXPERTS,
    "qwen3_moe": SIZES | EXPERTS,
    "granite": SIZES | {"logits_scaling": 3.0},
    "cohere": SIZES | {"logit_scale": 0.25},
}


LENGTHS = (11, 3, 0, 7, 1)


def build(family: str, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(FAMILIES.get(family, SIZES) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)  # zero at initialization, where a lost bias would not show
    return model


def texts(lengths=LENGTHS):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=g) for n in lengths]


def padded(rows, side: str, width: int = 12):
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at] = row, 1
    return ids, mask
