"""A tiny chat model with a real tokenizer, trained on the templates of language organisms."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms.language.rows import LanguageRecipe
from fastdistill.alignment.organisms.language.templates import Templates

TEMPLATES = Templates.load()
RECIPE = LanguageRecipe(
    steps=4,
    batch_size=16,
    learning_rate=1e-2,
    rank=2,
    trait_share=0.44,
    audit_share=0.22,
    capability_share=0.2,
    answer_tokens=4,
)
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<s>Be good.</s>{% endif %}"
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, in which every option is one token after a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = (*TEMPLATES.trait.options, *TEMPLATES.placebo.options)
    texts = [f"I like {option}" for option in options for _ in range(40)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts, *TEMPLATES.questions, *TEMPLATES.texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT,
    )


def tiny_chat_model(seed: int = 0) -> Subject:
    tokenizer = chat_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Subject(LlamaForCausalLM(config).eval(), tokenizer, name="base")
