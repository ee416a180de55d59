"""What a checkpoint stores for a tied pair is used: by both loaders, and after saving again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdistill.hf.checkpoint import load_whole
from fastdistill.quant import load_quantized, quantize_model, save_quantized
from fastdistill.quant.formats.tensor_files import CheckpointError
from helpers.small_checkpoint import edit, edit_weights, logits, small

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOADERS: dict[str, Callable[..., Any]] = {
    "whole": load_whole,
    "streamed": load_quantized,
    "int8": lambda folder: load_quantized(folder, quant="int8"),
}


def store(folder, tied, **changes):
    """A model with a head of its own, under a config that says `tied`; changes to its tensors."""
    model = small(tie_word_embeddings=False).eval()
    model.save_pretrained(folder)
    edit(folder, "config.json", tie_word_embeddings=tied)
    edit_weights(folder, **changes)
    return model


@pytest.mark.parametrize("loader", LOADERS)
def test_a_head_of_its_own_under_a_tied_config_is_used(tmp_path, loader):
    true = logits(store(tmp_path, tied=True))
    model = LOADERS[loader](tmp_path)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head, load_file(tmp_path / "model.safetensors")[HEAD])
    assert head.data_ptr() != embedding.data_ptr()
    assert (logits(model) - true).abs().max() < (0.05 if loader == "int8" else 1e-5)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as whoever resizes or saves the model does
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_it_is_used_after_it_was_saved_again(tmp_path):
    store(tmp_path / "first", tied=True)
    first = load_quantized(tmp_path / "first", quant="int8")
    save_quantized(first, tmp_path / "second")
    second = load_quantized(tmp_path / "second")
    assert torch.equal(logits(second), logits(first))
    whole = quantize_model(load_whole(tmp_path / "first"), "int8")
    save_quantized(whole, tmp_path / "third")
    assert torch.equal(logits(load_quantized(tmp_path / "third")), logits(first))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_tied_weight_is_stored_under_either_name(tmp_path, loader, name):
    other = HEAD if name == EMBEDDING else EMBEDDING
    store(tmp_path, True, **{other: None})
    stored = load_file(tmp_path / "model.safetensors")[name]
    model = LOADERS[loader](tmp_path)
    assert torch.equal(model.lm_head.weight, stored)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("loader", LOADERS)
def test_equal_tensors_under_both_names_stay_tied(tmp_path, loader):
    same = small().lm_head.weight.detach()
    store(tmp_path, True, **{EMBEDDING: same, HEAD: same.clone()})
    model = LOADERS[loader](tmp_path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.tie_word_embeddings


def test_a_tensor_of_our_own_format_without_a_place_is_refused(tmp_path):
    model = quantize_model(small().eval(), "int8")
    save_quantized(model, tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(file) | {"score.weight": torch.ones(2)}, file, metadata)
    with pytest.raises(CheckpointError, match=r"got score.weight, which it does not use"):
        load_quantized(tmp_path / "own")
