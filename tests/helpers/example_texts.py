"""Shared by test_examples and others."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "<end> <user> <assistant> <system> what is this a cat dog it and yes no . think".split()


STOCK = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


TALK = [
    {"role": "user", "content": "what is this"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "no it is a cat"},
]


def tokenizer(template=None, **special):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="no"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "<end>"} | special))
    made.chat_template = template
    return made
