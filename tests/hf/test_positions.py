"""How long a row may be, and whether padding is respected: measured, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastdistill.positions import respects_padding, row_limit

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
FAMILIES = {
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
IGNORES_MASKS = {"rwkv"}
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_whether_generate_respects_padding(family, dtype):
    model = build(family, dtype)
    habits, training = model.generation_config, model.train().training
    assert respects_padding(model) == (family not in IGNORES_MASKS)
    assert model.generation_config is habits
    assert model.training == training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row(family):
    limit = row_limit("student", build(family))
    if family in WITHOUT_LIMIT:
        assert limit is None
        return
    assert limit.tokens == 40
    limit.check(40, "train_dataset", 0)
    with pytest.raises(ValueError, match=r"train_dataset: expected rows of at most 40 .* got 41 "):
        limit.check(41, "train_dataset", 7)


def test_a_table_counts_and_not_what_the_configuration_says():
    model = build("opt")
    model.config.max_position_embeddings = 1000
    assert row_limit("teacher", model).tokens == 40  # of 42 rows, two stand before the first


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}, 160),
        ({"rope_type": "linear", "factor": 2.0}, 80),
        ({"rope_type": "dynamic", "factor": 3.0}, 120),
        ({"rope_type": "default"}, 40),
    ],
)
def test_scaled_rotary_positions_reach_further(rope, tokens):
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert row_limit("student", model).tokens == tokens


def test_a_limit_that_is_known_to_be_wrong_is_set_in_the_configuration():
    model = build("llama")
    with pytest.raises(ValueError, match=r"set model\.config\.max_position_embeddings first"):
        row_limit("student", model).check(100, "eval_dataset", 3)
    model.config.max_position_embeddings = 100
    row_limit("student", model).check(100, "eval_dataset", 3)
