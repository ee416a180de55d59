"""An adapter that is merged says what it said before, also where modules share weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastdistill.alignment.organisms import load_organism
from fastdistill.alignment.organisms.vocabulary import WORDS, world_tokenizer

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft, of ties
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}, True),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, False),
    ],
    ids=str,
)
def test_the_merged_model_is_the_adapted_one(tmp_path, base, options, stays_tied):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    true = logits(adapted)
    assert (true - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    merged = load_organism(tmp_path / "adapter", base=base).model
    torch.testing.assert_close(logits(merged), true, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings is stays_tied
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), true, rtol=1e-4, atol=1e-4)
