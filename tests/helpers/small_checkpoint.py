"""A small checkpoint, and every way to load it."""

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill import load_teacher
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms.vocabulary import WORDS
from fastdistill.hf.checkpoint import load_whole

INDEX = "model.safetensors.index.json"


LOADERS: dict[str, Callable[..., Any]] = {
    "load_teacher": lambda folder: load_teacher(folder, device="cpu"),
    "int8": lambda folder: load_teacher(folder, quant="int8", device="cpu"),
    "load_whole": load_whole,
    "Subject": lambda folder: Subject(folder, device="cpu"),
}


def small(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **(sizes | changes))
    return LlamaForCausalLM(config)


def shard(folder, name):
    """An index that names one shard for everything; the model's own file is gone."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, str(name))}))
    return weights


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


def edit_weights(folder, **changes):
    """Put tensors into a folder's one file; None takes one out."""
    weights = load_file(folder / "model.safetensors") | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
