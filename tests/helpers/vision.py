"""Tiny vision models with random weights, and rows with the tensors of their processors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

VOCAB, IMAGE = 64, 60
PLACES = 4  # placeholder tokens of an image
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = ("llava", "qwen2_vl")


def build(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "llava":
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 16,
            "initializer_range": 0.3,
        }
        text = TEXT | {"model_type": "llama"}
        llava = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        return LlavaForConditionalGeneration(llava)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    qwen = Qwen2VLConfig(
        vision_config=vision | {"initializer_range": 0.3},
        text_config=TEXT | {"rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return Qwen2VLForConditionalGeneration(qwen)


def row(kind: str, seed: int, images: int, length: int = 6) -> dict[str, Any]:
    """Images after two tokens, then text whose second half is the targets."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (2 + length,), generator=g)
    image = torch.tensor([IMAGE] * PLACES + [1])
    ids = torch.cat([ids[:2], *[image] * images, ids[2:]])
    labels = ids.clone()
    labels[: -length // 2] = -100
    made = {"input_ids": ids, "labels": labels}
    if not images:
        return made
    if kind == "llava":
        return made | {"pixel_values": torch.randn(images, 3, 8, 8, generator=g)}
    grid = torch.tensor([[1, 4, 4]] * images)
    return made | {
        "pixel_values": torch.randn(images * 16, 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def rows(kind: str) -> list[dict[str, Any]]:
    """A row with one image, one with two, and one with text alone."""
    return [row(kind, 0, 1), row(kind, 1, 2, 9), row(kind, 2, 0), row(kind, 3, 1, 7)]


def own_logits(model: Any, example: dict[str, Any]) -> Any:  # (T, V)
    """Return the logits of the model's own forward pass for one row."""
    inputs = {name: value for name, value in example.items() if name != "labels"}
    for name in ("input_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][None]
    return model(**inputs).logits[0]
