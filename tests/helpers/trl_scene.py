"""Shared by test_compat_trl and others."""

from __future__ import annotations

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i} plus {i}"},
            {"role": "assistant", "content": f"it is {2 * i}, of course " * (1 + i % 3)},
        ]
    }
    for i in range(8)
]


def model(tokenizer, seed, hidden=32, scale=1.0):
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        made.lm_head.weight.mul_(scale)
    return made


def settings(kind, folder, **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    return kind(str(folder), **(defaults | options))
